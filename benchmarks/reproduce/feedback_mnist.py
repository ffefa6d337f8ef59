"""The feedback family on MNIST: LeNet and an MLP, every rule from the same weights, on the same batches.

    python -m benchmarks.reproduce.feedback_mnist --data FOLDER              # all of MNIST, 10 epochs
    python -m benchmarks.reproduce.feedback_mnist --data FOLDER --small    # 6,000 images: minutes on one core
    python -m benchmarks.reproduce.feedback_mnist --data FOLDER --nets lenet --samples 20000
    python -m benchmarks.reproduce.feedback_mnist --data FOLDER --nets mlp_adam --rules bp fa usf

Plain SGD, the rate falling linearly to zero. The MLP is the weight-mirror paper's (784-500-10, sigmoid, rate 0.3, batch
128, no decay) under one rate. LeNet has ReLU, batch 64, momentum 0.9 and weight decay 1e-3 as in biotorch; its rates
were chosen on 6,000 training and 2,000 test images (some diverged or stood still at others), so these figures are
not from a blind test set. Random feedback is drawn at the size at which torch draws forward weights (`init=kaiming`).
weight_mirror starts with one epoch of mirror phases, pfa has its large decay in the first epoch. After each epoch: test
error, and each hidden layer's angle between the rule's gradient and backpropagation's. Writes
`results/feedback_mnist_<net>.json` (`_small`, `_<samples>`, `_<rules>`), anew after each epoch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks.common import write
from benchmarks.reproduce.course import arguments, named, shorten, trained
from graphrewrite.datasets import Dataset, Split, mnist
from graphrewrite.training import Budget, Learner, side_by_side

MNIST = 60_000


@dataclass(frozen=True)
class Setup:
    """A net and how it is trained."""

    model: Callable[[], nn.Module]
    flat: bool
    batch: int
    rate: float
    momentum: float
    decay: float
    rates: dict[str, float] = field(default_factory=dict)
    shrink: float = 2.8
    """pfa's first epoch shrinks the difference between its path weights and B^T W by exp(-shrink)."""
    adam: bool = False

    def rules(self, steps: int) -> list[str]:
        """The rules; `steps` is the length of an epoch."""
        drawn = [f"{rule}{{init=kaiming}}" for rule in ("fa", "usf", "brsf", "frsf", "kp", "weight_mirror")]
        first = round(self.shrink * (1 - self.momentum) / (self.rate * steps), 5)
        return ["bp", *drawn, "dfa", f"pfa{{decay={first},decay_steps={steps},init=kaiming}}"]


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 500), nn.Sigmoid(), nn.Linear(500, 10))


SETUPS = {
    "mlp": Setup(mlp, True, 128, 0.3, 0.0, 0.0),
    # steps that do not depend on the size of the feedback: what is left is its direction
    "mlp_adam": Setup(mlp, True, 128, 1e-3, 0.0, 0.0, adam=True),
    # weight_mirror diverged at a quarter of the common rate, which is its paper's ratio
    "lenet": Setup(lenet, False, 64, 0.05, 0.9, 1e-3, {"fa": 0.01, "dfa": 0.005, "weight_mirror": 0.005}, 0.9),
}


def learners_of(setup: Setup, data: Dataset, budget: Budget, only: Sequence[str] = ()) -> list[Learner]:
    steps = len(data.train.y) // setup.batch
    torch.manual_seed(budget.seed)
    example = Split(data.train.x[: budget.batch], data.train.y[: budget.batch])
    wanted = [rule for rule in setup.rules(steps) if not only or rule.partition("{")[0] in only]
    learners = side_by_side(setup.model(), wanted, example, budget, blocks="layers")
    for one in learners:
        name = one.rules[0].name
        rate = setup.rates.get(name, setup.rate)
        parameters = one.compiled.parameters()
        one.optimizer = (
            torch.optim.Adam(parameters, lr=rate)
            if setup.adam
            else torch.optim.SGD(parameters, lr=rate, momentum=setup.momentum, weight_decay=setup.decay)
        )
        if name == "weight_mirror":
            one.compiled.feedback_phase(times=steps)
    return learners


def degrees(cosine: float) -> float:
    return math.nan if math.isnan(cosine) else math.degrees(math.acos(max(-1.0, min(1.0, cosine))))


def row(net: str, one: Learner, reference: Learner) -> dict[str, Any]:
    hidden = list(one.points[0].alignment)[:-1]
    return {
        "net": net,
        "rule": one.rule,
        "weight_transport": one.certificates.weight_transport,
        "test_error": [round(100 * (1 - p.accuracy), 2) for p in one.points],
        "rate": one.optimizer.defaults["lr"],
        "loss": [round(p.loss, 4) for p in one.points],
        "angle_to_bp": {b: [round(degrees(p.alignment[b]), 1) for p in one.points] for b in hidden},
        "mean_angle_last": round(statistics.mean(degrees(one.points[-1].alignment[b]) for b in hidden), 1),
        "step_time_ratio_to_bp": round(one.ratio_to(reference), 2),
    }


def main() -> None:
    parser = arguments(__doc__, seed=True)
    parser.add_argument("--small", action="store_true", help="6,000 training and 2,000 test images")
    parser.add_argument("--samples", type=int, default=MNIST, help="training images")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--nets", default="mlp,lenet")
    parser.add_argument("--rules", nargs="+", default=[], help="only these, bp first; default: all")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    shorten(given, small=False, samples=640, epochs=1)
    torch.set_num_threads(given.threads)
    data = mnist(given.data)
    mean, std = data.train.x.mean(), data.train.x.std()
    count, test = (6000, 2000) if given.small else (min(given.samples, len(data.train.y)), len(data.test.y))
    data = Dataset(
        Split((data.train.x[:count] - mean) / std, data.train.y[:count]),
        Split((data.test.x[:test] - mean) / std, data.test.y[:test]),
    )
    for net in given.nets.split(","):
        setup = SETUPS[net]
        budget = Budget(epochs=given.epochs, batch=setup.batch, rate=setup.rate, rates=setup.rates, seed=given.seed)
        used = data.flat() if setup.flat else data
        learners = learners_of(setup, used, budget, given.rules)
        suffix = "_small" if given.small else f"_{count}" if count < MNIST else ""
        suffix += "".join(f"_{rule}" for rule in given.rules if rule != "bp")

        name = named(f"feedback_mnist_{net}{suffix}", given)

        def report(net: str = net, learners: list[Learner] = learners, name: str = name) -> None:
            rows = [row(net, one, learners[0]) for one in learners]
            for one in rows:
                last, angle = one["test_error"][-1], one["mean_angle_last"]
                print(f"{net:6} {one['rule']:48} error {last:6.2f} %  angle {angle:5.1f}")
            print(write(name, rows), flush=True)

        trained(name, learners, used, budget, report)


if __name__ == "__main__":
    main()
