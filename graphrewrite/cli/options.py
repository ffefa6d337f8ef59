"""Arguments and options that several commands share, and how their text is read."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from graphrewrite.textform import split_commas


class Level(StrEnum):
    """The level at which a graph is shown."""

    forward = "forward"
    operator = "operator"
    aten = "aten"
    backward = "backward"
    backward_weight = "backward_weight"


LevelOption = Annotated[
    Level,
    typer.Option("--level", "-l", help="forward: as captured; operator: after the rule; aten: all passes; or a stage."),
]


Target = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="package.module:factory, path.py:factory, or an exported .pt2 file.",
        show_default=False,
    ),
]
Rule = Annotated[
    list[str] | None,
    typer.Option(
        "--rule",
        "-r",
        metavar="RULE",
        help="A rule's name or text form, dfa or 'ff{threshold=2}'; or GLOB=RULE, repeated, for a map of rules.",
        show_default=False,
    ),
]
Compress = Annotated[
    list[str] | None,
    typer.Option(
        "--compress",
        "-c",
        metavar="CODEC",
        help="A codec's name or text form; repeated: the first that takes a value wins; or GLOB=CODEC for a map.",
        show_default=False,
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        "--memory-budget",
        metavar="BUDGET",
        help="Saved bytes: 0.3 is a fraction of backpropagation's, 300000 is bytes.",
        show_default=False,
    ),
]
Blocks = Annotated[
    str, typer.Option("--blocks", "-b", metavar="BLOCKS", help="auto, layers, or module globs with commas between.")
]
Loss = Annotated[
    str | None,
    typer.Option(
        "--loss",
        metavar="MODULE:FUNCTION",
        help="loss(outputs, targets) -> scalar; default: cross-entropy.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the factory's weights, of rule state and of batches.")]
Html = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", help="Write the curves as a self-contained page.", show_default=False),
]


def one_rule(texts: Sequence[str] | None, default: str = "bp") -> str | dict[str, str]:
    """What `--rule` says, as `compile` takes it: one rule, or a map from module glob to rule."""
    rules = several_rules(texts) or [default]
    if len(rules) > 1:
        raise typer.BadParameter(
            f"{len(rules)} rules for one graph; give one, or GLOB=RULE for each", param_hint="--rule"
        )
    return rules[0]


def several_rules(texts: Sequence[str] | None) -> list[str | dict[str, str]]:
    """Every `--rule` on its own; those of the form GLOB=RULE form one map together."""
    rules: list[str | dict[str, str]] = []
    entries: dict[str, str] = {}
    for text in texts or ():
        head, equals, rest = text.partition("=")
        if equals and "{" not in head:
            if not entries:
                rules.append(entries)
            entries[head.strip()] = rest.strip()
        else:
            rules.append(text)
    return rules


def codecs_of(texts: Sequence[str] | None) -> list[str] | dict[str, list[str]] | None:
    """What `--compress` says, as `compile` takes it: a list, or a map from module glob to one."""
    if not texts:
        return None
    entries: dict[str, list[str]] = {}
    for text in texts:
        head, equals, rest = text.partition("=")
        glob, codec = (head.strip(), rest.strip()) if equals and "{" not in head else ("*", text)
        entries.setdefault(glob, []).append(codec)
    return entries if set(entries) != {"*"} else entries["*"]


def budget_of(text: str | None) -> float | None:
    """What `--memory-budget` says: a whole number is bytes."""
    if text is None:
        return None
    try:
        return int(text) if text.strip().isdigit() else float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number", param_hint="--memory-budget") from None


def blocks_of(text: str) -> str | list[str]:
    """What `--blocks` says, as `compile` takes it."""
    return text if text in ("auto", "layers") else split_commas(text)
