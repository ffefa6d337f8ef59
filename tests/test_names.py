"""Names that Python or torch have other uses for: keywords, `_extra_state`, markup."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import graphrewrite as gr
from cli_run import Run, run_fixture
from graphrewrite.graph.core import StateInit
from graphrewrite.runtime.state import RuleState
from graphrewrite.testing.compare import assert_trains_like_eager

run = run_fixture


class Keywords(nn.Module):
    """Modules and a parameter that are named as Python keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("lambda", nn.Linear(4, 5))
        self.layers = nn.ModuleDict({"in": nn.Linear(5, 5), "class": nn.BatchNorm1d(5)})
        self.register_parameter("if", nn.Parameter(torch.ones(5)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = getattr(self, "lambda")(x) * getattr(self, "if")
        return self.layers["class"](self.layers["in"](first))


def test_modules_and_parameters_may_be_named_as_keywords() -> None:
    batch = torch.randn(6, 4), torch.randint(0, 5, (6,))
    made = assert_trains_like_eager(Keywords(), [batch], through="loss")
    assert {"if", "lambda.weight", "layers.in.weight", "layers.class.bias"} <= set(made.graph().parameters())


class Tagged(nn.Sequential):
    """A root module with extra state of its own, one that looks like ours."""

    tag = ""

    def get_extra_state(self) -> Any:
        return {"tag": self.tag, "step": 3}

    def set_extra_state(self, state: Any) -> None:
        self.tag = state["tag"]


def tagged(tag: str) -> gr.CompiledModule:
    model = Tagged(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3))
    model.tag = tag
    return gr.compile(model)


def test_a_root_module_keeps_its_extra_state_and_we_keep_ours() -> None:
    first, second, third = tagged("a"), tagged("b"), tagged("c")
    first.set_extra_state({"step": 7, "calls": 2})
    state = first.state_dict()
    assert state["_extra_state"] == {"tag": "a", "step": 3}
    assert second.load_state_dict(state).missing_keys == []
    assert (second.module.tag, second.get_extra_state()) == ("a", first.get_extra_state())
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    # the bare model's state, both ways
    third.set_extra_state({"step": 5})
    third.load_state_dict(first.module.state_dict())
    assert (third.module.tag, third.get_extra_state()["step"]) == ("a", 5)
    bare = Tagged(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3))
    bare.load_state_dict(first.module.state_dict())
    assert bare.tag == "a"
    # inside another module
    holder, other = nn.ModuleDict({"net": tagged("d")}), nn.ModuleDict({"net": first})
    holder.load_state_dict(other.state_dict())
    assert (holder["net"].module.tag, holder["net"].get_extra_state()["step"]) == ("a", 7)


def test_a_counter_written_under_its_earlier_name_is_read() -> None:
    made, other = gr.compile(nn.Linear(2, 2)), gr.compile(nn.Linear(2, 2))
    made.set_extra_state({"step": 9})
    state = copy.copy(made.state_dict())
    state["_extra_state"] = state.pop("_graphrewrite._extra_state")
    other.load_state_dict(state)
    assert other.get_extra_state()["step"] == 9


def test_certify_says_what_it_cannot_see_without_targets(run: Run) -> None:
    assert "gives no targets, so the graph holds no loss" in run("certify", ":untaught", "--rule", "dfa").out
    assert run("certify", ":mlp", "--rule", "dfa", "--json").data["has_loss"] is True
    assert run("certify", ":untaught", "--rule", "dfa", "--json").data["has_loss"] is False


@pytest.mark.parametrize("trainable", [False, True])
def test_state_of_a_block_inside_of_a_block(trainable):
    def init(size):
        return StateInit((size,), torch.float32, torch.device("cpu"), lambda t, g: t.normal_(generator=g), trainable)

    names = {"rule.d.1": init(3), "rule.d.1.0": init(4), "rule.d.1.0.x": init(5)}
    for order in (list(names), list(reversed(names))):
        state = RuleState()
        assert state.create({n: names[n] for n in order}, 0) == order
        assert {n: t.numel() for n, t in state.items()} == {n: names[n].shape[0] for n in names}
        other = RuleState()
        other.create(names, 1)
        other.load_state_dict(copy.deepcopy(state).state_dict())
        for name, tensor in state.items():
            assert torch.equal(other.find(name), tensor)
            assert other.find(name) is not tensor
