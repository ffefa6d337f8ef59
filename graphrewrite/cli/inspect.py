"""`graphrewrite inspect`: print a graph, block by block."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from graphrewrite.cli.files import check_file, write_file
from graphrewrite.cli.options import Blocks, Debug, Json, Level, LevelOption, Loss, Rule, Seed, Target, one_rule
from graphrewrite.cli.show import human_bytes, human_count, print_json, print_lines

if TYPE_CHECKING:
    from graphrewrite.analysis.cost import Cost
    from graphrewrite.graph.joint import JointGraph
    from graphrewrite.graph.text import Line, Names
    from graphrewrite.report.fold import Fold

EXPRESSION_WIDTH = 58
TYPE_WIDTH = 28

STYLES = {
    "cotangent": "magenta",
    "gradient": "green",
    "accumulate": "blue",
    "signal": "bold red",
    "tangent": "cyan",
    "loss": "yellow",
    "state": "red",
}


def inspect(
    target: Target,
    rule: Rule = None,
    level: LevelOption = Level.operator,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html", metavar="FILE", help="Write an interactive page: search, collapse, click.", show_default=False
        ),
    ] = None,
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="FILE", help="Write a drawing.", show_default=False)
    ] = None,
    dot: Annotated[
        Path | None, typer.Option("--dot", metavar="FILE", help="Write the graph for Graphviz.", show_default=False)
    ] = None,
    model_explorer: Annotated[
        Path | None,
        typer.Option(
            "--model-explorer", metavar="FILE", help="Write the graph for Google's Model Explorer.", show_default=False
        ),
    ] = None,
    depth: Annotated[
        int | None,
        typer.Option(
            "--depth",
            "-d",
            min=0,
            help="How many steps of a module path to look into; deeper modules get one line each. "
            "Default: all, and fewer where thousands of lines would be left.",
            show_default=False,
        ),
    ] = None,
    blocks: Blocks = "auto",
    loss: Loss = None,
    as_json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Print the graph of a model under a rule: its operators by block, their types, roles and modules."""
    wanted = one_rule(rule)
    for file in (html, svg, dot, model_explorer):
        check_file(file)

    from graphrewrite.analysis.cost import count
    from graphrewrite.cli.targets import load_target
    from graphrewrite.report.graph import describe, operator_count, parameter_count

    loaded = load_target(target, blocks=blocks, loss=loss, seed=seed)
    cost: Cost | None = None
    if level is Level.forward:
        graphs = {level.value: loaded.forward_graph(wanted)}
    else:
        compiled = loaded.compile(wanted)
        several = html is not None or model_explorer is not None
        levels = ["forward", "operator", "aten", level.value] if several else [level.value]
        graphs = {one: compiled.graph(one) for one in dict.fromkeys(levels)}
        cost = count(compiled.graph("aten"))
    graph = graphs[level.value]
    if html is not None:
        _write_page(html, target, graphs, level.value)
    if model_explorer is not None:
        from graphrewrite.report.model_explorer import to_model_explorer

        documents = {one: describe(held) for one, held in graphs.items()}
        write_file(model_explorer, json.dumps(to_model_explorer(documents), ensure_ascii=False))
    if svg is not None or dot is not None:
        from graphrewrite.report.drawing import to_dot, to_svg

        document = describe(graph)
        for file, draw in ((svg, to_svg), (dot, to_dot)):
            if file is not None:
                write_file(file, draw(document))
    if as_json:
        print_json(
            {
                "target": target,
                "operators": operator_count(graph),
                "parameters": parameter_count(graph),
                "flops": cost.by_role if cost else None,
                **describe(graph),
            }
        )
        return
    summary = f"{operator_count(graph)} operators, {human_count(parameter_count(graph))} parameters in "
    summary += f"{len(graph.blocks)} blocks"
    if cost:
        by_role = ", ".join(f"{role} {human_count(n)}" for role, n in cost.by_role.items())
        summary += f"; FLOPs per step: {human_count(cost.total)}" + (f" ({by_role})" if by_role else "")
    print_lines([Text(f"{target} at the {level.value} level", style="bold"), Text(summary), *listing(graph, depth)])


def _write_page(file: Path, target: str, graphs: dict[str, JointGraph], level: str) -> None:
    from graphrewrite.report.explorer import explorer_page

    rules = ", ".join(dict.fromkeys(block.rule for block in graphs[level].blocks))
    write_file(file, explorer_page(target, graphs, level=level, summary=f"learns by {rules}"))


def listing(graph: JointGraph, depth: int | None = None) -> list[Text]:
    """The lines of a graph, grouped: inputs, forward by block, backward by block from the last one, outputs.

    Args:
        graph: The graph.
        depth: How many steps of a module path to look into; None: all, unless the graph is large.
    """
    from graphrewrite.graph.nodes import is_getitem
    from graphrewrite.graph.text import Line, Names, lines
    from graphrewrite.report.fold import default_depth, fold

    names = Names(graph)
    # an element of an operator's result has the operator's name and a number: its line would say nothing new
    printed = [line for line in lines(graph, names) if not is_getitem(line.node)]
    chosen = default_depth(printed) if depth is None else depth
    shown = fold(printed, chosen)
    whole = [line for line in shown if isinstance(line, Line)]
    widths = (
        max((len(line.name) for line in whole), default=0),
        min(max((len(line.type) for line in whole), default=0), TYPE_WIDTH),
        min(max((len(line.expression) for line in whole), default=0), EXPRESSION_WIDTH),
    )
    out: list[Text] = []
    if chosen != depth:
        note = f"{len(printed)} lines, folded at depth {chosen}; --depth looks deeper, --html opens what you click"
        out.append(Text(note, style="yellow"))
    for section in ("inputs", "forward", "backward"):
        inside = [one for one in shown if one.section == section]
        if inside:
            out += [Text(""), Text(section, style="bold underline")]
        if section == "inputs":
            out += [_line(one, widths) for one in inside]
        else:
            out += _by_block(graph, inside, widths, reverse=section == "backward")
    return [*out, Text(""), Text("outputs", style="bold underline"), *_outputs(graph, names, widths[0], chosen)]


def _by_block(
    graph: JointGraph, lines: list[Line | Fold], widths: tuple[int, int, int], *, reverse: bool
) -> list[Text]:
    rules = {block.name: block.rule for block in graph.blocks}
    rank = {name: i for i, name in enumerate(rules)}
    grouped: dict[str, list[Line | Fold]] = {}
    for line in lines:
        grouped.setdefault(line.block, []).append(line)
    out = []
    for name in sorted(grouped, key=lambda n: rank.get(n, len(rank)), reverse=reverse):
        head = Text(f"  {name or '(no block)'}", style="bold cyan")
        if name in rules:
            head.append(f"  {rules[name]}", style="cyan")
        out += [head, *[_line(line, widths) for line in grouped[name]]]
    return out


def _line(line: Line | Fold, widths: tuple[int, int, int]) -> Text:
    from graphrewrite.report.fold import Fold

    name, kind, expression = widths
    text = Text("    ")
    if isinstance(line, Fold):
        text.append(f"{line.path or '(all)'} …", style="bold")
        return text.append(f"  {line.about()}, {human_bytes(line.nbytes)}", style="dim")
    text.append(f"{line.name:<{name}} ", style="bold")
    text.append(f"{line.type:<{kind}} ", style="dim")
    if line.section == "inputs":
        return text.append(line.expression)
    text.append(f"{line.expression:<{expression}}  ")
    text.append(f"{line.role:<10}", style=STYLES.get(line.role, ""))
    if line.module:
        text.append(f" {line.module}", style="dim")
    text.rstrip()
    return text


def _outputs(graph: JointGraph, names: Names, width: int, depth: int | None) -> list[Text]:
    """The results; gradients of what lies deeper than `depth` are counted."""
    from graphrewrite.graph.nodes import Grad, Param

    out, folded = [], 0
    for spec, node in graph.outputs.items():
        if depth is not None and isinstance(spec, Grad) and isinstance(spec.of, Param):
            folded += spec.of.name.count(".") > depth
            if spec.of.name.count(".") > depth:
                continue
        out.append(Text(f"    %{names[node]:<{width - 1}} {spec}"))
    return [*out, Text(f"    … gradients of {folded} more parameters", style="dim")] if folded else out
