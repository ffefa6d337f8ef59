"""The graph for Google's Model Explorer: its JSON of graphs, nodes and incoming edges, from our own document.

The file is a list of graphs, one per level. A node's namespace is what Model Explorer collapses: the half of the graph,
the block, and the module path inside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphrewrite.report.drawing import BACKWARD

_ATTRIBUTES = ("target", "expression", "role", "block", "module", "source", "made_by", "copy", "bytes")


def to_model_explorer(documents: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Level -> document of `report.graph.describe`, as Model Explorer reads it."""
    return [{"id": level, "nodes": _nodes(document)} for level, document in documents.items()]


def _nodes(document: dict[str, Any]) -> list[dict[str, Any]]:
    names = {node["id"]: node["name"] for node in document["nodes"]}
    nodes = [
        {
            "id": str(node["id"]),
            "label": node["name"],
            "namespace": _namespace(node),
            "incomingEdges": [
                {"sourceNodeId": str(source), "sourceNodeOutputId": "0", "targetNodeInputId": str(i)}
                for i, source in enumerate(node["inputs"])
            ],
            "attrs": _attributes(node, names),
            "outputsMetadata": [{"id": "0", "attrs": [{"key": "shape", "value": _shape(node["type"])}]}],
        }
        for node in document["nodes"]
    ]
    nodes += [
        {
            "id": f"output {i}",
            "label": one["what"],
            "namespace": "outputs",
            "incomingEdges": [
                {"sourceNodeId": str(one["node"]), "sourceNodeOutputId": "0", "targetNodeInputId": "0"},
            ],
        }
        for i, one in enumerate(document["outputs"])
    ]
    return nodes


def _namespace(node: dict[str, Any]) -> str:
    if node["op"] == "input":
        return "inputs"
    half = "backward" if node["role"] in BACKWARD else "forward"
    block, module = node["block"], node["module"]
    below = "" if module == block else module.removeprefix(f"{block}.") if block else module
    steps = [half, block or "(no block)", *([] if not below else below.split("."))]
    return "/".join(step.replace("/", "_") for step in steps)


def _attributes(node: dict[str, Any], names: Mapping[int, str]) -> list[dict[str, str]]:
    held = {key.replace("_", " "): str(node[key]) for key in _ATTRIBUTES if node[key]}
    if node["mirrors"] is not None:
        held["derivative of"] = names[node["mirrors"]]
    return [{"key": key, "value": value} for key, value in held.items()]


def _shape(held: Any) -> str:
    if held is None:
        return ""
    if isinstance(held, list):
        return ", ".join(_shape(one) for one in held)
    return f"{held['dtype']}[{', '.join(map(str, held['shape']))}]"
