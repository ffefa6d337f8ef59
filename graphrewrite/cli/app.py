"""The command line's commands, and how their errors are shown.

Exit codes: 0 all went well; 1 an error, told in one line on stderr; 2 the command line itself cannot be understood.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from graphrewrite import __version__
from graphrewrite.cli import certify, compare, diff, dump, explain, inspect, listing, memory, new, schedule
from graphrewrite.cli.show import error_line
from graphrewrite.errors import GraphRewriteError

LOOK = "Look at a rewritten graph"
TRAIN = "Train"
EXTEND = "Extend"
LIST = "List what is known"

app = typer.Typer(
    name="graphrewrite",
    help="Change how a PyTorch model learns, by rewriting its backward graph.",
    epilog="TARGET is package.module:factory, path.py:factory or an exported .pt2 file. A factory takes no arguments "
    "and returns (model, example_inputs) or (model, example_inputs, example_targets).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def command(name: str, panel: str, function: Callable[..., None]) -> None:
    """Add a command; its errors become one line and exit code 1."""
    paragraphs = (function.__doc__ or "").split("\n\n")
    # one line each: otherwise the help keeps the line ends of the source
    help_text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    app.command(name, rich_help_panel=panel, help=help_text)(told_in_one_line(function))


def told_in_one_line(function: Callable[..., None]) -> Callable[..., None]:
    """Let errors end the command with one line on stderr and exit code 1; with `--debug` they keep their traceback."""

    @functools.wraps(function)
    def run(**arguments: Any) -> None:
        try:
            function(**arguments)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except GraphRewriteError as error:
            if arguments["debug"]:
                raise
            error_line(str(error))
        except Exception as error:
            # whatever the user's model raises: one line, the rest with --debug
            if arguments["debug"]:
                raise
            text = next(iter(str(error).splitlines()), "")
            error_line(f"{type(error).__name__}: {text}; run again with --debug for the traceback")
        else:
            return
        raise typer.Exit(1)

    return run


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"graphrewrite {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Change how a PyTorch model learns, by rewriting its backward graph."""


command("inspect", LOOK, inspect.inspect)
command("diff", LOOK, diff.diff)
command("explain", LOOK, explain.explain)
command("certify", LOOK, certify.certify)
command("memory", LOOK, memory.memory)
command("dump", LOOK, dump.dump)
command("schedule", LOOK, schedule.schedule)
command("compare", TRAIN, compare.compare)
command("demo", TRAIN, compare.demo)
command("new", EXTEND, new.new)
command("rules", LIST, listing.rules)
command("passes", LIST, listing.passes)
command("codecs", LIST, listing.codecs)


def main() -> None:
    """The entry point of the `graphrewrite` command."""
    for stream in (sys.stdout, sys.stderr):
        # formulas and plots are not ASCII: on a terminal that is, a question mark is better than an error
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app()
