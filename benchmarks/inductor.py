"""The Inductor backend against `torch.compile`: step time of backpropagation, DFA and Mono-Forward; compile time.

    python benchmarks/inductor.py

Ratios are medians of interleaved pairs against `torch.compile(model)` in the same run; that against itself is printed
beside them. Writes `results/inductor.json`.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from common import ratio, write
from overhead import Layer, mlp
from torch import nn

import graphrewrite as gr


def cases() -> dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]]:
    return {
        "mlp 6 x 512, batch 128": (
            lambda: mlp(512, 6),
            lambda: (torch.randn(128, 512), torch.randint(0, 10, (128,))),
        ),
        "transformer 2 x 128, 4 x 128 tokens": (
            lambda: nn.Sequential(*[Layer(128, 4) for _ in range(2)], nn.Linear(128, 10)),
            lambda: (torch.randn(4, 128, 128), torch.randint(0, 10, (4, 128))),
        ),
    }


RULES = (("bp", "auto"), ("dfa", "layers"), ("mono_forward", "auto"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(2)
    rows = []
    for name, (make, batch) in cases().items():
        torch.manual_seed(0)
        reference = make()
        x, y = batch()
        compiled = torch.compile(copy.deepcopy(reference))
        rival = stepper(compiled, lambda x, y, c=compiled: gr.default_loss(c(x), y), x, y)
        rival_seconds = timed(rival)
        for rule, blocks in RULES:
            ours = gr.compile(copy.deepcopy(reference), rule, blocks=blocks, backend="inductor")
            started = time.perf_counter()
            ours.materialize(x, y)
            step = stepper(ours, ours.loss, x, y)
            step()
            seconds = time.perf_counter() - started
            found = ratio(step, rival, rounds=options.rounds, calls=options.calls)
            row = {
                "case": name,
                "rule": rule,
                "blocks": blocks,
                **found.row(),
                "compile_seconds": round(seconds, 1),
                "torch_compile_seconds": round(rival_seconds, 1),
                "saved_bytes": ours.report().saved_bytes,
            }
            rows.append(row)
            print(
                f"{name:<38} {rule:<14} torch.compile {found.reference_ms:8.2f} ms   ratio {found.median:.3f} "
                f"[{found.low:.3f}, {found.high:.3f}]   itself {found.same:.3f}   compiled in {seconds:.1f} s "
                f"({rival_seconds:.1f} s)",
                flush=True,
            )
            write("inductor", rows)
    print("written to", write("inductor", rows))


def stepper(module: nn.Module, loss: Callable[[Any, Any], torch.Tensor], x: Any, y: Any) -> Callable[[], None]:
    def step() -> None:
        module.zero_grad()
        loss(x, y).backward()

    return step


def timed(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
