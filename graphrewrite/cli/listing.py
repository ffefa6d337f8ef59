"""`graphrewrite rules`, `passes` and `codecs`: what the registry knows."""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import TYPE_CHECKING, Any

from rich.text import Text

from graphrewrite.cli.options import Debug, Json
from graphrewrite.cli.show import print_json, print_lines, print_table, row, table

if TYPE_CHECKING:
    from graphrewrite.registry import Kind


def rules(as_json: Json = False, debug: Debug = False) -> None:
    """List the learning rules: what each does, its formula, its paper and its options."""
    entries = catalogue("rule", ("summary", "formula", "paper", "objective", "needs_loss", "changes_forward"))
    if as_json:
        print_json({"rules": entries})
        return
    overview = table(["rule", "objective", "trains through", "from", "summary"])
    for entry in entries:
        through = "loss() only" if entry["needs_loss"] else "loss() or the model"
        row(overview, entry["name"], entry["objective"], through, entry["origin"], entry["summary"])
    print_table("", overview)
    for entry in entries:
        about = [Text(f"  {key:<8} {entry[key]}") for key in ("formula", "paper") if entry[key]]
        print_lines([Text(entry["name"], style="bold cyan"), *about, _options(entry), Text("")])


def passes(as_json: Json = False, debug: Debug = False) -> None:
    """List the other passes: clean-up, schedules, and what plugins add."""
    entries = catalogue("pass", ("summary", "paper", "level", "preserves_numerics"))
    if as_json:
        print_json({"passes": entries})
        return
    overview = table(["pass", "level", "numerics", "from", "summary"])
    for entry in entries:
        numerics = "preserved" if entry["preserves_numerics"] else "may change"
        row(overview, entry["name"], entry["level"], numerics, entry["origin"], entry["summary"])
    print_table("", overview)
    for entry in entries:
        if entry["options"]:
            print_lines([Text(entry["name"], style="bold cyan"), _options(entry), Text("")])


def codecs(as_json: Json = False, debug: Debug = False) -> None:
    """List the codecs: how a saved tensor can be stored."""
    entries = catalogue("codec", ("summary", "paper"))
    if as_json:
        print_json({"codecs": entries})
        return
    overview = table(["codec", "from", "summary"])
    for entry in entries:
        row(overview, entry["name"], entry["origin"], entry["summary"] or "")
    print_table("", overview)
    for entry in entries:
        if entry["options"]:
            print_lines([Text(entry["name"], style="bold cyan"), _options(entry), Text("")])


def catalogue(kind: Kind, attributes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Every registered rule, pass or codec: its name, where it comes from, class attributes and options.

    One that cannot be loaded (a plugin that lacks something) is listed with the reason as its summary.
    """
    from graphrewrite import registry

    entries = []
    for name, origin in registry.known(kind).items():
        entry: dict[str, Any] = {"name": name, "origin": origin, **dict.fromkeys(attributes), "options": {}}
        try:
            found = registry.find(kind, name)
        except Exception as error:  # noqa: BLE001  a plugin may raise anything when imported
            entry["summary"] = f"cannot be loaded: {type(error).__name__}: {error}"
        else:
            entry.update({key: _plain(getattr(found, key, None)) for key in attributes})
            # what has no summary is told by the first line of its docstring
            entry["summary"] = entry["summary"] or (inspect.getdoc(found) or "").partition("\n")[0].rstrip(".")
            entry["options"] = options_of(found)
        entries.append(entry)
    return entries


def options_of(found: Any) -> dict[str, Any]:
    """The options of a pass with their defaults."""
    if not dataclasses.is_dataclass(found):
        return {}
    return {field.name: _plain(_default(field)) for field in dataclasses.fields(found) if field.init}


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else "required"


def _plain(held: Any) -> Any:
    """What JSON can hold of a value; a property that depends on options is told as such."""
    if isinstance(held, property):
        return "depends on options"
    if isinstance(held, (tuple, list)):
        return [_plain(v) for v in held]
    return held if isinstance(held, (bool, int, float, str, type(None))) else str(held)


def _options(entry: dict[str, Any]) -> Text:
    shown = ", ".join(f"{name}={json.dumps(default)}" for name, default in entry["options"].items())
    return Text(f"  options  {shown or 'none'}")
