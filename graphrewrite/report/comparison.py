"""The result of training under several rules side by side, as plain data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphrewrite.report.certificates import PROPERTIES
from graphrewrite.training import Budget, Learner, Point


@dataclass(frozen=True)
class RuleResult:
    """One rule's outcome.

    Attributes:
        rule: Its text form.
        summary: What it is.
        formula: The rule in one line.
        accuracy: Share of judged samples classified rightly at the end, by `compiled.predict`.
        step_ratio: Median step time divided by backpropagation's on the same batch.
        step_seconds: Median step time.
        saved_bytes: Bytes between forward and backward of one training step.
        certificates: Property -> whether any block has it.
        locality_radius: The largest of all blocks.
        forward_passes: How often the model's forward runs in a step.
        points: Measurements during training, the last one at the end.
    """

    rule: str
    summary: str
    formula: str
    accuracy: float
    step_ratio: float
    step_seconds: float
    saved_bytes: int
    certificates: dict[str, bool]
    locality_radius: int
    forward_passes: int
    points: tuple[Point, ...]

    @property
    def alignment(self) -> dict[str, float]:
        """Block -> cosine to backpropagation at the end."""
        return self.points[-1].alignment


@dataclass(frozen=True)
class Comparison:
    """All rules, and what they were compared on.

    Attributes:
        model: What was trained.
        data: What it was trained on.
        judged_on: What accuracy was measured on.
        parameters: Numbers in the model's parameters.
        blocks: Its blocks, in topological order.
        budget: The same for all rules.
        seconds: Of everything.
        torch_version: Of torch.
        threads: That torch used.
        results: In the order given; the first one is backpropagation, the reference.
    """

    model: str
    data: str
    judged_on: str
    parameters: int
    blocks: tuple[str, ...]
    budget: Budget
    seconds: float
    torch_version: str
    threads: int
    results: tuple[RuleResult, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data; a cosine that does not exist (a zero gradient) is null."""
        data = dataclasses.asdict(self)
        data["budget"]["rates"] = dict(self.budget.rates)
        for result, held in zip(data["results"], self.results, strict=True):
            result["alignment"] = dict(held.alignment)
        finite: dict[str, Any] = _without_nan(data)
        return finite


def conclude(
    learners: Sequence[Learner], budget: Budget, *, model: str, data: str, judged_on: str, seconds: float
) -> Comparison:
    """The comparison of trained learners, the first of which is the reference."""
    reference = learners[0]
    graph = reference.compiled.graph("operator")
    return Comparison(
        model,
        data,
        judged_on,
        sum(p.numel() for p in reference.compiled.module.parameters()),
        tuple(block.name for block in graph.blocks),
        budget,
        seconds,
        torch.__version__,
        torch.get_num_threads(),
        tuple(_result(one, reference) for one in learners),
    )


def _result(one: Learner, reference: Learner) -> RuleResult:
    held = one.certificates
    return RuleResult(
        one.rule,
        "; ".join(rule.summary for rule in one.rules),
        "; ".join(rule.formula for rule in one.rules),
        one.points[-1].accuracy,
        one.ratio_to(reference),
        one.median_seconds,
        one.saved_bytes,
        {name: getattr(held, name) for name in PROPERTIES},
        held.locality_radius,
        held.forward_passes,
        tuple(one.points),
    )


def _without_nan(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _without_nan(held) for key, held in data.items()}
    return [_without_nan(held) for held in data] if isinstance(data, (list, tuple)) else data
