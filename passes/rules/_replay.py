"""Running part of the forward again inside a function that a verb traces: with other weights, on other activations.

Rules that compare several passes, or let activations settle, need passes that differ in what they change and in
nothing else. Batch-norm normalises every pass by that pass's own statistics; the running ones are those of the first
pass. Random numbers that depend on no activation (dropout's mask, added noise) are drawn once per step, by torch's own
generator as ever, and all passes read them. Random operators that read activations are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from graphrewrite.errors import RuleError
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.loop import labelled
from graphrewrite.graph.nodes import (
    Loss,
    LossTerm,
    Role,
    UserInput,
    flat_inputs,
    info,
    is_backward,
    is_float,
    value,
)
from graphrewrite.graph.ops import ATTENTIONS, call_operator, is_random

aten = torch.ops.aten
Given = torch.Tensor | Callable[[], torch.Tensor]

_EMPTY = frozenset(
    {
        aten.empty_like.default,
        aten.new_empty.default,
        aten.zeros_like.default,
        aten.new_zeros.default,
        aten.ones_like.default,
        aten.new_ones.default,
    }
)


def task_loss(graph: JointGraph) -> fx.Node:
    """The task loss, whatever else is in the sum of losses."""
    outputs = graph.outputs
    return outputs.get(LossTerm("task")) or outputs.get(Loss()) or graph.loss_node()


def _is_shared(node: fx.Node) -> bool:
    """A draw whose numbers depend on no activation: it reads shapes alone. That is what dropout's mask is."""
    if not is_random(node) or node.target in ATTENTIONS:
        return False
    if getattr(getattr(node.target, "overloadpacket", None), "__name__", "").endswith("_like"):
        return True
    return all(source.target in _EMPTY or not is_float(source) for source in flat_inputs(node))


def refuse_empty_batch(graph: JointGraph, rule: str) -> None:
    """A mean over no samples is no number: a gradient made of losses would put it into every weight."""
    for spec, node in graph.inputs.items():
        held = value(node)
        # where the size is a symbol, the comparison leaves a guard: an empty batch is captured anew, and meets this
        if isinstance(spec, UserInput) and isinstance(held, torch.Tensor) and held.dim() and held.shape[0] == 0:
            raise RuleError(
                f"{rule} makes gradients of losses, and the batch is empty: its loss is no number",
                node=node.name,
                remedy="skip empty batches (drop_last=True)",
            )


class Replay:
    """Part of the forward as a function of some of its values.

    What the outputs need is split in two: values that depend on a varying one are computed again, the others are
    `inputs`, computed once by the pass that is there: the common prefix of several passes is reused. An output may
    itself vary: it is computed, and what reads it reads what is given.

    Attributes:
        outputs: The values to compute.
        inputs: What it reads of the graph around it, beside the varying values.
        nodes: The operators it runs, in order.
    """

    def __init__(self, graph: JointGraph, outputs: Sequence[fx.Node], varying: Iterable[fx.Node], rule: str) -> None:
        self.outputs = list(outputs)
        given = set(varying)
        forward = graph.forward_nodes()
        moving = set(given)
        for node in forward:
            if not _is_shared(node) and any(source in moving for source in node.all_input_nodes):
                moving.add(node)
        needed: set[fx.Node] = set()
        inputs: set[fx.Node] = set()
        stack = list(self.outputs)
        while stack:
            node = stack.pop()
            if node in needed or node in inputs:
                continue
            if node.op == "placeholder" or (node not in moving and isinstance(value(node), torch.Tensor)):
                inputs.add(node)
                continue
            if is_random(node):
                raise RuleError(
                    f"{rule} runs this part of the model several times, and {node.target} would draw other numbers "
                    "each time",
                    node=node.name,
                    module=info(node).module,
                    source=info(node).source,
                    remedy="use nn.Dropout, whose mask all passes share, or switch this operator off",
                )
            needed.add(node)
            stack += [source for source in node.all_input_nodes if source not in given]
        self.nodes = [node for node in forward if node in needed]
        self.reads = {source for node in self.nodes for source in node.all_input_nodes if source in given}
        """The varying values that it reads in fact."""
        rank = {node: i for i, node in enumerate(graph.nodes)}
        self.inputs = sorted(inputs, key=rank.__getitem__)

    def __call__(
        self,
        given: Mapping[fx.Node, Given],
        inputs: Sequence[torch.Tensor],
        *,
        copy: str,
        role: Role | None = None,
    ) -> list[torch.Tensor]:
        """Run it.

        Args:
            given: The varying values; a function makes one where it is first read.
            inputs: Values of `inputs`.
            copy: Label of the pass.
            role: Role of its operators; None: their own.
        """
        fixed = dict(zip(self.inputs, inputs, strict=True))
        env: dict[fx.Node, Any] = {**fixed, **given}

        def read(node: fx.Node) -> Any:
            held = env[node]
            if callable(held) and not isinstance(held, torch.Tensor):
                held = env[node] = held()
            return held

        done: dict[fx.Node, Any] = dict(fixed)
        for node in self.nodes:
            done[node] = run_node(node, read, copy=copy, role=role)
            env.setdefault(node, done[node])
        return [done[node] for node in self.outputs]


def run_node(node: fx.Node, read: Callable[[fx.Node], Any], *, copy: str, role: Role | None = None) -> Any:
    """Run one operator of the forward again, labelled as what it is in another pass."""
    own = info(node)
    like = own.but(role=role or own.role, mirrors=None, cotangent_of=None, copy=copy, region="", stage="")
    with labelled(like):
        args, kwargs = fx.map_arg((node.args, node.kwargs), read)
        return call_operator(node.target, args, kwargs)  # type: ignore[arg-type]


def trained_leaves(graph: JointGraph) -> list[fx.Node]:
    """The parameters and learned state that require grad, are read, and belong to the running rule's blocks."""
    wanted = {block.name for block in graph.rule_blocks()}
    found = []
    for leaf in graph.leaves:
        readers = [u for u in leaf.users if u.op == "call_function" and not is_backward(u)]
        if readers and graph.table.block_of(leaf) in wanted and graph.table.is_weightlike(leaf):
            found.append(leaf)
    return found
