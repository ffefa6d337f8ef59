"""Forward-Forward and its variants on MNIST, ForwardGNN on Cora and CiteSeer, each next to backpropagation.

    python -m benchmarks.reproduce.ff_variants --data FOLDER
    python -m benchmarks.reproduce.ff_variants --data FOLDER --only graphs

One thread. The MNIST rules share initial weights, batches and steps of one run: Adam 3e-3, falling to zero over the
second half; wrong labels drawn anew each step; no peer normalisation. Rate and threshold were chosen on training
images that no run trains on (50,000 to 53,000), never on test images. All variants are read alike: the class with the
most goodness over all hidden blocks. Writes `results/ff_mnist.json` and `results/forward_gnn.json`.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.progress import track
from torch import nn
from torch.nn import functional as F

import graphrewrite as gr
from benchmarks.common import write
from benchmarks.reproduce.course import arguments, before, having, named, shorten, trained
from graphrewrite import datasets, training
from graphrewrite.evaluation import block_predictions, sparsity

MNIST_RULES = (
    "bp",
    "ff{goodness=mean,threshold=2,peer=0}",
    "ff{goodness=mean,threshold=2,peer=0,collaboration=previous}",
    "ff{goodness=mean,threshold=2,peer=0,collaboration=all}",
    "ff{threshold=1,peer=0}",
    "ff{threshold=1,peer=0,collaboration=all}",
)
GRAPH_RULES = ("bp", "forward_gnn", "forward_gnn{top_down=input}")


def mnist(given: argparse.Namespace) -> list[dict[str, Any]]:
    """784-256-256-256-10 on the first `--samples` training images, all test images."""
    samples, epochs = given.samples, given.epochs
    data = datasets.mnist(given.data).flat()
    data = datasets.Dataset(training.take(data.train, torch.arange(samples)), data.test)
    torch.manual_seed(0)
    layers = [m for a, b in itertools.pairwise((784, 256, 256, 256)) for m in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(256, 10))
    budget = training.Budget(epochs=epochs, batch=100, rate=3e-3, cooldown=0.5)
    learners = training.side_by_side(model, MNIST_RULES, training.take(data.train, torch.arange(100)), budget)
    trained(named("ff_mnist", given), learners, data, budget)
    return [
        {
            "data": f"mnist, {samples} training images, {epochs} epochs",
            "model": "784-256-256-256-10",
            "rule": one.rule,
            "test_error_percent": errors(one, data.test),
            "test_error_percent_of_the_last_block_by_epoch": [round(100 * (1 - p.accuracy), 2) for p in one.points],
            "zeros_by_block": {b: round(s, 3) for b, s in sparsity(one.compiled, data.test.x[:1000]).items()},
            "step_time_to_bp": round(one.ratio_to(learners[0]), 2),
            "update_locked": one.certificates.update_locked,
        }
        for one in learners
    ]


def errors(one: training.Learner, test: datasets.Split) -> dict[str, float]:
    """Test error in percent, of each block and of the goodness summed over all hidden blocks (bp: of its output)."""
    if one.rule == "bp":
        return {"all": round(100 * (1 - one.points[-1].accuracy), 2)}
    wrong: dict[str, int] = {}
    for piece in training.in_batches(test, 1000):
        scores = block_predictions(one.compiled, piece.x)
        for block, found in {"all": torch.stack(list(scores.values())).sum(0), **scores}.items():
            wrong[block] = wrong.get(block, 0) + int((found.argmax(1) != piece.y).sum())
    return {block: round(100 * count / len(test.y), 2) for block, count in wrong.items()}


class GraphNet(nn.Module):
    """Two or more graph layers with ReLU between them."""

    def __init__(self, layer: Callable[[int, int], nn.Module], widths: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer(a, b) for a, b in itertools.pairwise(widths)])

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        """Class scores of the nodes."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x, edge_index))
        return self.layers[-1](x, edge_index)  # type: ignore[no-any-return]


def citation(name: str, given: argparse.Namespace, held: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """GCN and SAGE on the public split; the test accuracy at the best validation accuracy."""
    from torch_geometric.nn import GCNConv, SAGEConv

    epochs = given.graph_epochs
    graph = datasets.planetoid(given.data, name)
    x = F.normalize(graph.x, p=1, dim=1)
    y = graph.y.masked_fill(~graph.train_mask, -100)
    for layer in (GCNConv, SAGEConv):
        torch.manual_seed(0)
        model = GraphNet(layer, [x.shape[1], 64, int(graph.y.max()) + 1])
        setting = {
            "data": f"{name}, public split, {epochs} epochs",
            "model": f"{layer.__name__} {x.shape[1]}-64-{int(graph.y.max()) + 1}",
        }
        for rule in track(given.graph_rules, f"{name}, {layer.__name__}"):
            if row := having(held, **setting, rule=rule):
                yield row
                continue
            own = copy.deepcopy(model)
            compiled = gr.compile(own, rule, example_inputs=(x, graph.edge_index), example_targets=y)
            optimizer = torch.optim.Adam(compiled.parameters(), lr=1e-2, weight_decay=5e-4)
            best, test, started = -1.0, 0.0, time.perf_counter()
            for epoch in range(epochs):
                optimizer.zero_grad()
                compiled.loss((x, graph.edge_index), y).backward()
                optimizer.step()
                if epoch % 4 == 3:
                    right = compiled.eval().predict((x, graph.edge_index)).argmax(1) == graph.y
                    compiled.train()
                    valid = right[graph.val_mask].float().mean().item()
                    if valid > best:
                        best, test = valid, right[graph.test_mask].float().mean().item()
            found = {
                **setting,
                "rule": rule,
                "test_accuracy_percent": round(100 * test, 2),
                "seconds": round(time.perf_counter() - started, 1),
            }
            print(found, flush=True)
            yield found


def main() -> None:
    """Run both parts, or one."""
    parser = arguments(__doc__)
    parser.add_argument("--only", choices=("mnist", "graphs"), default=None)
    parser.add_argument("--samples", type=int, default=20000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--graph-epochs", type=int, default=60)
    parser.add_argument("--sets", nargs="+", default=["cora", "citeseer"])
    parser.add_argument("--graph-rules", nargs="+", default=GRAPH_RULES)
    given = parser.parse_args()
    shorten(given, samples=300, epochs=1, graph_epochs=4, sets=given.sets[:1])
    torch.set_num_threads(1)
    if given.only != "graphs":
        rows = mnist(given)
        for row in rows:
            print(row, flush=True)
        write(named("ff_mnist", given), rows)
    if given.only != "mnist":
        rows, held = [], before(named("forward_gnn", given), given)
        for name in given.sets:
            for row in citation(name, given, held):
                rows.append(row)
                write(named("forward_gnn", given), rows)


if __name__ == "__main__":
    main()
