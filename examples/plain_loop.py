"""Train one network under a rule of your choice, in the loop you would write anyway.

    python examples/plain_loop.py --rule dfa
    python examples/plain_loop.py --rule mono_forward --epochs 5

The data are scikit-learn's digits.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import graphrewrite as gr
from graphrewrite.datasets import digits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", default="dfa")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()

    torch.manual_seed(0)
    train, test = digits().flat()
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    # with examples the rule's own parameters (feedback, heads) exist before the optimizer is built
    compiled = gr.compile(model, rule=options.rule, example_inputs=train.x[:8], example_targets=train.y[:8])
    print(compiled.report().certificates)

    optimizer = torch.optim.Adam(compiled.parameters(), lr=2e-3)
    for epoch in range(options.epochs):
        compiled.train()
        for batch in torch.randperm(len(train.x)).split(64):
            optimizer.zero_grad()
            compiled.loss(train.x[batch], train.y[batch]).backward()
            optimizer.step()
        compiled.eval()
        accuracy = (compiled.predict(test.x).argmax(-1) == test.y).float().mean().item()
        print(f"epoch {epoch + 1}: {100 * accuracy:.1f} % of {len(test.y)} test digits")


if __name__ == "__main__":
    main()
