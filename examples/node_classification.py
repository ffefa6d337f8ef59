"""Classify the nodes of a graph with a PyTorch Geometric network, under a rule.

    python examples/node_classification.py --rule dfa
    python examples/node_classification.py --rule mono_forward --data FOLDER

Without `--data` (or GRAPHREWRITE_DATA) the graph is a random one with two communities; with it, Cora.
"""

from __future__ import annotations

import argparse
import os
from typing import cast

import torch
from torch import nn
from torch_geometric.nn import GCNConv
from torch_geometric.utils import stochastic_blockmodel_graph

import graphrewrite as gr
from graphrewrite.datasets import VARIABLE, Graph, planetoid


class GCN(nn.Module):
    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.first = GCNConv(features, 32)
        self.second = GCNConv(32, classes)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.second(self.first(x, edge_index).relu(), edge_index))


def communities(nodes: int = 200) -> Graph:
    """Two communities that are linked densely inside and sparsely across; the features say little."""
    sizes = [nodes // 2, nodes - nodes // 2]
    y = torch.repeat_interleave(torch.arange(2), torch.tensor(sizes))
    edges = stochastic_blockmodel_graph(sizes, torch.tensor([[0.10, 0.01], [0.01, 0.10]]))
    x = torch.randn(nodes, 16) + 0.3 * y[:, None]
    train = torch.rand(nodes) < 0.2
    return Graph(x, edges, y, train, torch.zeros_like(train), ~train)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", default="dfa")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--data", default=os.environ.get(VARIABLE))
    options = parser.parse_args()

    torch.manual_seed(0)
    graph = planetoid(options.data) if options.data else communities()
    x, edges = graph.x, graph.edge_index
    # a node that is not for training is left out of every loss by the label -100
    targets = graph.y.where(graph.train_mask, -100)
    model = GCN(x.shape[1], int(graph.y.max()) + 1)
    compiled = gr.compile(
        model, options.rule, blocks=["first", "second"], example_inputs=(x, edges), example_targets=targets
    )
    optimizer = torch.optim.Adam(compiled.parameters(), lr=1e-2, weight_decay=5e-4)
    for epoch in range(options.epochs):
        compiled.train()
        optimizer.zero_grad()
        loss = compiled.loss((x, edges), targets)
        loss.backward()
        optimizer.step()
        if (epoch + 1) % max(options.epochs // 5, 1) == 0:
            compiled.eval()
            right = compiled.predict((x, edges)).argmax(-1) == graph.y
            accuracy = right[graph.test_mask].float().mean().item()
            print(f"epoch {epoch + 1}: loss {loss.item():.3f}, {100 * accuracy:.1f} % of the test nodes")


if __name__ == "__main__":
    main()
