"""Cutting an ATen-level graph into what runs in the forward and what runs in the backward.

A value is *saved* iff it is computed in the forward and read in a later stage. Forward nodes run in the forward.
Backward nodes run in the backward, except those that a schedule pass moved (`NodeInfo.stage`): the backward of a local
loss runs in the forward, right behind its block, so that the block's activations die there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx

from graphrewrite.graph.aliasing import base_of, is_view, view_chain
from graphrewrite.graph.nodes import (
    Buffer,
    BufferUpdate,
    Counter,
    Grad,
    InputSpec,
    InputUpdate,
    OutputSpec,
    StateUpdate,
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


@dataclass
class Partition:
    """The stages of one ATen-level graph, as runnable graph modules and their calling conventions.

    The forward takes `forward_inputs` and returns its results, each value once, then the values of `saved`;
    `forward_outputs` says which result each output is. The backward takes `saved`, then `tangents`, and returns the
    values of `backward_outputs`.
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

    @property
    def result_count(self) -> int:
        """How many results the forward has in front of the saved values."""
        return max(self.forward_outputs.values(), default=-1) + 1

    @property
    def saved_bytes(self) -> int:
        """Bytes held between the forward and the backward, gradients computed early included."""
        return sum(s.nbytes for s in self.saved)


def stages_of(graph: JointGraph) -> dict[fx.Node, Stage]:
    """The stage of every operator."""
    stages: dict[fx.Node, Stage] = {}
    for node in graph.nodes:
        if node.op not in ("call_function", "get_attr"):
            continue
        later = any(
            stages.get(s) == "backward" or isinstance(spec_of(s) if s.op == "placeholder" else None, Tangent)
            for s in node.all_input_nodes
        )
        moved = info(node).stage
        if later:
            stages[node] = "backward"
        elif moved:
            stages[node] = moved  # type: ignore[assignment]
        else:
            stages[node] = "backward" if is_backward(node) else "forward"
    _sink_views(graph, stages)
    return stages


def _sink_views(graph: JointGraph, stages: dict[fx.Node, Stage]) -> None:
    """A view that only the backward reads is made there: its base is saved, not the view."""
    kept = set(graph.outputs.values())
    for node in reversed(list(graph.nodes)):
        if stages.get(node) != "forward" or node in kept or not is_view(node):
            continue
        users = [stages.get(user) for user in node.users]
        if users and all(stage == "backward" for stage in users):
            stages[node] = "backward"


def partition(graph: JointGraph) -> Partition:
    """Cut an ATen-level graph into its forward and its backward."""
    stages = stages_of(graph)
    outputs = graph.outputs
    forward_outputs = {s: n for s, n in outputs.items() if _in_forward(s, n, stages)}
    backward_outputs = {s: n for s, n in outputs.items() if s not in forward_outputs}
    order = [n for n in graph.nodes if stages.get(n) == "forward"]
    backward_nodes = [n for n in graph.nodes if stages.get(n) == "backward"]
    copied, wanted = _needed(backward_nodes, backward_outputs.values(), stages)
    order = cheapest_order(graph, order, [*forward_outputs.values(), *wanted])
    backward_nodes = cheapest_order(graph, backward_nodes, list(backward_outputs.values()), wanted, descending=True)
    carried = _carried([n for n in wanted if n not in forward_outputs.values()], backward_nodes)
    overwritten: set[Any] = {Buffer(s.name) for s in outputs if isinstance(s, BufferUpdate)}
    overwritten |= {s.index for s in outputs if isinstance(s, InputUpdate)}
    saved = [_saved(n, n in carried, overwritten) for n in wanted]
    results = list(dict.fromkeys(forward_outputs.values()))
    forward_inputs = _inputs(order, [*results, *wanted])
    tangents = [n for n in graph.nodes if n.op == "placeholder" and isinstance(spec_of(n), Tangent)]
    return Partition(
        graph,
        extract(graph, forward_inputs, order, [*results, *wanted], {}),
        extract(
            graph,
            [*wanted, *tangents],
            [*copied, *backward_nodes],
            list(backward_outputs.values()),
            dict.fromkeys(carried.values(), torch.ops.aten.mul_.Tensor),
        ),
        [spec_of(n) for n in forward_inputs],  # type: ignore[misc]
        {spec: results.index(node) for spec, node in forward_outputs.items()},
        saved,
        [spec_of(n) for n in tangents],  # type: ignore[misc]
        list(backward_outputs),
        stages,
        {"forward": order, "backward": backward_nodes},
    )


def _saved(node: fx.Node, carried: bool, overwritten: set[Any]) -> Saved:
    spec = spec_of(node)
    if node.op != "placeholder":
        return Saved(node, carried, nbytes(value(node)))
    copied = spec in overwritten or (isinstance(spec, UserInput) and spec.index in overwritten)
    # the counter is made anew for each call
    return Saved(node, carried, nbytes(value(node)) if copied or isinstance(spec, Counter) else 0, copied)


def _in_forward(spec: OutputSpec, node: fx.Node, stages: dict[fx.Node, Stage]) -> bool:
    if isinstance(spec, Grad):
        # a gradient leaves through autograd in the backward, whenever it was computed
        return False
    if isinstance(spec, StateUpdate):
        return stages.get(node, "forward") == "forward"
    return stages.get(node, "forward") == "forward"


def _needed(
    backward: Sequence[fx.Node], results: Iterable[fx.Node], stages: dict[fx.Node, Stage]
) -> tuple[list[fx.Node], list[fx.Node]]:
    """What the backward reads of the forward: the views to repeat there, and the values to save."""
    copied: dict[fx.Node, None] = {}
    wanted: dict[fx.Node, None] = {}
    reads = [s for node in backward for s in node.all_input_nodes] + list(results)
    for source in reads:
        if stages.get(source) == "backward" or isinstance(
            spec_of(source) if source.op == "placeholder" else None, Tangent
        ):
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


def _carried(wanted: Sequence[fx.Node], backward: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Saved gradients that are only scaled by the loss's cotangent: scaled in place, then given away."""
    inside = set(backward)
    found: dict[fx.Node, fx.Node] = {}
    for node in wanted:
        users = [u for u in node.users if u in inside]
        if len(users) == 1 and info(users[0]).scales and node.op != "placeholder" and users[0].args[0] is node:
            found[node] = users[0]
    return found


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
