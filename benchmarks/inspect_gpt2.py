"""How long it takes to look at GPT-2 small: `inspect` as text after capture, and its page in a headless Chromium.

    python -m benchmarks.inspect_gpt2

The page of 10,000 nodes repeats the ATen-level document. Writes `results/inspect_gpt2.json`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import graphrewrite as gr
from benchmarks.common import write
from graphrewrite.cli.inspect import listing
from graphrewrite.cli.show import print_lines
from graphrewrite.report.explorer import explorer_page
from graphrewrite.report.graph import describe

TOKENS = (2, 128)
LARGE = 10_000


@contextlib.contextmanager
def timed(row: dict[str, Any], what: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    row[what] = round(time.perf_counter() - started, 3)
    print(what, row[what], flush=True)


def repeated(document: dict[str, Any], nodes: int) -> dict[str, Any]:
    """The document again and again, until it has so many nodes; each copy in blocks of its own."""
    size = len(document["nodes"])
    copies = -(-nodes // size)
    held = [
        {
            **node,
            "id": node["id"] + size * i,
            "inputs": [source + size * i for source in node["inputs"]],
            "mirrors": None if node["mirrors"] is None else node["mirrors"] + size * i,
            "block": f"{node['block']}@{i}" if node["block"] else "",
        }
        for i in range(copies)
        for node in document["nodes"]
    ]
    blocks = [{**b, "name": f"{b['name']}@{i}"} for i in range(copies) for b in document["blocks"]]
    return {**document, "nodes": held[:nodes], "blocks": blocks, "outputs": []}


def browse(row: dict[str, Any], file: pathlib.Path) -> None:
    """Open a page, search it and open a group: seconds until each is shown."""
    executable = os.environ.get("GRAPHREWRITE_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not executable:
        row["browser"] = "none is installed"
        return
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        page = running.new_page()
        with timed(row, "open_seconds"):
            page.goto(file.as_uri())
            page.locator(".row.group").first.wait_for()
        row["rows_at_first"] = page.locator(".row").count()
        with timed(row, "search_seconds"):
            page.fill("#search", "tanh")
            page.locator(".row.node").first.wait_for()
        page.fill("#search", "")
        page.locator(".row.group").first.wait_for()
        with timed(row, "expand_seconds"):
            page.locator('.row.group[aria-expanded="false"]').last.click()
        running.close()


def main() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(use_cache=False)).train()
    x = torch.randint(0, 50257, TOKENS)
    rows: list[dict[str, Any]] = []
    row: dict[str, Any] = {"what": "GPT-2 small, operator level", "load_before": round(os.getloadavg()[0], 2)}
    with timed(row, "compile_seconds"):
        compiled = gr.compile(model, "bp", example_inputs=x, example_targets=x)
    graphs = {level: compiled.graph(level) for level in ("forward", "operator", "aten")}
    row["nodes"] = len(graphs["operator"].graph.nodes)
    with timed(row, "text_seconds"), contextlib.redirect_stdout(io.StringIO()) as shown:
        print_lines(listing(graphs["operator"]))
    row["lines"] = shown.getvalue().count("\n")
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "graph.html"
        with timed(row, "page_seconds"):
            file.write_text(explorer_page("GPT-2 small", graphs, level="operator"), encoding="utf-8")
        row["page_bytes"] = file.stat().st_size
        browse(row, file)
        rows.append(row)
        document = repeated(describe(graphs["aten"]), LARGE)
        row = {"what": "ATen level, repeated", "nodes": len(document["nodes"])}
        held = json.dumps(document, separators=(",", ":")).replace("<", "\\u003c")
        page = explorer_page("10,000 nodes", {"aten": graphs["aten"]})
        start = page.index('id="graph-aten">') + len('id="graph-aten">')
        file.write_text(page[:start] + held + page[page.index("</script>", start) :], encoding="utf-8")
        row["page_bytes"] = file.stat().st_size
        browse(row, file)
        rows.append(row)
    print("written to", write("inspect_gpt2", rows))


if __name__ == "__main__":
    main()
