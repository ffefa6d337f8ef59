"""Rules that read other weights in the place of the forward weights in the backward: fa, usf, brsf, frsf, kp."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import graphrewrite as gr
from graphrewrite import random
from graphrewrite.errors import RuleError
from graphrewrite.testing import zoo
from graphrewrite.testing.compare import call
from helpers import assert_close, eager_grads

RULES = ("fa", "usf", "brsf", "frsf", "kp")
MATRIX = ("mlp", "cnn", "resnet", "gpt2", "bert", "vit", "gcn", "gat", "lstm")
QUICK = ("mlp", "cnn")
"""Models that capture in a second or two."""


def matrix(names=MATRIX):
    return [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in names]


def double(tree):
    return pytree.tree_map(lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t, tree)


def case_of(name: str, n: int = 3):
    case = zoo.make(name)
    torch.manual_seed(1)
    x, y = case.batch(n)
    return case.model.double(), double(x), y


def rule_grads(compiled, x, y, seed: int = 0):
    torch.manual_seed(seed)
    compiled.zero_grad()
    compiled.loss(x, y).backward()
    return {n: p.grad.clone() for n, p in compiled.module.named_parameters() if p.grad is not None}


def bp_grads(model, x, y, seed: int = 0):
    torch.manual_seed(seed)
    return eager_grads(model, gr.default_loss(call(model, x), y))


def feedback_of(compiled, kind: str = "feedback"):
    """Feedback weights by the name of the parameter they stand for."""
    found = {}
    for name, held in compiled.rule_state.items():
        rule, part, parameter = name.split(".", 2)
        assert rule in RULES
        if part == kind:
            found[parameter] = held
    return found


# --- identities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", matrix())
def test_fa_with_the_forward_weights_is_backpropagation(name):
    model, x, y = case_of(name)
    compiled = gr.compile(copy.deepcopy(model), "fa", example_inputs=x, example_targets=y, blocks="auto")
    parameters = dict(compiled.module.named_parameters())
    feedback = feedback_of(compiled)
    assert feedback
    before = rule_grads(compiled, x, y)
    expected = bp_grads(model, x, y)
    assert any((before[n] - expected[n]).abs().max() > 1e-3 * expected[n].abs().max() for n in expected)
    with torch.no_grad():
        for parameter, held in feedback.items():
            held.copy_(parameters[parameter])
    assert_close(rule_grads(compiled, x, y), expected)
    certificates = compiled.report().certificates
    assert not certificates.weight_transport, certificates
