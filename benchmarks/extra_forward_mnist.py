"""Rules without a backward next to backpropagation on an MNIST MLP: same initial weights, same batches.

    GRAPHREWRITE_DATA=folder python benchmarks/extra_forward_mnist.py --epochs 1 --rules bp pepita forward_gradient

Test accuracy after every epoch, the median over steps of the step time divided by backpropagation's on the same batch,
bytes saved between forward and backward, and the measured peak of one step, the gradients subtracted. A rate of its own
is written behind the rule: `pepita@0.01`. Writes `results/extra_forward_mnist.json`, or `--name`.
"""

from __future__ import annotations

import argparse
import itertools
import warnings

import torch
from common import write
from torch import nn

from graphrewrite import datasets
from graphrewrite.testing.memory import gradient_bytes, measured_peak
from graphrewrite.training import Budget, Split, side_by_side, take, train

RULES = [
    "bp",
    "pepita",
    "foton",
    "forward_gradient{perturb=weights}",
    "forward_gradient",
    "forward_gradient{tangents=4}",
    "forward_gradient{perturb=weights,guess=local}",
    "likelihood_ratio",
    "likelihood_ratio{samples=4}",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=None, help="data folder; default: the environment variable")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=2, help="hidden layers")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--samples", type=int, default=60_000, help="training images to use")
    parser.add_argument("--name", default="extra_forward_mnist", help="of the result file")
    parser.add_argument("--rules", nargs="+", default=RULES)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # one direction for a wide net is what is to be measured here
    warnings.filterwarnings("ignore", message=".*the predicted variance.*")
    data = datasets.mnist(given.data).flat()
    data = data._replace(train=take(data.train, torch.arange(min(given.samples, len(data.train.y)))))
    sizes = [784, *[given.width] * given.hidden]
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(given.width, 10))
    rules = [text.partition("@")[0] for text in given.rules]
    rates = {}
    for rule, text in zip(rules, given.rules, strict=True):
        if "@" in text:
            rates[rule.partition("{")[0]] = float(text.partition("@")[2])
    budget = Budget(epochs=given.epochs, batch=given.batch, rate=given.rate, rates=rates)
    example = Split(data.train.x[: given.batch], data.train.y[: given.batch])
    learners = side_by_side(model, rules, example, budget, blocks="layers")
    train(learners, data, budget)
    rows = []
    for one in learners:
        last = one.points[-1]
        peak = measured_peak(one.compiled.train(), example.x, example.y) - gradient_bytes(one.compiled)
        row = {
            "rule": one.rule,
            "test accuracy by epoch": [round(point.accuracy, 4) for point in one.points],
            "points below bp": round(100 * (learners[0].points[-1].accuracy - last.accuracy), 2),
            "step time / bp": round(one.ratio_to(learners[0]), 3),
            "saved bytes": one.saved_bytes,
            "peak bytes beside gradients": peak,
        }
        rows.append(row)
        print("  ".join(f"{k} {v}" for k, v in row.items()))
    setting = {k: v for k, v in vars(given).items() if k not in ("data", "rules", "name")}
    print("written to", write(given.name, [{"setting": {**setting, "rates": rates}}, *rows]))


if __name__ == "__main__":
    main()
