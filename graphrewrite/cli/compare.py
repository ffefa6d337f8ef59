"""`graphrewrite compare` and `graphrewrite demo`: train one model under several rules, side by side."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from graphrewrite.cli.options import Blocks, Debug, Html, Json, Loss, Seed, blocks_of
from graphrewrite.cli.show import (
    human_bytes,
    messages,
    print_json,
    print_lines,
    print_table,
    progress,
    row,
    table,
    working,
    yes_no,
)
from graphrewrite.errors import GraphRewriteError, RuleError
from graphrewrite.textform import split_commas

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from graphrewrite.cli.targets import Target
    from graphrewrite.datasets import Dataset
    from graphrewrite.report.comparison import Comparison
    from graphrewrite.training import Budget, Learner

RULES = ("bp", "dfa", "ff{threshold=0.3}")
"""What is compared if nothing is said. The first one is the reference."""

EPOCHS = {"digits": 100, "mnist": 5, "": 50}
"""Passes over each data set, and over what a target brings along."""

SHOWN_BLOCKS = 8
"""Alignment is printed for each of so many blocks; beyond, the lowest and the mean are."""


class DataName(StrEnum):
    """The data sets that `compare` knows."""

    digits = "digits"
    mnist = "mnist"


def compare(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="TARGET", help="What to train, as for inspect; default: a small net.", show_default=False
        ),
    ] = None,
    rules: Annotated[
        str | None,
        typer.Option("--rules", metavar="RULES", help=f"Rules with commas between; default: {','.join(RULES)}."),
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="Passes over the training set.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=2, help="Samples per step.")] = 64,
    rate: Annotated[float, typer.Option("--rate", min=0.0, help="Learning rate of Adam at the start.")] = 3e-3,
    dataset: Annotated[
        DataName | None, typer.Option("--dataset", help="Data to train on; default: the target's own, else digits.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", metavar="FOLDER", help="The folder that holds mnist/; GRAPHREWRITE_DATA names it as well."
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads of torch; default: 1 for the net on digits.")
    ] = None,
    html: Html = None,
    blocks: Blocks = "auto",
    loss: Loss = None,
    as_json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Train a model under several rules: accuracy, step time, saved bytes, alignment with backpropagation.

    Without TARGET, a small net on scikit-learn's digits, or on MNIST from a folder. A target is trained on its own
    inputs and targets (a fifth is held out if there are a hundred samples or more), or on the data set named.
    """
    from graphrewrite.training import Budget, hold_out

    _check_writable(html)
    name = dataset or (DataName.mnist if data else DataName.digits if target is None else None)
    budget = Budget(epochs or EPOCHS[name or ""], batch, rate, seed=seed)
    loaded = _target(target, name, blocks, loss, seed)
    if name is not None:
        found = _fit(_load(name, data), loaded)
        described, judged_on = _describe(name, found), "test set"
    else:
        from graphrewrite.datasets import Dataset, Split

        if loaded.targets is None:
            raise GraphRewriteError(
                f"{loaded.name} gives no targets to train on",
                remedy="return (model, example_inputs, example_targets), or name a data set with --dataset",
            )
        own = Split(loaded.inputs, loaded.targets)
        held_out = hold_out(own, seed=seed)
        found = held_out or Dataset(own, own)
        described, judged_on = "the target's own batch", "held-out fifth" if held_out else "training set"
    with _threads(threads or (1 if target is None and name is DataName.digits else None)):
        _run(loaded, found, budget, split_commas(rules or ""), described, judged_on, html, as_json)


def demo(
    html: Html = Path("graphrewrite-demo.html"),
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes over the training set.")] = EPOCHS["digits"],
    as_json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Train a small net on real handwritten digits under backpropagation and other rules, and write the curves."""
    compare(None, epochs=epochs, html=html, as_json=as_json, seed=seed)


def _run(
    loaded: Target,
    data: Dataset,
    budget: Budget,
    rules: list[str],
    described: str,
    judged_on: str,
    html: Path | None,
    as_json: bool,
) -> None:
    from graphrewrite.report.comparison import conclude
    from graphrewrite.training import steps_of, train

    started = time.perf_counter()
    learners = _learners(loaded, data, budget, rules)
    with progress(f"training {loaded.name}", steps_of(data.train, budget)) as advance:
        train(learners, data, budget, on_step=advance)
    seconds = time.perf_counter() - started
    held = conclude(learners, budget, model=loaded.name, data=described, judged_on=judged_on, seconds=seconds)
    if html is not None:
        from graphrewrite.report.html import comparison_page

        try:
            html.write_text(comparison_page(held), encoding="utf-8")
        except OSError as error:
            raise GraphRewriteError(f"cannot write {html}: {error.strerror}", remedy="name another file") from error
    if as_json:
        print_json(held.to_json())
    else:
        _print(held, html)


def _learners(loaded: Target, data: Dataset, budget: Budget, rules: list[str]) -> list[Learner]:
    """Compile a copy for each rule, backpropagation first; of the rules nobody asked for, those that do not fit go."""
    import torch

    from graphrewrite.training import sample_count, side_by_side, take

    asked = rules or list(RULES)
    if asked[0] != "bp":
        asked = ["bp", *(rule for rule in asked if rule != "bp")]
    count = sample_count(data.train)
    example = take(data.train, torch.arange(min(count, budget.batch))) if count else data.train
    learners: list[Learner] = []
    for rule in asked:
        try:
            with working(f"compiling {loaded.name} under {rule}"):
                learners += side_by_side(loaded.model, [rule], example, budget, blocks=loaded.blocks, loss=loaded.loss)
        except RuleError as error:
            if rules or rule == "bp":
                raise
            messages().print(Text(f"{rule} is left out: {error.message}"), soft_wrap=True)
    return learners


# --- what to train ---------------------------------------------------------------------------------------------------


def _target(text: str | None, name: DataName | None, blocks: str, loss: str | None, seed: int) -> Target:
    from graphrewrite.cli.targets import Target, find_object, load_target

    if text is not None:
        return load_target(text, blocks=blocks, loss=loss, seed=seed)
    widths = (784, 256, 256, 10) if name is DataName.mnist else (64, 128, 128, 10)
    loss_fn = None if loss is None else find_object(loss, "function")
    return Target(f"net {'-'.join(map(str, widths))}", _net(widths, seed), None, None, blocks_of(blocks), loss_fn, seed)


def _net(widths: Sequence[int], seed: int) -> nn.Module:
    """Linear layers with ReLU between them."""
    import torch
    from torch import nn

    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _load(name: DataName, folder: Path | None) -> Dataset:
    from graphrewrite import datasets

    with working(f"reading {name.value}"):
        return datasets.digits() if name is DataName.digits else datasets.mnist(folder)


def _fit(data: Dataset, loaded: Target) -> Dataset:
    """Images in the shape of the target's example input; vectors for the built-in nets."""
    import torch

    from graphrewrite.datasets import Dataset, Split
    from graphrewrite.inputs import as_inputs

    if loaded.inputs is None:
        return data.flat()
    inputs = as_inputs(loaded.inputs)
    example = inputs.args[0] if len(inputs.args) == 1 and not inputs.kwargs else None
    shape = tuple(example.shape[1:]) if isinstance(example, torch.Tensor) else ()
    image = data.train.x[0]
    if not isinstance(example, torch.Tensor) or not example.is_floating_point() or example[0].numel() != image.numel():
        wanted = f"a batch of shape (n, {', '.join(map(str, shape))})" if shape else "other inputs"
        raise GraphRewriteError(
            f"{loaded.name} takes {wanted}, the images are {' x '.join(map(str, image.shape))}",
            remedy="name a target that takes one floating-point image or vector of that size",
        )

    def fit(split: Split) -> Split:
        return Split(split.x.reshape(-1, *shape), split.y)

    return Dataset(fit(data.train), fit(data.test))


def _describe(name: DataName, data: Dataset) -> str:
    return f"{name.value}, {len(data.train.y)} training and {len(data.test.y)} test samples"


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Run with so many threads of torch: products of a few thousand numbers only lose by being shared out."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_writable(path: Path | None) -> None:
    """Find out before the training, not after it."""
    if path is None:
        return
    existed = path.exists()
    try:
        path.open("a").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise GraphRewriteError(
            f"cannot write {path}: {error.strerror}", remedy="name a file in a folder that exists"
        ) from error


# --- printing --------------------------------------------------------------------------------------------------------


def _print(held: Comparison, html: Path | None) -> None:
    from graphrewrite.report.certificates import PROPERTIES

    budget = held.budget
    setting = (
        f"{held.data}; {budget.epochs} epochs, batches of {budget.batch}, seed {budget.seed}, {held.seconds:.0f} s"
    )
    print_lines([Text(f"{held.model} ({held.parameters:,} parameters) on {setting}", style="bold"), Text("")])
    numbers = [f"accuracy ({held.judged_on})", "points to bp", "step time / bp", "saved"]
    results = table(["rule", *numbers], right=numbers)
    for r in held.results:
        gap = f"{100 * (r.accuracy - held.results[0].accuracy):+.2f}"
        row(results, r.rule, f"{100 * r.accuracy:.2f} %", gap, f"{r.step_ratio:.2f}", human_bytes(r.saved_bytes))
    print_table("", results)
    numbers = ["radius", "forward passes"]
    proved = table(["rule", *(p.replace("_", " ") for p in PROPERTIES), *numbers], right=numbers)
    for r in held.results:
        row(proved, r.rule, *(yes_no(r.certificates[p]) for p in PROPERTIES), r.locality_radius, r.forward_passes)
    print_table("proved on the graph", proved)
    print_table("cosine of each block's gradient to backpropagation's, at the end", _alignment(held))
    if html is not None:
        print_lines([Text(f"curves: {html}")])


def _alignment(held: Comparison) -> Table:
    blocks = held.blocks
    columns = list(blocks) if len(blocks) <= SHOWN_BLOCKS else ["lowest", "mean"]
    made = table(["rule", *columns], right=columns)
    for r in held.results:
        cosines = [r.alignment.get(block, math.nan) for block in blocks]
        if len(blocks) > SHOWN_BLOCKS:
            known = [c for c in cosines if not math.isnan(c)] or [math.nan]
            cosines = [min(known), sum(known) / len(known)]
        row(made, r.rule, *("-" if math.isnan(c) else f"{c:+.3f}" for c in cosines))
    return made
