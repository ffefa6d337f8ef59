"""`graphrewrite schedule`: the timeline of a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from graphrewrite.cli.files import check_file, write_file
from graphrewrite.cli.options import Blocks, Debug, Json, Loss, Rule, Seed, Target, one_rule
from graphrewrite.cli.show import human_bytes, human_count, print_json, print_lines, print_table, row, table

COLOURS = {
    "forward": "cyan",
    "early local backward": "yellow",
    "backward": "magenta",
    "backward weight": "green",
}


def schedule(
    target: Target,
    rule: Rule = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the timeline as a page.", show_default=False)
    ] = None,
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="FILE", help="Write it as a drawing.", show_default=False)
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE", help="Write it as a trace for Perfetto.", show_default=False),
    ] = None,
    blocks: Blocks = "auto",
    loss: Loss = None,
    as_json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Show what a step runs, in order: forward, early local backward, backward, and the bytes alive after each.

    Nothing is run: a step of the timeline is one operator, and bytes are predicted. Parameters, buffers and the batch
    are not counted.
    """
    wanted = one_rule(rule)
    for file in (html, svg, trace):
        check_file(file)

    from graphrewrite.cli.targets import load_target
    from graphrewrite.report import schedule as report

    loaded = load_target(target, blocks=blocks, loss=loss, seed=seed)
    compiled = loaded.compile(wanted)
    part, name = compiled.program().partition, compiled.report().rule
    title = f"{target} under {name}"
    if html is not None:
        write_file(html, report.schedule_page(part, title))
    if svg is not None:
        write_file(svg, report.to_svg(part, title))
    if trace is not None:
        write_file(trace, json.dumps(report.to_trace(part, title), ensure_ascii=False))
    data = report.to_json(part)
    if as_json:
        print_json({"target": target, "rule": name, **data})
        return
    numbers = ["from step", "operators", "FLOPs", "peak", "alive at its end"]
    shown = table(["from step", "phase", "block", *numbers[1:]], right=numbers)
    for one in data["segments"]:
        row(
            shown,
            one["start"],
            Text(one["phase"], style=COLOURS[one["phase"]]),
            one["block"] or "(no block)",
            one["operators"],
            human_count(one["flops"]),
            human_bytes(one["peak_bytes"]),
            human_bytes(one["live_bytes"]),
        )
    print_table(title, shown)
    saved, peak = human_bytes(data["saved_bytes"]), human_bytes(data["peak_bytes"])
    print_lines([Text(f"{data['steps']} operators; saved {saved}, peak of live bytes {peak}", style="bold")])
