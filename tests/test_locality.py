"""Locality proved by perturbation: what a rule's certificate calls local does not move when later blocks change.

Every local rule, in turn on a plain net, a transformer, a net with batch-norm and a graph network: the parameters of
each later block are changed, heads included, and the gradients of a block must be bitwise what they were.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import graphrewrite as gr
from graphrewrite.testing import zoo
from graphrewrite.testing.rules import compile_copy, downstream_reads

LOCAL = [
    "ff",
    "ff{loss=symba,goodness=mean}",
    "ff{collaboration=previous}",
    "ff{negatives=all,peer=0}",
    "mono_forward",
    "mono_forward{share=heads}",
    "local_loss{head=pred}",
    "local_loss{head=sim}",
    "local_loss{head=predsim}",
    "local_loss{head=dgl}",
    "local_loss{head=aug_local}",
    "local_loss{head=target_projection}",
    "lls",
    "lls{modulation=m}",
    "lls{modulation=mxm}",
    "counter_current",
]
GRAPH = [
    "forward_gnn",
    "forward_gnn{method=label}",
    "forward_gnn{method=virtual}",
    "forward_gnn{top_down=loss}",
    "forward_gnn{top_down=input}",
]
QUICK = {("lls", "mlp")}
"""The others are checked by default in the files of their rules, on a net of their own."""


def mlp():
    torch.manual_seed(0)
    layers = [m for a, b in itertools.pairwise((8, 7, 7, 7)) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(7, 4)), torch.randn(6, 8), torch.randint(0, 4, (6,)), None


def of_zoo(name):
    case = zoo.make(name)
    torch.manual_seed(0)
    return (case.model, *case.batch(6), case.loss)


def cases():
    pairs = [(rule, "mlp") for rule in LOCAL]
    pairs += [(rule, name) for name in ("cnn", "vit", "gcn") for rule in ("mono_forward", "local_loss", "lls", "ff")]
    pairs += [("mono_forward", "gpt2"), ("local_loss", "gpt2"), ("counter_current", "cnn")]
    pairs += [(rule, "gcn") for rule in GRAPH]
    return [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in pairs]


@pytest.mark.parametrize(("rule", "name"), cases())
def test_gradients_do_not_move_with_later_blocks(rule, name):
    model, x, y, loss = mlp() if name == "mlp" else of_zoo(name)
    options = {"blocks": "layers"} if name == "mlp" else {}
    proved = compile_copy(model, rule, x, y, loss=loss, **options).report().certificates
    assert proved.locality_radius == 0
    assert not proved.update_locked
    assert not proved.weight_transport
    reads = downstream_reads(model, rule, x, y, loss=loss, **options)
    assert len(reads) >= 2
    assert not any(reads.values()), reads


def test_the_perturbation_would_find_a_dependence():
    model, x, y, _ = mlp()
    assert downstream_reads(model, "bp", x, y, blocks="layers")["0"] == {"2", "4", "6"}


@pytest.mark.slow
def test_collaboration_of_all_layers_is_not_local_and_says_so():
    model, x, y, _ = mlp()
    rule = "ff{collaboration=all}"
    proved = compile_copy(model, rule, x, y, blocks="layers").report().certificates
    reads = downstream_reads(model, rule, x, y, blocks="layers")
    assert reads["0"] == {"2", "4"}
    assert proved.update_locked
    assert proved.locality_radius == 2


@pytest.mark.slow
def test_a_shared_unembedding_is_read_by_all_and_the_certificate_says_so():
    """The matrix belongs to the last block: heads that borrow it are not local."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 7), nn.ReLU(), nn.Linear(7, 4, bias=False))
    x, y = torch.randn(6, 8), torch.randint(0, 4, (6,))
    rule = "mono_forward{share=unembedding}"
    reads = downstream_reads(model, rule, x, y, blocks="layers")
    assert reads == {"0": {"4"}, "2": {"4"}, "4": set()}
    proved = gr.compile(model, rule, example_inputs=x, example_targets=y, blocks="layers").report().certificates
    assert proved.locality_radius >= 1
