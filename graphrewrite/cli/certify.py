"""`graphrewrite certify`: what is proved about the graphs of a model under several rules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from graphrewrite.cli.options import Blocks, Debug, Json, Loss, Rule, Seed, Target, several_rules
from graphrewrite.cli.show import human_bytes, print_json, print_lines, print_table, row, table, yes_no
from graphrewrite.errors import GraphRewriteError

if TYPE_CHECKING:
    from graphrewrite.analysis.certificates import Certificates
    from graphrewrite.runtime.module import CompiledModule


WITHOUT_TARGETS = (
    "The target gives no targets, so the graph holds no loss: the cotangent of the output comes from outside, and what "
    "must have run before it is there is not counted. With targets, a rule that uses the global error is update locked."
)


def certify(
    target: Target,
    rule: Rule = None,
    paths: Annotated[bool, typer.Option("--paths", help="The chain of nodes that proves each property.")] = False,
    blocks: Blocks = "auto",
    loss: Loss = None,
    as_json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Prove weight transport, backward and update locking, locality and use of the global error, for each rule.

    Without --rule, for every rule there is; those that are not defined on the model are listed with the reason.
    """
    wanted = several_rules(rule)

    from graphrewrite import registry
    from graphrewrite.cli.targets import load_target
    from graphrewrite.report.certificates import to_json

    loaded = load_target(target, blocks=blocks, loss=loss, seed=seed)
    found: dict[str, Certificates] = {}
    refused: dict[str, str] = {}
    for one in wanted or list(registry.known("rule")):
        try:
            compiled: CompiledModule = loaded.compile(one)
        except GraphRewriteError as error:
            if wanted:
                raise
            refused[str(one)] = error.message
            continue
        report = compiled.report()
        found[report.rule] = report.certificates
    if as_json:
        print_json(
            {
                "target": target,
                "has_loss": loaded.targets is not None,
                "rules": [to_json(name, c) for name, c in found.items()],
                "refused": refused,
            }
        )
        return
    _print(found, refused, paths)
    if loaded.targets is None and any(not held.update_locked for held in found.values()):
        print_lines([Text(WITHOUT_TARGETS, style="yellow")])


def _print(found: dict[str, Certificates], refused: dict[str, str], paths: bool) -> None:
    from graphrewrite.report.certificates import PROPERTIES

    heads = [name.replace("_", " ") for name in PROPERTIES]
    numbers = ["radius", "forward passes", "saved"]
    overview = table(["rule", *heads, *numbers], right=numbers)
    for name, held in found.items():
        saved = human_bytes(sum(held.saved_bytes.values()))
        answers = [yes_no(getattr(held, p)) for p in PROPERTIES]
        row(overview, name, *answers, held.locality_radius, held.forward_passes, saved)
    print_table("", overview)
    for name, reason in refused.items():
        print_lines([Text(f"{name} is not defined on this model: {reason}", style="dim"), Text("")])
    for name, held in found.items():
        by_block = table(["block", *heads, "radius", "saved"], right=["radius", "saved"])
        for block in held.blocks:
            answers = [yes_no(bool(getattr(block, p))) for p in PROPERTIES]
            saved = human_bytes(held.saved_bytes.get(block.block, 0))
            row(by_block, block.block, *answers, block.locality_radius, saved)
        print_table(name, by_block)
        if paths:
            _print_paths(held)


def _print_paths(held: Certificates) -> None:
    from graphrewrite.report.certificates import PROPERTIES

    for block in held.blocks:
        for name in PROPERTIES:
            path = getattr(block, name).path
            if path:
                head = Text(f"  {block.block}: {name.replace('_', ' ')}, because", style="bold")
                print_lines([head, *[Text(f"    {'reads ' if i else ''}{step}") for i, step in enumerate(path)]])
    print_lines([Text("")])
