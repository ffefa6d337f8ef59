"""Local rules next to backpropagation on an MNIST MLP: same initial weights, same batches, interleaved steps.

    GRAPHREWRITE_DATA=folder python -m benchmarks.reproduce.local_mnist --epochs 2

Test accuracy after every epoch, and the median over steps of the step time divided by backpropagation's on the same
batch. Every rule, backpropagation too, has the learning rate of `--rates` that is best after `--tune-epochs` on 10,000
training images, judged on the last 5,000 training images, which no run trains on. Writes `results/local_mnist.json`,
or `--name`.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import nn

from benchmarks.common import write
from benchmarks.reproduce.course import arguments, named, shorten, trained, without
from graphrewrite import datasets
from graphrewrite.datasets import Dataset
from graphrewrite.training import Budget, Split, side_by_side, take, train

RULES = ["bp", "mono_forward", "local_loss{head=predsim}", "lls"]


HELD_OUT = 5_000


def tuned(model: nn.Module, rules: list[str], data: Dataset, rates: list[float], budget: Budget) -> dict[str, float]:
    """Rule name -> the rate with the best accuracy on the held-out images."""
    best: dict[str, tuple[float, float]] = {}
    example = take(data.train, torch.arange(budget.batch))
    for rate in rates:
        learners = side_by_side(model, rules, example, dataclasses.replace(budget, rate=rate))
        train(learners, data, budget)
        for one, rule in zip(learners, rules, strict=True):
            name = rule.partition("{")[0]
            best[name] = max(best.get(name, (0.0, 0.0)), (one.points[-1].accuracy, rate))
            print(f"{rule} at {rate}: {one.points[-1].accuracy:.4f} on held-out images", flush=True)
    return {name: rate for name, (_, rate) in best.items()}


def main() -> None:
    parser = arguments(__doc__, seed=True)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=3, help="hidden layers")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--tune-epochs", type=int, default=3)
    parser.add_argument("--samples", type=int, default=55_000, help="training images to use")
    parser.add_argument("--activation", choices=["relu", "elu", "tanh"], default="relu")
    parser.add_argument("--batch-norm", action="store_true", help="a batch norm behind each hidden layer")
    parser.add_argument("--rules", nargs="+", default=RULES)
    parser.add_argument("--name", default="local_mnist", help="of the result file")
    given = parser.parse_args()
    shorten(given, epochs=1, tune_epochs=1, samples=1000, rates=given.rates[:1])
    torch.set_num_threads(1)
    torch.manual_seed(given.seed)
    data = datasets.mnist(given.data).flat()
    held_out = take(data.train, torch.arange(60_000 - HELD_OUT, 60_000))
    data = data._replace(train=take(data.train, torch.arange(min(given.samples, 60_000 - HELD_OUT))))
    sizes = [784, *[given.width] * given.hidden]
    norm = nn.BatchNorm1d if given.batch_norm else nn.Identity
    # one block each: with `layers`, a norm would be a block of its own
    activation = {"relu": nn.ReLU, "elu": nn.ELU, "tanh": nn.Tanh}[given.activation]
    layers = [nn.Sequential(nn.Linear(a, b), norm(b), activation()) for a, b in itertools.pairwise(sizes)]
    model = nn.Sequential(*layers, nn.Linear(given.width, 10))
    screen = Dataset(take(data.train, torch.arange(min(10_000, given.samples))), held_out)
    rates = tuned(model, given.rules, screen, given.rates, Budget(given.tune_epochs, given.batch, seed=given.seed))
    budget = Budget(epochs=given.epochs, batch=given.batch, rates=rates, seed=given.seed)
    example = Split(data.train.x[: given.batch], data.train.y[: given.batch])
    learners = side_by_side(model, given.rules, example, budget)
    trained(named(given.name, given), learners, data, budget)
    rows = []
    for rule, one in zip(given.rules, learners, strict=True):
        last = one.points[-1]
        row = {
            "rule": rule,
            "rate": rates[rule.partition("{")[0]],
            "test accuracy by epoch": [round(point.accuracy, 4) for point in one.points],
            "points below bp": round(100 * (learners[0].points[-1].accuracy - last.accuracy), 2),
            "step time / bp": round(one.ratio_to(learners[0]), 3),
            "saved bytes": one.saved_bytes,
        }
        rows.append(row)
        print("  ".join(f"{k} {v}" for k, v in row.items()))
    setting = without(given, "rules", "name")
    print("written to", write(named(given.name, given), [{"setting": setting}, *rows]))


if __name__ == "__main__":
    main()
