"""Local rules next to backpropagation on CIFAR-10, a small conv net: same weights, same batches, interleaved steps.

    GRAPHREWRITE_DATA=folder python -m benchmarks.reproduce.local_cifar --samples 5000 --epochs 6

Three stages of 3x3 convolution, batch-norm, ReLU and 2x2 pooling (16, 32, 64 channels), and a linear layer. Adam 1e-3
falling to zero, no augmentation, nothing tuned. Test accuracy after every epoch, the accuracy of each block's own head
at the end, step time over backpropagation's. Writes `results/local_cifar.json`, anew after every epoch.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from benchmarks.common import write
from benchmarks.reproduce.course import arguments, named, shorten, trained, without
from graphrewrite import datasets
from graphrewrite.errors import RuleError
from graphrewrite.evaluation import block_accuracy
from graphrewrite.training import Budget, Dataset, Learner, Split, side_by_side, take

RULES = [
    "bp",
    "local_loss{head=predsim}",
    "local_loss{head=dgl}",
    "local_loss{head=aug_local}",
    "counter_current",
]


def net() -> nn.Sequential:
    stages = [
        nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
        for a, b in itertools.pairwise((3, 16, 32, 64))
    ]
    return nn.Sequential(*stages, nn.Sequential(nn.Flatten(), nn.Linear(1024, 10)))


def row(one: Learner, reference: Learner, test: Split, *, heads: bool) -> dict[str, Any]:
    try:
        blocks = block_accuracy(one.compiled, test) if heads else {}
    except RuleError as error:
        blocks = {"none": error.message}
    return {
        "rule": one.rule,
        "test_accuracy": [round(p.accuracy, 4) for p in one.points],
        "points_below_bp": round(100 * (reference.points[-1].accuracy - one.points[-1].accuracy), 2),
        "accuracy_of_blocks": {b: a if isinstance(a, str) else round(a, 4) for b, a in blocks.items()},
        "step_time_ratio_to_bp": round(one.ratio_to(reference), 2),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--test", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--rules", nargs="+", default=RULES)
    given = parser.parse_args()
    shorten(given, samples=300, test=300, epochs=1)
    torch.set_num_threads(1)
    data = datasets.cifar10(given.data, batches=-(-given.samples // 10_000))
    mean, std = data.train.x.mean((0, 2, 3), keepdim=True), data.train.x.std((0, 2, 3), keepdim=True)
    data = Dataset(*(Split((s.x - mean) / std, s.y) for s in data))
    data = Dataset(take(data.train, torch.arange(given.samples)), take(data.test, torch.arange(given.test)))
    torch.manual_seed(0)
    budget = Budget(epochs=given.epochs, batch=given.batch, rate=given.rate)
    learners = side_by_side(net(), given.rules, take(data.train, torch.arange(given.batch)), budget)
    setting = without(given, "rules")

    def report(*, heads: bool = False) -> None:
        rows = [row(one, learners[0], data.test, heads=heads) for one in learners]
        for one in rows:
            print(one)
        print(write(named("local_cifar", given), [{"setting": setting}, *rows]), flush=True)

    trained(named("local_cifar", given), learners, data, budget, report)
    report(heads=True)


if __name__ == "__main__":
    main()
