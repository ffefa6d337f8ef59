"""One stage of a partition as a graph of its own: what it reads, what it computes, what it returns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from graphrewrite.errors import GraphRewriteError
from graphrewrite.graph.nodes import OutputSpec, Role, Stored, Tap, info
from graphrewrite.graph.text import Names

if TYPE_CHECKING:
    from graphrewrite.graph.joint import JointGraph
    from graphrewrite.graph.partition import Partition


def stage_graph(part: Partition, stage: str) -> JointGraph:
    """A stage as a graph: its inputs are what is fed or was saved, its outputs what it returns or hands on.

    It is made to be read and run; edits of it change no program.

    Args:
        part: The partition.
        stage: `"forward"`, `"backward"` or `"backward_weight"`.
    """
    from graphrewrite.graph.joint import JointGraph

    module = getattr(part, stage, None)
    if not isinstance(module, fx.GraphModule):
        raise GraphRewriteError(f"this program has no {stage} stage", remedy="its backward was not split in two")
    names = Names(part.graph)
    whole = {node.name: node for node in part.graph.nodes}
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    twins: dict[fx.Node | None, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "output":
            continue
        env[node] = graph.node_copy(node, env.__getitem__)
        env[node].meta = dict(node.meta)
        twins[node.meta.get("aten", whole.get(node.name))] = env[node]
    for node, new in env.items():
        own = info(node)
        if node.op == "placeholder" and own.spec is None:
            own = own.but(role=Role.INPUT, spec=Stored(names[whole[node.name]]))
        new.meta["gr"] = own.but(
            mirrors=twins.get(own.mirrors, own.mirrors), cotangent_of=twins.get(own.cotangent_of, own.cotangent_of)
        )
    results = _results(part, stage, names)
    returned = module.graph.output_node().args[0]
    graph.output(tuple(env[returned[i]] for _, i in results))  # type: ignore[index]
    made = JointGraph(fx.GraphModule(module, graph), level="aten", fake_mode=part.graph.fake_mode)
    made.output_node.meta["specs"] = tuple(spec for spec, _ in results)
    made.blocks = list(part.graph.blocks)
    made.constants = part.graph.constants
    made.context = part.graph.context
    made.log = part.graph.log
    made.passes = list(part.graph.passes)
    return made


def _results(part: Partition, stage: str, names: Names) -> list[tuple[OutputSpec, int]]:
    """What a stage returns, with the position in its own results."""
    if stage != "forward":
        specs: list[OutputSpec] = list(getattr(part, f"{stage}_outputs"))
        if stage == "backward":
            specs += [Tap(f"held {names[one.node]}") for one in part.held if one.saved < 0]
        return [(spec, i) for i, spec in enumerate(specs)]
    saved = [(Tap(f"saved {names[one.node]}"), part.result_count + i) for i, one in enumerate(part.saved)]
    return [*part.forward_outputs.items(), *saved]
