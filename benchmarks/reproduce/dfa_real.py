"""DFA on real data, next to backpropagation and to training the top block only.

    GRAPHREWRITE_DATA=folder python -m benchmarks.reproduce.dfa_real

* Cora, public split, 2-layer GCN with 16 hidden units; test accuracy at the best validation, one in 5 epochs. Settings
  of Launay et al. 2020: Adam 0.01; DFA with dropout 0.1 and weight decay 1e-4 on the first layer, BP and top-only with
  0.5 and 5e-4.
* Tiny Shakespeare by characters, a small pre-norm GPT, macro placement; validation loss in nats per character. Every
  arm at each rate of `--rates`, the same batches; `best` marks the arm's lowest validation loss.

Writes `results/dfa_cora.json` and `results/dfa_shakespeare.json`, anew after each run.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch
from rich.progress import track
from torch import nn
from torch.nn import functional as F
from torch_geometric.nn import GCNConv

import graphrewrite as gr
from benchmarks.common import write
from benchmarks.overhead import Layer
from benchmarks.reproduce.course import arguments, before, having, named, shorten
from graphrewrite.datasets import Graph, planetoid, tinyshakespeare

ARMS = ("bp", "dfa", "top")


def freeze_all_but(model: nn.Module, top: tuple[str, ...]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(top))


# --- Cora ----------------------------------------------------------------------------------------------------------


class GCN(nn.Module):
    def __init__(self, features: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.conv1, self.conv2, self.dropout = GCNConv(features, 16), GCNConv(16, classes), dropout

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        h = F.dropout(x, self.dropout, self.training)
        h = F.relu(self.conv1(h, edge_index))
        return self.conv2(F.dropout(h, self.dropout, self.training), edge_index)


def cora_arm(graph: Graph, arm: str, seed: int, epochs: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    dropout, decay = (0.1, 1e-4) if arm == "dfa" else (0.5, 5e-4)
    x = graph.x / graph.x.sum(1, keepdim=True).clamp(min=1)
    model = GCN(x.shape[1], int(graph.y.max()) + 1, dropout)
    if arm == "top":
        freeze_all_but(model, ("conv2",))
    targets = torch.where(graph.train_mask, graph.y, -100)
    rule = "bp" if arm == "top" else arm
    compiled = gr.compile(
        model, rule, example_inputs=(x, graph.edge_index), example_targets=targets, blocks=["conv1", "conv2"], seed=seed
    )
    groups = [{"params": model.conv1.parameters(), "weight_decay": decay}, {"params": model.conv2.parameters()}]
    optimizer = torch.optim.Adam(groups, lr=0.01)
    best = (0.0, 0.0)
    for epoch in range(1, epochs + 1):
        compiled.train()
        optimizer.zero_grad()
        compiled.loss((x, graph.edge_index), targets).backward()
        optimizer.step()
        if epoch % 5:
            continue
        compiled.eval()
        with torch.no_grad():
            right = compiled(x, graph.edge_index).argmax(1) == graph.y
        scores = tuple(right[mask].float().mean().item() for mask in (graph.val_mask, graph.test_mask))
        best = max(best, scores)
    compiled.train()
    angles = compiled.alignment((x, graph.edge_index), targets).blocks
    return {
        "task": "cora",
        "arm": arm,
        "seed": seed,
        "epochs": epochs,
        "validation_accuracy": round(best[0], 4),
        "test_accuracy": round(best[1], 4),
        "alignment": {block: round(angle.cosine, 4) for block, angle in angles.items()},
    }


# --- Tiny Shakespeare ------------------------------------------------------------------------------------------------


class GPT(nn.Module):
    def __init__(self, vocabulary: int, width: int = 80, layers: int = 2, heads: int = 4, context: int = 64) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.layers = nn.ModuleList([Layer(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.layers:
            h = layer(h)
        return self.head(self.norm(h))


def windows(
    text: torch.Tensor, count: int, length: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    starts = torch.randint(0, len(text) - length - 1, (count,), generator=generator)
    index = starts[:, None] + torch.arange(length)
    return text[index], text[index + 1]


def shakespeare_arm(folder: str | None, arm: str, seed: int, steps: int, rate: float = 1e-3) -> dict[str, Any]:
    text = tinyshakespeare(folder)
    torch.manual_seed(seed)
    model = GPT(len(text.vocabulary))
    if arm == "top":
        freeze_all_but(model, ("norm", "head"))
    generator = torch.Generator().manual_seed(seed)
    valid = windows(text.valid, 64, 64, torch.Generator().manual_seed(0))
    batch = windows(text.train, 16, 64, generator)
    rule = "bp" if arm == "top" else arm
    compiled = gr.compile(model, rule, example_inputs=batch[0], example_targets=batch[1], seed=seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    curve = []
    for step in range(1, steps + 1):
        x, y = windows(text.train, 16, 64, generator)
        optimizer.zero_grad()
        compiled.loss(x, y).backward()
        optimizer.step()
        if step % max(1, steps // 5) == 0:
            compiled.eval()
            with torch.no_grad():
                curve.append((step, round(compiled.loss(*valid).item(), 4)))
            compiled.train()
    angles = compiled.alignment(*batch).blocks
    return {
        "task": "tinyshakespeare",
        "arm": arm,
        "seed": seed,
        "steps": steps,
        "rate": rate,
        "placement": "macro" if arm == "dfa" else None,
        "validation_loss": curve[-1][1],
        "curve": curve,
        "alignment": {block: round(angle.cosine, 4) for block, angle in angles.items()},
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--only", choices=("cora", "shakespeare"), default=None)
    given = parser.parse_args()
    shorten(given, seeds=1, epochs=5, steps=3, rates=given.rates[:1])
    torch.set_num_threads(1)
    if given.only != "shakespeare":
        graph = planetoid(given.data, "cora")
        rows = []
        name = named("dfa_cora", given)
        held = before(name, given)
        for seed, arm in track(list(itertools.product(range(given.seeds), ARMS)), "Cora"):
            row = having(held, arm=arm, seed=seed, epochs=given.epochs)
            rows.append(row or timed(cora_arm, graph, arm, seed, given.epochs))
            write(name, rows)
    if given.only != "cora":
        rows = []
        name = named("dfa_shakespeare", given)
        held = before(name, given)
        for rate, arm in track(list(itertools.product(given.rates, ARMS)), "Shakespeare"):
            row = having(held, arm=arm, rate=rate, steps=given.steps)
            rows.append(row or timed(shakespeare_arm, given.data, arm, 0, given.steps, rate))
            best = {a: min(r["validation_loss"] for r in rows if r["arm"] == a) for a in ARMS[: len(rows)]}
            rows = [{**r, "best": r["validation_loss"] == best[r["arm"]]} for r in rows]
            write(name, rows)


def timed(run: Any, *args: Any) -> dict[str, Any]:
    started = time.perf_counter()
    row: dict[str, Any] = run(*args)
    shown = {k: row[k] for k in row if k not in ("alignment", "curve")}
    print(f"{time.perf_counter() - started:6.1f} s  {shown}", flush=True)
    return row


if __name__ == "__main__":
    main()
