"""PEPITA on CIFAR-10 as its authors logged it, next to the same rule written out in plain PyTorch.

    GRAPHREWRITE_DATA=folder python -m benchmarks.reproduce.pepita_cifar --epochs 3

The net of the published log: 3072-1024-10, ReLU, no bias, He-uniform weights, dropout 0.1 with one mask for both
passes, batch 64, SGD with rate 0.01 and momentum 0.9, pixels in [0, 1]. Both learners start from the same weights and
the same F and see the same batches. First, over some batches with the same dropout masks, the largest difference of
their gradients; then each draws masks of its own, and test accuracy is measured after every epoch, beside the published
figure. Writes `results/pepita_cifar.json`, anew after every epoch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from rich.progress import track
from torch import nn
from torch.nn import functional as F

import graphrewrite as gr
from benchmarks.common import RESULTS, write
from benchmarks.reproduce.course import arguments, named, shorten, without
from graphrewrite import datasets
from graphrewrite.training import Split, in_batches

PUBLISHED = {0: 35.12, 1: 38.07, 2: 40.90, 4: 41.40, 9: 45.05, 19: 48.61, 29: 49.77}
"""Test accuracy by epoch, from 0 on: the log that the authors committed."""
DROP = 0.1


def net(width: int) -> nn.Sequential:
    model = nn.Sequential(
        nn.Linear(3072, width, bias=False), nn.ReLU(), nn.Dropout(DROP), nn.Linear(width, 10, bias=False)
    )
    for weight in model.parameters():
        bound = math.sqrt(6 / weight.shape[1])
        nn.init.uniform_(weight, -bound, bound)
    return model


class Oracle:
    """The rule written out: two passes, an outer product for each layer."""

    def __init__(self, first: torch.Tensor, last: torch.Tensor, feedback: torch.Tensor) -> None:
        self.weights = [first.clone(), last.clone()]
        self.feedback = feedback.clone()
        self.moved = [torch.zeros_like(w) for w in self.weights]

    def gradients(self, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        first, last = self.weights
        mask = F.dropout(x.new_ones(len(x), len(first)), DROP)
        hidden = torch.relu(x @ first.T) * mask
        error = (hidden @ last.T).softmax(1) - F.one_hot(y, 10)
        changed = x + error @ self.feedback
        again = torch.relu(changed @ first.T) * mask
        last_error = (again @ last.T).softmax(1) - F.one_hot(y, 10)
        return [(hidden - again).T @ changed / len(x), last_error.T @ again / len(x)]

    def step(self, x: torch.Tensor, y: torch.Tensor, rate: float, momentum: float) -> None:
        for weight, moved, gradient in zip(self.weights, self.moved, self.gradients(x, y), strict=True):
            moved.mul_(momentum).add_(gradient)
            weight.sub_(moved, alpha=rate)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.weights[0].T) @ self.weights[1].T


def percent_right(predict: Any, test: Split) -> float:
    right = sum(int((predict(piece.x).argmax(1) == piece.y).sum()) for piece in in_batches(test, 1000))
    return round(100 * right / len(test.y), 2)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batches", type=int, default=5, help="of the five training files")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--compared", type=int, default=5, help="batches whose gradients are compared")
    given = parser.parse_args()
    shorten(given, epochs=1, batches=1, width=16, compared=1)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = datasets.cifar10(given.data, given.batches).flat()
    model = net(given.width)
    x, y = data.train.x[: given.batch], data.train.y[: given.batch]
    compiled = gr.compile(model, "pepita", example_inputs=x, example_targets=y, blocks="layers")
    feedback = compiled.rule_state["pepita.feedback"]
    oracle = Oracle(model[0].weight.detach(), model[3].weight.detach(), feedback)
    optimizer = torch.optim.SGD(compiled.parameters(), lr=given.rate, momentum=given.momentum)

    apart = 0.0
    for number in range(given.compared):
        at = slice(number * given.batch, (number + 1) * given.batch)
        torch.manual_seed(number)
        compiled.zero_grad()
        compiled.loss(data.train.x[at], data.train.y[at]).backward()
        torch.manual_seed(number)
        for weight, wanted in zip(
            compiled.parameters(), oracle.gradients(data.train.x[at], data.train.y[at]), strict=True
        ):
            apart = max(apart, float((weight.grad - wanted).abs().max() / wanted.abs().max()))
    print(f"gradients over {given.compared} batches: largest relative difference {apart:.2e}", flush=True)

    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    course = RESULTS / "interrupted" / f"{named('pepita_cifar', given)}.pt"
    if given.resume and course.is_file():
        held = torch.load(course, weights_only=True)
        rows = held["rows"]
        compiled.load_state_dict(held["state"])
        optimizer.load_state_dict(held["optimizer"])
        oracle.weights, oracle.moved = held["weights"], held["moved"]
        generator.set_state(held["order"])
        torch.set_rng_state(held["random"])
    for epoch in range(len(rows), given.epochs):
        order = torch.randperm(len(data.train.y), generator=generator).split(given.batch)
        for index in track(order, f"epoch {epoch}"):
            x, y = data.train.x[index], data.train.y[index]
            optimizer.zero_grad()
            compiled.loss(x, y).backward()
            optimizer.step()
            oracle.step(x, y, given.rate, given.momentum)
        compiled.eval()
        with torch.no_grad():
            ours = percent_right(compiled.predict, data.test)
        compiled.train()
        rows.append(
            {
                "epoch": epoch,
                "test accuracy %": ours,
                "oracle's %": percent_right(oracle, data.test),
                "published %": PUBLISHED.get(epoch),
            }
        )
        print(rows[-1], flush=True)
        head = {"setting": without(given), "largest relative difference of gradients": apart}
        write(named("pepita_cifar", given), [head, *rows])
        course.parent.mkdir(parents=True, exist_ok=True)
        torch.save(
            {
                "rows": rows,
                "state": compiled.state_dict(),
                "optimizer": optimizer.state_dict(),
                "weights": oracle.weights,
                "moved": oracle.moved,
                "order": generator.get_state(),
                "random": torch.get_rng_state(),
            },
            course,
        )


if __name__ == "__main__":
    main()
