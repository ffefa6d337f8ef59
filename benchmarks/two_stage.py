"""What a backward in two stages costs, holds and gains.

    python -m benchmarks.two_stage [--only times|concat|inductor|bytes]

* Time of both stages over time of the one-stage backward, for a GPT stage, eager and (on request) lowered by Inductor;
  torch's own split over its own backward beside it. Medians of interleaved pairs; the reference against itself is
  printed beside them. Between the stages glibc hands memory back to the system and asks for it again, at some
  microseconds per page: the same ratios with an allocator that keeps its memory tell that from the work itself.
* Bytes held between the stages, in elements per token and layer divided by the width: as they are, with activations and
  cotangents computed again in the weight stage, with 8-bit codecs, and with all of it; the error of the weight
  gradients; and the peak of each, predicted from the graph and measured on a running step.
* Weight gradients of eight micro-batches as one, over one by one.

Writes `results/two_stage_<times|concat|inductor|bytes>.json`.
"""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

import graphrewrite as gr
from benchmarks.common import keep_memory, write
from benchmarks.overhead import Layer
from graphrewrite.analysis.liveness import backward_curve, forward_curve, weight_curve
from graphrewrite.graph.nodes import Grad, value
from graphrewrite.testing.memory import peak_bytes

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


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


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
    found, same, times, parts, pages = [], [], [], [], []
    for _ in range(rounds):
        first, at = reference(), faults()
        mine, then = ours(), faults()
        second = reference()
        pages.append([then - at, faults() - then])
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
        "page_faults": [round(statistics.mean(column)) for column in zip(*pages, strict=True)],
    }


def cost(rounds: int, backend: str = "eager") -> list[dict[str, Any]]:
    tokens = (4, 256)
    eager = stage()
    one, two = (gr.compile(copy.deepcopy(eager), split_backward=split, backend=backend) for split in (False, True))
    cases = {f"{backend}: I + W over full": (lambda: two_stages(two, tokens), lambda: full(one, tokens))}
    if backend == "eager":
        cases["torch: I + W over full"] = (lambda: torch_split(eager, tokens), lambda: full(eager, tokens))
    found = [{"case": case, "memory": "returned", **pairs(*both, rounds)} for case, both in cases.items()]
    keep_memory()
    return found + [{"case": case, "memory": "kept", **pairs(*both, rounds)} for case, both in cases.items()]


BLOCKS = "recompute{plan=blocks}"
COMPOSED: dict[str, dict[str, Any]] = {
    "as it is": {"split_backward": True},
    "recompute, split budget=0.6": {"split_backward": "split_backward{budget=0.6}", "compress": BLOCKS},
    "int8, cotangents int8": {"split_backward": "split_backward{codec=int8}", "compress": "int8"},
    "recompute, split budget=0.6, cotangents int8": {
        "split_backward": "split_backward{budget=0.6,codec=int8}",
        "compress": BLOCKS,
    },
}


def held() -> list[dict[str, Any]]:
    """Bytes between the stages, error of the gradients and peaks, for each way to hold less."""
    layers = 2  # figures are per layer
    tokens, model, rows = (4, 256), stage(layers), []
    unit = WIDTH * tokens[0] * tokens[1] * layers * 4
    x0, cotangent = torch.randn(*tokens, WIDTH), torch.randn(*tokens, WIDTH)
    x = x0.clone().requires_grad_()
    model(x).backward(cotangent)
    right = torch.cat([p.grad.flatten() for p in model.parameters()])
    for name, options in COMPOSED.items():
        two = gr.compile(copy.deepcopy(model), dynamic=None, **options)
        two.zero_grad()

        def step(two: gr.CompiledModule = two) -> None:
            own = x0.clone().requires_grad_()
            two(own).backward(cotangent)
            two.backward_weight()

        step()
        found = torch.cat([p.grad.flatten() for p in two.module.parameters()])
        two.zero_grad()
        report, part = two.report(), two.program().partition
        measured = peak_bytes(step, [*two.parameters(), *two.buffers(), x0, cotangent])
        # what the caller holds: its copy of the inputs and, behind the first stage, their gradient and other gradients
        inputs = x0.nbytes
        early = sum(value(part.graph.outputs[s]).nbytes for s in part.backward_outputs if isinstance(s, Grad))
        predicted = max(
            forward_curve(part).peak + inputs,
            backward_curve(part).peak + inputs,
            weight_curve(part).peak + inputs + early,
        )
        rows.append(
            {
                "case": name,
                "saved_bytes": report.saved_bytes,
                "held_bytes": report.held_bytes,
                "saved_widths_per_token_and_layer": round(report.saved_bytes / unit, 3),
                "held_widths_per_token_and_layer": round(report.held_bytes / unit, 3),
                "gradient_error": float((found - right).norm() / right.norm()),
                "peak_predicted": predicted,
                "peak_measured": measured,
                "measured_over_predicted": round(measured / predicted, 4),
            }
        )
    return rows


def concatenated(rounds: int) -> list[dict[str, Any]]:
    keep_memory()
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
    parser.add_argument("--only", choices=["times", "concat", "inductor", "bytes"], default="times")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    cases: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "times": lambda: cost(given.rounds),
        "concat": lambda: concatenated(given.rounds),
        "inductor": lambda: cost(given.rounds, "inductor"),
        "bytes": held,
    }
    rows = cases[given.only]()
    for row in rows:
        print(*(f"{key} {held}" for key, held in row.items()), sep="   ")
    print("written to", write(f"two_stage_{given.only}", rows))


if __name__ == "__main__":
    main()
