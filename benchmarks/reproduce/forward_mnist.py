"""Rules that learn from forward passes, noise or a settling loop, next to backpropagation on an MNIST MLP, in one run.

    GRAPHREWRITE_DATA=folder python -m benchmarks.reproduce.forward_mnist
    python -m benchmarks.reproduce.forward_mnist --tune --samples 10000 --epochs 1 --rules pepita@3e-3 pepita@1e-2

A tanh net on images halved to 14 x 14 pixels (a step of zeroth order costs as many numbers as there are weights, and
learns the less from each), the same initial weights and batches for all, Adam falling to zero. A rule's rate stands
behind it, `pepita@0.01`; those below were chosen between 3e-3 and 1e-2 (pepita: and 3e-2) on 20,000 training images
with `--tune`, which measures on training images that it holds out and never looks at the test set; variants of a rule
that were not tried have the rate of the one that was. Test accuracy (of `compiled.predict`) after every epoch; the
step's processor time over backpropagation's, medians of interleaved steps, with backpropagation against itself; bytes
between forward and backward and the measured peak of a step, the gradients subtracted. Writes
`results/forward_mnist.json`, or `--name`; with `--rules bp ...`, rows of other rules at the same setting stay in it,
which is how the committed file was made: in pieces, each with backpropagation, whose accuracy is the same in all.
"""

from __future__ import annotations

import itertools
import json
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.common import RESULTS, processor_ratios, write
from benchmarks.reproduce.course import arguments, named, shorten, trained, without
from graphrewrite import datasets
from graphrewrite.datasets import Dataset
from graphrewrite.testing.memory import gradient_bytes, measured_peak, peak_bytes
from graphrewrite.training import Budget, Learner, Split, side_by_side, take

RULES = [
    "bp@1e-2",
    "pepita@3e-2",
    "foton@3e-3",
    "forward_gradient{perturb=weights}@1e-2",
    "forward_gradient{perturb=weights,guess=local}@1e-2",
    "forward_gradient@1e-2",
    "forward_gradient{tangents=8}@1e-2",
    "likelihood_ratio@1e-2",
    "likelihood_ratio{samples=4}@1e-2",
    "predictive_coding{variant=exact}@1e-2",
    "predictive_coding@1e-2",
    "equilibrium_propagation{free_steps=20,nudged_steps=6}@1e-2",
    "target_propagation@1e-2",
    "zeroth_order@1e-2",
    "zeroth_order{queries=32}@1e-2",
    "zeroth_order{method=stein,queries=32}@1e-2",
    "zeroth_order{method=coordinate,sparsity=0.98}@1e-2",
]


def data_of(folder: str | None, samples: int, tune: bool) -> Dataset:
    """MNIST at a quarter of the pixels; for tuning, the last 5,000 training images in the place of the test set."""
    found = datasets.mnist(folder)

    def halved(split: Split) -> Split:
        return Split(F.avg_pool2d(split.x.reshape(-1, 1, 28, 28), 2).flatten(1), split.y)

    training = halved(found.train)
    held_out = take(training, torch.arange(55_000, 60_000)) if tune else halved(found.test)
    return Dataset(take(training, torch.arange(min(samples, 55_000 if tune else 60_000))), held_out)


def row(one: Learner, bp: Learner, example: Split, ratio: float) -> dict[str, Any]:
    last, compiled = one.points[-1], one.compiled
    found = {
        "rule": one.rule,
        "rate": one.optimizer.defaults["lr"],
        "test accuracy by epoch": [round(point.accuracy, 4) for point in one.points],
        "points below bp": round(100 * (bp.points[-1].accuracy - last.accuracy), 2),
        "step processor time / bp": round(ratio, 2),
        "saved bytes": one.saved_bytes,
        "peak bytes beside gradients": measured_peak(compiled.train(), example.x, example.y) - gradient_bytes(compiled),
    }
    if getattr(one.rules[0], "in_place", False):
        known = [*compiled.module.parameters(), example.x, example.y]
        found["peak bytes of zo_step"] = peak_bytes(lambda: compiled.zo_step(example.x, example.y, 0.0), known)
        with torch.no_grad():
            infer = lambda: F.cross_entropy(compiled.module(example.x), example.y)  # noqa: E731
            found["peak bytes of inference"] = peak_bytes(infer, known)
    return found


def step_of(one: Learner, example: Split) -> Any:
    def step() -> None:
        one.optimizer.zero_grad()
        one.compiled.loss(example.x, example.y).backward()
        one.optimizer.step()

    return step


def main() -> None:
    parser = arguments(__doc__, seed=True)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=2, help="hidden layers")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=3e-3, help="of rules that name none")
    parser.add_argument("--samples", type=int, default=30_000, help="training images to use")
    parser.add_argument("--name", default="forward_mnist", help="of the result file")
    parser.add_argument("--tune", action="store_true", help="measure on held-out training images, write nothing")
    parser.add_argument("--rules", nargs="+", default=RULES, help="bp first")
    given = parser.parse_args()
    shorten(given, samples=256, epochs=1)
    torch.set_num_threads(1)
    torch.manual_seed(given.seed)
    # that few directions are drawn for many weights is what is measured here
    warnings.filterwarnings("ignore", message=".*the predicted variance.*|.*times the squared gradient.*")
    data = data_of(given.data, given.samples, given.tune)
    sizes = [196, *[given.width] * given.hidden]
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(given.width, 10))
    budget = Budget(epochs=given.epochs, batch=given.batch, rate=given.rate, seed=given.seed)
    example = Split(data.train.x[: given.batch], data.train.y[: given.batch])
    learners = side_by_side(model, [text.partition("@")[0] for text in given.rules], example, budget, blocks="layers")
    for one, text in zip(learners, given.rules, strict=True):
        rate = float(text.partition("@")[2] or given.rate)
        one.optimizer = torch.optim.Adam([p for p in one.compiled.parameters() if p.requires_grad], lr=rate)
    print("compiled", flush=True)
    name = named(given.name, given)
    report = lambda: print([p.points[-1].accuracy for p in learners], flush=True)  # noqa: E731
    trained(name, learners, data, budget, report)
    if given.tune:
        for one, text in zip(learners, given.rules, strict=True):
            print(f"{text:60} {one.points[-1].accuracy:.4f}")
        return
    ratios, same = processor_ratios([step_of(one, example) for one in learners])
    rows = [row(one, learners[0], example, ratio) for one, ratio in zip(learners, ratios, strict=True)]
    for one, text in zip(rows, given.rules, strict=True):
        one["asked"] = text.partition("@")[0]
        one["bp / bp"] = round(same, 3)
        print("  ".join(f"{k} {v}" for k, v in one.items()))
    setting = without(given, "rules", "name", "tune", "rate")
    setting["weights"] = sum(p.numel() for p in model.parameters())
    print("written to", write(name, [{"setting": setting}, *merged(name, setting, rows)]))


def merged(name: str, setting: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """These rows, and those that the result file holds of other rules at the same setting, in the order of `RULES`."""
    path = RESULTS / f"{name}.json"
    held = json.loads(path.read_text())["rows"] if path.is_file() else []
    before = held[1:] if held and held[0] == {"setting": setting} else []
    by_rule = {one["asked"]: one for one in [*before, *rows]}
    order = [text.partition("@")[0] for text in RULES]
    return sorted(by_rule.values(), key=lambda one: order.index(one["asked"]) if one["asked"] in order else len(order))


if __name__ == "__main__":
    main()
