"""Zeroth order, predictive coding, equilibrium and target propagation next to backpropagation on an MNIST MLP.

    GRAPHREWRITE_DATA=folder python benchmarks/energy_mnist.py --epochs 1

Same initial weights, same batches, interleaved steps, Adam for all. Test accuracy (of `compiled.predict`) after every
epoch; the median over steps of the step time divided by backpropagation's on the same batch; the measured peak of one
step, gradients included. Writes `results/energy_mnist.json`.
"""

from __future__ import annotations

import argparse
import itertools
import warnings

import torch
from common import write
from torch import nn

from graphrewrite import datasets
from graphrewrite.testing.memory import measured_peak
from graphrewrite.training import Budget, Split, side_by_side, take, train

RULES = [
    "bp",
    "predictive_coding{variant=exact}",
    "predictive_coding",
    "equilibrium_propagation{free_steps=20,nudged_steps=6}",
    "target_propagation",
    "zeroth_order",
    "zeroth_order{method=stein,queries=8}",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=None, help="data folder; default: the environment variable")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=2, help="hidden layers")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--samples", type=int, default=60_000, help="training images to use")
    parser.add_argument("--rules", nargs="+", default=RULES)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # that zeroth order asks few queries for many weights is what is measured here
    warnings.filterwarnings("ignore", message=".*times the squared gradient.*")
    data = datasets.mnist(given.data).flat()
    data = data._replace(train=take(data.train, torch.arange(min(given.samples, len(data.train.y)))))
    sizes = [784, *[given.width] * given.hidden]
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(given.width, 10))
    budget = Budget(epochs=given.epochs, batch=given.batch, rate=given.rate)
    example = Split(data.train.x[: given.batch], data.train.y[: given.batch])
    learners = side_by_side(model, given.rules, example, budget, blocks="layers")
    train(learners, data, budget)
    rows = []
    for one in learners:
        last = one.points[-1]
        row = {
            "rule": one.rule,
            "test accuracy by epoch": [round(point.accuracy, 4) for point in one.points],
            "points below bp": round(100 * (learners[0].points[-1].accuracy - last.accuracy), 2),
            "step time / bp": round(one.ratio_to(learners[0]), 3),
            "saved bytes": one.saved_bytes,
            "peak bytes": measured_peak(one.compiled.train(), example.x, example.y),
        }
        rows.append(row)
        print("  ".join(f"{k} {v}" for k, v in row.items()))
    setting = {k: v for k, v in vars(given).items() if k not in ("data", "rules")}
    print("written to", write("energy_mnist", [{"setting": setting}, *rows]))


if __name__ == "__main__":
    main()
