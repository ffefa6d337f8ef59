"""The interactive page of a graph: search, collapse by block and module, click through. One file, no network."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from graphrewrite.graph.joint import JointGraph
from graphrewrite.report.graph import describe

if TYPE_CHECKING:
    from graphrewrite.runtime.module import CompiledModule

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""Nothing is loaded: what the page shows is in the page, and a browser is told to hold it to that."""


def explorer_page(title: str, graphs: Mapping[str, JointGraph], *, level: str = "", summary: str = "") -> str:
    """The page that shows one model at one or several levels.

    Args:
        title: Its heading.
        graphs: Level -> graph; a tab each.
        level: What is shown first; the first graph if not given.
        summary: A line under the heading.
    """
    level = level or next(iter(graphs))
    tabs = "".join(
        f'<button class="tab" role="tab" data-level="{escape(one)}">{escape(one)}</button>' for one in graphs
    )
    data = "".join(
        f'<script type="application/json" id="graph-{escape(one)}">{embedded(describe(graph))}</script>'
        for one, graph in graphs.items()
    )
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{_resource('explorer.css')}</style></head>",
            f'<body data-level="{escape(level)}"><header><h1>{escape(title)}</h1>',
            '<input id="search" type="search" placeholder="name, operator, module, role, pass" aria-label="search">',
            f'<span role="tablist">{tabs}</span>',
            '<button class="tool" id="open">expand all</button><button class="tool" id="close">collapse all</button>',
            f'<span id="found" class="hint" role="status"></span><p>{escape(summary)}</p></header>',
            '<main><div id="tree"></div><div id="details"></div></main>',
            f"{data}<script>{_resource('explorer.js')}</script></body></html>\n",
        ]
    )


def frame(page: str, *, height: str = "36rem") -> str:
    """A page inside a frame: what a notebook shows."""
    style = f"width:100%;height:{height};border:1px solid #8888"
    return f'<iframe sandbox="allow-scripts" style="{style}" srcdoc="{escape(page)}"></iframe>'


def graph_frame(graph: JointGraph) -> str:
    """A graph in a notebook."""
    title = f"graph at the {graph.level} level"
    return frame(explorer_page(title, {graph.level: graph}))


def compiled_frame(compiled: CompiledModule) -> str:
    """A compiled module in a notebook: its graphs, or its text if nothing was captured yet."""
    if not compiled.captured:
        return f"<pre>{escape(repr(compiled))}</pre>"
    graphs = {level: compiled.graph(level) for level in ("forward", "operator", "aten")}
    blocks = graphs["operator"].blocks
    rules = ", ".join(dict.fromkeys(block.rule for block in blocks))
    summary = f"learns by {rules}; {len(blocks)} blocks"
    return frame(explorer_page(type(compiled.module).__name__, graphs, level="operator", summary=summary))


def embedded(data: Any) -> str:
    """JSON that can stand inside a script element, whatever the model's names are."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _resource(name: str) -> str:
    return importlib.resources.files("graphrewrite.report").joinpath(name).read_text(encoding="utf-8")
