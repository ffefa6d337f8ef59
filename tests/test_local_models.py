"""Local heads on a transformer and on a graph network, against loops of plain PyTorch, gradient by gradient.

Sequence classification, language modelling through the model's own unembedding, node classification.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch_geometric.nn import GCNConv, SAGEConv

import graphrewrite as gr
from helpers import assert_close

CLASSES, WIDTH, WORDS, LENGTH = 3, 8, 11, 5
SMOOTH = 1e-12
"""What the heads add under the root of a length, so that it has a derivative at zero."""


class Layer(nn.Module):
    """Pre-norm attention and a feed-forward part, both residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d)
        x = x + self.out(h)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Finish(nn.Module):
    """The norm and the map behind the layers."""

    def __init__(self, outputs: int, pool: bool) -> None:
        super().__init__()
        self.norm, self.head, self.pool = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, outputs, bias=False), pool

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        h = self.norm(h)
        return self.head(h.mean(1) if self.pool else h)


class Text(nn.Module):
    """A small transformer; with `tied` the embedding is the unembedding as well."""

    def __init__(self, outputs: int, *, pool: bool, tied: bool = False) -> None:
        super().__init__()
        self.token, self.finish = nn.Embedding(WORDS, WIDTH), Finish(outputs, pool)
        self.layers = nn.ModuleList([Layer(), Layer()])
        if tied:
            self.finish.head.weight = self.token.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.token(tokens)
        for layer in self.layers:
            h = layer(h)
        return self.finish(h)

    def stages(self):
        return [("token", self.token), ("layers.0", self.layers[0]), ("layers.1", self.layers[1])]


class Nodes(nn.Module):
    """Two hidden graph layers and one that answers."""

    def __init__(self, layer) -> None:
        super().__init__()
        self.a, self.b, self.c = layer(6, WIDTH), layer(WIDTH, WIDTH), layer(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.b(F.relu(self.a(x, edges)), edges))
        return self.c(h, edges)


# --- the local losses, written down once more: rows of features, weights of the head, one label per row -----------


def pred(h, w, y):
    return F.cross_entropy(F.linear(h, w["weight"], w.get("bias")), y)


def cosines(rows):
    centred = rows - rows.mean(1, keepdim=True)
    norms = ((centred * centred).sum(1) + SMOOTH).sqrt()
    return centred @ centred.t() / (norms[:, None] * norms[None, :])


def predsim(h, w, y):
    sim = (cosines(h @ w["similarity"].t()) - cosines(F.one_hot(y, CLASSES).to(h.dtype))).square().mean()
    return 0.25 * pred(h, w, y) + 0.75 * sim


def dgl(h, w, y):
    for i in range(3):
        h = F.linear(h, w[f"hidden{i}_weight"])
        h = F.relu(F.batch_norm(h, None, None, w[f"hidden{i}_scale"], w[f"hidden{i}_shift"], training=True))
    return pred(h, w, y)


def lls(h, w, y):
    frequency = torch.linspace(50, 512, CLASSES, dtype=torch.float64)
    basis = torch.sin(frequency[:, None] * torch.arange(h.shape[1], dtype=torch.float64))
    return F.cross_entropy(h / (h.square().sum(1, keepdim=True) + SMOOTH).sqrt() @ basis.t() * w["scale"], y)


PREDSIM = 'local_loss{head="predsim{beta=0.75}"}'
HEADS = {
    "mono_forward": pred,
    PREDSIM: predsim,
    "local_loss{head=dgl}": dgl,
    "lls{modulation=m}": lls,
}


def compile_(model, rule, x, y, blocks):
    compiled = gr.compile(copy.deepcopy(model), rule, example_inputs=x, example_targets=y, blocks=blocks)
    with torch.no_grad():
        for name, held in compiled.rule_state.items():
            if "basis" not in name:
                held.normal_(0.0, 0.5)  # zero starts would hide errors
    return compiled


def weights_of(compiled):
    """Block -> the weights of its head, as leaves of their own."""
    found = {}
    for name, held in compiled.rule_state.items():
        block, _, key = name.partition(".head.")[2].rpartition(".")
        found.setdefault(block, {})[key] = held.detach().clone().requires_grad_(held.requires_grad)
    return found


def assert_gradients(compiled, model, x, y, weights) -> None:
    """Those of the rule against those that a loop has left on the model and the weights."""
    compiled.zero_grad()
    compiled.loss(x, y).backward()
    own = dict(compiled.module.named_parameters())
    assert_close({n: own[n].grad for n in own}, {n: p.grad for n, p in model.named_parameters()}, rtol=1e-10)
    rule = next(iter(compiled.rule_state), "").partition(".head.")[0]
    for block, held in weights.items():
        for key, weight in held.items():
            if weight.requires_grad:
                state = compiled.rule_state[f"{rule}.head.{block}.{key}"]
                assert_close({key: state.grad}, {key: weight.grad}, rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("rule", HEADS)
def test_sequence_classification(rule):
    torch.manual_seed(0)
    model = Text(CLASSES, pool=True).double()
    x, y = torch.randint(0, WORDS, (7, LENGTH)), torch.tensor([0, 1, 2, 2, 1, 0, 0])
    compiled = compile_(model, rule, x, y, ["token", "layers.*", "finish"])
    weights, h, total = weights_of(compiled), x, 0.0
    assert set(weights) == {"token", "layers.0", "layers.1"}
    for name, stage in model.stages():
        h = stage(h.detach())
        total = total + HEADS[rule](h.mean(1), weights[name], y)
    (total + F.cross_entropy(model.finish(h.detach()), y)).backward()
    assert_gradients(compiled, model, x, y, weights)


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_language_modelling_through_the_models_own_unembedding(tied):
    torch.manual_seed(0)
    model = Text(WORDS, pool=False, tied=tied).double()
    x, y = torch.randint(0, WORDS, (4, LENGTH)), torch.randint(0, WORDS, (4, LENGTH))
    y[0, :2] = -100
    compiled = compile_(model, "mono_forward{share=unembedding}", x, y, ["token", "layers.*", "finish"])
    assert not compiled.rule_state
    h, total = x, 0.0
    for _, stage in model.stages():
        h = stage(h.detach())
        total = total + F.cross_entropy((h @ model.finish.head.weight.t()).flatten(0, 1), y.flatten())
    (total + F.cross_entropy(model.finish(h.detach()).flatten(0, 1), y.flatten())).backward()
    assert_gradients(compiled, model, x, y, {})


@pytest.mark.slow
@pytest.mark.parametrize("rule", HEADS)
@pytest.mark.parametrize("layer", [GCNConv, SAGEConv])
def test_node_classification(rule, layer):
    torch.manual_seed(0)
    model = Nodes(layer).double()
    nodes = 12
    x, edges = torch.randn(nodes, 6, dtype=torch.float64), torch.randint(0, nodes, (2, 30))
    y = torch.randint(0, CLASSES, (nodes,))
    compiled = compile_(model, rule, (x, edges), y, ["a", "b", "c"])
    weights = weights_of(compiled)
    h, total = x, 0.0
    for name in ("a", "b"):
        h = F.relu(getattr(model, name)(h.detach(), edges))
        total = total + HEADS[rule](h, weights[name], y)
    (total + F.cross_entropy(model.c(h.detach(), edges), y)).backward()
    assert_gradients(compiled, model, (x, edges), y, weights)


@pytest.mark.slow
def test_nodes_without_a_label_teach_no_head():
    torch.manual_seed(0)
    model = Nodes(GCNConv).double()
    x, edges = torch.randn(9, 6, dtype=torch.float64), torch.randint(0, 9, (2, 20))
    y = torch.randint(0, CLASSES, (9,))
    y[::2] = -100
    compiled = compile_(model, "mono_forward", (x, edges), y, ["a", "b", "c"])
    weights = weights_of(compiled)
    h, total = x, 0.0
    for name in ("a", "b"):
        h = F.relu(getattr(model, name)(h.detach(), edges))
        total = total + F.cross_entropy(h[1::2] @ weights[name]["weight"].t(), y[1::2])
    (total + F.cross_entropy(model.c(h.detach(), edges)[1::2], y[1::2])).backward()
    assert_gradients(compiled, model, (x, edges), y, weights)
