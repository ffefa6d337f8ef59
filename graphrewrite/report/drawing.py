"""Drawings of a graph's document (`report.graph.describe`): Graphviz DOT, and SVG laid out by networkx.

A small graph is drawn node by node. One of more than `SMALL` nodes is drawn block by block, the forward and the
backward of each: a picture of thousands of boxes shows nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html import escape
from typing import Any

import networkx as nx

SMALL = 150
BACKWARD = ("cotangent", "gradient", "accumulate", "signal")
BOX, GAP, ROW = 150, 20, 64

_STYLE = """
:root { color-scheme: light dark }
svg { --back: #ffffff; --box: #f6f7f9; --text: #1c2024; --soft: #5b6570; --forward: #0b62a4; --backward: #9a3b8f }
@media (prefers-color-scheme: dark) {
  svg { --back: #14181c; --box: #1b2127; --text: #e6e9ec; --soft: #a0abb6; --forward: #6cb6ff; --backward: #e08fd6 }
}
.back { fill: var(--back) }
text { font: 11px ui-monospace, monospace; fill: var(--text) }
.small { fill: var(--soft); font-size: 9px }
rect { fill: var(--box); stroke: var(--forward) }
.backward rect { stroke: var(--backward) }
.input rect { stroke: var(--soft); stroke-dasharray: 3 2 }
path { fill: none; stroke: var(--soft); marker-end: url(#arrow) }
marker path { fill: var(--soft); stroke: none; marker-end: none }
"""

_ARROW = (
    '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
    '<path d="M0 0 L8 4 L0 8 z"/></marker></defs>'
)


@dataclass
class Box:
    """What is drawn as one box: a node, or one half of a block.

    Attributes:
        name: Its title.
        about: A second, smaller line.
        kind: `"input"`, `"forward"` or `"backward"`.
        members: How many operators it stands for.
    """

    name: str
    about: str
    kind: str
    members: int = 1
    reads: set[int] = field(default_factory=set)


def boxes_of(document: dict[str, Any], *, small: int = SMALL) -> list[Box]:
    """The boxes of a document; `reads` refers to positions in the list. Parameters are left out."""
    nodes = [n for n in document["nodes"] if n["op"] == "call" or n["target"].startswith(("input", "target"))]
    whole = len(nodes) <= small
    place: dict[int, int] = {}
    found: dict[Any, int] = {}
    boxes: list[Box] = []
    for node in nodes:
        kind = "input" if node["op"] == "input" else "backward" if node["role"] in BACKWARD else "forward"
        key = node["id"] if whole or kind == "input" else (kind, node["block"])
        if key not in found:
            found[key] = len(boxes)
            title = node["name"] if whole or kind == "input" else node["block"] or "(no block)"
            boxes.append(Box(title, _type(node["type"]) if whole or kind == "input" else kind, kind, 0))
        place[node["id"]] = found[key]
        boxes[found[key]].members += 1
        mine = boxes[found[key]].reads
        mine.update(place[s] for s in node["inputs"] if s in place and place[s] != found[key])
    for box in boxes:
        if box.members > 1:
            box.about += f", {box.members} operators"
    return boxes


def to_dot(document: dict[str, Any]) -> str:
    """The graph in Graphviz's language; names are quoted, whatever they are."""
    boxes = boxes_of(document)
    lines = [f"digraph {json.dumps(document['level'])} {{", "  node [shape=box, fontname=monospace];"]
    for i, box in enumerate(boxes):
        style = {"input": "dashed", "forward": "solid", "backward": "bold"}[box.kind]
        label = f"{box.name}\n{box.about}"
        lines.append(f"  n{i} [label={json.dumps(label, ensure_ascii=False)}, style={style}];")
    lines += [f"  n{source} -> n{i};" for i, box in enumerate(boxes) for source in sorted(box.reads)]
    return "\n".join([*lines, "}\n"])


def to_svg(document: dict[str, Any]) -> str:
    """A drawing in layers from top to bottom, light and dark."""
    boxes = boxes_of(document)
    spots, width, height = _layout(boxes)
    label = f"graph at the {escape(document['level'])} level"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"',
        f'role="img" aria-label="{label}"><style>{_STYLE}</style>',
        _ARROW,
        f'<rect class="back" width="{width}" height="{height}" style="stroke:none"/>',
    ]
    for i, box in enumerate(boxes):
        for source in sorted(box.reads):
            (x, y), (a, b) = spots[source], spots[i]
            middle = (y + b) / 2
            parts.append(f'<path d="M{x} {y + 18} C{x} {middle} {a} {middle} {a} {b - 18}"/>')
    for box, (x, y) in zip(boxes, spots, strict=True):
        title, about = escape(_short(box.name, 21)), escape(_short(box.about, 26))
        parts.append(
            f'<g class="{box.kind}"><title>{escape(box.name)}</title>'
            f'<rect x="{x - BOX / 2}" y="{y - 17}" width="{BOX}" height="34" rx="4"/>'
            f'<text x="{x}" y="{y - 2}" text-anchor="middle">{title}</text>'
            f'<text class="small" x="{x}" y="{y + 11}" text-anchor="middle">{about}</text></g>'
        )
    return "\n".join([*parts, "</svg>\n"])


def _layout(boxes: list[Box]) -> tuple[list[tuple[float, float]], int, int]:
    """Where the middle of each box is, and the size of the drawing."""
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(boxes)))
    graph.add_edges_from((source, i) for i, box in enumerate(boxes) for source in box.reads)
    # halves of blocks may read one another in both directions: they share a layer
    merged = nx.condensation(graph)
    for layer, members in enumerate(nx.topological_generations(merged)):
        for one in members:
            for node in merged.nodes[one]["members"]:
                graph.nodes[node]["layer"] = layer
    if not boxes:
        return [], BOX, ROW
    found = nx.multipartite_layout(graph, subset_key="layer", align="horizontal")
    layers: dict[int, list[int]] = {}
    for node in sorted(graph, key=lambda n: found[n][0]):
        layers.setdefault(graph.nodes[node]["layer"], []).append(node)
    step = BOX + GAP
    width, height = max(map(len, layers.values())) * step + GAP, len(layers) * ROW + GAP
    spots: dict[int, tuple[float, float]] = {}
    for layer, members in layers.items():
        for i, node in enumerate(members):
            spots[node] = ((width - len(members) * step) / 2 + (i + 0.5) * step, layer * ROW + (ROW + GAP) / 2)
    return [spots[i] for i in range(len(boxes))], width, height


def _type(held: Any) -> str:
    if held is None:
        return ""
    if isinstance(held, list):
        return ", ".join(_type(one) for one in held)
    return f"{held['dtype']}{held['shape']}".replace("'", "")


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
