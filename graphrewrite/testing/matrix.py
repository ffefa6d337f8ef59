"""Rule x model x codec x split x backend: whether a combination trains, and what it says if it refuses."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from graphrewrite import api
from graphrewrite.errors import BackendError, RuleError
from graphrewrite.runtime.module import CompiledModule
from graphrewrite.testing import zoo

TRAINS = "trains"
ONE_SIZE = {"forward_gnn"}
"""Rules that hold the labels of one graph's nodes as state: they are tried on graphs of one size."""
STILL = {(rule, "vit"): {"vit.embeddings.cls_token"} for rule in ("pepita", "foton")}
"""What cannot learn: a token in front of the model that is the same in both passes, whatever the input."""


def outcome(rule: str, model: str, **options: Any) -> str:
    """Train a model of the zoo for two steps, at the captured batch size and at another one.

    Args:
        rule: Name or text form.
        model: Name in the zoo.
        options: For `compile`.

    Returns:
        `"trains"`, or the message with which the rule, codec or backend refuses the model.
    """
    try:
        train(rule, model, **options)
    except (RuleError, BackendError) as error:
        return error.message
    return TRAINS


def train(rule: str, model: str, **options: Any) -> CompiledModule:
    """Two training steps of a combination; `options` are those of `compile`.

    Returns:
        What was compiled, after the steps, in evaluation mode.

    Raises:
        RuleError: The rule or the codec refuses the model, when it is captured. Later it would be a fault.
        BackendError: The backend refuses the graph, when it is captured.
        AssertionError: A loss, gradient or prediction is not finite, a weight never moves, or a step is refused after
            the capture was not.
    """
    case = zoo.make(model)
    compiled = api.compile(case.model, rule, loss=case.loss, **options)
    first, second, _ = case.sizes
    compiled.materialize(*case.batch(first))
    before = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    optimizer = torch.optim.SGD(compiled.parameters(), lr=1e-3)
    x: Any = None
    reached: set[str] = set()
    for size in (first, first if rule.partition("{")[0] in ONE_SIZE else second):
        x, y = case.batch(size)
        optimizer.zero_grad()
        try:
            loss = compiled.loss(x, y)
            loss.backward()
            if options.get("split_backward"):
                compiled.backward_weight()
        except (RuleError, BackendError) as error:
            raise AssertionError(f"{rule} on {model} refuses at a step of size {size}: {error}") from error
        assert torch.isfinite(loss), f"the loss of {rule} on {model} is {loss.item()}"
        gradients = {name: p.grad for name, p in case.model.named_parameters() if p.grad is not None}
        bad = [name for name, g in gradients.items() if not torch.isfinite(g).all()]
        assert not bad, f"gradients of {rule} on {model} are not finite: {bad}"
        # of the smallest gradients a step of float32 is nothing
        reached |= {name for name, g in gradients.items() if g.any()}
        optimizer.step()
    excused = STILL.get((rule.partition("{")[0], model), set())
    still = [n for n, p in case.model.named_parameters() if torch.equal(p, before[n]) and n not in excused]
    # biases in front of a normalisation have a gradient of zero; whole layers that stay where they are would be a cut
    stuck = [name for name in still if before[name].dim() > 1 and name not in reached]
    assert not stuck, f"under {rule} these weights of {model} never learn: {stuck}"
    predicted = compiled.eval().predict(x)
    found = all(torch.isfinite(t).all() for t in tree_leaves(predicted) if torch.is_tensor(t))
    assert found, f"{rule} predicts what is not finite on {model}"
    return compiled
