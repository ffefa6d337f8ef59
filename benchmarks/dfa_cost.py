"""What DFA saves: floating-point operations counted on the graph, and the time of a step, against backpropagation.

    python -m benchmarks.dfa_cost

At `blocks="layers"` no product of an input cotangent is left on an MLP but the projections of the error; with larger
blocks each block keeps its own. Writes `results/dfa_cost.json`.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import graphrewrite as gr
from benchmarks.common import ratio, write
from benchmarks.reproduce.dfa_real import GPT
from graphrewrite.analysis.cost import count
from graphrewrite.testing import zoo


def mlp() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    widths = (784, 512, 512, 512, 10)
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Linear(a, b), *([nn.ReLU()] if i < 3 else [])]
    return nn.Sequential(*layers), torch.randn(128, 784), torch.randint(0, 10, (128,))


def lenet() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 16, 5), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(16, 32, 5), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        nn.Sequential(nn.Linear(800, 120), nn.ReLU()),
        nn.Linear(120, 10),
    )
    return model, torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))


def resnet() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    case = zoo.make("resnet")
    return case.model, torch.randn(32, 3, 32, 32), torch.randint(0, 5, (32,))


def gpt() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    return GPT(65), torch.randint(0, 65, (16, 64)), torch.randint(0, 65, (16, 64))


CASES: tuple[tuple[Callable[[], Any], Any, tuple[str, ...]], ...] = (
    (mlp, "layers", ("dfa",)),
    (lenet, "layers", ("dfa{spatial=tile}",)),
    (lenet, "auto", ("dfa", "dfa{spatial=tile}")),
    (resnet, "auto", ("dfa{spatial=tile}",)),
    (gpt, "layers", ("dfa",)),
    (gpt, "auto", ("dfa", "dfa{placement=micro}")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timing; 0: count only")
    parser.add_argument("--models", nargs="+", default=[make.__name__ for make, _, _ in CASES], help="which to run")
    parser.add_argument("--name", default="dfa_cost", help="name of the result file")
    given = parser.parse_args()
    rounds = given.rounds
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    rows = []
    for make, blocks, rules in CASES:
        if make.__name__ not in given.models:
            continue
        model, x, y = make()
        exact, exact_step = build(model, "bp", x, y, blocks)
        reference = count(exact.graph("aten"))
        for rule in rules:
            compiled, step = build(model, rule, x, y, blocks)
            cost = count(compiled.graph("aten"))
            row = {
                "model": make.__name__,
                "blocks": blocks,
                "rule": rule,
                "flops": cost.by_role,
                "flops_bp": reference.by_role,
                "backward_ratio": round(cost.backward / reference.backward, 4),
                "step_ratio": round(cost.total / reference.total, 4),
                "time": ratio(step, exact_step, rounds=rounds, calls=10).row() if rounds else None,
            }
            rows.append(row)
            write(given.name, rows)
            print({k: v for k, v in row.items() if k != "flops_bp"}, flush=True)


def build(model: nn.Module, rule: str, x: Any, y: Any, blocks: Any) -> tuple[gr.CompiledModule, Callable[[], Any]]:
    compiled = gr.compile(model, rule, example_inputs=x, example_targets=y, blocks=blocks)

    def step() -> None:
        compiled.zero_grad()
        compiled.loss(x, y).backward()

    return compiled, step


if __name__ == "__main__":
    main()
