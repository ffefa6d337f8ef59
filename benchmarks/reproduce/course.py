"""What the scripts of published figures share: a short trial, a progress bar, courses that interruptions keep."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.common import RESULTS, read
from graphrewrite.cli.show import progress
from graphrewrite.datasets import Dataset
from graphrewrite.training import Budget, Learner, steps_of, train


def arguments(description: str | None, *, seed: bool = False) -> argparse.ArgumentParser:
    """The options of all scripts; `seed` for those whose other seeds have files of their own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of data sets; default: the environment variable GRAPHREWRITE_DATA")
    parser.add_argument("--quick", action="store_true", help="a short trial; writes to results/quick")
    parser.add_argument("--resume", action="store_true", help="keep the rows that an interrupted run has written")
    if seed:
        text = "of weights, batches and feedback; another one than 0 writes a file of its own, *_seed<N>"
        parser.add_argument("--seed", type=int, default=0, help=text)
    return parser


def shorten(given: argparse.Namespace, **options: Any) -> None:
    """Options of a trial, if one was asked for."""
    if given.quick:
        vars(given).update(options)


def named(name: str, given: argparse.Namespace) -> str:
    """The result file: trials do not touch those that are kept, and other seeds have their own."""
    name = f"{name}_seed{given.seed}" if getattr(given, "seed", 0) else name
    return f"quick/{name}" if given.quick else name


def trained(
    name: str,
    learners: Sequence[Learner],
    data: Dataset,
    budget: Budget,
    on_point: Callable[[], None] | None = None,
) -> None:
    """`train` with a progress bar; called again after an interruption, it goes on behind the last whole epoch."""
    kept = RESULTS / "interrupted" / f"{name}.pt"
    with progress(name, steps_of(data.train, budget)) as advance:
        train(learners, data, budget, on_step=advance, on_point=on_point, checkpoint=kept)


def before(name: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the result file, with `--resume`."""
    return read(name) if given.resume else []


def having(rows: list[dict[str, Any]], **entries: Any) -> dict[str, Any] | None:
    """The first row with these entries."""
    return next((row for row in rows if all(row.get(key) == held for key, held in entries.items())), None)


def without(given: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The setting that a result file states: the options, without those that do not change what is measured."""
    return {key: held for key, held in vars(given).items() if key not in ("data", "quick", "resume", "seed", *names)}
