"""`graphrewrite new`: a plugin package that installs, registers itself and passes its own tests."""

from __future__ import annotations

import keyword
import re
import string
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from graphrewrite.cli.options import Debug, Json
from graphrewrite.cli.show import print_json, print_lines
from graphrewrite.errors import GraphRewriteError

GROUPS = {"rule": "rules", "pass": "passes", "codec": "codecs"}


class Kind(StrEnum):
    """What a plugin can add."""

    rule = "rule"
    codec = "codec"
    pass_ = "pass"


def new(
    kind: Annotated[Kind, typer.Argument(help="What to add.", show_default=False)],
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Its registry name: lower case, digits, _.", show_default=False)
    ],
    into: Annotated[
        Path, typer.Option("--into", metavar="DIR", help="The folder in which the package's folder is made.")
    ] = Path(),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a plugin package: code that works as it is, an entry point, and tests.

    Install it with pip, and the name is known to `compile` and to this command.
    """
    name = name.replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise GraphRewriteError(f"{name!r} is no registry name", remedy="use lower-case letters, digits and _")
    _refuse_known(kind.value, name)
    distribution = "graphrewrite-" + name.replace("_", "-").strip("-")
    folder = into / distribution
    files = package(kind.value, name, distribution)
    try:
        folder.mkdir(parents=True)
        for place, text in files.items():
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / place).write_text(text, encoding="utf-8")
    except FileExistsError as error:
        raise GraphRewriteError(f"{folder} is there already", remedy="choose another name or --into DIR") from error
    except OSError as error:
        raise GraphRewriteError(f"cannot write {folder}: {error.strerror}", remedy="name another --into DIR") from error
    if as_json:
        print_json({"kind": kind.value, "name": name, "folder": str(folder), "files": list(files)})
        return
    print_lines([Text(str(folder), style="bold"), *[Text(f"  {place}") for place in files]])
    print_lines([Text(f"next: pip install -e '{folder}[test]' && pytest {folder}")])


def package(kind: str, name: str, distribution: str) -> dict[str, str]:
    """The files of a plugin package, by path."""
    from graphrewrite.cli import templates

    module = f"graphrewrite_{name}"
    words = name.strip("_").split("_")
    values = {
        "name": name,
        "kind": kind,
        "group": GROUPS[kind],
        "module": module,
        "distribution": distribution,
        "Class": "".join(word.capitalize() for word in words),
        "Title": " ".join(words).capitalize(),
    }
    values["usage"] = string.Template(templates.USAGE[kind]).substitute(values)
    code, test = templates.MODULES[kind]
    texts = {
        "pyproject.toml": templates.PYPROJECT,
        "README.md": templates.README,
        f"{module}/__init__.py": code,
        f"tests/test_{name}.py": test,
    }
    return {place: string.Template(text).substitute(values) for place, text in texts.items()}


def _refuse_known(kind: str, name: str) -> None:
    from graphrewrite import registry

    origin = registry.known(kind).get(name)  # type: ignore[arg-type]
    if origin is not None:
        raise GraphRewriteError(f"there is a {kind} named {name!r} already ({origin})", remedy="choose another name")
