"""Rules times models: whether a rule trains a model of the zoo, and what it says if it refuses."""

from __future__ import annotations

import torch
from torch.utils._pytree import tree_leaves

from graphrewrite import api
from graphrewrite.errors import RuleError
from graphrewrite.testing import zoo

TRAINS = "trains"
ONE_SIZE = {"forward_gnn"}
"""Rules that hold the labels of one graph's nodes as state: they are tried on graphs of one size."""
STILL = {(rule, "vit"): {"vit.embeddings.cls_token"} for rule in ("pepita", "foton")}
"""What cannot learn: a token in front of the model that is the same in both passes, whatever the input."""


def outcome(rule: str, model: str) -> str:
    """Train a model of the zoo for two steps, at the captured batch size and at another one.

    Args:
        rule: Name or text form.
        model: Name in the zoo.

    Returns:
        `"trains"`, or the message of the `RuleError` with which the rule refuses the model.

    Raises:
        AssertionError: A loss, gradient or prediction is not finite, or a weight never moves.
    """
    case = zoo.make(model)
    compiled = api.compile(case.model, rule, loss=case.loss)
    first, second, _ = case.sizes
    try:
        compiled.materialize(*case.batch(first))
    except RuleError as error:
        return error.message
    before = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    optimizer = torch.optim.SGD(compiled.parameters(), lr=1e-3)
    for size in (first, first if rule.partition("{")[0] in ONE_SIZE else second):
        x, y = case.batch(size)
        optimizer.zero_grad()
        loss = compiled.loss(x, y)
        loss.backward()
        assert torch.isfinite(loss), f"the loss of {rule} on {model} is {loss.item()}"
        gradients = {name: p.grad for name, p in case.model.named_parameters() if p.grad is not None}
        bad = [name for name, g in gradients.items() if not torch.isfinite(g).all()]
        assert not bad, f"gradients of {rule} on {model} are not finite: {bad}"
        optimizer.step()
    excused = STILL.get((rule.partition("{")[0], model), set())
    still = [n for n, p in case.model.named_parameters() if torch.equal(p, before[n]) and n not in excused]
    # biases in front of a normalisation have a gradient of zero; whole layers that stay where they are would be a cut
    stuck = [name for name in still if before[name].dim() > 1]
    assert not stuck, f"under {rule} these weights of {model} never learn: {stuck}"
    predicted = compiled.eval().predict(x)
    found = all(torch.isfinite(t).all() for t in tree_leaves(predicted) if torch.is_tensor(t))
    assert found, f"{rule} predicts what is not finite on {model}"
    return TRAINS
