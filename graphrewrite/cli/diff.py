"""`graphrewrite diff`: what a rule changes in the graph of another, or a pass in the graph it gets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from graphrewrite.cli.files import check_file, write_file
from graphrewrite.cli.options import Blocks, Debug, Json, Loss, Rule, Seed, Target, one_rule
from graphrewrite.cli.show import human_bytes, human_count, print_json, print_lines

if TYPE_CHECKING:
    from graphrewrite.cli.targets import Target as Loaded
    from graphrewrite.report.diff import BlockDiff, Change, Diff

MANY = 12
"""More added nodes of a block, role and pass than this are told in one line."""

SIGNS = {"removed": ("-", "red"), "rerouted": ("~", "yellow"), "moved": (">", "blue"), "added": ("+", "green")}


def diff(
    target: Target,
    rule: Rule = None,
    against: Annotated[
        str | None, typer.Option("--against", metavar="RULE", help="The rule to compare with; default: bp.")
    ] = None,
    ran: Annotated[
        str | None,
        typer.Option(
            "--pass",
            "-p",
            metavar="PASS",
            help="Compare the graphs before and after a pass instead; NAME:2 is the second time it ran.",
            show_default=False,
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write both graphs side by side.", show_default=False),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Every added node on a line of its own.")] = False,
    blocks: Blocks = "auto",
    loss: Loss = None,
    as_json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Compare the graphs of a model under two rules: what is removed, added and rerouted, in FLOPs and saved bytes.

    With --pass, the graph before and after any pass: a rule, a clean-up, a schedule.
    """
    if not rule and ran is None:
        raise typer.BadParameter("say which rule to look at", param_hint="--rule")
    if ran is not None and against is not None:
        raise typer.BadParameter("a pass is compared with the graph before it", param_hint="--against")
    wanted, other = one_rule(rule), one_rule([against or "bp"])
    check_file(html)

    from graphrewrite.cli.targets import load_target
    from graphrewrite.report.diff import compare_compiled, to_json

    loaded = load_target(target, blocks=blocks, loss=loss, seed=seed)
    if ran is not None:
        found = _around(loaded, wanted, ran)
    else:
        found = compare_compiled(loaded.compile(other), loaded.compile(wanted))
    if html is not None:
        from graphrewrite.report.diff_page import diff_page

        write_file(html, diff_page(target, found))
    if as_json:
        print_json({"target": target, **to_json(found)})
    else:
        print_lines(text_of(found, full=full))


def _around(loaded: Loaded, rule: str | dict[str, str], ran: str) -> Diff:
    """The graphs before and after a pass."""
    from graphrewrite.observe import observing
    from graphrewrite.report.diff import Snapshots, compare_pass

    snapshots = Snapshots()
    with observing(snapshots):
        compiled = loaded.compile(rule)
    text, before, after = snapshots.find(ran)
    return compare_pass(text, compiled.report().rule, before, after)


def text_of(found: Diff, *, full: bool = False) -> list[Text]:
    """The printed form of a diff, block by block; `full`: every added node on a line of its own."""
    old, new = found.sides
    head = f"{found.total('removed')} removed, {found.total('rerouted')} rerouted, {found.total('added')} added"
    if found.total("moved"):
        head += f", {found.total('moved')} moved"
    out = [Text(f"{old} -> {new}", style="bold"), Text(f"{head}; {_numbers(found.flops, found.saved_bytes)}")]
    for block in found.blocks:
        if not block.changes and not any(block.flops) and not any(block.saved_bytes):
            continue
        title = Text(f"\n{block.block or '(rule state)'}", style="bold cyan")
        if any(block.rules) and not found.ran:
            title.append(f"  {block.rules[0]} -> {block.rules[1]}", style="cyan")
        title.append(f"  {_numbers(block.flops, block.saved_bytes)}; {block.kept} operators the same", style="dim")
        out.append(title)
        out += _changes(block, full)
    return out


def _changes(block: BlockDiff, full: bool) -> list[Text]:
    from graphrewrite.graph.text import count_operators
    from graphrewrite.report.diff import grouped

    out = []
    for kind in SIGNS:
        for (role, copy), changes in grouped(block.of_kind(kind)).items():
            if kind not in ("added", "moved") or full or len(changes) <= MANY:
                out += [_line(change) for change in changes]
                continue
            operators = ", ".join(
                f"{name} x{n}" if n > 1 else name for name, n in count_operators(c.line.node for c in changes).items()
            )
            where = f" of pass {copy}" if copy else ""
            sign, colour = SIGNS[kind]
            out.append(Text(f"  {sign} {len(changes)} {role} operators{where}: {operators}", style=colour))
    return out


def _line(change: Change) -> Text:
    sign, colour = SIGNS[change.kind]
    line = change.line
    text = Text(f"  {sign} {line.name:<22} {line.type:<18} {line.expression}  {line.role}", style=colour)
    if change.passes:
        text.append(f"\n      now in pass {', '.join(change.passes)}", style="dim")
    if change.kind == "rerouted":
        text.append(f"\n      reads {_names(change.now)} instead of {_names(change.was)}", style="dim")
    elif change.kind == "moved":
        text.append(f"\n      from the {change.was[0]} to the {change.now[0]} stage", style="dim")
    return text


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "nothing"


def _numbers(flops: tuple[int, int], saved: tuple[int, int]) -> str:
    return (
        f"FLOPs {human_count(flops[0])} -> {human_count(flops[1])}, "
        f"saved {human_bytes(saved[0])} -> {human_bytes(saved[1])}"
    )
