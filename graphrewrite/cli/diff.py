"""`graphrewrite diff`: what a rule changes in the graph of another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from graphrewrite.cli.options import Blocks, Debug, Json, Loss, Rule, Seed, Target, one_rule
from graphrewrite.cli.show import human_bytes, human_count, print_json, print_lines

if TYPE_CHECKING:
    from graphrewrite.report.diff import BlockDiff, Change, Diff

MANY = 12
"""More added nodes of a block, role and pass than this are told in one line."""

SIGNS = {"removed": ("-", "red"), "rerouted": ("~", "yellow"), "added": ("+", "green")}


def diff(
    target: Target,
    rule: Rule = None,
    against: Annotated[str, typer.Option("--against", metavar="RULE", help="The rule to compare with.")] = "bp",
    full: Annotated[bool, typer.Option("--full", help="Every added node on a line of its own.")] = False,
    blocks: Blocks = "auto",
    loss: Loss = None,
    as_json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Compare the graphs of a model under two rules: what is removed, added and rerouted, in FLOPs and saved bytes."""
    if not rule:
        raise typer.BadParameter("say which rule to look at", param_hint="--rule")
    wanted, other = one_rule(rule), one_rule([against])

    from graphrewrite.cli.targets import load_target
    from graphrewrite.report.diff import compare_compiled, to_json

    loaded = load_target(target, blocks=blocks, loss=loss, seed=seed)
    found = compare_compiled(loaded.compile(other), loaded.compile(wanted))
    if as_json:
        print_json({"target": target, **to_json(found)})
    else:
        print_lines(text_of(found, full=full))


def text_of(found: Diff, *, full: bool = False) -> list[Text]:
    """The printed form of a diff, block by block; `full`: every added node on a line of its own."""
    old, new = found.rules
    head = f"{found.total('removed')} removed, {found.total('rerouted')} rerouted, {found.total('added')} added"
    out = [Text(f"{old} -> {new}", style="bold"), Text(f"{head}; {_numbers(found.flops, found.saved_bytes)}")]
    for block in found.blocks:
        if not block.changes and not any(block.flops) and not any(block.saved_bytes):
            continue
        title = Text(f"\n{block.block or '(rule state)'}", style="bold cyan")
        if any(block.rules):
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
            if kind != "added" or full or len(changes) <= MANY:
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
    return text


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "nothing"


def _numbers(flops: tuple[int, int], saved: tuple[int, int]) -> str:
    return (
        f"FLOPs {human_count(flops[0])} -> {human_count(flops[1])}, "
        f"saved {human_bytes(saved[0])} -> {human_bytes(saved[1])}"
    )
