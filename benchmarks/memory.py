"""Peak live activation bytes against depth, for every rule that is asked for, next to eager backpropagation.

    python benchmarks/memory.py --rules bp,dfa,ff

Bytes are storages allocated during one step, parameters and inputs not counted, the returned gradients subtracted, in
units of one block's activation. Writes `results/memory.json`.
"""

from __future__ import annotations

import argparse

import torch
from common import write
from torch import nn
from torch.utils.checkpoint import checkpoint

import graphrewrite as gr
from graphrewrite.testing.memory import equal_blocks, gradient_bytes, measured_peak, peak_bytes, predicted_peak

WIDTH, BATCH, DEPTHS = 64, 4096, (4, 16, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rules", default="bp,dfa,ff")
    rules = parser.parse_args().rules.split(",")
    unit = BATCH * WIDTH * 4
    rows = []
    for depth in DEPTHS:
        torch.manual_seed(0)
        model = equal_blocks(depth, WIDTH)
        x, y = torch.randn(BATCH, WIDTH), torch.randint(0, 10, (BATCH,))
        gradients = gradient_bytes(model)

        def checkpointed(x: torch.Tensor = x, model: nn.Sequential = model) -> torch.Tensor:
            for block in model[:-1]:
                x = checkpoint(block, x, use_reentrant=False)
            return model[-1](x)

        known = [*model.parameters(), x, y]
        eager = peak_bytes(lambda m=model, x=x, y=y: gr.default_loss(m(x), y).backward(), known)
        model.zero_grad()
        saved = peak_bytes(lambda f=checkpointed, y=y: gr.default_loss(f(), y).backward(), known)
        row = {
            "depth": depth,
            "eager": round((eager - gradients) / unit, 2),
            "eager, every block checkpointed": round((saved - gradients) / unit, 2),
        }
        for rule in rules:
            compiled = gr.compile(model, rule)
            compiled.loss(x, y).backward()
            measured, predicted = measured_peak(compiled, x, y), predicted_peak(compiled)
            row[rule] = round((measured - gradients) / unit, 2)
            row[f"{rule}, predicted"] = round((predicted - gradients) / unit, 2)
        rows.append(row)
        print("  ".join(f"{k} {v}" for k, v in row.items()))
    print("written to", write("memory", rows))


if __name__ == "__main__":
    main()
