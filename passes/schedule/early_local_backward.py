"""Run the backward of local losses in the forward, right behind their block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from graphrewrite.errors import RuleError
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import (
    LOSS_BLOCK,
    Loss,
    NodeInfo,
    Role,
    Tangent,
    info,
    is_backward,
    is_getitem,
    spec_of,
    value,
)
from graphrewrite.pipeline import Pass, PassResult


@dataclass(frozen=True)
class EarlyLocalBackward(Pass):
    """Compute gradients that need nothing of the task loss in the forward, and scale them in the backward.

    The derivative of the loss is linear in the loss's cotangent t. Where a gradient depends on t but on nothing of
    the task loss, t is replaced by 1, the computation moves to the forward stage, and the result is multiplied by t
    where it leaves. The block's activations then die right behind it: only gradients are carried.

    Under fp16 the replaced cotangent is a power of two, removed again in the gradient's own dtype: a `GradScaler`
    cannot reach what is computed before it.

    Args:
        fp16_scale: The power of two.
    """

    fp16_scale: float = 4096.0

    name = "early_local_backward"
    level = "aten"
    preserves_numerics = False
    summary = "run the backward of local losses in the forward, right behind their block"

    def requires(self, graph: JointGraph) -> None:
        """The scale must be a power of two, else it would round."""
        mantissa, _ = torch.frexp(torch.tensor(self.fp16_scale))
        if self.fp16_scale <= 0 or mantissa.item() != 0.5:
            raise RuleError(f"fp16_scale={self.fp16_scale} is no power of two")

    def run(self, graph: JointGraph) -> PassResult:
        """Find the region, replace its cotangent, scale what leaves it."""
        tangent = graph.inputs.get(Tangent(Loss()))
        if tangent is None:
            self.fail(graph, "the backward starts from no loss in this graph")
            return PassResult(graph, False)
        region = self._region(graph, tangent)
        if not region:
            self.fail(graph, "every gradient depends on the task loss")
            return PassResult(graph, False)
        for of, node in graph.grads().items():
            if node not in region and not (is_getitem(node) and node.args[0] in region):
                self.fail(graph, f"the gradient of {of} depends on the task loss, which comes last", node)
        scale = self.fp16_scale if any(_is_half(n) for n in region) else 1.0
        self._replace_cotangent(graph, tangent, region, scale)
        for node in (*region, *self._helpers(graph, region)):
            node.meta["gr"] = info(node).but(stage="forward")
        self._scale_exits(graph, tangent, region, scale)
        graph.sort()
        graph.prune()
        return PassResult(graph, True)

    @staticmethod
    def _region(graph: JointGraph, tangent: fx.Node) -> dict[fx.Node, None]:
        """Nodes that depend on the loss's cotangent, and on neither another cotangent nor the task loss."""
        region: dict[fx.Node, None] = {}
        depends: set[fx.Node] = {tangent}
        barred: set[fx.Node] = set()
        for node in graph.nodes:
            if node.op == "placeholder":
                if isinstance(spec_of(node), Tangent) and node is not tangent:
                    barred.add(node)
                continue
            if node.op != "call_function" or isinstance(value(node), torch.SymInt):
                continue  # a size carries no information about the loss
            if info(node).block == LOSS_BLOCK or any(s in barred for s in node.all_input_nodes):
                barred.add(node)
            elif is_backward(node) and any(s in depends for s in node.all_input_nodes):
                depends.add(node)
                region[node] = None
        return region

    @staticmethod
    def _helpers(graph: JointGraph, region: dict[fx.Node, None]) -> list[fx.Node]:
        """Backward nodes that read activations only (a power, a mask) and serve the region."""
        helpers: dict[fx.Node, None] = {}
        for node in reversed(list(graph.nodes)):
            if is_backward(node) and node not in region and any(u in region or u in helpers for u in node.users):
                helpers[node] = None
        return list(helpers)

    @staticmethod
    def _replace_cotangent(graph: JointGraph, tangent: fx.Node, region: dict[fx.Node, None], scale: float) -> None:
        # one constant per reader, so that each belongs to its block and nothing ties the blocks together
        for reader in [u for u in tangent.users if u in region]:
            like = info(reader).but(stage="forward", cotangent_of=None)
            val = value(tangent)
            one = graph.emit(
                torch.ops.aten.full.default, ([], scale), {"dtype": val.dtype, "device": val.device}, like=like
            )
            reader.replace_input_with(tangent, one)

    @staticmethod
    def _scale_exits(graph: JointGraph, tangent: fx.Node, region: dict[fx.Node, None], scale: float) -> None:
        output = graph.output_node
        factor = tangent
        if scale != 1.0:
            like = NodeInfo(role=Role.GRADIENT, block=LOSS_BLOCK)
            factor = graph.emit(torch.ops.aten._to_copy.default, (tangent,), {"dtype": torch.float32}, like=like)
            factor = graph.emit(torch.ops.aten.mul.Tensor, (factor, 1.0 / scale), like=like)
        for node in region:
            leaving = [u for u in node.users if u is output or u not in region]
            if not leaving:
                continue
            like = info(node).but(stage="", scales=True)
            scaled = graph.emit(
                torch.ops.aten.mul.Tensor, (node, factor), like=like, name=f"{node.name}_scaled", val=_same(graph, node)
            )
            for user in leaving:
                user.replace_input_with(node, scaled)


def _same(graph: JointGraph, node: fx.Node) -> torch.Tensor:
    return graph.fresh_fake(value(node))


def _is_half(node: fx.Node) -> bool:
    val = value(node)
    return isinstance(val, torch.Tensor) and val.dtype == torch.float16
