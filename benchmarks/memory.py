"""Peak live activation bytes against depth, for every rule that is asked for, next to eager backpropagation.

    python -m benchmarks.memory --rules bp dfa ff mono_forward "local_loss{head=predsim}" lls
    python -m benchmarks.memory --local --name memory_local        # every rule and head with local objectives

Bytes are storages allocated during one step, parameters and inputs not counted, the returned gradients subtracted, in
units of one block's activation. For rules whose updates are not locked: the same of `step_blocks`, nothing subtracted,
and the most bytes that all `.grad` take together, in KiB, in the ordinary step and in the unlocked one. Writes
`results/memory.json`, anew after each depth; with `--add`, into the rows that are there already.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

import graphrewrite as gr
from benchmarks.common import RESULTS, write
from graphrewrite.testing.memory import equal_blocks, gradient_bytes, measured_peak, peak_bytes, predicted_peak

WIDTH, BATCH, DEPTHS = 64, 1024, (4, 16, 64)
LOCAL = [
    "ff",
    "ff{loss=symba}",
    "ff{collaboration=previous}",
    "ff{collaboration=all}",
    "ff{readout=all}",
    "mono_forward",
    "local_loss{head=pred}",
    "local_loss{head=sim}",
    "local_loss{head=predsim}",
    "local_loss{head=dgl}",
    "local_loss{head=aug_local}",
    "local_loss{head=target_projection}",
    "lls",
    "lls{modulation=mxm}",
    "counter_current",
]
RULES = ["bp", "dfa", "ff", "mono_forward", "local_loss{head=predsim}", "lls"]


def unlocked(compiled: gr.CompiledModule, x: torch.Tensor, y: torch.Tensor, unit: int) -> dict[str, float]:
    """Peaks of `step_blocks` with plain gradient descent, which holds no state of its own."""
    optimizers = [torch.optim.SGD(group["params"], lr=0.0) for group in compiled.param_groups()]
    alive: list[int] = []
    compiled.step_blocks(x, y, optimizers, before_update=lambda *_: alive.append(held_gradients(compiled)))
    known = [*compiled.parameters(), *compiled.buffers(), x, y]
    measured = peak_bytes(lambda: compiled.step_blocks(x, y, optimizers), known)
    return {"": round(measured / unit, 2), ", gradients KiB": round(max(alive) / 1024, 1)}


def held_gradients(compiled: gr.CompiledModule) -> int:
    return sum(p.grad.numel() * p.grad.element_size() for p in compiled.parameters() if p.grad is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rules", nargs="+", default=RULES)
    parser.add_argument("--local", action="store_true", help="every rule and head with local objectives")
    parser.add_argument("--depths", nargs="+", type=int, default=DEPTHS)
    parser.add_argument(
        "--add", action="store_true", help="keep what the result file says about other rules and depths"
    )
    parser.add_argument("--name", default="memory", help="name of the result file")
    given = parser.parse_args()
    rules = LOCAL if given.local else given.rules
    unit = BATCH * WIDTH * 4
    rows: dict[int, dict[str, Any]] = {}
    if given.add:
        rows = {row["depth"]: row for row in json.loads((RESULTS / f"{given.name}.json").read_text())["rows"]}
    for depth in given.depths:
        torch.manual_seed(0)
        model = equal_blocks(depth, WIDTH)
        x, y = torch.randn(BATCH, WIDTH), torch.randint(0, 10, (BATCH,))
        gradients = gradient_bytes(model)

        def checkpointed(x: torch.Tensor = x, model: nn.Sequential = model, depth: int = depth) -> torch.Tensor:
            return model[-1](checkpoint_sequential(model[:-1], math.isqrt(depth), x, use_reentrant=False))

        known = [*model.parameters(), x, y]
        eager = peak_bytes(lambda m=model, x=x, y=y: gr.default_loss(m(x), y).backward(), known)
        model.zero_grad()
        saved = peak_bytes(lambda f=checkpointed, y=y: gr.default_loss(f(), y).backward(), known)
        row = {
            "depth": depth,
            "eager": round((eager - gradients) / unit, 2),
            "eager, checkpointed in sqrt(depth) segments": round((saved - gradients) / unit, 2),
        }
        for rule in rules:
            compiled = gr.compile(model, rule, verify="off")
            compiled.loss(x, y).backward()
            returned = held_gradients(compiled)
            measured, predicted = measured_peak(compiled, x, y), predicted_peak(compiled)
            row[rule] = round((measured - returned) / unit, 2)
            row[f"{rule}, predicted"] = round((predicted - returned) / unit, 2)
            row[f"{rule}, update locked"] = compiled.report().certificates.update_locked
            if not row[f"{rule}, update locked"]:
                row[f"{rule}, gradients KiB"] = round(returned / 1024, 1)
                row.update({f"{rule}, step_blocks{k}": v for k, v in unlocked(compiled, x, y, unit).items()})
        rows[depth] = {**rows.get(depth, {}), **row}
        print("  ".join(f"{k} {v}" for k, v in row.items()))
        print("written to", write(given.name, [rows[depth] for depth in sorted(rows)]), flush=True)


if __name__ == "__main__":
    main()
