"""Names: the registry, suggestions for wrong ones, and a plugin package found through its entry points."""

from __future__ import annotations

import pathlib
import shutil
import sys
import tomllib
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphrewrite as gr
from graphrewrite import registry
from graphrewrite.graph.nodes import Tap
from graphrewrite.testing.compare import gradients
from helpers import assert_close, eager_grads

PLUGIN = pathlib.Path(__file__).parent / "plugin"


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def batch():
    return torch.randn(6, 4), torch.randint(0, 3, (6,))


# --- registry ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rule", "pass", "codec", "backend"])
def test_what_is_built_in_can_be_loaded_under_its_name(kind):
    for name, source in registry.known(kind).items():
        found = registry.find(kind, name)
        assert name == name.lower().replace("-", "_")
        if source == "built in" and hasattr(found, "name"):
            assert found.name == name


@pytest.mark.parametrize(
    ("options", "message", "remedy"),
    [
        ({"rule": "dfaa"}, "no rule is named 'dfaa'", "dfa"),
        ({"rule": "nonsense"}, "no rule is named 'nonsense'", "known: bp"),
        ({"rule": "dfa{shard=true}"}, "no option 'shard'", "shared"),
        ({"rule": "bp{x=1}"}, "no option 'x'", "none"),
        ({"passes": ["fold_view"]}, "no pass is named 'fold_view'", "fold_views"),
        ({"backend": "eagr"}, "no backend is named 'eagr'", "eager"),
        ({"rule": {"0": "fff"}}, "no rule is named 'fff'", "ff"),
        ({"rule": ""}, "no name", "name"),
        ({"rule": "dfa{scale}"}, "cannot read the options", "option=value"),
        ({"rule": "dfa{scale=1"}, "cannot read", "braces"),
        ({"rule": "dfa{scale=[1}"}, "cannot read the value of 'scale'", "JSON"),
        ({"rule": "dfa{scale=1 shared=true}"}, "expected a comma", None),
        ({"rule": 3}, "3 is no rule", "Rule object"),
        ({"rule": "dfa{scale=loud}"}, "scale", None),
        ({"rule": "dfa{shared=3}"}, "shared", None),
        ({"rule": "ff{threshold=high}"}, "threshold", None),
    ],
)
def test_wrong_names_and_options(options, message, remedy):
    """Refused by `compile`, before anything is captured."""
    with pytest.raises(gr.RuleError, match=message) as error:
        gr.compile(mlp(), **options)
    assert remedy is None or remedy in error.value.remedy


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("dfa{distribution=cauchy}", "distribution='cauchy' is unknown"),
        ("dfa{spatial=cubic}", "spatial='cubic' is unknown"),
        ("ff{goodness=max}", "goodness='max' is unknown"),
        ("ff{readout=none}", "readout='none' is unknown"),
    ],
)
def test_unknown_values_of_options(rule, message):
    with pytest.raises(gr.RuleError, match=message):
        gr.compile(mlp(), rule).materialize(*batch())


def test_hyphens_stand_for_underscores():
    assert str(gr.PassManager(gr.compile(mlp(), passes=["fold-views"])._options.passes)) == "fold_views"


def test_registration_in_code():
    @dataclass(frozen=True)
    class Mine(gr.Pass):
        name = "mine_of_this_test"

        def run(self, graph):
            return gr.PassResult(graph, False)

    try:
        assert gr.register("pass", Mine.name, Mine) is Mine
        assert registry.known("pass")[Mine.name] == "registered"
        compiled = gr.compile(mlp(), passes=[Mine.name]).materialize(*batch())
        assert Mine.name in [r.text for r in compiled.report().passes]
    finally:
        del registry._registered["pass"][Mine.name]


# --- a plugin ----------------------------------------------------------------------------------------------------


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The package as an installer would leave it: the code, and a dist-info folder with its entry points."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    shutil.copytree(PLUGIN / "graphrewrite_example", tmp_path / "graphrewrite_example")
    info = tmp_path / f"graphrewrite_example-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = [
        "\n".join([f"[{group}]", *(f"{name} = {path}" for name, path in entries.items())])
        for group, entries in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n\n".join(groups) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield project
    sys.modules.pop("graphrewrite_example", None)


def test_plugins_are_listed_with_their_distribution(plugin):
    for kind in ("rule", "pass", "codec", "backend"):
        assert registry.known(kind)[f"example_{kind}"] == "graphrewrite-example"
    with pytest.raises(gr.RuleError) as error:
        gr.compile(mlp(), "example_rul")
    assert "example_rule" in error.value.remedy


def test_listing_plugins_does_not_import_them(plugin):
    registry.known("rule")
    assert "graphrewrite_example" not in sys.modules


def test_rule_of_a_plugin(plugin):
    """delta_l = 3 W^T delta_{l+1}, written out."""
    model, (x, y) = mlp().double(), batch()
    x = x.double()
    compiled = gr.compile(model, "example_rule{scale=3}", verify="numeric")
    compiled.loss(x, y).backward()
    h = torch.relu(model[0](x))
    detached = h.detach().requires_grad_()
    (error,) = torch.autograd.grad(F.cross_entropy(model[2](detached), y), detached)
    upper = eager_grads(model, F.cross_entropy(model[2](h.detach()), y))
    lower = eager_grads(model, (h * 3 * error).sum())
    assert_close(gradients(model), {**upper, **lower})
    assert "example_rule{scale=3}" in str(compiled.report())


def test_pass_and_codec_of_a_plugin(plugin):
    x, y = batch()
    compiled = gr.compile(mlp(), passes=["example_pass"]).materialize(x, y)
    assert Tap("logits") in compiled.graph("operator").outputs
    compiled.loss(x, y).backward()
    assert isinstance(registry.find("codec", "example_codec")(), gr.Codec)


def test_backend_of_a_plugin(plugin):
    x, y = batch()
    model = mlp()
    compiled = gr.compile(model, backend="example_backend")
    compiled.loss(x, y).backward()
    from graphrewrite_example import calls

    assert calls == ["forward", "backward"]
    assert compiled.report().backend == "example_backend"
