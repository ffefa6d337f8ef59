"""`graphrewrite dump`: every intermediate graph as runnable Python."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from graphrewrite.cli.options import Blocks, Debug, Json, Loss, Rule, Seed, Target, one_rule
from graphrewrite.cli.show import print_json, print_lines


def dump(
    target: Target,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where to; it is made if there is none.", show_default=False)
    ],
    rule: Rule = None,
    blocks: Blocks = "auto",
    loss: Loss = None,
    as_json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Write every intermediate graph as readable, runnable Python, with its metadata as JSON.

    GRAPHREWRITE_DUMP=DIR in the environment does the same inside a training script.
    """
    wanted = one_rule(rule)

    import json

    from graphrewrite.cli.targets import load_target
    from graphrewrite.observe import observing
    from graphrewrite.report.dump import Dumper

    loaded = load_target(target, blocks=blocks, loss=loss, seed=seed)
    dumper = Dumper(folder)
    with observing(dumper):
        loaded.compile(wanted)
    programs = [(place, json.loads((place / "program.json").read_text(encoding="utf-8"))) for place in dumper.written]
    if as_json:
        print_json({"target": target, "programs": [{"folder": str(place), **about} for place, about in programs]})
        return
    for place, about in programs:
        print_lines([Text(str(place), style="bold")])
        for step in about["steps"]:
            print_lines(
                [
                    Text(
                        f"  {step['file']}  after {step['step']}"
                        if step["modified"]
                        else f"  {step['step']} changed nothing"
                    )
                ]
            )
        print_lines([Text(f"  {file}  as it runs") for file in ("operator.py", *about["stages"])])
