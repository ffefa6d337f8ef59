"""What all commands print with: consoles, tables, numbers, progress on terminals."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

PIPED_WIDTH = 240
"""Columns where the output is no terminal: wide enough that tables keep their words whole."""


def console() -> Console:
    """The console of results."""
    # looked at when used: tests and callers may have replaced sys.stdout
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)


def messages() -> Console:
    """The console of errors and progress: stderr."""
    return Console(stderr=True, highlight=False, markup=False)


def error_line(text: str) -> None:
    """Print an error in one line."""
    message, _, remedy = text.partition("\n  remedy: ")
    line = " ".join(message.split()) + (f"; remedy: {' '.join(remedy.split())}" if remedy else "")
    out = messages()
    out.print(Text("error: ", style="bold red") + Text(line), soft_wrap=True)


def print_json(data: Any) -> None:
    """Print data as JSON."""
    sys.stdout.write(json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def table(columns: Sequence[str], *, right: Sequence[str] = ()) -> Table:
    """An empty table; columns named in `right` are aligned to the right."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        side: Literal["left", "right"] = "right" if column in right else "left"
        made.add_column(Text(column), justify=side, header_style="bold", overflow="fold")
    return made


def print_table(title: str, shown: Table) -> None:
    """Print a table with a title above it, and an empty line below."""
    out = console()
    if title:
        out.print(Text(title, style="bold"), soft_wrap=True)
    # rich fills every line up to the width of its table
    with out.capture() as printed:
        out.print(shown)
    sys.stdout.write("\n".join(line.rstrip() for line in printed.get().splitlines()) + "\n\n")


def row(into: Table, *cells: Any, style: str | None = None) -> None:
    """Add a row; what is no `Text` is shown as it is, brackets included."""
    into.add_row(*[cell if isinstance(cell, Text) else Text(str(cell)) for cell in cells], style=style)


def yes_no(holds: bool) -> Text:
    """A property, in a colour for each answer."""
    return Text("yes", style="yellow") if holds else Text("no", style="green")


def human_bytes(count: float) -> str:
    """`1536` -> `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def human_count(count: float) -> str:
    """`1536000` -> `1.54 M`."""
    for unit in ("", " k", " M"):
        if abs(count) < 1000:
            return f"{count:.0f}" if not unit else f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} G"


def print_lines(lines: Sequence[RenderableType]) -> None:
    """Print lines that may be longer than the terminal is wide: they are never cut."""
    out = console()
    for line in lines:
        out.print(line, soft_wrap=True)


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Say on a terminal what takes a while."""
    out = messages()
    if not out.is_terminal:
        yield
        return
    with out.status(what):
        yield


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on a terminal; gives the function to call after each of `total` steps."""
    out = messages()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=out,
        transient=True,
        disable=not out.is_terminal,
    )
    with bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)
