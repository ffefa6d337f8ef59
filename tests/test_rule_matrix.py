"""Every rule on every kind of model that it may not refuse: a step at the captured batch size and at another one."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves

import graphrewrite as gr
from graphrewrite.testing import zoo

FEEDBACK = [
    "fa",
    "usf",
    "brsf",
    "frsf",
    "kp",
    "weight_mirror",
    "pfa",
    "dfa",
    "drtp",
    "highway",
    "dual_propagation",
    "straight_through",
    "reinmax",
]
FORWARD = ["pepita", "foton", "forward_gradient", "likelihood_ratio"]
LOCAL = ["ff", "mono_forward", "local_loss", "lls"]
MODELS = {
    **dict.fromkeys(FEEDBACK, ("mlp", "cnn", "resnet", "gpt2", "bert", "vit", "gcn", "gat", "lstm")),
    **dict.fromkeys(LOCAL, ("mlp", "cnn", "resnet", "vit", "gpt2", "gcn")),
    **dict.fromkeys(FORWARD, ("mlp", "cnn", "resnet", "vit", "gcn")),
    "counter_current": ("mlp", "cnn"),
    "forward_gnn": ("gcn", "gat", "sage"),
}
ONE_SIZE = {"forward_gnn"}
"""Rules that hold the labels of one graph's nodes as state."""
STILL = {(rule, "vit"): {"vit.embeddings.cls_token"} for rule in ("pepita", "foton")}
"""What cannot learn: a token in front of the model that is the same in both passes, whatever the input."""
REFUSED = {("ff", "gpt2"): "floating-point input"}
QUICK = {"mlp", "gcn"}


def pairs():
    for rule, models in MODELS.items():
        for model in models:
            marks = () if model in QUICK else pytest.mark.slow
            yield pytest.param(rule, model, marks=marks, id=f"{rule}-{model}")


@pytest.mark.parametrize(("rule", "model"), list(pairs()))
def test_rule_trains_model(rule, model):
    case = zoo.make(model)
    compiled = gr.compile(case.model, rule, loss=case.loss)
    first, second, _ = case.sizes
    if (rule, model) in REFUSED:
        with pytest.raises(gr.RuleError, match=REFUSED[rule, model]):
            compiled.materialize(*case.batch(first))
        return
    compiled.materialize(*case.batch(first))
    before = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    optimizer = torch.optim.SGD(compiled.parameters(), lr=1e-3)
    for size in (first, first if rule in ONE_SIZE else second):
        x, y = case.batch(size)
        optimizer.zero_grad()
        loss = compiled.loss(x, y)
        loss.backward()
        assert torch.isfinite(loss)
        held = {name: p.grad for name, p in case.model.named_parameters() if p.grad is not None}
        assert all(torch.isfinite(g).all() for g in held.values())
        optimizer.step()
    still = [name for name, p in case.model.named_parameters() if torch.equal(p, before[name])]
    # biases in front of a normalisation have a gradient of zero; whole layers that stay where they are would be a cut
    still = [name for name in still if before[name].dim() > 1 and name not in STILL.get((rule, model), ())]
    assert not still, f"these never learn: {still}"
    predicted = compiled.eval().predict(x)
    assert all(torch.isfinite(t).all() for t in tree_leaves(predicted) if torch.is_tensor(t))


def test_every_rule_is_in_the_matrix():
    from graphrewrite import registry

    built_in = {name for name, source in registry.known("rule").items() if source == "built in"}
    assert built_in == {*MODELS, "bp"}
