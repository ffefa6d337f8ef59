"""Train under a rule with Hugging Face `accelerate` (`pip install accelerate`).

    python examples/accelerate_loop.py --rule dfa
    accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py --rule dfa

What is prepared is `compiled.loss_module()`, whose forward is the rule's loss, so that data parallel wrappers see it.
The data are scikit-learn's digits.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import graphrewrite as gr
from graphrewrite.datasets import digits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", default="dfa")
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()

    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    train, test = digits().flat()
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    compiled = gr.compile(model, rule=options.rule, example_inputs=train.x[:8], example_targets=train.y[:8])
    module, optimizer, loader = accelerator.prepare(
        compiled.loss_module(),
        torch.optim.Adam(compiled.parameters(), lr=2e-3),
        DataLoader(TensorDataset(*train), batch_size=64, shuffle=True),
    )
    for epoch in range(options.epochs):
        module.train()
        for x, y in loader:
            optimizer.zero_grad()
            accelerator.backward(module(x, y))
            optimizer.step()
        compiled.eval()
        accuracy = (compiled.predict(test.x).argmax(-1) == test.y).float().mean().item()
        accelerator.print(f"epoch {epoch + 1}: {100 * accuracy:.1f} % of the test digits")


if __name__ == "__main__":
    main()
