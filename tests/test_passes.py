"""The contract of passes, the pass manager, attribution of errors, and early local backward."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import graphrewrite as gr
from graphrewrite.compiler import CLEANUP
from graphrewrite.graph.nodes import info
from graphrewrite.graph.verify import verify
from graphrewrite.pipeline import PassEvent, build_pass
from graphrewrite.testing.compare import gradients
from helpers import aten_graph, find, grads_of, joint_graph, run


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))


def batch(n: int = 6):
    return torch.randn(n, 4), torch.randint(0, 3, (n,))


@dataclass(frozen=True)
class Nothing(gr.Pass):
    name = "nothing"

    def run(self, graph):
        return gr.PassResult(graph, False)


@dataclass(frozen=True)
class CutFirst(gr.Pass):
    """Cut the first boundary."""

    name = "cut_first"

    def run(self, graph):
        graph.cut(find(graph, "relu")[0])
        return gr.PassResult(graph, True)


@dataclass(frozen=True)
class Refuses(gr.Pass):
    name = "refuses"
    stage: str = "requires"

    def requires(self, graph):
        if self.stage == "requires":
            raise gr.RuleError("not on this graph")

    def run(self, graph):
        if self.stage == "run":
            raise gr.RuleError("cannot go on")
        if self.stage == "bug":
            raise KeyError("a bug of the pass")
        return gr.PassResult(graph, True)

    def ensures(self, graph):
        if self.stage == "ensures":
            raise gr.VerifyError("did not get there")


@dataclass(frozen=True)
class Breaks(gr.Pass):
    """Writes a wrong shape; `admits` says whether it says that it changed anything."""

    name = "breaks"
    level = "aten"
    admits: bool = True

    def run(self, graph):
        node = find(graph, "relu")[0]
        node.meta["gr"] = info(node).but(made_by="")
        return gr.PassResult(graph, self.admits)


# --- contract ----------------------------------------------------------------------------------------------------


def test_a_pass_is_a_frozen_dataclass_with_defaults():
    one = Nothing()
    assert (one.name, one.level, one.preserves_numerics, str(one)) == ("nothing", "operator", False, "nothing")
    with pytest.raises(AttributeError):
        one.option = 3
    with pytest.raises(NotImplementedError, match="defines no run"):
        gr.Pass().run(None)


def test_manager_runs_in_order_and_keeps_history():
    graph = joint_graph(mlp(), *batch())
    before = len(graph.graph.nodes)
    manager = gr.PassManager([Nothing(), CutFirst()])
    result = manager.run(graph)
    assert result is graph
    assert str(manager) == "nothing,cut_first"
    first, second = manager.history
    assert (first.text, first.level, first.modified) == ("nothing", "operator", False)
    assert (second.text, second.modified) == ("cut_first", True)
    assert first.nodes_before == first.nodes_after == second.nodes_before == before
    assert second.nodes_after == len(graph.graph.nodes) < before


def test_nodes_carry_the_name_of_the_pass_that_made_them():
    @dataclass(frozen=True)
    class Double(gr.Pass):
        name = "double"

        def run(self, graph):
            graph.replace_vjp(find(graph, "relu")[0], lambda r, g: g * 2)
            return gr.PassResult(graph, True)

    graph = gr.PassManager([Double()]).run(joint_graph(mlp(), *batch()))
    assert [info(n).made_by for n in graph.backward_nodes() if n.target is torch.ops.aten.mul.Tensor] == ["double"]


@pytest.mark.parametrize("stage", ["requires", "run", "ensures", "bug"])
def test_errors_name_the_pass_and_those_before_it(stage):
    manager = gr.PassManager([Nothing(), CutFirst(), Refuses(stage)])
    with pytest.raises((gr.GraphRewriteError, KeyError)) as error:
        manager.run(joint_graph(mlp(), *batch()))
    (note,) = error.value.__notes__
    assert "refuses" in note
    assert note.endswith("passes before it: nothing, cut_first")


def test_callbacks_see_every_pass_in_order():
    events: list[PassEvent] = []
    order = []

    class Recorder:
        wants_before = True

        def __call__(self, event: PassEvent) -> None:
            events.append(event)
            order.append("recorder")

    graph = joint_graph(mlp(), *batch())
    text = str(graph)
    gr.PassManager([Nothing(), CutFirst()], [Recorder(), lambda event: order.append("second")]).run(graph)
    assert order == ["recorder", "second"] * 2
    assert [(str(e.ran), e.index, e.modified) for e in events] == [("nothing", 0, False), ("cut_first", 1, True)]
    assert all(e.seconds >= 0 for e in events)
    assert str(events[1].before) == text  # a copy from before, not the edited graph
    assert events[1].graph is graph


def test_without_a_wish_no_copy_is_made():
    events = []
    gr.PassManager([Nothing()], [events.append]).run(joint_graph(mlp(), *batch()))
    assert events[0].before is None


def test_a_verifier_between_passes_names_the_pass():
    graph = aten_graph(mlp(), *batch())
    manager = gr.PassManager([build_pass("fold_views"), Breaks()], [lambda event: verify(event.graph)])
    with pytest.raises(gr.VerifyError, match="pass breaks broke the graph: has no provenance") as error:
        manager.run(graph)
    assert error.value.node == "relu"
    assert "fold_views" in error.value.remedy


@pytest.mark.parametrize("admits", [True, False])
def test_compile_verifies_after_every_pass(admits):
    """Also after one that says it changed nothing."""
    with pytest.raises(gr.VerifyError, match=r"pass breaks.* broke the graph"):
        gr.compile(mlp(), passes=["fold_views", Breaks(admits)]).materialize(*batch())


def test_verification_can_be_off():
    gr.compile(mlp(), passes=[Breaks()], verify="off").materialize(*batch())


@dataclass(frozen=True)
class Lies(gr.Pass):
    """Promises to change no number, and changes one."""

    name = "lies"
    level = "aten"
    preserves_numerics = True
    how: str = "scale"

    def run(self, graph):
        node = find(graph, "relu")[0]
        users = list(node.users)
        if self.how == "scale":
            new = graph.emit(torch.ops.aten.mul.Tensor, (node, 1.0001), like=info(node))
        else:
            new = graph.emit(torch.ops.aten.nan_to_num.default, (node,), like=info(node))
        for user in users:
            user.replace_input_with(node, new)
        graph.sort()
        return gr.PassResult(graph, True)


def test_numeric_verification_catches_a_broken_promise():
    x, y = batch()
    gr.compile(mlp(), passes=[Lies()]).materialize(x, y)  # the structure is fine
    with pytest.raises(gr.VerifyError, match="lies promised to preserve numerics but changed"):
        gr.compile(mlp(), passes=[Lies()], verify="numeric").materialize(x, y)


def test_numeric_verification_tells_nan_from_zero():
    x, y = batch()
    x[0] = float("nan")
    with pytest.raises(gr.VerifyError, match="promised to preserve numerics"):
        gr.compile(mlp(), passes=[Lies("nan")], verify="numeric").materialize(x, y)


def test_passes_of_both_levels_run_at_their_place():
    seen: list[tuple[str, str]] = []

    @dataclass(frozen=True)
    class Look(gr.Pass):
        name = "look"
        note: str = ""

        def run(self, graph):
            seen.append((self.note, graph.level))
            return gr.PassResult(graph, False)

    class LookLate(Look):
        level = "aten"

    gr.compile(mlp(), passes=[LookLate("late"), Look("early")]).materialize(*batch())
    assert seen == [("early", "operator"), ("late", "aten")]


def test_reasons_for_not_firing_are_kept():
    @dataclass(frozen=True)
    class Picky(gr.Pass):
        name = "picky"

        def run(self, graph):
            self.fail(graph, "too small", find(graph, "linear")[0])
            return gr.PassResult(graph, False)

    compiled = gr.compile(mlp(), passes=[Picky()]).materialize(*batch())
    assert ("picky", "linear", "too small") in compiled.report().notes


# --- early local backward ------------------------------------------------------------------------------------------


def ff(model: nn.Module, **options) -> gr.CompiledModule:
    return gr.compile(model, "ff", **options)


def test_early_local_backward_runs_for_local_rules_and_not_for_global_ones():
    x, y = batch()
    for rule, expected in (("ff", True), ("bp", False), ("dfa", False)):
        compiled = gr.compile(mlp(), rule).materialize(x, y)
        ran = [r for r in compiled.report().passes if r.text.startswith("early_local_backward")]
        assert [r.modified for r in ran] == [True] * expected
    compiled = gr.compile(mlp(), "bp", passes=["early_local_backward"]).materialize(x, y)
    assert ("early_local_backward", "", "every gradient depends on the task loss") in compiled.report().notes


def test_early_local_backward_changes_no_gradient():
    """Against the operator-level graph, in which nothing is early."""
    x, y = batch()
    model = mlp()
    compiled = ff(model)
    compiled.loss(x, y).backward()
    graph = compiled.graph("operator")
    state = {n: torch.full_like(t, 0.5) for n, t in compiled.rule_state.items()}
    expected = grads_of(run(graph, model, x, y, state=state))
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[name]), name


def test_early_gradients_are_scaled_by_the_cotangent_of_the_loss():
    x, y = batch()
    found = []
    for factor in (1.0, -4.0, 0.0):
        torch.manual_seed(3)
        model = mlp()
        (factor * ff(model).loss(x, y)).backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], -4 * gradient)
        assert not found[2][name].any()


def test_early_local_backward_is_idempotent():
    x, y = batch()
    model = mlp()
    compiled = ff(model, passes=["early_local_backward"])
    compiled.loss(x, y).backward()
    last = [r for r in compiled.report().passes if r.text == "early_local_backward"]
    assert len(last) == 2
    reference = ff(mlp())
    reference.module.load_state_dict(model.state_dict())
    reference.loss(x, y).backward()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, gradients(reference.module)[name]), name


def test_early_gradients_survive_fp16():
    """Gradients far below fp16's smallest number arrive, scaled in fp32."""
    x, y = batch()
    model = mlp()
    compiled = ff(model, dynamic=None)
    with torch.autocast("cpu", torch.float16):
        loss = compiled.loss(x, y)
    loss.backward()
    low = gradients(model)
    model.zero_grad()
    compiled._step = 0
    reference = ff(model, dynamic=None)
    reference.loss(x, y).backward()
    for name, gradient in gradients(model).items():
        assert low[name].dtype == torch.float32
        assert (low[name] - gradient).norm() <= 0.02 * gradient.norm() + 1e-4, name


@pytest.mark.parametrize("scale", [0.0, -2.0, 3.0, 1000.0])
def test_fp16_scale_must_be_a_power_of_two(scale):
    with pytest.raises(gr.RuleError, match="no power of two"):
        build_pass(f"early_local_backward{{fp16_scale={scale}}}").requires(None)


def test_every_cleanup_pass_is_registered_and_promises_to_preserve_numerics():
    for name in CLEANUP:
        one = build_pass(name)
        assert one.preserves_numerics
        assert one.level == "aten"
        assert one.summary


def test_rule_runs_once_per_program():
    x, y = batch()
    compiled = gr.compile(mlp(), "dfa").materialize(x, y)
    history = [r.text for r in compiled.report().passes]
    assert history == ["dfa", "expand", *CLEANUP]
