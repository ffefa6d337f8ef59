"""Every rule on every kind of model that it may not refuse: a step at the captured batch size and at another one."""

from __future__ import annotations

import json
import pathlib

import pytest

from graphrewrite.testing import matrix

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
FORWARD = ["pepita", "foton", "forward_gradient", "likelihood_ratio", "zeroth_order"]
ENERGY = ["predictive_coding", "target_propagation"]
LOCAL = ["ff", "mono_forward", "local_loss", "lls"]
MODELS = {
    **dict.fromkeys(FEEDBACK, ("mlp", "cnn", "resnet", "gpt2", "bert", "vit", "gcn", "gat", "lstm")),
    **dict.fromkeys(LOCAL, ("mlp", "cnn", "resnet", "vit", "gpt2", "gcn")),
    **dict.fromkeys(ENERGY, ("mlp", "cnn", "resnet", "vit", "gcn")),
    "equilibrium_propagation": ("mlp",),
    **dict.fromkeys(FORWARD, ("mlp", "cnn", "resnet", "vit", "gcn")),
    "counter_current": ("mlp", "cnn"),
    "forward_gnn": ("gcn", "gat", "sage"),
}
REFUSED = {("ff", "gpt2"): "floating-point input"}
QUICK = {"mlp"}


def pairs():
    for rule, models in MODELS.items():
        for model in models:
            marks = () if model in QUICK else pytest.mark.slow
            yield pytest.param(rule, model, marks=marks, id=f"{rule}-{model}")


@pytest.mark.filterwarnings("ignore:.*times the squared gradient.*:UserWarning")
@pytest.mark.parametrize(("rule", "model"), list(pairs()))
def test_rule_trains_model(rule, model):
    found = matrix.outcome(rule, model)
    if (rule, model) in REFUSED:
        assert REFUSED[rule, model] in found
    else:
        assert found == matrix.TRAINS


def test_the_recorded_table_is_that_of_these_rules():
    """What the documentation shows: `python -m benchmarks.matrix` adds what is missing."""
    text = (pathlib.Path(__file__).parent.parent / "benchmarks" / "results" / "matrix.json").read_text()
    rows = json.loads(text)["rows"]
    plain = [r for r in rows if (r["codec"], r["split"], r["backend"]) == ("none", False, "eager")]
    table = {(row["rule"], row["model"]): row for row in plain}
    assert {rule for rule, _ in table} == {*MODELS, "bp"}, "run python -m benchmarks.matrix, then docs/generate.py"
    required = {(rule, model) for rule, models in MODELS.items() for model in models} - REFUSED.keys()
    refused = {pair: table[pair]["why"] for pair in required & table.keys() if table[pair]["outcome"] != "trains"}
    assert not refused
    assert {row["outcome"] for (rule, _), row in table.items() if rule == "bp"} == {matrix.TRAINS}


def test_no_cell_of_the_recorded_matrix_fails():
    """A combination trains or says why not; a failure is to be mended, not recorded."""
    text = (pathlib.Path(__file__).parent.parent / "benchmarks" / "results" / "matrix.json").read_text()
    rows = json.loads(text)["rows"]
    assert [row for row in rows if row["outcome"] not in ("trains", "refuses")] == []
    assert all(row["why"] for row in rows if row["outcome"] == "refuses")


def test_every_rule_is_in_the_matrix():
    from graphrewrite import registry

    built_in = {name for name, source in registry.known("rule").items() if source == "built in"}
    assert built_in == {*MODELS, "bp"}
