"""Maps from module glob to rule: what a mixture trains is what its rules train, and its certificate is derived."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphrewrite as gr
from graphrewrite.testing.rules import assert_locality_is_certified
from helpers import assert_close, eager_grads, train_step

SLOW = pytest.mark.slow
pytestmark = pytest.mark.filterwarnings("ignore:.*narrower than the output error.*:UserWarning")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)]
    return nn.Sequential(*layers).double()


def batch():
    torch.manual_seed(1)
    return torch.randn(7, 4).double(), torch.randint(0, 3, (7,))


def compiled_with(rule, model=None):
    x, y = batch()
    return gr.compile(model or net(), rule, blocks="layers", example_inputs=x, example_targets=y)


def of(gradients, *layers):
    return {n: g for n, g in gradients.items() if n.split(".")[0] in layers}


def certificate(compiled):
    return {b.block: b for b in compiled.report().certificates.blocks}


@pytest.mark.parametrize(
    "rule",
    [
        "zeroth_order",
        "zeroth_order{method=coordinate}",
        "predictive_coding{steps=5}",
        "predictive_coding{variant=exact}",
    ],
)
@pytest.mark.parametrize("mine", [("0",), ("2", "4"), ("6",)])
def test_rules_that_replace_gradients_leave_the_others_exact(rule, mine):
    """Backpropagation runs through the blocks of the other rule: the rest keeps its exact gradient."""
    if "predictive" in rule and mine == ("6",):
        with pytest.raises(gr.RuleError, match="nothing to settle"):
            compiled_with(dict.fromkeys(mine, rule))
        return
    model, (x, y) = net(), batch()
    exact = eager_grads(model, F.cross_entropy(model(x), y))
    compiled = compiled_with(dict.fromkeys(mine, rule), model)
    found = train_step(compiled, x, y)
    others = [layer for layer in "0246" if layer not in mine]
    assert_close(of(found, *others), of(exact, *others), rtol=1e-12)
    assert set(of(found, *mine)) == set(of(exact, *mine))
    rules = {b.block: b.rule for b in compiled.report().certificates.blocks}
    assert all((rules[layer] == "bp") == (layer in others) for layer in rules)


@SLOW
def test_zeroth_order_blocks_take_part_of_the_directions():
    """A block's weights move along the same directions whether or not other blocks are perturbed with them."""
    model, (x, y) = net(), batch()
    rule = "zeroth_order{method=coordinate}"
    alone = train_step(compiled_with({"2": rule}, model), x, y)
    whole = train_step(compiled_with(rule, model), x, y)
    assert_close(of(alone, "2"), of(whole, "2"))


def test_two_rules_without_a_backward_side_by_side():
    model, (x, y) = net(), batch()
    both = compiled_with(
        {"0": "zeroth_order{method=coordinate,scale=1e-6}", "*": "predictive_coding{variant=exact}"}, model
    )
    exact, found = eager_grads(model, F.cross_entropy(model(x), y)), train_step(both, x, y)
    assert_close(of(found, "2", "4", "6"), of(exact, "2", "4", "6"), rtol=1e-12)
    assert_close(of(found, "0"), of(exact, "0"), rtol=1e-4)
    proved = certificate(both)
    assert not proved["0"].weight_transport
    assert not proved["0"].backward_locked
    assert proved["2"].weight_transport
    assert proved["2"].backward_locked


@pytest.mark.parametrize(
    "feedback", ["dfa", pytest.param("fa", marks=SLOW), pytest.param("usf", marks=SLOW), pytest.param("kp", marks=SLOW)]
)
def test_feedback_in_front_of_zeroth_order(feedback):
    """The feedback rule's blocks learn as in a map with bp behind them."""
    x, y = batch()
    mixed = train_step(compiled_with({"0": feedback, "2": feedback, "*": "zeroth_order"}), x, y)
    with_bp = train_step(compiled_with({"0": feedback, "2": feedback}), x, y)
    assert_close(of(mixed, "0", "2"), of(with_bp, "0", "2"), rtol=1e-12)


def test_the_certificate_of_a_mixture_is_that_of_its_blocks():
    proved = certificate(compiled_with({"0": "dfa", "2": "zeroth_order", "4": "predictive_coding{steps=3}"}))
    assert [proved[b].rule.partition("{")[0] for b in "0246"] == ["dfa", "zeroth_order", "predictive_coding", "bp"]
    assert [bool(proved[b].weight_transport) for b in "0246"] == [False, False, True, False]
    assert [bool(proved[b].backward_locked) for b in "0246"] == [False, False, True, False]
    assert all(proved[b].global_error for b in "0246")


@SLOW
def test_locality_of_a_mixture_is_as_certified():
    x, y = batch()
    rule = {"0": "dfa", "2": "zeroth_order", "4": "predictive_coding{steps=3}"}
    assert_locality_is_certified(net(), rule, x, y, blocks="layers")


@pytest.mark.parametrize(
    ("local", "order", "other"),
    [
        pytest.param("ff", "local first", "zeroth_order{method=coordinate}", marks=SLOW),
        pytest.param("ff", "local last", "zeroth_order{method=coordinate}", marks=SLOW),
        pytest.param("ff", "local first", "predictive_coding{variant=exact}", marks=SLOW),
        pytest.param("ff", "local last", "predictive_coding{variant=exact}", marks=SLOW),
        pytest.param("ff", "local last", "bp", marks=SLOW),
        pytest.param("mono_forward", "local last", "zeroth_order{method=coordinate}", marks=SLOW),
        ("mono_forward", "local last", "predictive_coding{variant=exact}"),
    ],
)
def test_local_rules_with_others_behind(local, order, other):
    """Blocks behind a local rule's learn from the task loss of the pass that reads them, whoever is named first."""
    x, y = batch()
    model = net()
    rules = {"0": local, "2": local, "4": other, "6": other}
    if order == "local last":
        rules = {"4": other, "6": other, "0": local, "2": local}
    compiled = compiled_with(rules, model)
    found = train_step(compiled, x, y)
    plain = train_step(compiled_with({"0": local, "2": local}, model), x, y)
    assert set(found) == set(plain)
    assert_close(of(found, "0", "2"), of(plain, "0", "2"), rtol=1e-9)
    assert_close(of(found, "4", "6"), of(plain, "4", "6"), rtol=1e-2 if "coordinate" in other else 1e-9)
    # and not because the other rule was forgotten
    same = all(torch.equal(found[n], plain[n]) for n in of(found, "4", "6"))
    assert same == (other == "bp")
    proved = certificate(compiled)
    assert not proved["0"].global_error
    assert not proved["0"].update_locked


@pytest.mark.parametrize(("local", "other"), [("ff", "zeroth_order"), ("mono_forward", "predictive_coding")])
def test_local_rules_behind_others_are_refused(local, other):
    """Nothing of the task loss comes back through a cut, and no loss of their own reaches the first blocks."""
    with pytest.raises(gr.RuleError, match="no cotangent would reach it"):
        compiled_with({"0": other, "*": local})
