"""Random models through random pipelines: rule, blocks, codecs, split, passes in any order.

What is asserted of every example: nothing but a `RuleError` comes out, and only at capture; the verifier accepts the
graph after every pass; what promises to preserve numbers preserves every bit; what a codec stores comes back within the
bound that the codec declares. Shrunk failures of earlier runs are kept at the end, by name.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from graphrewrite.passes.compression.compress_saved import build_codec
from hypothesis import given
from hypothesis import strategies as st

import graphrewrite as gr
from graphrewrite import registry
from graphrewrite.compiler import CLEANUP
from graphrewrite.testing import assert_same, eager_gradients, gradients
from random_dags import WIDTH, Dag, check, programs

RULES = [name for name, source in registry.known("rule").items() if source == "built in" and name != "forward_gnn"]
EXACT = ["mask", "recompute", "cpu_offload"]
LOSSY = ["int8", "int4", "int2", "bf16", "fp16", "fp8", "topk", "lowrank", "velora", "hadamard"]
"""All of the codecs that store a value; those that are passes (`fewbit`) change the derivative and declare no bound."""
APPROXIMATE = ["fewbit", "approx_bp", "ms_norm", "randomized_linear", "hot"]
AT_OPERATORS = ["straight_through", "reinmax"]


@dataclass(frozen=True)
class Pipeline:
    """How a model is compiled."""

    rule: str = "bp"
    blocks: str = "auto"
    compress: tuple[str, ...] = ()
    split: bool = False
    passes: tuple[str, ...] = ()
    verify: str = "structure"
    seed: int = 0

    @property
    def exact(self) -> bool:
        return all(codec in EXACT for codec in self.compress)

    @property
    def options(self) -> dict[str, Any]:
        return {
            "rule": self.rule,
            "blocks": self.blocks,
            "compress": list(self.compress) or None,
            "split_backward": self.split,
            "passes": self.passes,
            "verify": self.verify,
            "seed": self.seed,
        }


def pipelines(rules: list[str], codecs: list[str]) -> st.SearchStrategy[Pipeline]:
    return st.builds(
        Pipeline,
        rule=st.sampled_from(rules),
        blocks=st.sampled_from(["auto", "layers"]),
        compress=st.lists(st.sampled_from(codecs), max_size=2, unique=True).map(tuple) if codecs else st.just(()),
        split=st.booleans(),
        passes=st.lists(st.sampled_from([*CLEANUP, "recompute_regions"]), max_size=6).map(tuple),
        verify=st.sampled_from(["structure", "numeric"]),
        seed=st.integers(0, 3),
    )


@dataclass
class Run:
    """A training step of a copy of the model."""

    compiled: gr.CompiledModule
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor | None] = field(default_factory=dict)


def batch(n: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, WIDTH, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def run(program: Any, pipeline: Pipeline, sizes: tuple[int, ...] = (5,)) -> Run | None:
    """Compile and take a step per size; None where the rule or a codec refuses, which it may at capture only."""
    compiled = gr.compile(copy.deepcopy(Dag(program)), **pipeline.options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compiled.materialize(*batch(sizes[0]))
        except gr.RuleError:
            return None
        for size in sizes:
            compiled.zero_grad()
            torch.manual_seed(0)
            loss = compiled.loss(*batch(size))
            loss.backward()
            if pipeline.split:
                compiled.backward_weight()
    return Run(compiled, loss.detach(), gradients(compiled.module))


# --- what is asserted ------------------------------------------------------------------------------------------------


def assert_preserves(program: Any, pipeline: Pipeline) -> None:
    """Backpropagation with exact codecs is eager mode, bit by bit; any other rule is itself without the pipeline."""
    found = run(program, pipeline)
    if pipeline.rule == "bp":
        assert found is not None, "backpropagation refuses nothing"
        expected = eager_gradients(Dag(program), *batch())
    else:
        plain = run(program, Pipeline(pipeline.rule, pipeline.blocks, seed=pipeline.seed))
        assert (found is None) == (plain is None), "what a rule refuses does not depend on codecs, split and passes"
        if found is None or plain is None:
            return
        assert torch.equal(found.loss, plain.loss)
        expected = plain.gradients
    for name, gradient in found.gradients.items():
        assert_same(gradient, expected[name], f"gradient of {name}")


def assert_survives(program: Any, pipeline: Pipeline) -> None:
    """Two steps at two sizes give gradients of the parameters' shapes, or the combination was refused at capture."""
    found = run(program, pipeline, sizes=(5, 3))
    if found is None:
        return
    assert found.loss.shape == ()
    for name, parameter in found.compiled.module.named_parameters():
        gradient = found.gradients[name]
        assert gradient is None or (gradient.shape == parameter.shape and gradient.dtype == parameter.dtype), name


def assert_within_bounds(program: Any, codec: str, seed: int) -> None:
    """What the backward reads of every saved value, against what the forward computed, under the codec's own bound."""
    exact = gr.compile(Dag(program), seed=seed)
    stored = gr.compile(Dag(program), compress=codec, seed=seed)
    x, y = batch()
    losses = []
    for compiled in (exact, stored):
        compiled.materialize(x, y)
        torch.manual_seed(0)
        losses.append(compiled.loss(x, y))
    assert torch.equal(losses[0].detach(), losses[1].detach()), "a codec changes no forward"
    for treatment in stored.graph("aten").treatments:
        assert treatment.after <= treatment.before, treatment
    chosen = build_codec(codec)
    values = [v for v in losses[0].grad_fn.saved_tensors if v.is_floating_point() and v.numel()]
    for value in values:
        groups = getattr(chosen, "groups", 1)
        if value.ndim == 0 or value.shape[-1] % groups:
            with pytest.raises(gr.RuleError, match=f"does not split into groups={groups}"):
                chosen.encode(value)
            continue
        draw = {"draw": lambda size: torch.rand(size)} if chosen.random else {}
        residuals = chosen.encode(value, **draw)
        residuals = [residuals] if isinstance(residuals, torch.Tensor) else list(residuals)
        decoded = chosen.decode(residuals, value)
        bound = chosen.bound(value)
        if bound is None or not torch.isfinite(value).all():
            continue
        error = (decoded.double() - value.double()).abs()
        if bound.ndim == 0 and value.ndim:
            assert error.norm() <= bound.double() * (1 + 1e-6) + 1e-12, codec
        else:
            assert bool((error <= bound.double() * (1 + 1e-6) + 1e-12).all()), codec


# --- examples --------------------------------------------------------------------------------------------------------


@given(programs, pipelines(["bp"], EXACT))
@check(4, derandomize=True)
def test_backpropagation_is_eager_mode_through_any_exact_pipeline(program, pipeline):
    assert_preserves(program, pipeline)


@given(programs, pipelines(RULES, [*EXACT, *LOSSY, *APPROXIMATE]))
@check(4, derandomize=True)
def test_any_pipeline_trains_or_is_refused(program, pipeline):
    assert_survives(program, pipeline)


@pytest.mark.slow
@given(programs, pipelines(["bp"], EXACT))
@check(150, derandomize=False)
def test_backpropagation_is_eager_mode_through_any_exact_pipeline_in_full(program, pipeline):
    assert_preserves(program, pipeline)


@pytest.mark.slow
@given(programs, pipelines(RULES, [*EXACT, *LOSSY, *APPROXIMATE]))
@check(150, derandomize=False)
def test_any_pipeline_trains_or_is_refused_in_full(program, pipeline):
    assert_survives(program, pipeline)


@pytest.mark.slow
@given(programs, pipelines([rule for rule in RULES if rule != "bp"], EXACT))
@check(100, derandomize=False)
def test_a_rule_is_itself_through_any_exact_pipeline(program, pipeline):
    assert_preserves(program, pipeline)


@pytest.mark.slow
@given(programs, st.sampled_from(LOSSY), st.integers(0, 3))
@check(60, derandomize=False)
def test_codecs_keep_their_bounds_on_what_is_saved(program, codec, seed):
    assert_within_bounds(program, codec, seed)


# --- shrunk failures of earlier runs ---------------------------------------------------------------------------------


def test_a_codec_by_groups_says_which_features_do_not_split():
    assert_within_bounds([(33, 0, 0, 0), *[(0, 0, 0, 0)] * 4], "velora", 0)


def test_recompute_of_views_that_a_schedule_moved_to_the_forward():
    """Gradients of a local rule are computed in the forward; a minimum cut through a view of one had no bound."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 3))
    x, y = torch.randn(4, 1, 6, 6), torch.randint(0, 3, (4,))
    plain = gr.compile(copy.deepcopy(net), "local_loss", example_inputs=x, example_targets=y)
    again = gr.compile(copy.deepcopy(net), "local_loss", compress="recompute", example_inputs=x, example_targets=y)
    found = []
    for compiled in (plain, again):
        compiled.loss(x, y).backward()
        found.append(gradients(compiled.module))
    for name, gradient in found[0].items():
        assert_same(found[1][name], gradient, name)
