"""Test error on MNIST of each rule next to backpropagation, all on the same net.

    python -m benchmarks.reproduce.learning --data FOLDER
    python -m benchmarks.reproduce.learning --data FOLDER --setting full --rules ff

`--setting small` takes minutes for each rule on two cores: 784-500-500-10, Adam, the same for all rules.
`--setting full` is Forward-Forward as published: three layers of 1000 units whose weights start at N(0, 1/n_out),
SGD with momentum on 50,000 images for 100 epochs, the rate falling in the second half, and a linear read-out of all
hidden layers but the first with a rate of its own. (`--layers 4 --width 2000 --epochs 60` is the net of Hinton's
paper.) The other rules get the same net, batches and epochs, with Adam.

The error is that after the last epoch, not the best one; `seconds` are those of the steps, and depend on what else the
machine does. Writes `results/learning.json`, for the full setting `results/learning_full.json`.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.common import write
from benchmarks.reproduce.course import arguments, before, having, named, shorten, trained
from graphrewrite import datasets
from graphrewrite.datasets import Dataset, Split
from graphrewrite.textform import split_commas
from graphrewrite.training import Budget, Learner, side_by_side, take


@dataclass(frozen=True)
class Setting:
    """A net and how long to train it.

    Attributes:
        width: Units of each hidden layer.
        layers: How many hidden layers.
        epochs: Passes over the training set.
        samples: Training images used, from the first one on.
        rules: Rule name -> the text form that is trained.
    """

    width: int
    layers: int
    epochs: int
    samples: int
    rules: dict[str, str]


SETTINGS = {
    "small": Setting(500, 2, 20, 60_000, {"bp": "bp", "dfa": "dfa", "ff": "ff{threshold=0.3}"}),
    "full": Setting(1000, 3, 100, 50_000, {"bp": "bp", "dfa": "dfa", "ff": "ff{readout=all}"}),
}
BATCH, RATE = 100, 1e-3


def net(widths: list[int], *, published: bool) -> nn.Sequential:
    """Linear layers with ReLU between them; `published`: weights N(0, std 1 / sqrt(n_out)) and no bias at first."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        linear = nn.Linear(inputs, outputs)
        if published:
            nn.init.normal_(linear.weight, std=1 / math.sqrt(outputs))
            nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def published_optimizer(learner: Learner) -> torch.optim.Optimizer:
    """SGD with momentum; the read-out has a rate and a decay of its own."""
    named = dict(learner.compiled.named_parameters())
    head = [p for name, p in named.items() if "readout" in name]
    rest = [p for name, p in named.items() if "readout" not in name]
    groups = [{"params": rest, "lr": 1e-3, "weight_decay": 3e-4}, {"params": head, "lr": 1e-2, "weight_decay": 3e-3}]
    return torch.optim.SGD(groups, lr=1e-3, momentum=0.9)


def run(name: str, given: argparse.Namespace, setting: Setting, data: Dataset) -> dict[str, Any]:
    """Train one rule; its row."""
    torch.manual_seed(given.seed)
    published = given.setting == "full" and name == "ff"
    widths = [784, *[setting.width] * setting.layers, 10]
    budget = Budget(setting.epochs, BATCH, RATE, cooldown=0.5 if given.setting == "full" else 1.0, seed=given.seed)
    model = net(widths, published=published).to(given.device)
    example = take(data.train, torch.arange(BATCH))
    (learner,) = side_by_side(model, [setting.rules.get(name, name)], example, budget, blocks="layers")
    if published:
        learner.optimizer = published_optimizer(learner)
    started = time.perf_counter()
    trained(f"{named(file_of(given), given)}_{name}", [learner], data, budget, report(learner, started))
    return {
        "setting": given.setting,
        "rule": learner.rule,
        "net": "-".join(map(str, widths)),
        "optimizer": "SGD, momentum 0.9" if published else f"Adam, {RATE:g}",
        "epochs": budget.epochs,
        "batch": BATCH,
        "training_samples": len(data.train.y),
        "seed": given.seed,
        "test_error_percent": round(100 * (1 - learner.points[-1].accuracy), 2),
        "seconds": round(sum(learner.seconds)),
        "saved_bytes": learner.saved_bytes,
        "course": [[p.epoch, round(100 * (1 - p.accuracy), 2)] for p in learner.points],
    }


def report(learner: Learner, started: float) -> Callable[[], None]:
    """Prints the newest measurement of a learner."""

    def on_point() -> None:
        point = learner.points[-1]
        print(
            f"{learner.rule:<20} epoch {point.epoch:>3}   test error {100 * (1 - point.accuracy):5.2f} %   "
            f"loss {point.loss:.4f}   {time.perf_counter() - started:6.0f} s",
            flush=True,
        )

    return on_point


def prepared(data: Dataset, samples: int, device: str) -> Dataset:
    """Vectors on the device, the first `samples` of the training set."""
    flat = data.flat()
    parts = [Split(part.x.to(device), part.y.to(device)) for part in flat]
    return Dataset(Split(parts[0].x[:samples], parts[0].y[:samples]), parts[1])


def file_of(given: argparse.Namespace) -> str:
    """The name of the result file."""
    return "learning" if given.setting == "small" else "learning_full"


def main() -> None:
    parser = arguments(__doc__, seed=True)
    parser.add_argument("--setting", choices=SETTINGS, default="small")
    parser.add_argument("--rules", default="bp,dfa,ff", help="names or text forms, commas between")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    held = SETTINGS[given.setting]
    shorten(given, epochs=1)
    samples = 1000 if given.quick else held.samples
    setting = Setting(
        given.width or held.width, given.layers or held.layers, given.epochs or held.epochs, samples, held.rules
    )
    data = prepared(datasets.mnist(given.data), setting.samples, given.device)
    rows: list[dict[str, Any]] = []
    held_rows = before(named(file_of(given), given), given)
    for name in split_commas(given.rules):
        rule = setting.rules.get(name, name)
        row = having(held_rows, rule=rule, epochs=setting.epochs, seed=given.seed)
        rows.append(row or run(name, given, setting, data))
        path = write(named(file_of(given), given), rows)
    for row in rows:
        print(f"{row['rule']:<20} {row['test_error_percent']:5.2f} % test error in {row['seconds']} s")
    print("written to", path)


if __name__ == "__main__":
    main()
