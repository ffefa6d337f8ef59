"""LLS: local learning with a fixed periodic basis: every block is read by sinusoids, one frequency per class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from graphrewrite.passes.rules._heads import Fill, Head, HeadRule, Weight, Weights, ones
from graphrewrite.passes.rules._local_heads import Tokens, known, unit_length
from graphrewrite.passes.rules._site import Site

Modulation = Literal["none", "m", "mxm"]


def periodic(low: float, high: float, *, square: bool) -> Fill:
    """Rows c_k[j] = sin(f_k j), j = 0, 1, ..., with f_k evenly spaced from `low` to `high`; or their signs."""

    def fill(tensor: torch.Tensor, _generator: torch.Generator) -> Any:
        rows, columns = tensor.shape
        # arguments are large: in single precision they would lose the phase
        frequency = torch.linspace(low, high, rows, dtype=torch.float64)
        waves = torch.sin(frequency.unsqueeze(1) * torch.arange(columns, dtype=torch.float64))
        return tensor.copy_(waves.sign() if square else waves)

    return fill


def identity(tensor: torch.Tensor, _generator: torch.Generator) -> Any:
    """Start as the identity matrix."""
    return tensor.copy_(torch.eye(tensor.shape[0], dtype=tensor.dtype))


@dataclass(frozen=True)
class PeriodicBasis(Head):
    """Logits of a normalised, pooled block output against a fixed periodic basis. Options as for the rule."""

    modulation: Modulation = "none"
    low: float = 50.0
    high: float = 512.0
    square: bool = False
    temperature: float = 1.0
    features: int = 2048
    tokens: Tokens = "mean"

    @property
    def learns(self) -> bool:  # type: ignore[override]
        """Only the modulation is trained."""
        return self.modulation != "none"

    def init(self, site: Site) -> Mapping[str, Weight]:
        """The basis, and the modulation."""
        known("modulation", self.modulation, ("none", "m", "mxm"))
        known("tokens", self.tokens, ("mean", "first", "last"))
        shape = (site.width, site.features(self.features))
        weights = {"basis": Weight(shape, periodic(self.low, self.high, square=self.square), trainable=False)}
        if self.modulation == "m":
            weights["scale"] = Weight((site.width,), ones)
        elif self.modulation == "mxm":
            weights["mix"] = Weight((site.width, site.width), identity)
        return weights

    def forward(self, site: Site, weights: Weights, h: torch.Tensor) -> Any:
        """<pool(h)/|pool(h)|, c_k> / T, scaled or mixed."""
        z = unit_length(site.pooled(h, self.features, self.tokens))
        logits = z @ weights["basis"].t() / self.temperature
        if self.modulation == "m":
            logits = logits * weights["scale"]
        elif self.modulation == "mxm":
            logits = logits @ weights["mix"].t()
        return site.answer(logits)


@dataclass(frozen=True)
class LocalLearningPeriodic(HeadRule):
    """Cut the blocks from each other and teach each hidden one through logits against fixed sinusoids.

    Beside the block only the modulation learns, if there is one. The last block is trained by the task loss, and
    logits are judged by that same loss.

    Args:
        modulation: `"none"`; `"m"`: a learned scale per class (LLS-M); `"mxm"`: a learned matrix over the classes, the
            identity at first (LLS-MxM).
        low: The first frequency.
        high: The last one; classes are spaced evenly between.
        square: Signs of the sinusoids instead of the sinusoids.
        temperature: Divides the logits.
        features: Maps are average-pooled until at most this many features remain.
        tokens: Which token of a sequence with one answer is read: the `"mean"` of all, the `"first"`, the `"last"`.
    """

    modulation: Modulation = "none"
    low: float = 50.0
    high: float = 512.0
    square: bool = False
    temperature: float = 1.0
    features: int = 2048
    tokens: Tokens = "mean"

    name = "lls"
    summary = "LLS: local logits against a fixed periodic basis, plain, scaled (m) or mixed (mxm)"
    formula = "logits_k = ⟨pool(h)/‖pool(h)‖, c_k⟩ / T,  c_k[j] = sin(f_k j),  f_k = low … high"
    paper = "Apolinario, Roy, Frenkel: LLS: Local Learning Rule for Deep Neural Networks, WACV 2025"

    def make_head(self) -> Head:
        """The basis with this rule's options."""
        return PeriodicBasis(
            self.modulation, self.low, self.high, self.square, self.temperature, self.features, self.tokens
        )
