"""Properties of a rewritten graph, proved by reachability on the graph itself.

For every block, from the gradients of its parameters backwards:

* **weight transport**: does a cotangent that came through another block read a forward weight of it?
* **backward locking**: does the block wait for the backward of a block behind it?
* **update locking**: does the block's update wait for the forward of a block behind it?
* **locality radius**: how many blocks behind it enter the block's gradient at all, by parameters or activations?
* **global error**: does the gradient depend on the task loss?
* **backward depth**: how many blocks' products must run one after another in the backward before the gradient is there?

What a loop's result depends on is found inside of its body: the walk goes through the operators of one step, from a
piece of state to that of the step before and to the initial one. With few steps that is an upper bound.

Each finding comes with the chain of nodes that proves or breaks it. Nothing is declared by rules.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import networkx as nx
import torch
from torch import fx

from graphrewrite.analysis.cost import flops
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.loop import LoopCall, is_loop
from graphrewrite.graph.nodes import (
    LOSS_BLOCK,
    Grad,
    Loss,
    NodeInfo,
    Param,
    Role,
    State,
    Tangent,
    info,
    is_backward,
    is_getitem,
    spec_of,
    value,
)
from graphrewrite.graph.partition import Partition
from graphrewrite.graph.text import Names, operator_name

_SUMS = {torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor}
_SIGNS = {torch.ops.aten.sign.default, torch.ops.aten.sgn.default}


@dataclass(frozen=True)
class Finding:
    """A property of one block.

    Attributes:
        holds: Whether it has the property.
        path: The chain of nodes from the block's gradient back to what shows it; empty if it does not hold.
    """

    holds: bool
    path: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.holds

    def __str__(self) -> str:
        return "yes" if self.holds else "no"


NO = Finding(False)


@dataclass(frozen=True)
class BlockCertificate:
    """What was proved about one block. See the module docstring."""

    block: str
    rule: str
    weight_transport: Finding
    backward_locked: Finding
    update_locked: Finding
    locality_radius: int
    global_error: Finding
    backward_depth: int = 1
    """Blocks, itself included, whose products, convolutions and attentions wait for each other in the backward."""
    affine_reads: tuple[str, ...] = ()
    """Element-wise parameters of other blocks that a cotangent read; no weight transport."""
    sign_reads: tuple[str, ...] = ()
    """Weights of other blocks of which only the sign was read."""
    local_reads: tuple[str, ...] = ()
    """Weights of the block itself that its own backward read."""


@dataclass(frozen=True)
class Certificates:
    """The certificate of a graph: one entry per block that learns.

    Attributes:
        blocks: In topological order.
        forward_passes: How often the model's forward runs in one step.
        saved_bytes: Bytes saved between forward and backward, by block, gradients computed early included.
    """

    blocks: tuple[BlockCertificate, ...]
    forward_passes: int
    saved_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def weight_transport(self) -> bool:
        """Whether any block has it."""
        return any(b.weight_transport for b in self.blocks)

    @property
    def backward_locked(self) -> bool:
        """Whether any block is."""
        return any(b.backward_locked for b in self.blocks)

    @property
    def update_locked(self) -> bool:
        """Whether any block is."""
        return any(b.update_locked for b in self.blocks)

    @property
    def global_error(self) -> bool:
        """Whether a block in front of the last one needs the task loss."""
        return any(b.global_error for b in self.blocks[:-1])

    @property
    def locality_radius(self) -> int:
        """The largest of all blocks."""
        return max((b.locality_radius for b in self.blocks), default=0)

    @property
    def backward_depth(self) -> int:
        """The largest of all blocks: with parallel blocks, the backward takes as long as this many of them."""
        return max((b.backward_depth for b in self.blocks), default=0)

    def __getitem__(self, block: str) -> BlockCertificate:
        for one in self.blocks:
            if one.block == block:
                return one
        raise KeyError(block)

    def __str__(self) -> str:
        head = ("block", "rule", "weight transport", "backward locked", "update locked", "radius", "global error")
        rows = [
            (
                b.block,
                b.rule,
                str(b.weight_transport),
                str(b.backward_locked),
                str(b.update_locked),
                str(b.locality_radius),
                str(b.global_error),
            )
            for b in self.blocks
        ]
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
        ]
        depth = f"blocks one after another in the backward: {self.backward_depth} of {len(self.blocks)}"
        return "\n".join([*lines, depth, f"forward passes: {self.forward_passes}"])


def certify(part: Partition) -> Certificates:
    """Prove the properties of every block of a partitioned graph that learns."""
    graph = part.graph
    prover = _Prover(graph)
    found = [prover.certificate(block.name) for block in graph.blocks]
    saved: dict[str, int] = {block.name: 0 for block in graph.blocks}
    for one in part.saved:
        name = info(one.node).block
        saved[name] = saved.get(name, 0) + one.nbytes
    return Certificates(tuple(c for c in found if c is not None), prover.forward_passes(), saved)


class _Prover:
    def __init__(self, graph: JointGraph) -> None:
        self.graph = graph
        self.names = Names(graph)
        self.rules = {block.name: block.rule for block in graph.blocks}
        self.loops = _Loops(graph)
        self._weights = self._weight_params()
        self._params_only = self._parameter_values()
        flow = nx.DiGraph()
        flow.add_nodes_from(self.rules)
        inner = [n for n in self.loops.nodes if info(n).role is Role.FORWARD]
        for node in (*graph.forward_nodes(), *inner):
            if info(node).role is Role.LOSS:
                continue  # what a local loss reads of other blocks is no flow of the model
            for source in self.loops.sources(node):
                if source.op != "call_function" or not _tensor(source) or source in self._params_only:
                    continue
                # of what a loop computes, only what belongs to a block
                if info(source).block in self.rules or source in node.all_input_nodes:
                    flow.add_edge(info(source).block, info(node).block)
        self._behind: dict[str, set[str]] = {
            name: (nx.descendants(flow, name) if name in flow else set()) - {name, LOSS_BLOCK} for name in self.rules
        }
        self._terms = self._gradient_terms()
        self._chains = self._block_chains()

    # --- facts -----------------------------------------------------------------------------------------------------

    def _weight_params(self) -> set[str]:
        """Parameters that are matrices, kernels or tables; the others are element-wise."""
        return {
            spec.name for spec, node in self.graph.inputs.items() if isinstance(spec, Param) and value(node).dim() > 1
        }

    def _parameter_values(self) -> dict[fx.Node, str]:
        """Values computed from one parameter alone in the forward (a transpose, a cast) -> its name."""
        found: dict[fx.Node, str] = {}
        for node in self.graph.nodes:
            spec = spec_of(node) if node.op == "placeholder" else None
            if isinstance(spec, Param):
                found[node] = spec.name
            elif node.op == "call_function" and not is_backward(node):
                sources = [s for s in node.all_input_nodes if _tensor(s)]
                if sources and all(s in found for s in sources):
                    found[node] = found[sources[0]]
        for node, given in self.loops.inputs.items():
            if given in found:
                found[node] = found[given]
        for node in self.loops.nodes:
            sources = [s for s in node.all_input_nodes if _tensor(s)]
            known = [s for s in sources if s in found]
            # a weight that was moved is that weight still
            moved = node.target in _SUMS and any(value(s).shape == value(node).shape for s in known)
            if known and (moved or (not is_backward(node) and len(known) == len(sources))):
                found[node] = found[known[0]]
        return found

    def _gradient_terms(self) -> dict[str, list[fx.Node]]:
        """Block -> the gradients computed in it. The gradient of a tied parameter is a sum over blocks."""
        terms: dict[str, list[fx.Node]] = {}
        for spec, node in self.graph.outputs.items():
            if not isinstance(spec, Grad) or not isinstance(spec.of, (Param, State)):
                continue
            stack = [node]
            while stack:
                term = stack.pop()
                own = info(term)
                if own.role is Role.ACCUMULATE and own.scales is False and _sums_gradients(term):
                    stack += [s for s in term.all_input_nodes if is_backward(s)]
                else:
                    terms.setdefault(own.block, []).append(term)
        return terms

    def _block_chains(self) -> dict[fx.Node, dict[str, int]]:
        """Node -> block -> the longest chain of blocks with backward products that ends in it, on the way there."""
        found: dict[fx.Node, dict[str, int]] = {}
        for node in self.graph.nodes:
            if node.op != "call_function":
                continue
            longest: dict[str, int] = {}
            for source in node.all_input_nodes:
                for block, length in found.get(source, {}).items():
                    longest[block] = max(longest.get(block, 0), length)
            own = info(node).block
            if is_loop(node):
                # the blocks of a body work side by side, its steps one after another
                call = LoopCall.of(node)
                before = max(longest.values(), default=0)
                working = {info(n).block for n in call.body.nodes if is_backward(n) and flops(n)}
                longest |= {block: before + call.steps for block in working if block in self.rules}
            elif is_backward(node) and own in self.rules and flops(node):
                longest = {own: max([1, *(n + (block != own) for block, n in longest.items())])}
            found[node] = longest
        return found

    def forward_passes(self) -> int:
        """Distinct passes among the forward operators that compute activations; in loops, once for each step."""
        labels = self._passes(self.graph.forward_nodes())
        looped = sum(call.steps * len(self._passes(call.body.nodes)) for call in self.loops.calls)
        return max(len(labels), 1) + looped

    def _passes(self, nodes: Iterable[fx.Node]) -> set[str]:
        return {
            info(n).copy
            for n in nodes
            if info(n).role is Role.FORWARD and n not in self._params_only and _tensor(n) and self._reads_weight(n)
        }

    def _reads_weight(self, node: fx.Node) -> bool:
        return any(s in self._params_only for s in node.all_input_nodes)

    # --- one block -------------------------------------------------------------------------------------------------

    def certificate(self, block: str) -> BlockCertificate | None:
        starts = self._terms.get(block)
        if not starts:
            return None
        behind = self._behind[block]
        everything, parents = self._reach(starts)
        # a second forward pass may start from a cotangent: what came back to it counts, too
        backward = [n for n in everything if is_backward(n)]
        transport, affine, signs, local = NO, [], [], []
        for node in backward:
            for name in self._weights_read(node):
                if info(node).block == block:
                    local.append(name)
                elif name not in self._weights:
                    affine.append(name)
                elif node.target in _SIGNS:
                    signs.append(name)
                elif not transport and info(node).block != LOSS_BLOCK:
                    transport = Finding(True, (*self._path(node, parents), f"parameter {name}"))
        met = {info(n).block for n in everything if n.op == "call_function" and _tensor(n)} & behind
        return BlockCertificate(
            block=block,
            rule=self.rules[block],
            weight_transport=transport,
            backward_locked=self._first(backward, parents, lambda n: info(n).block in behind),
            update_locked=self._first(
                everything,
                parents,
                lambda n: not is_backward(n) and n.op == "call_function" and info(n).block in behind,
            ),
            locality_radius=len(met),
            backward_depth=max(n for start in starts for n in (1, *self._chains.get(start, {}).values())),
            global_error=self._first(everything, parents, _is_error),
            affine_reads=_unique(affine),
            sign_reads=_unique(signs),
            local_reads=_unique(local),
        )

    def _reach(self, starts: Iterable[fx.Node]) -> tuple[list[fx.Node], dict[fx.Node, fx.Node | None]]:
        """Nodes reachable against the data flow, in breadth-first order, with the node each was reached from."""
        parents: dict[fx.Node, fx.Node | None] = dict.fromkeys(starts)
        queue, order = deque(parents), []
        while queue:
            node = queue.popleft()
            order.append(node)
            for source in self.loops.sources(node):
                if source in parents or not _carries(node, source):
                    continue
                parents[source] = node
                queue.append(source)
        return order, parents

    def _weights_read(self, node: fx.Node) -> Iterable[str]:
        for source in node.all_input_nodes:
            if source in self._params_only and not _size_only(node):
                yield self._params_only[source]

    def _first(
        self, nodes: Iterable[fx.Node], parents: dict[fx.Node, fx.Node | None], test: Callable[[fx.Node], bool]
    ) -> Finding:
        for node in nodes:
            if _tensor(node) and test(node):
                return Finding(True, self._path(node, parents))
        return NO

    def _path(self, node: fx.Node, parents: dict[fx.Node, fx.Node | None]) -> tuple[str, ...]:
        chain: list[fx.Node] = []
        current: fx.Node | None = node
        while current is not None:
            chain.append(current)
            current = parents[current]
        return tuple(self._describe(n) for n in reversed(chain))

    def _describe(self, node: fx.Node) -> str:
        own: NodeInfo = info(node)
        if node.op == "placeholder":
            return str(own.spec)
        return f"%{self.names[node]} = {operator_name(node)} ({own.role} of {own.block or 'no block'})"


class _Loops:
    """The bodies of a graph's loops, joined to the graph around them."""

    def __init__(self, graph: JointGraph) -> None:
        self.calls = [LoopCall.of(node) for node in graph.nodes if is_loop(node)]
        self.nodes = [node for call in self.calls for node in call.body.nodes]
        self.inputs: dict[fx.Node, fx.Node] = {}
        """Placeholder of a body -> what every step is given there."""
        self._state: dict[fx.Node, list[fx.Node]] = {}
        for call in self.calls:
            states = call.body.placeholders[: call.body.states]
            for inner, first, last in zip(states, call.state, call.body.results, strict=True):
                self._state[inner] = [last, first]
            self.inputs |= dict(zip(call.body.placeholders[call.body.states :], call.inputs, strict=True))

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """What a value is computed from; for a loop's result, in its body."""
        loop = node.args[0] if is_getitem(node) else None
        waiting = list(node.all_input_nodes)
        if isinstance(loop, fx.Node) and is_loop(loop):
            call, number = LoopCall.of(loop), int(node.args[1])  # type: ignore[arg-type]
            waiting = [call.body.results[number] if call.steps else call.state[number]]
        found: dict[fx.Node, None] = {}
        passed: set[fx.Node] = set()
        while waiting:
            source = waiting.pop(0)
            if source in passed:
                continue
            passed.add(source)
            if source in self._state:
                waiting += self._state[source]
            elif source in self.inputs:
                waiting.append(self.inputs[source])
            else:
                found[source] = None
        return list(found)


def _carries(node: fx.Node, source: fx.Node) -> bool:
    """Whether data flows along an edge: sizes do not, nor does the factor that scales an early gradient."""
    if not _tensor(source) and not isinstance(source.meta.get("val"), (tuple, list)):
        return False
    return not (info(node).scales and source is not node.args[0])


def _is_error(node: fx.Node) -> bool:
    spec = spec_of(node) if node.op == "placeholder" else None
    if isinstance(spec, Tangent):
        return not isinstance(spec.output, Loss)
    in_loss = node.op == "call_function" and info(node).block == LOSS_BLOCK
    return in_loss and (not is_backward(node) or info(node).role is Role.SIGNAL)


def _sums_gradients(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.add.Tensor


def _size_only(node: fx.Node) -> bool:
    """Whether an operator looks at its input's shape and not at its values."""
    return operator_name(node) in {
        "sym_size",
        "sym_numel",
        "new_zeros",
        "new_empty",
        "new_full",
        "zeros_like",
        "empty_like",
    }


def _tensor(node: fx.Node) -> bool:
    val = node.meta.get("val")
    if isinstance(val, (tuple, list)):
        return any(isinstance(v, torch.Tensor) for v in val)
    return isinstance(val, torch.Tensor)


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
