"""`graphrewrite explain`: why each pass did, or did not, fire."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

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
from graphrewrite.cli.show import print_json, print_lines

if TYPE_CHECKING:
    from graphrewrite.report.explain import Firing, Refusal, Story

MANY = 8
"""More changes of one kind in one block than this are told in one line."""

SIGNS = {
    "removed": ("-", "red"),
    "replaced": ("-", "red"),
    "added": ("+", "green"),
    "rerouted": ("~", "yellow"),
    "moved": (">", "blue"),
    "stored": ("=", "green"),
}


def explain(
    target: Target,
    rule: Rule = None,
    compress: Compress = None,
    budget: Budget = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--pass", "-p", metavar="PASS", help="A pass or rule to tell about; may be repeated.", show_default=False
        ),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Every change and every reason on a line of its own.")] = False,
    blocks: Blocks = "auto",
    loss: Loss = None,
    as_json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Tell, pass by pass, on which nodes it fired and what it changed, and which candidates it declined and why."""
    wanted = one_rule(rule)

    from graphrewrite.cli.targets import load_target
    from graphrewrite.observe import observing
    from graphrewrite.report.explain import Explainer, to_json

    loaded = load_target(target, blocks=blocks, loss=loss, seed=seed)
    explainer = Explainer()
    with observing(explainer):
        compiled = loaded.compile(wanted, codecs_of(compress), budget_of(budget))
    stories = _selected(explainer.stories, [name.replace("-", "_") for name in only or ()])
    if as_json:
        print_json({"target": target, "rule": compiled.report().rule, "passes": to_json(stories)})
    else:
        print_lines(text_of(stories, full=full))


def _selected(stories: list[Story], names: list[str]) -> list[Story]:
    from graphrewrite.errors import GraphRewriteError

    known = [story.name for story in stories]
    for name in names:
        if name not in known:
            raise GraphRewriteError(f"no pass {name!r} ran on this target", remedy=f"these did: {', '.join(known)}")
    return [story for story in stories if not names or story.name in names]


def text_of(stories: list[Story], *, full: bool = False) -> list[Text]:
    """The printed form of stories: one paragraph for each pass."""
    out: list[Text] = []
    for story in stories:
        head = Text(f"{story.text}", style="bold")
        head.append(f"  {story.level} level, {story.nodes[0]} -> {story.nodes[1]} nodes, {_did(story)}", style="dim")
        out += [head, Text(f"  {story.summary}", style="dim")] if story.summary else [head]
        out += _grouped(story.fired, full)
        out += _declined(story.declined, full)
        if not story.fired and not story.declined:
            out.append(Text("  no candidate in this graph", style="magenta"))
        out.append(Text(""))
    return out


def _did(story: Story) -> str:
    if not story.fired:
        return "fired nowhere"
    return f"fired on {len(story.fired)} node{'s' if len(story.fired) != 1 else ''}"


def _grouped(fired: tuple[Firing, ...], full: bool) -> list[Text]:
    by_block: dict[str, dict[str, list[Firing]]] = {}
    for one in fired:
        by_block.setdefault(one.block, {}).setdefault(one.kind, []).append(one)
    out = []
    for block, kinds in by_block.items():
        out.append(Text(f"  fired in {block or '(no block)'}", style="cyan"))
        for kind in SIGNS:
            changes = kinds.get(kind, [])
            shown = changes if full or len(changes) <= MANY else changes[: MANY - 1]
            out += [_line(one) for one in shown]
            if len(shown) < len(changes):
                out.append(Text(f"    {SIGNS[kind][0]} and {len(changes) - len(shown)} more {kind}", style="dim"))
    return out


def _line(one: Firing) -> Text:
    sign, colour = SIGNS[one.kind]
    text = Text(f"    {sign} %{one.node}", style=colour)
    text.append(f"  {one.operator}, {one.role}")
    text.append(f"  {one.kind}: {one.text}" if one.text else f"  {one.kind}", style="dim")
    return text


def _declined(declined: tuple[Refusal, ...], full: bool) -> list[Text]:
    by_reason: dict[str, list[Refusal]] = {}
    for one in declined:
        by_reason.setdefault(one.reason, []).append(one)
    out = []
    for reason, ones in by_reason.items():
        out.append(Text(f"  declined: {reason}", style="magenta"))
        places = [_place(one) for one in ones]
        named = [place for place in places if place]
        shown = named if full or len(named) <= MANY else named[: MANY - 1]
        out += [Text(f"    {place}") for place in shown]
        if len(shown) < len(named):
            out.append(Text(f"    and {len(named) - len(shown)} more", style="dim"))
    return out


def _place(one: Refusal) -> str:
    parts = [f"%{one.node}" if one.node else "", f"block {one.block}" if one.block else "", one.source]
    return "  ".join(part for part in parts if part)
