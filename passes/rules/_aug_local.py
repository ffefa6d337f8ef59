"""AugLocal: the auxiliary network of a block is a copy of later blocks of the model itself, with fresh weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from graphrewrite.passes.rules._boundary import is_map
from graphrewrite.passes.rules._heads import Fill, ones, uniform, zeros
from graphrewrite.passes.rules._local_heads import Pred
from graphrewrite.passes.rules._site import average_pool
from torch import fx
from torch.nn import functional as F

from graphrewrite.errors import RuleError
from graphrewrite.graph.core import Block
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import (
    Buffer,
    BufferUpdate,
    NodeInfo,
    Param,
    Role,
    ancestors,
    fix,
    info,
    is_float,
    same_shape,
    same_size,
    spec_of,
    value,
)
from graphrewrite.rule import Rule


@dataclass(frozen=True)
class AugLocal(Pred):
    """Copies of `d_l` evenly spaced later blocks, then a linear map, judged by the compile's loss.

    d_l = max(1, round(d (1 - t l/(L-2)) + t l/(L-2))) falls from d for the first of L blocks to the last hidden one: a
    pyramid. Copies have weights of their own, drawn anew (matrices uniform in 1/sqrt(fan-in), scales one, shifts zero),
    and running statistics of their own. Where a copy's input is of another width than what it is to read, a linear map
    (a 1x1 convolution and average-pooling, for maps) stands in front of it. Blocks with several inputs or outputs are
    not copied.

    Args:
        depth: d.
        taper: t.
        start: As for `pred`; N(0, 2/n) here.
    """

    start: Literal["zero", "normal"] = "normal"
    depth: int = 2
    taper: float = 0.5

    def read(self, graph: JointGraph, rule: Rule, name: str, boundary: fx.Node, hidden: Sequence[Block]) -> fx.Node:
        """Put the copies behind the boundary."""
        if self.depth < 1:
            raise RuleError(f"aug_local{{depth={self.depth}}} copies nothing", remedy="use depth >= 1, or head=pred")
        own = info(boundary).block
        place = next(i for i, block in enumerate(hidden) if block.name == own)
        later = [part for block in hidden[place + 1 :] if (part := _Part.of(graph, block.name)) is not None]
        wanted = pyramid(place, len(hidden) + 1, self.depth, self.taper)
        tail = boundary
        for number, part in enumerate(evenly(later, wanted)):
            prefix = rule.state_name(f"head.{name}.aux{number}")
            entry = _adapted(graph, tail, part.entry, own, prefix)
            if entry is None:
                graph.log.add(rule.name, boundary.name, f"block {part.block} does not fit behind {tail.name}")
                continue
            tail = part.copy(graph, entry, own, prefix)
        return tail


def pyramid(place: int, blocks: int, depth: int, taper: float) -> int:
    """How many blocks the auxiliary network of block `place` (from 0) of `blocks` copies."""
    share = taper * place / (blocks - 2) if blocks > 2 else 0.0
    return max(1, round(depth * (1 - share) + share))


def evenly(later: Sequence[_Part], count: int) -> list[_Part]:
    """`count` of them, evenly spaced, the last one included; all, if there are fewer."""
    if count >= len(later):
        return list(later)
    return [later[-(-(i + 1) * len(later) // count) - 1] for i in range(count)]


@dataclass(frozen=True)
class _Part:
    """A block that can be copied: one activation comes in, one goes out."""

    block: str
    entry: fx.Node
    exit: fx.Node
    nodes: tuple[fx.Node, ...]

    @staticmethod
    def of(graph: JointGraph, block: str) -> _Part | None:
        """The block, if it can be copied."""
        exits = graph.boundaries(block)
        backward = graph.backward
        assert backward is not None
        if len(exits) != 1:
            return None
        inside = {n for n in graph.forward_nodes() if info(n).block == block and info(n).role is Role.FORWARD}
        needed, stack = {exits[0]}, [exits[0]]
        entries: dict[fx.Node, None] = {}
        while stack:
            for source in stack.pop().all_input_nodes:
                if source in inside:
                    if source not in needed:
                        needed.add(source)
                        stack.append(source)
                elif source.op == "call_function" and is_float(source) and backward.requires_grad(source):
                    entries[source] = None
        if len(entries) != 1 or backward.is_weightlike(next(iter(entries))):
            return None
        order = tuple(n for n in graph.forward_nodes() if n in needed)
        return _Part(block, next(iter(entries)), exits[0], order)

    def copy(self, graph: JointGraph, entry: fx.Node, block: str, prefix: str) -> fx.Node:
        """The block's operators once more, on another input, for another block, with fresh weights."""
        mapping: dict[fx.Node, fx.Node] = {self.entry: entry}
        statistics: dict[fx.Node, str] = {}
        for node in self.nodes:
            for source in node.all_input_nodes:
                if source not in mapping and source.op == "placeholder":
                    mapping[source] = self._fresh(graph, source, prefix, statistics)
        updates = {spec.name: node for spec, node in graph.outputs.items() if isinstance(spec, BufferUpdate)}
        order = [*self._constants(graph, block), *self.nodes]
        inside = set(order)
        for node in updates.values():
            mine = node.op == "call_function" and info(node).block == self.block and node not in inside
            if mine and all(source in inside or source in mapping for source in node.all_input_nodes):
                order.append(node)
        for node in order:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: mapping.get(n, n))
            like = info(node).but(role=Role.LOSS, block=block, mirrors=None, region="")
            mapping[node] = graph.emit(node.target, args, kwargs, like=like, name=f"{node.name}_aux")  # type: ignore[arg-type]
        for buffer, name in statistics.items():
            spec = spec_of(buffer)
            assert isinstance(spec, Buffer)
            new = updates.get(spec.name)
            if new is not None and new in mapping:
                graph.update_state(name, lambda _old, new: new, [mapping[new]])
        return mapping[self.exit]

    def _constants(self, graph: JointGraph, block: str) -> list[fx.Node]:
        """What the block reads that hangs on no activation (a causal mask), computed behind `block`: copied, too."""
        backward = graph.backward
        assert backward is not None
        position = {one.name: i for i, one in enumerate(graph.blocks)}
        inside = set(self.nodes)
        found: set[fx.Node] = set()
        for source in {s for node in self.nodes for s in node.all_input_nodes} - inside - {self.entry}:
            computed = {n for n in ancestors([source]) if n.op == "call_function"}
            if not any(map(backward.requires_grad, computed)):
                behind = {n for n in computed if position.get(info(n).block, -1) > position.get(block, -1)}
                found |= {n for n in behind if isinstance(value(n), torch.Tensor)}
        return [n for n in graph.forward_nodes() if n in found]

    @staticmethod
    def _fresh(graph: JointGraph, source: fx.Node, prefix: str, statistics: dict[fx.Node, str]) -> fx.Node:
        """State in the place of a parameter or of a running statistic; other inputs are read as they are."""
        spec, val = spec_of(source), value(source)
        running = isinstance(spec, Buffer) and spec.name.rpartition(".")[2] in ("running_mean", "running_var")
        if not isinstance(spec, Param) and not running:
            return source
        assert isinstance(spec, (Param, Buffer))
        name = f"{prefix}.{spec.name.replace('.', '_')}"
        fill: Fill = _fill(spec.name, val) if isinstance(spec, Param) else _statistic(spec.name)
        node = graph.add_state(
            name, tuple(map(fix, val.shape)), fill, trainable=isinstance(spec, Param) and source in graph.leaves,
            dtype=val.dtype,
        )  # fmt: skip
        if running:
            statistics[source] = name
        return node


def _fill(name: str, val: torch.Tensor) -> Fill:
    if val.dim() > 1:
        return uniform(1.0 / math.sqrt(math.prod(map(fix, val.shape[1:]))))
    return zeros if name.rpartition(".")[2] in ("bias", "beta", "shift") else ones


def _statistic(name: str) -> Fill:
    return zeros if name.endswith("mean") else ones


def _adapted(graph: JointGraph, tail: fx.Node, entry: fx.Node, block: str, prefix: str) -> fx.Node | None:
    """`tail` in the shape of `entry`: itself, or behind a linear map; None if the two do not compare."""
    have, want = value(tail), value(entry)
    if same_shape(have.shape, want.shape) and have.dtype == want.dtype:
        return tail
    if have.dim() != want.dim() or have.dim() < 2 or have.dtype != want.dtype:
        return None
    channels = have.dim() > 2 and is_map(entry) and is_map(tail)
    axis = 1 if channels else have.dim() - 1
    others = [i for i in range(have.dim()) if i != axis and not (channels and i > 1)]
    if any(not same_size(have.shape[i], want.shape[i]) for i in others):
        return None
    outputs, inputs = fix(want.shape[axis]), fix(have.shape[axis])
    size = tuple(map(fix, want.shape[2:])) if channels else ()
    like = NodeInfo(role=Role.LOSS, block=block, module=f"head.{block}")
    if channels:
        tail = graph.splice(lambda h: average_pool(h, size), [tail], like=like)
    if outputs == inputs:
        return tail
    shape = (outputs, inputs, *(1 for _ in size))
    weight = graph.add_state(
        f"{prefix}.adapter", shape, uniform(1.0 / math.sqrt(inputs)), trainable=True, dtype=have.dtype
    )

    def adapt(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(h.movedim(1, -1), weight.flatten(1)).movedim(-1, 1) if channels else F.linear(h, weight)

    adapted: fx.Node = graph.splice(adapt, [tail, weight], like=like)
    return adapted
