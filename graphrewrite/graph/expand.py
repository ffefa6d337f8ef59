"""Expansion: operator level -> ATen level, by tracing the reference interpreter.

Every ATen call inherits the `NodeInfo` of the operator-level node that made it: which node made which call is
observed while tracing, never guessed from names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from graphrewrite._compat import make_fx, traced_graph
from graphrewrite.errors import VerifyError
from graphrewrite.graph.interpret import interpret
from graphrewrite.graph.nodes import NodeInfo, Role, info, is_backward, producer, value

if TYPE_CHECKING:
    from graphrewrite.graph.joint import JointGraph

aten = torch.ops.aten


def expand(graph: JointGraph) -> JointGraph:
    """Expand every VJP node and composite operator to ATen calls; the given graph is not changed."""
    from graphrewrite.graph.joint import JointGraph

    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    made_by: dict[fx.Node, fx.Node] = {}

    def run(*inputs: Any) -> list[Any]:
        traced = traced_graph()
        assert traced is not None
        cursor = [_last(traced)]

        def after(node: fx.Node) -> None:
            new = cursor[0].next if cursor[0] is not None else next(iter(traced.nodes))
            while new.op != "root":
                made_by[new] = node
                cursor[0] = new
                new = new.next

        return interpret(graph, inputs, after=after)

    fakes = [graph.fresh_fake(v) if isinstance(v := value(n), torch.Tensor) else v for n in placeholders]
    with graph.tracing(keep_new_symbols=True):
        traced = make_fx(run, tracing_mode="real", _allow_non_fake_inputs=True)(*fakes)
    _carry_attributes(graph, traced)
    other = JointGraph(traced, level="aten", fake_mode=graph.fake_mode)
    other.blocks = list(graph.blocks)
    other.constants = graph.constants
    other.state_inits = graph.state_inits
    other.aliases = graph.aliases
    other.context = graph.context
    other.log = graph.log
    other.passes = list(graph.passes)
    other.forward_may_read_cotangents = graph.forward_may_read_cotangents
    _annotate(graph, other, placeholders, made_by)
    return other


def _last(traced: fx.Graph) -> fx.Node | None:
    last = None
    for node in traced.nodes:
        last = node
    return last


def _carry_attributes(graph: JointGraph, traced: fx.GraphModule) -> None:
    """Tensors that tracing lifted into attributes would escape the signature."""
    for node in traced.graph.nodes:
        if node.op == "get_attr" and isinstance(getattr(traced, str(node.target), None), torch.Tensor):
            raise VerifyError(
                f"expansion lifted a tensor into the graph ({node.target})",
                node=node.name,
                remedy="this is a bug of graphrewrite: constants must be placeholders",
            )


def _annotate(
    graph: JointGraph, other: JointGraph, placeholders: list[fx.Node], made_by: dict[fx.Node, fx.Node]
) -> None:
    given = iter(placeholders)
    env: dict[fx.Node, fx.Node] = {}
    results: dict[fx.Node, Any] = {}
    for node in other.nodes:
        if node.op == "placeholder":
            source = next(given)
            env[source] = node
            node.meta["gr"] = info(source)
        elif node.op == "output":
            continue
        else:
            origin = made_by.get(node)
            own = info(origin) if origin is not None else NodeInfo()
            # operator-level nodes stay reachable as provenance: they belong to the other graph
            node.meta["gr"] = own.but(mirrors=None, cotangent_of=None)
            node.meta["origin"] = origin
            node.meta["mirrors"] = producer(own.mirrors) if own.mirrors is not None else None
        if "val" not in node.meta:
            node.meta["val"] = None
        results[node] = node.meta["val"]
    outputs = other.output_node
    flat = outputs.args[0]
    outputs.args = (tuple(flat),)  # type: ignore[arg-type]
    outputs.meta["specs"] = tuple(graph.outputs)
    specs = dict(zip(graph.outputs.items(), flat, strict=True))  # type: ignore[arg-type]
    of = {node: result for (_, node), result in specs.items()}
    _share_sizes(other)
    other.leaves = {env[n]: None for n in graph.leaves}
    other.model_outputs = [of[n] for n in graph.model_outputs if n in of]


def _share_sizes(graph: JointGraph) -> None:
    """A size is traced once, by whoever asks first: where that was a backward node, the forward may read it, too."""
    for node in reversed(list(graph.nodes)):
        if not is_backward(node) or not isinstance(value(node), torch.SymInt):
            continue
        read_by_forward = any(u.op == "call_function" and not is_backward(u) for u in node.users)
        if read_by_forward and all(
            not is_backward(s) or isinstance(value(s), torch.SymInt) for s in node.all_input_nodes
        ):
            node.meta["gr"] = info(node).but(role=Role.FORWARD)
