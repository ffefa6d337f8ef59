"""Randomised weight gradients of linear layers: a sketch of the input is kept in its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import torch
from graphrewrite.passes.compression._approximate import ApproximateBackward
from graphrewrite.passes.compression._linear import Linear, as_rows, find_linears
from graphrewrite.passes.compression._regions import readers
from graphrewrite.passes.compression._sketch import SKETCHES
from torch import fx

from graphrewrite.errors import RuleError
from graphrewrite.graph.aliasing import base_of
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import info


@dataclass(frozen=True)
class RandomizedLinear(ApproximateBackward):
    """Let the weight gradient of linear layers be (S g)ᵀ (S x), and keep S x.

    S has k = ceil(rate · N) rows for N tokens and E[Sᵀ S] = I, so the gradient is unbiased; its variance falls with k.
    S is not kept: it is drawn from the seeded counter (seed, step, rank) in the forward and again in the backward.
    Cotangents of activations, and biases, stay exact. Layers that read the same input share one sketch.

    At rate 1 `rows`, `dct` and `fft` are exact.

    Args:
        rate: Rows of the sketch per token, in (0, 1].
        sketch: `"gaussian"`, `"rademacher"`; `"dct"` or `"fft"`: random signs, then random rows of an orthonormal
            transform; `"rows"`: random tokens, without replacement.
        always: Sketch inputs that are kept for something else, too.
    """

    rate: float = 0.25
    sketch: Literal["gaussian", "rademacher", "dct", "fft", "rows"] = "rademacher"
    always: bool = False

    name = "randomized_linear"
    summary = "unbiased weight gradients of linear layers from a random sketch of the input"
    formula = "∂W = (S g)ᵀ (S x),  E[Sᵀ S] = I,  S of ceil(rate·N) rows"
    paper = "Bershatsky et al.: Memory-Efficient Backpropagation through Large Linear Layers, 2022"

    def requires(self, graph: JointGraph) -> None:
        """A rate in (0, 1] and a known sketch."""
        if isinstance(self.rate, bool) or not isinstance(self.rate, (int, float)) or not 0 < self.rate <= 1:
            raise RuleError(f"randomized_linear{{rate={self.rate}}} is out of range", remedy="use 0 < rate <= 1")
        if self.sketch not in SKETCHES:
            raise RuleError(
                f"randomized_linear knows no sketch {self.sketch!r}", remedy=f"use one of {', '.join(SKETCHES)}"
            )

    def rewrite(self, graph: JointGraph, wanted: Callable[[fx.Node], bool]) -> int:
        """The linear layers, those with the same input together."""
        count = 0
        for linears in by_input(self, graph, wanted, always=self.always):
            self._replace(graph, linears)
            count += len(linears)
        return count

    def _replace(self, graph: JointGraph, linears: list[Linear]) -> None:
        counter, stream = graph.counter(), graph.stream()
        sketch = graph.context.form(SKETCHES[self.sketch])
        part = Fraction(self.rate).limit_denominator(10_000)

        def height(count: Any) -> Any:
            return (count * part.numerator + part.denominator - 1) // part.denominator

        def shrink(number: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
            rows = as_rows(tensor)
            if rows.shape[0] == 0:
                return rows
            drawn: torch.Tensor = sketch(number, stream, rows, height(rows.shape[0]))
            return drawn

        first = linears[0]
        like = info(first.op).but(mirrors=None)
        kept: fx.Node = graph.splice(shrink, [counter, first.x], like=like, whole=False)
        for linear in linears:
            graph.replace_vjp(linear.op, _sketched(graph, linear, shrink), residuals=[counter, kept], part="w")


def _sketched(graph: JointGraph, linear: Linear, shrink: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    row = linear.row(graph)
    assert row is not None

    def bwd(residuals: tuple[torch.Tensor, ...], cotangent: torch.Tensor) -> Any:
        counter, kept = residuals
        return linear.gradients(row, as_rows(cotangent), shrink(counter, cotangent).t() @ kept)

    return bwd


def by_input(
    one: ApproximateBackward, graph: JointGraph, wanted: Callable[[fx.Node], bool], *, always: bool
) -> list[list[Linear]]:
    """The wanted linear layers whose weight gradient is their own, grouped by the tensor they read.

    Left out, with the reason noted, are those whose input is kept for another operator in any case.
    """
    groups: dict[fx.Node, list[Linear]] = {}
    for linear in find_linears(graph):
        row = linear.row(graph)
        if not wanted(linear.op):
            continue
        if row is None or not row.plain:
            one.fail(graph, "its weight gradient was replaced already", linear.op)
        else:
            groups.setdefault(base_of(linear.x), []).append(linear)
    found: list[list[Linear]] = []
    for base, linears in groups.items():
        taken = {linear.op for linear in linears}
        others = [op for op in readers(graph, base) if op not in taken]
        reason = ""
        if base.op == "placeholder":
            reason = "it reads an input, which is not stored"
        elif others:
            reason = f"%{others[0].name} keeps %{base.name}, which it reads"
        if reason and not always:
            for linear in linears:
                one.fail(graph, reason, linear.op)
            continue
        # views of one tensor with rows of different lengths are sketched apart
        by_view: dict[fx.Node, list[Linear]] = {}
        for linear in linears:
            by_view.setdefault(linear.x, []).append(linear)
        found += by_view.values()
    return found
