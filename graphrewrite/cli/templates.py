"""The files of a new plugin package, as texts with `$name`, `$module`, `$distribution` and `$Class` in them."""

from __future__ import annotations

PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "$distribution"
version = "0.1.0"
description = "A $kind for graphrewrite."
requires-python = ">=3.11"
dependencies = ["graphrewrite"]

[project.optional-dependencies]
test = ["pytest>=8"]

[project.entry-points."graphrewrite.$group"]
$name = "$module:$Class"

[tool.setuptools]
packages = ["$module"]

[tool.pytest.ini_options]
testpaths = ["tests"]
"""

README = """\
# $distribution

The $kind `$name` for graphrewrite.

```
pip install -e '.[test]' && pytest
```

$usage
"""

USAGE = {
    "rule": '```python\ncompiled = graphrewrite.compile(model, rule="$name")\n```',
    "pass": '```python\ncompiled = graphrewrite.compile(model, passes=["$name"])\n```',
    "codec": 'Its registry name is `$name`: `graphrewrite.registry.find("codec", "$name")`.',
}

RULE = '''\
"""$Title: every block hands on its cotangent times a constant."""

from __future__ import annotations

from dataclasses import dataclass

import graphrewrite as gr


@dataclass(frozen=True)
class $Class(gr.Rule):
    """Multiply the cotangent by `scale` wherever it crosses from a block into the one before it.

    Args:
        scale: The factor; 1 is backpropagation.
    """

    scale: float = 0.5

    name = "$name"
    summary = "cotangents that shrink or grow from block to block"
    formula = "δ_l = s (W_{l+1}ᵀ δ_{l+1}) ⊙ φ'(z_l)"
    paper = ""

    def requires(self, graph: gr.JointGraph) -> None:
        """Refuse what the rule is not defined on, before anything is edited."""
        if not self.scale > 0:
            raise gr.RuleError(f"scale={self.scale} is not positive")

    def run(self, graph: gr.JointGraph) -> gr.PassResult:
        """Let later blocks read each boundary through an identity whose derivative is `scale`."""
        boundaries = [b for block in graph.rule_blocks() for b in graph.boundaries(block.name)]
        modified = False
        for boundary in boundaries:
            consumers = graph.crossing(boundary, loss=False)
            if not consumers:
                self.fail(graph, "only the loss reads this boundary", boundary)
                continue
            graph.map_value(boundary, lambda h: h + (self.scale - 1) * (h - h.detach()), consumers=consumers)
            modified = True
        return gr.PassResult(graph, modified)
'''

RULE_TEST = '''\
"""$Class: its formula, its identity with backpropagation, its locality, its options."""

from __future__ import annotations

import pytest
import torch
from graphrewrite import testing
from torch import nn

import graphrewrite as gr


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, torch.randn(7, 4, dtype=torch.float64), torch.randint(0, 3, (7,))


def test_matches_its_formula(problem):
    def oracle(model, x, y, state):
        """Backpropagation, times scale once for each boundary on the way down."""
        crossings = {"0": 2, "2": 1, "4": 0}
        exact = testing.eager_gradients(model, x, y)
        return {name: 0.25 ** crossings[name[0]] * gradient for name, gradient in exact.items()}

    testing.assert_matches_oracle(problem[0], "$name{scale=0.25}", *problem[1:], oracle)


def test_is_backpropagation_at_scale_one(problem):
    testing.assert_is_backpropagation(problem[0], "$name{scale=1}", *problem[1:])


def test_locality_is_what_the_certificate_says(problem):
    testing.assert_locality_is_certified(problem[0], "$name", *problem[1:])


@pytest.mark.parametrize("family", ["mlp", "cnn", "resnet"])
def test_trains_models_of_several_families(family):
    case = testing.zoo.make(family)
    x, y = case.batch(case.sizes[0])
    gradients = testing.rule_gradients(case.model, "$name", x, y, loss=case.loss)
    assert all(g is None or torch.isfinite(g).all() for g in gradients.values())


def test_options_are_checked(problem):
    with pytest.raises(gr.RuleError, match="not positive"):
        testing.compile_copy(problem[0], "$name{scale=-1}", *problem[1:])
'''

PASS = '''\
"""$Title: adding zero changes nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from graphrewrite.patterns import Failure, Match, PatternPass, fail, op, var
from torch import fx

import graphrewrite as gr

aten = torch.ops.aten


@dataclass(frozen=True)
class $Class(PatternPass):
    """Replace `x + 0` by `x`, where shape and dtype stay the same."""

    name = "$name"
    level = "aten"
    preserves_numerics = True
    summary = "drop additions of the constant zero"
    pattern = op(aten.add.Tensor, var("x"), var("zero"))

    def check(self, graph: gr.JointGraph, match: Match) -> Failure | None:
        """The second summand is the number 0, and nothing is broadcast or cast."""
        zero, x = match["zero"], match["x"]
        if isinstance(zero, fx.Node) or zero != 0:
            return fail("the second summand is not the number 0")
        old, new = match.root.meta["val"], x.meta["val"]
        if old.dtype != new.dtype or str(old.shape) != str(new.shape):
            return fail("the addition also changes the dtype or the shape")
        return None

    def rewrite(self, graph: gr.JointGraph, match: Match) -> fx.Node:
        """The first summand takes its place."""
        return match["x"]
'''

PASS_TEST = '''\
"""$Class: it fires, it does not fire, numerics are kept."""

from __future__ import annotations

import torch
from graphrewrite import testing
from torch import nn

import graphrewrite as gr


class Adds(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.layer, self.number = nn.Linear(4, 3), number

    def forward(self, x):
        return self.layer(x) + self.number


def compiled(number):
    torch.manual_seed(0)
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    return gr.compile(Adds(number), passes=["$name"], verify="numeric", example_inputs=x, example_targets=y)


def additions(made):
    return sum(node.target is torch.ops.aten.add.Tensor for node in made.graph("aten").nodes)


def record(made):
    return next(r for r in made.report().passes if r.text == "$name")


def test_fires():
    assert record(compiled(0)).modified
    assert additions(compiled(0)) == additions(compiled(1)) - 1


def test_does_not_fire_and_says_why():
    made = compiled(1)
    assert not record(made).modified
    assert any(by == "$name" and "not the number 0" in why for by, _, why in made.report().notes)


def test_numerics_are_kept():
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    testing.assert_is_backpropagation(Adds(0), "bp", x, y, passes=["$name"])
'''

CODEC = '''\
"""$Title: a tensor in eight bits, with one scale for all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class $Class:
    """Round to the nearest of 255 levels between -max and max: an error of at most max / 254."""

    name = "$name"
    summary = "eight bits and one scale per tensor"

    def encode(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        """The levels as int8, and the scale."""
        scale = tensor.abs().amax().clamp_min(torch.finfo(tensor.dtype).tiny) / 127
        return [(tensor / scale).round().to(torch.int8), scale]

    def decode(self, residuals: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """Levels times scale, in the dtype of `like`."""
        levels, scale = residuals
        return (levels * scale).to(like.dtype)
'''

CODEC_TEST = '''\
"""$Class: its error bound, its bytes, and what it does to a gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from $module import $Class
from graphrewrite import registry, testing
from torch import nn

import graphrewrite as gr


@dataclass(frozen=True)
class EncodeActivations(gr.Pass):
    """Store what the backward reads of every tanh in encoded form."""

    name = "encode_activations"
    level = "aten"

    def run(self, graph):
        found = [n for n in graph.forward_nodes() if n.target is torch.ops.aten.tanh.default]
        for node in found:
            graph.encode_saved(node, registry.find("codec", "$name")())
        return gr.PassResult(graph, bool(found))


def test_is_a_codec():
    assert isinstance(registry.find("codec", "$name")(), gr.Codec)


def test_error_is_at_most_half_a_level():
    x = torch.randn(64, 9)
    codec = $Class()
    levels, scale = codec.encode(x)
    assert levels.dtype == torch.int8
    decoded = codec.decode([levels, scale], x)
    assert (decoded - x).abs().max() <= x.abs().max() / 254 * 1.001
    assert torch.equal(codec.decode(codec.encode(torch.zeros(3)), torch.zeros(3)), torch.zeros(3))


def test_saves_bytes_and_keeps_the_gradient_close():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 3))
    x, y = torch.randn(32, 4), torch.randint(0, 3, (32,))
    plain = testing.measure_memory(model, "bp", x, y)
    coded = testing.measure_memory(model, "bp", x, y, passes=[EncodeActivations()])
    assert coded.saved < plain.saved
    exact = testing.eager_gradients(model, x, y)
    close = testing.rule_gradients(model, "bp", x, y, passes=[EncodeActivations()])
    for name, gradient in exact.items():
        assert (close[name] - gradient).norm() <= 0.02 * gradient.norm()
'''

MODULES = {"rule": (RULE, RULE_TEST), "pass": (PASS, PASS_TEST), "codec": (CODEC, CODEC_TEST)}
