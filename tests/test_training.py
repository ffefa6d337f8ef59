"""Training side by side: a course that was interrupted goes on as if it had not been."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphrewrite.datasets import Dataset, Split
from graphrewrite.errors import GraphRewriteError
from graphrewrite.training import Budget, Learner, side_by_side, train

RULES = ["bp", "mono_forward", "zeroth_order"]
BUDGET = Budget(epochs=4, batch=16)


def data() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 6, generator=generator)
    return Dataset(Split(x, (x[:, 0] > 0).long()), Split(x[:10], (x[:10, 0] > 0).long()))


def learners(rules: list[str] = RULES, budget: Budget = BUDGET) -> list[Learner]:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)]
    return side_by_side(nn.Sequential(*layers), rules, Split(data().train.x[:16], data().train.y[:16]), budget)


def interrupted(path, after: int, rules: list[str] = RULES) -> None:
    steps = 0

    def stop() -> None:
        nonlocal steps
        steps += 1
        if steps > after:
            raise KeyboardInterrupt

    mine = learners(rules)
    torch.manual_seed(5)
    with pytest.raises(KeyboardInterrupt):
        train(mine, data(), BUDGET, on_step=stop, checkpoint=path)


def test_an_interrupted_course_goes_on_bit_for_bit(tmp_path):
    path = tmp_path / "folder" / "course.pt"
    whole = learners()
    torch.manual_seed(5)
    train(whole, data(), BUDGET)
    interrupted(path, after=7)  # in the third of four epochs of three steps
    parts = learners()
    calls = []
    torch.manual_seed(6)
    train(parts, data(), BUDGET, on_step=lambda: calls.append(1), checkpoint=path)
    assert len(calls) == 6
    assert not list(path.parent.iterdir())
    for one, other in zip(whole, parts, strict=True):
        assert [(p.epoch, p.accuracy, p.loss, p.alignment) for p in other.points] == [
            (p.epoch, p.accuracy, p.loss, p.alignment) for p in one.points
        ]
        assert len(other.seconds) == 12
        state, found = one.compiled.state_dict(), other.compiled.state_dict()
        assert state.keys() == found.keys()
        torch.testing.assert_close(found, state, rtol=0, atol=0)


def test_a_course_of_something_else_is_refused(tmp_path):
    path = tmp_path / "course.pt"
    interrupted(path, 4, ["bp"])
    with pytest.raises(GraphRewriteError, match=r"(?s)holds a training of bp .*not of dfa.*remove the file"):
        train(learners(["dfa"]), data(), BUDGET, checkpoint=path)
    with pytest.raises(GraphRewriteError, match=r"batch=16.* not of .*batch=8"):
        train(learners(["bp"]), data(), Budget(epochs=4, batch=8), checkpoint=path)
    assert path.is_file()
