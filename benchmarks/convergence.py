"""Training with a tenth of the saved bytes: final losses next to those of exact backpropagation, on real data.

    GRAPHREWRITE_DATA=folder python -m benchmarks.convergence --tasks cora shakespeare cifar sst2

Small models, three seeds, Adam at a rate that falls linearly to zero; all arms of a seed start from the same weights
and see the same batches.

* `exact`: backpropagation.
* `exact, nudged`, the positive control: backpropagation from weights that differ in their last bits (by a factor
  within 1e-7 of one). How far its losses are from those of `exact` is how far two trainings drift apart by rounding
  alone; what another arm is off by within that says nothing about the arm.
* `budget`: `memory_budget=0.1`, whatever the planner chooses.
* `codes`: 4-bit `lloyd` codes of what crosses from block to block; what lies inside is recomputed from them.
* `rounded down`, the negative control: what linear layers keep in 2 bits that are always rounded down, so that the
  error has a sign.

`train` is the mean loss of the last fifth of the steps, `valid` the loss on held-out data, `times_fewer` the bytes of
`exact` that are saved over those of the arm. Writes `results/convergence.json`, anew after each run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from graphrewrite.passes.compression.int2 import Int2
from torch import nn
from torch.nn import functional as F

import graphrewrite as gr
from benchmarks.common import read, write
from graphrewrite import datasets


@dataclass(frozen=True)
class RoundedDown(Int2):
    """Two bits, always rounded towards the group's minimum."""

    name = "rounded_down"

    def encode(self, tensor: torch.Tensor, *, draw: Any = None) -> Any:
        """As `int2` with the last draw that stochastic rounding may make."""
        return Int2(self.group, self.symmetric, "stochastic").encode(tensor, draw=lambda size: tensor.new_zeros(size))


ARMS: dict[str, dict[str, Any]] = {
    "exact": {},
    "exact, nudged": {},
    "budget": {"memory_budget": 0.1},
    "codes": {"compress": ["ms_norm", "mask", "recompute{plan=blocks}", "lloyd"]},
    "rounded down": {
        "compress": ["mask", RoundedDown(operators=("addmm", "mm", "convolution", "convolution_backward"))]
    },
}


@dataclass
class Task:
    """A model, batches to train on, and the loss on held-out data."""

    model: nn.Module
    batches: list[tuple[Any, Any]]
    held_out: Callable[[nn.Module], float]
    rate: float


# --- models ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.norm, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = (part.view(b, t, self.heads, -1).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class Transformer(nn.Module):
    """A causal language model, or an encoder whose mean over words is classified."""

    def __init__(self, words: int, length: int, width: int, layers: int, classes: int | None = None) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*[Block(width, width // 16, classes is None) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes or words)
        self.classifies = classes is not None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.blocks(self.words(x) + self.places))
        return self.head(h.mean(1) if self.classifies else h)


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv_2, self.norm_2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm_2(self.conv_2(F.relu(self.norm(self.conv(x))))) + self.skip(x))


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 32, 1), Residual(32, 64, 2)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )


# --- tasks -----------------------------------------------------------------------------------------------------------


def shakespeare(folder: str | None, steps: int, width: int = 64, length: int = 64, batch: int = 16) -> Task:
    text = datasets.tinyshakespeare(folder)

    def cut(source: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        starts = torch.randint(0, len(source) - length - 1, (count,))
        rows = torch.stack([source[s : s + length + 1] for s in starts.tolist()])
        return rows[:, :-1], rows[:, 1:].contiguous()

    model = Transformer(len(text.vocabulary), length, width, 2)
    batches = [cut(text.train, batch) for _ in range(steps)]
    x, y = cut(text.valid, 256)
    return Task(model, batches, lambda m: float(F.cross_entropy(m(x).flatten(0, 1), y.flatten())), 2e-3)


def cifar(folder: str | None, steps: int, batch: int = 32) -> Task:
    data = datasets.cifar10(folder, batches=1)
    order = torch.randint(0, len(data.train.y), (steps, batch))
    x, y = data.test.x[:2000], data.test.y[:2000]
    batches = [(data.train.x[rows], data.train.y[rows]) for rows in order]
    return Task(resnet(), batches, lambda m: float(F.cross_entropy(m(x), y)), 2e-3)


def sst2(folder: str | None, steps: int, batch: int = 32) -> Task:
    data = datasets.sst2(folder, length=24)
    order = torch.randint(0, len(data.train.y), (steps, batch))
    model = Transformer(len(data.vocabulary), 24, 64, 2, classes=2)
    batches = [(data.train.x[rows], data.train.y[rows]) for rows in order]
    return Task(model, batches, lambda m: float(F.cross_entropy(m(data.valid.x), data.valid.y)), 1e-3)


def cora(folder: str | None, steps: int) -> Task:
    from torch_geometric.nn import GCNConv

    class GCN(nn.Module):
        def __init__(self, features: int, classes: int) -> None:
            super().__init__()
            self.conv, self.conv_2, self.conv_3 = GCNConv(features, 32), GCNConv(32, 32), GCNConv(32, classes)

        def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
            return self.conv_3(F.elu(self.conv_2(F.elu(self.conv(x, edges)), edges)), edges)

    graph = datasets.planetoid(folder)
    x = graph.x / graph.x.sum(1, keepdim=True).clamp(min=1)
    targets = torch.where(graph.train_mask, graph.y, -100)
    model = GCN(x.shape[1], int(graph.y.max()) + 1)
    held_out = torch.where(graph.val_mask, graph.y, -100)
    batches = [((x, graph.edge_index), targets)] * steps
    return Task(model, batches, lambda m: float(F.cross_entropy(m(x, graph.edge_index), held_out)), 5e-3)


TASKS: dict[str, tuple[Callable[..., Task], int]] = {
    "cora": (cora, 200),
    "shakespeare": (shakespeare, 600),
    "sst2": (sst2, 400),
    "cifar": (cifar, 1000),
}


def nudge(model: nn.Module) -> None:
    """Every parameter times a factor within 1e-7 of one: at most its last bit."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-7 * (2 * torch.rand(parameter.shape, dtype=torch.float64) - 1))


def arm(task: Task, options: dict[str, Any], seed: int) -> dict[str, Any]:
    started = time.process_time()
    x, y = task.batches[0]
    compiled = gr.compile(
        task.model, example_inputs=x, example_targets=y, dynamic=None, verify="off", seed=seed, **options
    )
    optimizer = torch.optim.Adam(task.model.parameters(), lr=task.rate)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(task.batches))
    losses = []
    for x, y in task.batches:
        optimizer.zero_grad()
        loss = compiled.loss(x, y)
        loss.backward()
        optimizer.step()
        decay.step()
        losses.append(loss.item())
    task.model.eval()
    with torch.no_grad():
        valid = task.held_out(task.model)
    tail = losses[-max(1, len(losses) // 5) :]
    return {
        "saved_bytes": compiled.report().saved_bytes,
        "train": sum(tail) / len(tail),
        "valid": valid,
        "process_seconds": round(time.process_time() - started, 1),
    }


def runs(
    tasks: list[str], arms: list[str], seeds: list[int], folder: str | None, scale: float
) -> Iterator[dict[str, Any]]:
    for seed in seeds:
        for name in tasks:
            make, steps = TASKS[name]
            exact: dict[str, Any] = {}
            for label in arms:
                torch.manual_seed(seed)
                row = {"task": name, "seed": seed, "arm": label, "rate": "falls"}
                row["steps"] = max(1, int(steps * scale))
                task = make(folder, row["steps"])
                if label == "exact, nudged":
                    nudge(task.model)
                row |= arm(task, ARMS[label], seed)
                exact = exact or row
                row["times_fewer"] = round(exact["saved_bytes"] / row["saved_bytes"], 2)
                for which in ("train", "valid"):
                    row[f"{which}_off"] = row[which] / exact[which] - 1
                yield row


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, of runs of one length."""
    found = []

    def of(task: str, steps: int, label: str) -> list[dict[str, Any]]:
        return [row for row in rows if (row["task"], row["steps"], row["arm"]) == (task, steps, label)]

    for task, steps, label in dict.fromkeys((row["task"], row["steps"], row["arm"]) for row in rows):
        mine = of(task, steps, label)
        mean = {k: sum(row[k] for row in mine) / len(mine) for k in ("train", "valid", "times_fewer")}
        seeds = {row["seed"] for row in mine}
        exact = [row for row in of(task, steps, "exact") if row["seed"] in seeds]
        for which in ("train", "valid"):
            mean[f"{which}_off"] = mean[which] / (sum(row[which] for row in exact) / len(exact)) - 1
        found.append({"task": task, "steps": steps, "arm": label, "mean_of_seeds": len(mine), **mean})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help="exact comes first")
    parser.add_argument("--scale", type=float, default=1.0, help="times the steps of every task")
    parser.add_argument("--add", action="store_true", help="to the runs that the result file has")
    parser.add_argument("--data", default=None)
    parser.add_argument("--name", default="convergence", help="name of the result file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = [row for row in read(given.name) if "seed" in row] if given.add else []
    for row in runs(given.tasks, given.arms, given.seeds, given.data, given.scale):
        same = ("task", "seed", "arm", "steps")
        rows = [old for old in rows if any(old[k] != row[k] for k in same)] + [row]
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        write(given.name, [*summary(rows), *rows])


if __name__ == "__main__":
    main()
