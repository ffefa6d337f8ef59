"""Cutting an ATen-level graph into what runs in the forward, in the backward and, split in two, in its weight stage.

A value is *saved* iff it is computed in the forward and read in a later stage. Forward nodes run in the forward.
Backward nodes run in the backward, except those that a schedule pass moved (`NodeInfo.stage`): the backward of a local
loss runs in the forward, right behind its block, so that the block's activations die there; weight gradients of a
two-stage backward run in the weight stage. What that stage reads of the stages before it is *held*.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx

from graphrewrite.errors import BackendError
from graphrewrite.graph.aliasing import base_of, is_view, view_chain
from graphrewrite.graph.nodes import (
    Buffer,
    BufferUpdate,
    Counter,
    Grad,
    InputSpec,
    InputUpdate,
    NodeInfo,
    OutputSpec,
    Role,
    Tangent,
    UserInput,
    info,
    is_backward,
    nbytes,
    spec_of,
    value,
)
from graphrewrite.graph.ordering import cheapest_order

if TYPE_CHECKING:
    from graphrewrite.backends import Taken
    from graphrewrite.graph.joint import JointGraph

Stage = Literal["forward", "backward", "weight"]


@dataclass(frozen=True)
class Saved:
    """One value that lives between the forward and the backward.

    Attributes:
        node: Its node in the ATen-level graph.
        carried: A finished gradient, handed on rather than read: it is given away in the backward.
        nbytes: Bytes of its elements at the example's sizes; 0 for sizes and for inputs, parameters and buffers that
            are referenced.
        copied: An input that the call writes to once it is over: the backward gets a copy.
    """

    node: fx.Node
    carried: bool
    nbytes: int
    copied: bool = False

    @property
    def is_input(self) -> bool:
        """Whether it is an input of the graph: it is referenced, not stored."""
        return self.node.op == "placeholder"


@dataclass(frozen=True)
class Held:
    """One value that lives between the backward and its weight stage.

    Attributes:
        node: Its node in the ATen-level graph.
        saved: Its position in `Partition.saved`; -1 for what the backward computes and hands on.
        nbytes: Bytes of its elements at the example's sizes; 0 for sizes and for inputs, parameters and buffers.
    """

    node: fx.Node
    saved: int
    nbytes: int


@dataclass
class Partition:
    """The stages of one ATen-level graph, as runnable graph modules and their calling conventions.

    The forward takes `forward_inputs` and returns its results, each value once, then the values of `saved`;
    `forward_outputs` says which result each output is. The backward takes the first `read_by_backward` of `saved`, then
    `tangents`, and returns the values of `backward_outputs`, then those of `held` that it computes. The weight stage,
    where there is one, takes `held` and returns the values of `backward_weight_outputs`.
    """

    graph: JointGraph
    forward: fx.GraphModule
    backward: fx.GraphModule
    forward_inputs: list[InputSpec]
    forward_outputs: dict[OutputSpec, int]
    saved: list[Saved]
    tangents: list[Tangent]
    backward_outputs: list[OutputSpec]
    stages: dict[fx.Node, Stage]
    order: dict[Stage, list[fx.Node]]
    read_by_backward: int
    backward_weight: fx.GraphModule | None = None
    held: list[Held] = field(default_factory=list)
    backward_weight_outputs: list[OutputSpec] = field(default_factory=list)
    coverage: dict[fx.Node, Taken] = field(default_factory=dict)
    """What runs each node; written by the backend. Nodes that are missing are run by the backend that was asked for."""

    @property
    def modules(self) -> list[fx.GraphModule]:
        """The stages as graph modules: forward, backward and, if the backward is split, its weight stage."""
        return [m for m in (self.forward, self.backward, self.backward_weight) if m is not None]

    @property
    def result_count(self) -> int:
        """How many results the forward has in front of the saved values."""
        return max(self.forward_outputs.values(), default=-1) + 1

    @property
    def saved_bytes(self) -> int:
        """Bytes held between the forward and the backward, gradients computed early included."""
        return sum(s.nbytes for s in self.saved)

    @property
    def held_bytes(self) -> int:
        """Bytes held between the two stages of the backward."""
        return sum(h.nbytes for h in self.held)


def stages_of(graph: JointGraph) -> dict[fx.Node, Stage]:
    """The stage of every operator."""
    stages: dict[fx.Node, Stage] = {}
    for node in graph.nodes:
        if node.op not in ("call_function", "get_attr"):
            continue
        moved = info(node).stage
        before = {stages.get(source) for source in node.all_input_nodes}
        if moved == "weight" or "weight" in before:
            stages[node] = "weight"
        elif "backward" in before or any(_is_tangent(source) for source in node.all_input_nodes):
            stages[node] = "backward"
        elif moved:
            stages[node] = moved  # type: ignore[assignment]
        elif isinstance(value(node), torch.SymInt):
            # a size of a forward value is taken there: the value is not saved for it
            stages[node] = "forward"
        else:
            stages[node] = "backward" if is_backward(node) else "forward"
    _sink_views(graph, stages)
    return stages


def _is_tangent(node: fx.Node) -> bool:
    return node.op == "placeholder" and isinstance(spec_of(node), Tangent)


def _sink_views(graph: JointGraph, stages: dict[fx.Node, Stage]) -> None:
    """A view that only one later stage reads is made there: its base is saved, not the view."""
    kept = set(graph.outputs.values())
    for node in reversed(list(graph.nodes)):
        if node not in stages or node in kept or not is_view(node):
            continue
        readers = {stages.get(user) for user in node.users}
        if len(readers) == 1 and (reader := readers.pop()) is not None:
            stages[node] = reader


def partition(graph: JointGraph) -> Partition:
    """Cut an ATen-level graph into its forward and its backward, and that in two where a pass split it."""
    stages = stages_of(graph)
    outputs = graph.outputs
    forward_outputs = {s: n for s, n in outputs.items() if _in_forward(s, n, stages)}
    later = {s: n for s, n in outputs.items() if s not in forward_outputs}
    weight_outputs = {s: n for s, n in later.items() if stages.get(n) == "weight"}
    backward_outputs = {s: n for s, n in later.items() if s not in weight_outputs}
    order: dict[Stage, list[fx.Node]] = {
        stage: [n for n in graph.nodes if stages.get(n) == stage] for stage in ("forward", "backward", "weight")
    }
    weight_copied, held = _needed(order["weight"], (), stages, "weight")
    handed = [n for n in held if stages.get(n) == "backward"]
    copied, wanted = _needed(order["backward"], [*backward_outputs.values(), *handed], stages, "backward")
    read_by_backward = len(wanted)
    known = set(wanted)
    wanted += [n for n in held if n not in known and not _is_tangent(n) and stages.get(n) != "backward"]
    handed += [n for n in held if _is_tangent(n)]
    order["forward"] = cheapest_order(graph, order["forward"], [*forward_outputs.values(), *wanted])
    order["backward"] = cheapest_order(
        graph,
        order["backward"],
        [*backward_outputs.values(), *handed],
        wanted[:read_by_backward],
        descending=True,
        either=any(info(n).region for n in order["backward"]),
    )
    order["weight"] = cheapest_order(graph, order["weight"], list(weight_outputs.values()), held, descending=True)
    carried = _carried([n for n in wanted if n not in forward_outputs.values()], order["backward"], set(held))
    overwritten: set[Any] = {Buffer(s.name) for s in outputs if isinstance(s, BufferUpdate)}
    overwritten |= {s.index for s in outputs if isinstance(s, InputUpdate)}
    saved = [_saved(n, n in carried, overwritten) for n in wanted]
    results = list(dict.fromkeys(forward_outputs.values()))
    forward_inputs = _inputs(order["forward"], [*results, *wanted])
    tangents = [n for n in graph.nodes if _is_tangent(n)]
    part = Partition(
        graph,
        extract(graph, forward_inputs, order["forward"], [*results, *wanted], {}),
        extract(
            graph,
            [*wanted[:read_by_backward], *tangents],
            [*copied, *order["backward"]],
            [*backward_outputs.values(), *handed],
            dict.fromkeys(carried.values(), torch.ops.aten.mul_.Tensor),
        ),
        [spec_of(n) for n in forward_inputs],  # type: ignore[misc]
        {spec: results.index(node) for spec, node in forward_outputs.items()},
        saved,
        [spec_of(n) for n in tangents],  # type: ignore[misc]
        list(backward_outputs),
        stages,
        order,
        read_by_backward,
    )
    if weight_outputs:
        position, read = {node: i for i, node in enumerate(wanted)}, set(held)
        # in the order in which the stages before hand them on
        held = [*(n for n in wanted if n in read), *handed]
        part.held = [Held(n, position.get(n, -1), _bytes(n)) for n in held]
        part.backward_weight_outputs = list(weight_outputs)
        part.backward_weight = extract(
            graph, held, [*weight_copied, *order["weight"]], list(weight_outputs.values()), {}
        )
    else:
        del order["weight"]
    return part


def _bytes(node: fx.Node) -> int:
    if node.op == "placeholder" and not _is_tangent(node):
        return 0
    return nbytes(value(node))


def _saved(node: fx.Node, carried: bool, overwritten: set[Any]) -> Saved:
    spec = spec_of(node)
    if node.op != "placeholder":
        return Saved(node, carried, nbytes(value(node)))
    copied = spec in overwritten or (isinstance(spec, UserInput) and spec.index in overwritten)
    # the counter is made anew for each call
    return Saved(node, carried, nbytes(value(node)) if copied or isinstance(spec, Counter) else 0, copied)


def _in_forward(spec: OutputSpec, node: fx.Node, stages: dict[fx.Node, Stage]) -> bool:
    # a gradient leaves through autograd in the backward, whenever it was computed
    return not isinstance(spec, Grad) and stages.get(node, "forward") == "forward"


def _needed(
    nodes: Sequence[fx.Node], results: Iterable[fx.Node], stages: dict[fx.Node, Stage], stage: Stage
) -> tuple[list[fx.Node], list[fx.Node]]:
    """What a stage reads of those before it: the views to repeat in it, and the values to hand on to it."""
    copied: dict[fx.Node, None] = {}
    wanted: dict[fx.Node, None] = {}
    reads = [s for node in nodes for s in node.all_input_nodes] + list(results)
    for source in reads:
        if stages.get(source) == stage or (stage == "backward" and _is_tangent(source)):
            continue
        if source.op == "get_attr":
            copied[source] = None
            continue
        for view in view_chain(source):
            copied[view] = None
            for size in view.all_input_nodes[1:]:
                wanted[size] = None
        wanted[base_of(source)] = None
    # a size that a repeated view reads, or a tuple whose element is read, must itself be there
    return list(copied), [n for n in wanted if n not in copied]


def _carried(wanted: Sequence[fx.Node], backward: Sequence[fx.Node], held: set[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Saved gradients that are only scaled by the loss's cotangent: scaled in place, then given away."""
    inside = set(backward)
    found: dict[fx.Node, fx.Node] = {}
    for node in wanted:
        users = [u for u in node.users if u in inside]
        if len(users) != 1 or node in held or node.op == "placeholder":
            continue
        if info(users[0]).scales and users[0].args[0] is node:
            found[node] = users[0]
    return found


def save_sizes(part: Partition, symbols: Iterable[Any], stage: Stage) -> None:
    """Let a later stage know the sizes that these symbols stand for, for backends whose code needs each by itself.

    Raises:
        BackendError: No value of the forward tells one of them.
    """
    module = part.backward if stage == "backward" else part.backward_weight
    assert module is not None
    for symbol in symbols:
        node = _size_of(part, symbol)
        part.stages[node] = "forward"
        part.order["forward"].append(node)
        # the backward reads the first of the saved values, the weight stage any of them
        position = part.read_by_backward if stage == "backward" else len(part.saved)
        part.saved.insert(position, Saved(node, False, 0))
        part.held = [
            Held(one.node, one.saved + 1 if one.saved >= position else one.saved, one.nbytes) for one in part.held
        ]
        _append_result(part.forward, node, part.result_count + position)
        if stage == "backward":
            _insert_input(module, node, position)
            part.read_by_backward += 1
        else:
            _insert_input(module, node, len(part.held))
            part.held.append(Held(node, position, 0))
    part.forward.recompile()
    module.recompile()


def _append_result(module: fx.GraphModule, node: fx.Node, position: int) -> None:
    graph = module.graph
    made = {n.meta.get("aten", n.name): n for n in graph.nodes}
    output = graph.output_node()
    with graph.inserting_before(output):
        size = graph.node_copy(node, lambda n: made.get(n) or made[n.name])
    size.meta = {**node.meta, "aten": node}
    results: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    results.insert(position, size)
    output.args = (tuple(results),)


def _insert_input(module: fx.GraphModule, node: fx.Node, position: int) -> None:
    graph = module.graph
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    before = inputs[position] if position < len(inputs) else next(n for n in graph.nodes if n.op != "placeholder")
    with graph.inserting_before(before):
        fed = graph.placeholder(node.name)
    fed.meta = dict(node.meta)


def _size_of(part: Partition, symbol: Any) -> fx.Node:
    """A node that computes one size, from an input of the forward or, if it depends on data, from a value of it."""
    fed = [n for n in part.graph.nodes if n.op == "placeholder" and spec_of(n) in part.forward_inputs]
    for node in [*fed, *part.order["forward"]]:
        for dim, size in enumerate(getattr(value(node), "shape", ())):
            if isinstance(size, torch.SymInt) and size.node.expr == symbol:
                like = NodeInfo(role=Role.FORWARD)
                return part.graph.emit(torch.ops.aten.sym_size.int, (node, dim), like=like, val=size)
    raise BackendError(
        f"a later stage needs the size {symbol}, which is no dimension of a value of the forward",
        remedy="compile with dynamic=None, or with backend='eager'",
    )


def _inputs(order: Sequence[fx.Node], results: Iterable[fx.Node]) -> list[fx.Node]:
    read: dict[fx.Node, None] = {}
    for node in order:
        for source in node.all_input_nodes:
            if source.op == "placeholder":
                read[source] = None
    for node in results:
        if node.op == "placeholder":
            read[node] = None
    return list(read)


def extract(
    graph: JointGraph,
    inputs: Sequence[fx.Node],
    nodes: Sequence[fx.Node],
    results: Sequence[fx.Node],
    retarget: dict[fx.Node, Any],
) -> fx.GraphModule:
    """A graph module of some nodes, with the same names."""
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        env[node] = new.placeholder(node.name)
        env[node].meta = dict(node.meta)
    for node in nodes:
        if node in env:
            continue
        env[node] = new.node_copy(node, env.__getitem__)
        env[node].meta = dict(node.meta)
        env[node].meta["aten"] = node
        if node in retarget:
            env[node].target = retarget[node]
    new.output(tuple(env[n] for n in results))
    return fx.GraphModule(graph.module, new)
