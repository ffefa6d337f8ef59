"""Run the backward in two stages: input cotangents at once, weight gradients later."""

from __future__ import annotations

from dataclasses import dataclass

from graphrewrite.passes.schedule.encode_held import EncodeHeld

from graphrewrite.errors import RuleError
from graphrewrite.graph.joint import JointGraph
from graphrewrite.pipeline import Pass, PassResult


@dataclass(frozen=True)
class SplitBackward(Pass):
    """Move weight gradients (`w_*`) into a stage of their own, behind the one that computes input cotangents (`d_*`).

    The gradients are the same numbers. A pipeline stage can hand its input's cotangent on before it computes its weight
    gradients, and fill what would be idle time with them; between the stages it holds, for each linear map, the input
    and the cotangent of the output.

    What cannot wait (normalisations compute both in one kernel) stays in the first stage, with the reason in the
    report.

    Args:
        budget: What may be held between the stages: a float in (0, 1] is a fraction of what would be held, an int is
            bytes. The weight stage computes the rest again, cotangents and products as well, where that takes the
            least work. It starts from what is held or saved: let the backward recompute (`compress="recompute"`,
            `memory_budget=`) for it to reach far.
        codec: How held cotangents, and activations that the first stage computed again, are stored: `"int8"`, ...; the
            pass `encode_held` then runs behind this one. Gradients of inputs stay as they are.
    """

    budget: float | int | None = None
    codec: str = ""

    name = "split_backward"
    level = "aten"
    preserves_numerics = True
    summary = "compute input cotangents at once and weight gradients in a later stage"
    paper = (
        "Rae, Lee, Richings 2024, https://arxiv.org/abs/2405.18047; Qi et al. 2023, https://arxiv.org/abs/2401.10241"
    )

    def __post_init__(self) -> None:
        held = self.budget
        if held is None:
            return
        if isinstance(held, bool) or held <= 0 or (isinstance(held, float) and held > 1):
            raise RuleError(f"split_backward: budget={held!r}", remedy="a fraction in (0, 1], or an int of bytes")

    @property
    def passes(self) -> list[Pass]:
        """This pass, and that of the codec."""
        return [self, EncodeHeld((self.codec,))] if self.codec else [self]

    def run(self, graph: JointGraph) -> PassResult:
        """Mark the nodes of the weight stage."""
        split = graph.split_backward(self.budget)
        for of, reason in split.kept.items():
            self.fail(graph, f"the gradient of {of} stays in the first stage: {reason}", graph.grads()[of])
        if not split.nodes and not split.kept:
            self.fail(graph, "the graph computes no gradient")
        return PassResult(graph, bool(split.nodes))
