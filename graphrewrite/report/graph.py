"""A graph as plain data, for `graphrewrite inspect --json` and other tools.

The document:

* `level`: `"forward"`, `"operator"` or `"aten"`.
* `blocks`: `[{"name", "index", "rule"}]` in topological order.
* `nodes`: in execution order. Each has
    * `id`: its position; `inputs` and `mirrors` refer to it;
    * `name`: the name in the printed graph (`d_linear_1`);
    * `op`: `"input"`, `"call"` or `"attribute"`; `target`: the operator (`aten.linear.default`), for a VJP node
      `"vjp"`, for an input what is fed in (`"parameter 0.weight"`);
    * `type`: `{"dtype", "shape"}`, symbolic sizes as text; a list of such for several results; null for none;
    * `expression`: the printed right-hand side;
    * `role`, `block`, `module`, `source` (`file:line`), `made_by` (the pass that made it, or `"capture"`);
    * `mirrors`: for a backward node, the forward node (or the input) whose derivative it is part of, else null;
    * `copy`: the forward pass it belongs to, `""` for the first;
    * `inputs`: the nodes it reads, without repetition; `bytes`: of its result at the example's sizes.
* `outputs`: `[{"what", "node"}]`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import info, is_getitem, nbytes, spec_of, value
from graphrewrite.graph.ops import is_vjp
from graphrewrite.graph.text import Line, Names, lines

_KINDS = {"placeholder": "input", "get_attr": "attribute"}


def describe(graph: JointGraph) -> dict[str, Any]:
    """The document of a graph; see the module docstring."""
    names = Names(graph)
    printed = lines(graph, names)
    ids = {line.node: i for i, line in enumerate(printed)}
    # the expansion keeps the operator that each ATen call came from: the last call of it is its result
    results = {origin: i for line, i in zip(printed, ids.values(), strict=True) if (origin := _origin(line.node))}
    return {
        "level": graph.level,
        "blocks": [{"name": b.name, "index": b.index, "rule": b.rule} for b in graph.blocks],
        "nodes": [_node(line, ids, results, names) for line in printed],
        "outputs": [{"what": str(spec), "node": ids[node]} for spec, node in graph.outputs.items()],
    }


def operator_count(graph: JointGraph) -> int:
    """How many operators a graph has; taking an element of a result is none."""
    return sum(node.op == "call_function" and not is_getitem(node) for node in graph.nodes)


def parameter_count(graph: JointGraph) -> int:
    """How many numbers the parameters of a graph hold."""
    return sum(value(node).numel() for node in graph.parameters().values())


def _origin(node: fx.Node) -> fx.Node | None:
    found: fx.Node | None = node.meta.get("origin")
    return found


def _mirror(node: fx.Node, ids: dict[fx.Node, int], results: dict[fx.Node, int]) -> int | None:
    mirror = info(node).mirrors
    if mirror is None:
        return results.get(node.meta.get("mirrors"))  # type: ignore[arg-type]
    return ids.get(mirror)


def _node(line: Line, ids: dict[fx.Node, int], results: dict[fx.Node, int], names: Names) -> dict[str, Any]:
    node, own = line.node, info(line.node)
    return {
        "id": ids[node],
        "name": line.name.removeprefix("%"),
        "op": _KINDS.get(node.op, "call"),
        "target": _target(node),
        "type": _type(value(node), names),
        "expression": line.expression,
        "role": line.role,
        "block": line.block,
        "module": line.module,
        "source": own.source,
        "made_by": own.made_by,
        "mirrors": _mirror(node, ids, results),
        "copy": own.copy,
        "inputs": [ids[source] for source in node.all_input_nodes],
        "bytes": nbytes(value(node)),
    }


def _target(node: fx.Node) -> str:
    if node.op == "placeholder":
        return str(spec_of(node))
    if is_vjp(node):
        return "vjp"
    if is_getitem(node):
        return "getitem"
    return str(node.target)


def _type(val: Any, names: Names) -> Any:
    if isinstance(val, torch.Tensor):
        sizes = [size if isinstance(size, int) else names.size(size) for size in val.shape]
        return {"dtype": str(val.dtype).removeprefix("torch."), "shape": sizes}
    if isinstance(val, (tuple, list)):
        return [_type(v, names) for v in val]
    return {"dtype": "size", "shape": []} if isinstance(val, torch.SymInt) else None
