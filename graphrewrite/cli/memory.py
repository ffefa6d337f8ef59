"""`graphrewrite memory`: what a step keeps alive."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from graphrewrite.cli.files import check_file, write_file
from graphrewrite.cli.options import (
    Blocks,
    Budget,
    Compress,
    Debug,
    Json,
    Loss,
    Rule,
    Seed,
    Target,
    budget_of,
    codecs_of,
    one_rule,
)
from graphrewrite.cli.show import human_bytes, print_json, print_lines, print_table, row, table

if TYPE_CHECKING:
    import torch

    from graphrewrite.analysis.liveness import Curve
    from graphrewrite.cli.targets import Target as Loaded
    from graphrewrite.inputs import Inputs
    from graphrewrite.report.memory import LayerGroup
    from graphrewrite.runtime.module import CompiledModule


def memory(
    target: Target,
    rule: Rule = None,
    compress: Compress = None,
    budget: Budget = None,
    measure: Annotated[bool, typer.Option("--measure", help="Run a step and measure its peak as well.")] = False,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write the curve and the table as a page.", show_default=False),
    ] = None,
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="FILE", help="Write the curve as a drawing.", show_default=False)
    ] = None,
    blocks: Blocks = "auto",
    loss: Loss = None,
    as_json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Show what a step saves between forward and backward, and how many bytes are alive while it runs.

    Parameters, buffers and the batch are not counted. The prediction counts the storages of the graph's own values;
    a measurement also sees the scratch space of torch's operators. Born and dies are the operators that compute a value
    and read it last, counted in the order in which they run.
    """
    wanted = one_rule(rule)
    for file in (html, svg):
        check_file(file)

    from graphrewrite.analysis.liveness import backward_curve, forward_curve
    from graphrewrite.cli.targets import load_target
    from graphrewrite.report.memory import by_layer

    loaded = load_target(target, blocks=blocks, loss=loss, seed=seed)
    compiled = loaded.compile(wanted, codecs_of(compress), budget_of(budget))
    report = compiled.report()
    partition = compiled.program().partition
    curves = {"forward": forward_curve(partition), "backward": backward_curve(partition)}
    groups = by_layer(report.saved, [b.name for b in partition.graph.blocks])
    peak = max(curve.peak for curve in curves.values())
    measured = measured_peak(compiled, loaded) if measure else None
    if html is not None or svg is not None:
        from graphrewrite.report.memory_page import memory_page
        from graphrewrite.report.schedule import to_svg

        title = f"{target} under {report.rule}"
        marks = {} if measured is None else {"measured peak": measured}
        if svg is not None:
            write_file(svg, to_svg(partition, title, marks))
        if html is not None:
            write_file(html, memory_page(partition, title, groups, peak, measured))
    if as_json:
        print_json(
            {
                "target": target,
                "rule": report.rule,
                "saved_bytes": report.saved_bytes,
                "layers": [_group(g) for g in groups],
                "live_bytes": {stage: curve.live for stage, curve in curves.items()},
                "predicted_peak": peak,
                "measured_peak": measured,
            }
        )
        return
    saved = human_bytes(report.saved_bytes)
    print_table(f"saved between forward and backward under {report.rule}: {saved}", _table(groups))
    line = Text(f"peak of live bytes: {human_bytes(peak)} predicted", style="bold")
    if measured is not None:
        line.append(f", {human_bytes(measured)} measured")
    print_lines([*_plot(curves), line])


def measured_peak(compiled: CompiledModule, loaded: Loaded) -> int:
    """The most bytes that one training step had alive at once, gradients included."""
    import torch

    from graphrewrite.analysis.liveness import LiveBytes
    from graphrewrite.inputs import as_inputs

    inputs = as_inputs(loaded.inputs)
    given: list[Any] = [inputs.args, inputs.kwargs, loaded.targets]
    if loaded.targets is None:
        # without a loss, the cotangents of the outputs are handed in, as the batch is
        with torch.no_grad():
            given += [torch.ones_like(t) for t in _outputs(compiled, inputs)]
    known = [*compiled.parameters(), *compiled.buffers(), *_tensors(given)]
    compiled.zero_grad(set_to_none=True)
    live = LiveBytes(known)
    with live:
        if loaded.targets is None:
            torch.autograd.backward(_outputs(compiled, inputs), given[3:])
        else:
            compiled.loss(loaded.inputs, loaded.targets).backward()
    return live.peak


def _outputs(compiled: CompiledModule, inputs: Inputs) -> list[torch.Tensor]:
    """The outputs that have a cotangent."""
    return [t for t in _tensors(compiled(*inputs.args, **inputs.kwargs)) if t.is_floating_point()]


def _tensors(tree: Any) -> list[torch.Tensor]:
    import torch
    from torch.utils import _pytree as pytree

    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _table(groups: list[LayerGroup]) -> Table:
    from graphrewrite.report.memory import lifetime, range_of

    numbers = ["born", "dies", "in one layer", "in all"]
    made = table(["layer", "value of", "type", "kind", "codec", *numbers], right=numbers)
    for group in groups:
        for i, value in enumerate(group.values):
            source = f"{value.operator}, {value.module}" if value.module else value.operator
            row(
                made,
                range_of(group.layers) if i == 0 else "",
                source,
                value.type,
                value.kind,
                value.codec,
                *lifetime(value),
                human_bytes(value.nbytes),
                human_bytes(value.nbytes * len(group.layers)),
            )
    return made


def _plot(curves: dict[str, Curve]) -> list[Text]:
    from graphrewrite.report.memory import plot

    rows, starts = plot(list(curves.values()))
    if not rows:
        return []
    peak = human_bytes(max(curve.peak for curve in curves.values()))
    width = len(peak)
    out = [Text("bytes alive after each operator, in order", style="bold")]
    boundary = starts[1]
    for i, line in enumerate(rows):
        label = peak if i == 0 else "0".rjust(width) if i == len(rows) - 1 else " " * width
        text = Text(f"  {label} ", style="dim")
        text.append(line[:boundary], style="cyan")
        text.append(line[boundary:], style="magenta")
        out.append(text)
    legend = Text(" " * (width + 3))
    legend.append("forward".ljust(boundary)[: max(boundary, len("forward") + 1)], style="cyan")
    legend.append("backward", style="magenta")
    return [*out, legend]


def _group(group: LayerGroup) -> dict[str, Any]:
    return {
        "layers": list(group.layers),
        "bytes": group.nbytes,
        "values": [
            {
                "module": v.module,
                "operator": v.operator,
                "type": v.type,
                "kind": v.kind,
                "codec": v.codec,
                "bytes": v.nbytes,
                "born": [born for born, _ in v.lives],
                "dies": [dies for _, dies in v.lives],
            }
            for v in group.values
        ],
    }
