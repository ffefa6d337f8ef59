"""Names -> rules, passes, codecs and backends: built in, registered in code, or found through entry points.

Built-in tables hold only import paths, so that listing names imports nothing.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
from collections.abc import Iterable
from typing import Any, Literal

from graphrewrite.errors import RuleError

Kind = Literal["rule", "pass", "codec", "backend"]

_GROUPS: dict[Kind, str] = {
    "rule": "graphrewrite.rules",
    "pass": "graphrewrite.passes",
    "codec": "graphrewrite.codecs",
    "backend": "graphrewrite.backends",
}
_TABLES: dict[Kind, tuple[str, ...]] = {
    "rule": ("graphrewrite.passes.rules",),
    "pass": ("graphrewrite.passes.cleanup", "graphrewrite.passes.schedule", "graphrewrite.passes"),
    "codec": ("graphrewrite.passes.compression",),
    "backend": ("graphrewrite.backends",),
}
_registered: dict[Kind, dict[str, Any]] = {kind: {} for kind in _GROUPS}


def register(kind: Kind, name: str, factory: Any) -> Any:
    """Make a rule, pass, codec or backend known under `name`, in this process."""
    _registered[kind][name] = factory
    return factory


def known(kind: Kind) -> dict[str, str]:
    """Registered names and where each comes from (`"built in"`, a distribution's name, or `"registered"`)."""
    names = dict.fromkeys(_builtin(kind), "built in")
    for entry in _entry_points(kind):
        names[entry.name] = entry.dist.name if entry.dist else "entry point"
    names.update(dict.fromkeys(_registered[kind], "registered"))
    return dict(sorted(names.items()))


def find(kind: Kind, name: str) -> Any:
    """The class or function behind a name.

    Raises:
        RuleError: Nothing of that kind has the name; the nearest names are listed.
    """
    if name in _registered[kind]:
        return _registered[kind][name]
    path = _builtin(kind).get(name)
    if path is not None:
        return load(path)
    for entry in _entry_points(kind):
        if entry.name == name:
            return entry.load()
    near = difflib.get_close_matches(name, known(kind), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known(kind))}"
    raise RuleError(f"no {kind} is named {name!r}", remedy=hint)


def load(path: str) -> Any:
    """The object behind `"package.module:qualname"`."""
    module, _, qualname = path.partition(":")
    held: Any = importlib.import_module(module)
    for part in qualname.split("."):
        held = getattr(held, part)
    return held


def _builtin(kind: Kind) -> dict[str, str]:
    table: dict[str, str] = {}
    for module in _TABLES[kind]:
        table.update(importlib.import_module(module).REGISTRY)
    return table


def _entry_points(kind: Kind) -> Iterable[importlib.metadata.EntryPoint]:
    return importlib.metadata.entry_points(group=_GROUPS[kind])
