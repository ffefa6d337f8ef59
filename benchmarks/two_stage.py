"""What a backward in two stages costs, holds and gains.

    python benchmarks/two_stage.py

* Time of both stages over time of the one-stage backward, for a GPT stage; torch's own split over its own backward
  beside it. Medians of interleaved pairs; the reference against itself is printed beside them.
* Bytes held between the stages, in elements per token and layer divided by the width.
* Weight gradients of eight micro-batches as one, over one by one.

Writes `results/two_stage.json`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import write
from overhead import Layer
from torch import nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

import graphrewrite as gr

WIDTH, HEADS, LAYERS = 384, 6, 4
MICRO_BATCHES = 8


def stage(layers: int = LAYERS) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[Layer(WIDTH, HEADS) for _ in range(layers)])


def forward(model: nn.Module, tokens: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    for p in model.parameters():
        p.grad = None
    x = torch.randn(*tokens, WIDTH, requires_grad=True)
    out = model(x)
    return x, out, torch.randn_like(out)


def timed(*calls: Callable[[], Any]) -> list[float]:
    times = []
    for call in calls:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return times


def full(model: nn.Module, tokens: tuple[int, int]) -> list[float]:
    _, out, cotangent = forward(model, tokens)
    return timed(lambda: out.backward(cotangent))


def two_stages(compiled: gr.CompiledModule, tokens: tuple[int, int]) -> list[float]:
    _, out, cotangent = forward(compiled, tokens)
    return timed(lambda: out.backward(cotangent), compiled.backward_weight)


def torch_split(model: nn.Module, tokens: tuple[int, int]) -> list[float]:
    x, out, cotangent = forward(model, tokens)
    groups: list[Any] = []
    return timed(
        lambda: groups.extend(stage_backward_input([out], [cotangent], [x], model.parameters())[1]),
        lambda: stage_backward_weight(model.parameters(), groups),
    )


def pairs(ours: Callable[[], list[float]], reference: Callable[[], list[float]], rounds: int) -> dict[str, Any]:
    """Interleaved: reference, ours, reference."""
    for _ in range(2):
        ours()
        reference()
    found, same, times, parts = [], [], [], []
    for _ in range(rounds):
        first, mine, second = reference(), ours(), reference()
        found.append(sum(mine) / (0.5 * (sum(first) + sum(second))))
        same.append(sum(second) / sum(first))
        times += [sum(first), sum(second)]
        parts.append(mine)
    return {
        "median": round(statistics.median(found), 4),
        "low": round(min(found), 4),
        "high": round(max(found), 4),
        "same": round(statistics.median(same), 4),
        "reference_ms": round(statistics.median(times) * 1e3, 2),
        "parts_ms": [round(statistics.median(column) * 1e3, 2) for column in zip(*parts, strict=True)],
    }


def cost(rounds: int) -> list[dict[str, Any]]:
    tokens = (4, 256)
    eager = stage()
    one, two = gr.compile(copy.deepcopy(eager)), gr.compile(copy.deepcopy(eager), split_backward=True)
    rows = [
        {"case": "I + W over full", **pairs(lambda: two_stages(two, tokens), lambda: full(one, tokens), rounds)},
        {
            "case": "torch: I + W over full",
            **pairs(lambda: torch_split(eager, tokens), lambda: full(eager, tokens), rounds),
        },
    ]
    report = two.report()
    unit = WIDTH * tokens[0] * tokens[1] * LAYERS * 4
    rows.append(
        {
            "case": "held between the stages",
            "bytes": report.held_bytes,
            "widths_per_token_and_layer": round(report.held_bytes / unit, 3),
            "saved_before": round(report.saved_bytes / unit, 3),
        }
    )
    return rows


def concatenated(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for count in (64, 256, 512):
        two = gr.compile(stage(1), split_backward=True)

        def run(concat: bool, count: int = count, two: gr.CompiledModule = two) -> list[float]:
            two.zero_grad()
            for _ in range(MICRO_BATCHES):
                _, out, cotangent = forward_of(two, (1, count))
                out.backward(cotangent)
            return timed(lambda: two.backward_weight(concat=concat))

        found = pairs(lambda: run(True), lambda: run(False), rounds)
        rows.append({"case": f"{MICRO_BATCHES} micro-batches of {count} tokens as one, over one by one", **found})
    return rows


def forward_of(model: nn.Module, tokens: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(*tokens, WIDTH, requires_grad=True)
    out = model(x)
    return x, out, torch.randn_like(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = cost(given.rounds) + concatenated(given.rounds)
    for row in rows:
        print(*(f"{key} {held}" for key, held in row.items()), sep="   ")
    print("written to", write("two_stage", rows))


if __name__ == "__main__":
    main()
