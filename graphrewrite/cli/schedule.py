"""`graphrewrite schedule`: the timeline of a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from graphrewrite.cli.files import check_file, write_file
from graphrewrite.cli.options import Blocks, Debug, Json, Loss, Rule, Seed, Target, one_rule
from graphrewrite.cli.show import human_bytes, human_count, print_json, print_lines, print_table, row, table

if TYPE_CHECKING:
    from graphrewrite.cli.targets import Target as Loaded

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
    split: Annotated[
        bool, typer.Option("--split-backward", help="Two-stage backward: weight gradients in a stage of their own.")
    ] = False,
    pipeline: Annotated[
        str | None,
        typer.Option(
            "--pipeline",
            metavar="NAME",
            help="Simulate a pipeline instead: GPipe, 1F1B, Interleaved1F1B, InterleavedZeroBubble, ZBVZeroBubble, "
            "DualPipeV, or ForwardOnly (local rules). The example inputs are one micro-batch.",
            show_default=False,
        ),
    ] = None,
    stages: Annotated[int, typer.Option("--stages", metavar="N", help="Stages of the pipeline.")] = 2,
    micro_batches: Annotated[int, typer.Option("--micro-batches", metavar="N", help="Micro-batches per step.")] = 8,
    blocks: Blocks = "auto",
    loss: Loss = None,
    as_json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Show what a step runs, in order: forward, early local backward, backward, and the bytes alive after each.

    Nothing is run: a step of the timeline is one operator, and bytes are predicted. Parameters, buffers and the batch
    are not counted. With --pipeline, the model is cut into stages of equal cost, and the schedule of PyTorch's pipeline
    engine is simulated on their counted costs.
    """
    wanted = one_rule(rule)
    for file in (html, svg, trace):
        check_file(file)

    from graphrewrite.cli.targets import load_target
    from graphrewrite.report import schedule as report

    loaded = load_target(target, blocks=blocks, loss=loss, seed=seed)
    if pipeline is not None:
        simulated = _simulated(loaded, pipeline, stages, micro_batches)
        _show_pipeline(f"{target} as a pipeline of {stages} stages, {pipeline}", simulated, html, svg, trace, as_json)
        return
    compiled = loaded.compile(wanted, split_backward=split)
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


def _simulated(loaded: Loaded, pipeline: str, stages: int, micro_batches: int) -> dict[str, Any]:
    """The timeline of a pipeline of the target's model."""
    from graphrewrite.backends.distributed.cut import cut
    from graphrewrite.backends.distributed.simulate import actions_of, ranks_of, simulate
    from graphrewrite.report.pipeline import to_json

    ranks = ranks_of(pipeline, stages)
    actions = actions_of(pipeline, ranks, micro_batches, stages)
    made = cut(loaded.model, loaded.inputs, stages, blocks=loaded.blocks, tied="replicate")
    costs = [part.cost for part in made.parts]
    timeline = simulate(actions, costs, local=pipeline == "ForwardOnly")
    data = to_json(timeline, pipeline, micro_batches, costs)
    for one, part in zip(data["stages"], made.parts, strict=True):
        one["blocks"] = list(part.blocks)
    return {"timeline": timeline, "data": data}


def _show_pipeline(
    title: str, simulated: dict[str, Any], html: Path | None, svg: Path | None, trace: Path | None, as_json: bool
) -> None:
    from graphrewrite.report import pipeline as report

    timeline, data = simulated["timeline"], simulated["data"]
    if html is not None:
        write_file(html, report.pipeline_page(timeline, title))
    if svg is not None:
        write_file(svg, report.to_svg(timeline, title))
    if trace is not None:
        write_file(trace, json.dumps(report.to_trace(timeline, title), ensure_ascii=False))
    if as_json:
        print_json({"title": title, "pipeline": data})
        return
    numbers = ["forward", "backward", "weight", "saved", "held"]
    shown = table(["stage", "blocks", *numbers], right=numbers)
    for index, one in enumerate(data["stages"]):
        first, last = one["blocks"][0], one["blocks"][-1]
        row(
            shown,
            index,
            first if first == last else f"{first} .. {last}",
            *(human_count(round(one[kind])) for kind in ("forward", "backward", "weight")),
            *(human_bytes(round(one[kind])) for kind in ("saved_bytes", "held_bytes")),
        )
    print_table(title, shown)
    peak = human_bytes(round(max(data["peak_bytes"])))
    print_lines(
        [
            Text(
                f"{data['processes']} processes, {data['micro_batches']} micro-batches: {100 * data['bubble']:.1f} % "
                f"of the time is spent waiting; peak {peak} per process",
                style="bold",
            )
        ]
    )
