"""Common parts of rules that estimate gradients from noise: which values are perturbed, and the noise itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from graphrewrite.passes.rules._feedback_weights import same_on_all_ranks
from torch import fx

from graphrewrite import random
from graphrewrite.errors import RuleError
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import (
    REPLAY,
    NodeInfo,
    Param,
    Role,
    ancestors,
    flat_inputs,
    hint,
    info,
    is_backward,
    is_float,
    outputs_of,
    producer,
    same_size,
    spec_of,
    value,
)
from graphrewrite.graph.ops import (
    ACTIVATIONS,
    ATTENTIONS,
    CONVOLUTIONS,
    EMBEDDINGS,
    NORMALISATIONS,
    POOLS,
    is_pointwise,
)

aten = torch.ops.aten

PerSample = Literal["auto", "always", "never"]
Distribution = Literal["normal", "signs"]


@dataclass(frozen=True)
class Noise:
    """One draw of independent noise with mean 0 and variance 1, the same wherever it is computed in a step.

    Attributes:
        stream: Random stream.
        distribution: `"normal"`, or `"signs"`: -1 and 1.
        per_rank: Whether the replicas of a model draw their own.
    """

    stream: int
    distribution: Distribution = "normal"
    per_rank: bool = True

    def like(self, counter: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        """In the shape and dtype of a tensor, whose values are not read."""
        if not self.per_rank:
            counter = same_on_all_ranks(counter)
        kind = "normal" if self.distribution == "normal" else "sign"
        return random.direction(counter, self.stream, tensor.shape, None, kind, tensor.dtype)


def trained_leaves(graph: JointGraph) -> list[fx.Node]:
    """The parameters that the running rule trains: those whose first reader is in one of its blocks."""
    own = {block.name for block in graph.rule_blocks()}
    table = graph.table
    return [n for n in graph.leaves if isinstance(spec_of(n), Param) and n.users and table.block_of(n) in own]


def perturbed_values(graph: JointGraph) -> list[fx.Node]:
    """The results of operators that read a parameter, in the running rule's blocks: pre-activations, most of them.

    What is computed from parameters alone (a normalised weight) is none: the operator that applies it to an
    activation is.
    """
    own = {block.name for block in graph.rule_blocks()}
    table = graph.table
    found = []
    for op in graph.forward_nodes():
        if info(op).copy or info(op).role is not Role.FORWARD or info(op).block not in own or producer(op) is not op:
            continue
        if not any(table.requires_grad(n) and table.is_weightlike(n) for n in flat_inputs(op)):
            continue
        if table.is_weightlike(op) or not table.requires_grad(op):
            continue
        tape = table.tape(op)
        assert tape is not None
        found += [n for i, n in outputs_of(op).items() if i in tape.requires_grad() and is_float(n) and n.users]
    if not found:
        raise RuleError("no operator of these blocks reads a parameter: there is nothing to perturb")
    return found


def replayed(graph: JointGraph) -> None:
    """Let the backward run the forward of the rule's blocks again, noise and all, instead of saving their inputs."""
    own = {block.name for block in graph.rule_blocks()}
    for node in graph.forward_nodes():
        held = info(node)
        if held.block in own and held.role is Role.FORWARD and not held.region:
            node.meta["gr"] = held.but(region=REPLAY)


def readers(node: fx.Node) -> list[fx.Node]:
    """The forward operators that read a value, the loss included."""
    return [
        u
        for u in node.users
        if u.op == "call_function" and not is_backward(u) and info(u).role in (Role.FORWARD, Role.LOSS)
    ]


def spread(per_sample: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """One number per sample (or one for all), so that it multiplies a tensor whose first dimension is the batch."""
    if per_sample.dim() == 0:
        return per_sample.to(like.dtype)
    return per_sample.to(like.dtype).reshape([per_sample.shape[0]] + [1] * (like.dim() - 1))


# --- do samples meet? ----------------------------------------------------------------------------------------------

Excuse = tuple[fx.Node, str]


def where_samples_meet(graph: JointGraph, answer: fx.Node, perturbed: Sequence[fx.Node]) -> Excuse | None:
    """The first operator between perturbed values and the answer that may mix samples; None if there is none.

    Each sample is a position of dimension 0. Operators that are not known to keep samples apart count as mixing.
    """
    batch = value(answer).shape[0] if value(answer).dim() else None
    reached: set[fx.Node] = set()
    for node in perturbed:
        if not _keeps_batch(node, batch):
            return node, f"dimension 0 of {_shape(node)} is not the batch"
        reached.add(node)
    before = ancestors([answer])
    for op in graph.forward_nodes():
        if op not in before or not any(n in reached for n in op.all_input_nodes):
            continue
        if not graph.table.requires_grad(op) or isinstance(value(op), torch.SymInt):
            continue
        known = producer(op) is not op or _apart(op, reached)
        if not known or (isinstance(value(op), torch.Tensor) and not _keeps_batch(op, batch)):
            return op, f"{op.target} may mix samples"
        reached.add(op)
    return None


def _keeps_batch(node: fx.Node, batch: Any) -> bool:
    val = value(node)
    return isinstance(val, torch.Tensor) and val.dim() > 0 and same_size(val.shape[0], batch)


def _shape(node: fx.Node) -> str:
    return f"{node.name} ({', '.join(map(str, value(node).shape))})"


_KEEPING = (
    ACTIVATIONS
    | ATTENTIONS
    | CONVOLUTIONS
    | EMBEDDINGS
    | POOLS
    | {
        aten.linear.default,
        aten.layer_norm.default,
        aten.native_layer_norm.default,
        aten.rms_norm.default,
        aten.group_norm.default,
        aten.constant_pad_nd.default,
        aten.reshape.default,
        aten.view.default,
        aten._unsafe_view.default,
        aten.flatten.using_ints,
        aten.clone.default,
        aten.contiguous.default,
        aten._to_copy.default,
        aten.expand.default,
        aten.alias.default,
    }
)
_ALONG: dict[object, int] = {
    aten.softmax.int: 1,
    aten._softmax.default: 1,
    aten.log_softmax.int: 1,
    aten.slice.Tensor: 1,
    aten.select.int: 1,
    aten.unsqueeze.default: 1,
    aten.split.Tensor: 2,
    aten.split_with_sizes.default: 2,
    aten.chunk.default: 2,
    aten.unbind.int: 1,
    aten.cat.default: 1,
    aten.stack.default: 1,
    aten.cumsum.default: 1,
}
"""Operators along one dimension, and which argument names it (0 by default)."""
_OVER = {aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.var.correction, aten.permute.default}


def _apart(op: fx.Node, reached: set[fx.Node]) -> bool:
    """Whether an operator is known to keep samples apart; its shape is looked at elsewhere."""
    inputs = [n for n in flat_inputs(op) if isinstance(value(n), torch.Tensor)]
    dims: int = max(value(n).dim() for n in inputs)
    args: tuple[Any, ...] = op.args
    if op.target in NORMALISATIONS and op.target not in _KEEPING:
        return False
    if op.target in CONVOLUTIONS:
        return inputs[0] in reached and inputs[1] not in reached
    if op.target in _KEEPING:
        return True
    if op.target in (aten.matmul.default, aten.bmm.default):
        return dims > 2 and all(n not in reached or value(n).dim() == dims for n in inputs)
    if op.target in _ALONG:
        at = _ALONG[op.target]
        dim = op.kwargs.get("dim", args[at] if len(args) > at else 0)
        return isinstance(dim, int) and dim % dims != 0
    if op.target is aten.transpose.int:
        return all(int(d) % dims != 0 for d in args[1:3])
    if op.target in _OVER:
        over = args[1] if len(args) > 1 else None
        if not isinstance(over, (list, tuple)):
            return False
        if op.target is aten.permute.default:
            return int(over[0]) % dims == 0
        return all(int(d) % dims != 0 for d in over)
    # element by element: a smaller operand is spread over samples, never over dimension 0 of another one
    alike = is_pointwise(op) or op.target is aten.broadcast_tensors.default
    return alike and all(n not in reached or value(n).dim() == dims for n in inputs)


def size_of(nodes: Sequence[fx.Node], *, per_sample: bool = False) -> int:
    """How many numbers some values have at the example's sizes, all together or per sample."""
    total = 0
    for node in nodes:
        shape = value(node).shape[1:] if per_sample else value(node).shape
        count = 1
        for size in shape:
            count *= hint(size)
        total += count
    return total


def noise_node(graph: JointGraph, noise: Noise, counter: fx.Node, of: fx.Node) -> fx.Node:
    """The noise as a tangent of a value, in the forward."""
    block = graph.table.block_of(of)
    like = NodeInfo(role=Role.TANGENT, block=block, module=info(of).module or block)
    make: Callable[..., torch.Tensor] = noise.like
    made: fx.Node = graph.splice(make, [counter, of], like=like, whole=False)
    return made
