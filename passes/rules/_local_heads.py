"""The heads of `local_loss`: prediction, similarity, both, DGL's auxiliary network, random target projection."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from graphrewrite.passes.rules._heads import Fill, Head, Weight, Weights, normal, ones, uniform, zeros
from graphrewrite.passes.rules._site import Site, Teacher, average_pool
from torch.nn import functional as F

from graphrewrite.errors import RuleError
from graphrewrite.graph.nodes import same_size

Tokens = Literal["mean", "first", "last"]


@dataclass(frozen=True)
class Pred(Head):
    """A linear map of the (pooled) block output, judged by the compile's loss: L = loss(D pool(h), y).

    Args:
        start: `"zero"`, or `"normal"`: N(0, 2/n) for n features.
        bias: Whether there is a bias, zero at first.
        features: Maps are average-pooled until at most this many features remain.
        tokens: Which token of a sequence with one answer is read: the `"mean"` of all, the `"first"`, the `"last"`.
    """

    start: Literal["zero", "normal"] = "zero"
    bias: bool = True
    features: int = 2048
    tokens: Tokens = "mean"

    def init(self, site: Site) -> Mapping[str, Weight]:
        """D and its bias."""
        known("start", self.start, ("zero", "normal"))
        known("tokens", self.tokens, ("mean", "first", "last"))
        width = site.features(self.features)
        fill: Fill = zeros if self.start == "zero" else normal(math.sqrt(2.0 / width))
        weights = {"weight": Weight((site.width, width), fill)}
        return {**weights, "bias": Weight((site.width,), zeros)} if self.bias else weights

    def forward(self, site: Site, weights: Weights, h: torch.Tensor) -> Any:
        """D pool(h) + b."""
        pooled = site.pooled(h, self.features, self.tokens)
        return site.answer(F.linear(pooled, weights["weight"], weights.get("bias")))


def unit_length(rows: torch.Tensor) -> torch.Tensor:
    """Rows divided by their length (the square root of the squares' sum + 1e-12, which is smooth at zero)."""
    # not `norm`: its derivative masks in place, and in-place operators keep the schedule from sorting by blocks
    return rows / (rows.square().sum(-1, keepdim=True) + 1e-12).sqrt()


def similarity(rows: torch.Tensor) -> torch.Tensor:
    """S(rows): cosine of every pair of rows, each row centred by its own mean."""
    centred = rows - rows.mean(1, keepdim=True)
    unit = unit_length(centred)
    cosines: torch.Tensor = unit @ unit.t()
    return cosines


def similarity_loss(features: torch.Tensor, codes: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Mean over pairs of samples that count of (S(features) - S(codes))^2."""
    pairs = counted.unsqueeze(1) * counted.unsqueeze(0)
    gap = (similarity(features) - similarity(codes.to(features.dtype))).square()
    return (gap * pairs).sum() / pairs.sum().clamp(min=1.0)


@dataclass(frozen=True)
class Sim(Head):
    """Similarity matching: L = MSE(S(A h), S(onehot(y))), S the centred cosines of all pairs in the batch.

    A is a square linear map, or a 3x3 convolution on maps, without bias; a map is reduced to the standard deviation of
    each channel over its positions (the square root of variance + 1e-8, which is smooth at zero), a sequence with one
    answer to its mean token.
    """

    answers: ClassVar[bool] = False

    def init(self, site: Site) -> Mapping[str, Weight]:
        """A."""
        require_codes(site)
        n = site.channels
        if site.kind == "map":
            kernel = (3,) * (len(site.shape) - 2)
            fan_in = n * math.prod(kernel)
            return {"similarity": Weight((n, n, *kernel), uniform(1.0 / math.sqrt(fan_in)))}
        return {"similarity": Weight((n, n), uniform(1.0 / math.sqrt(n)))}

    def forward(self, site: Site, weights: Weights, h: torch.Tensor) -> Any:
        """Rows of features to compare."""
        a = weights["similarity"]
        if site.kind != "map":
            return site.pooled(F.linear(h, a)).flatten(0, site.batch - 1)
        conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[h.dim() - 2]
        made = conv(h, a, padding=1).flatten(2)
        if same_size(made.shape[2], 1):
            return made.flatten(1)
        return (made.var(2) + 1e-8).sqrt()

    def loss(self, outputs: Any, teacher: Teacher) -> torch.Tensor:
        """Similarities of features against those of the targets."""
        return similarity_loss(outputs, *teacher.codes())


@dataclass(frozen=True)
class PredSim(Pred):
    """Both: L = (1 - beta) * pred + beta * sim.

    Args:
        beta: Weight of the similarity part.
    """

    beta: float = 0.99

    answers: ClassVar[bool] = False

    def init(self, site: Site) -> Mapping[str, Weight]:
        """D, its bias, and A."""
        return {**Pred.init(self, site), **Sim().init(site)}

    def forward(self, site: Site, weights: Weights, h: torch.Tensor) -> Any:
        """The answer, and rows of features."""
        return Pred.forward(self, site, weights, h), Sim().forward(site, weights, h)

    def loss(self, outputs: Any, teacher: Teacher) -> torch.Tensor:
        """The weighted sum."""
        answer, rows = outputs
        return (1 - self.beta) * teacher.task(answer) + self.beta * similarity_loss(rows, *teacher.codes())

    def answer(self, outputs: Any) -> Any:
        """The prediction."""
        return outputs[0]


@dataclass(frozen=True)
class Dgl(Head):
    """The MLP-SR auxiliary network of decoupled greedy learning, judged by the compile's loss.

    On maps: average-pool to a quarter of each size, `convs` 1x1 convolutions with batch-norm and ReLU, average-pool to
    2x2, `layers` linear maps with batch-norm and ReLU, a linear map. On vectors and (mean) tokens only the linear part.
    Batch-norm uses the statistics of the batch always: the head serves training only.

    Args:
        convs: How many convolutions.
        layers: How many hidden linear maps.
    """

    convs: int = 3
    layers: int = 3

    def _width(self, site: Site) -> int:
        return site.channels * math.prod(self._last_size(site)) if self._on_map(site) else site.channels

    @staticmethod
    def _on_map(site: Site) -> bool:
        return site.kind == "map" and not site.dense

    @staticmethod
    def _last_size(site: Site) -> tuple[int, ...]:
        return tuple(min(2, -(-size // 4)) for size in map(int, site.shape[2:]))

    def init(self, site: Site) -> Mapping[str, Weight]:
        """Convolutions, linear maps, and the scales and shifts of batch-norm."""
        weights: dict[str, Weight] = {}

        def layer(name: str, outputs: int, inputs: int, kernel: tuple[int, ...] = ()) -> None:
            weights[f"{name}_weight"] = Weight((outputs, inputs, *kernel), uniform(1.0 / math.sqrt(inputs)))
            weights[f"{name}_scale"] = Weight((outputs,), ones)
            weights[f"{name}_shift"] = Weight((outputs,), zeros)

        if self._on_map(site):
            for i in range(self.convs):
                layer(f"conv{i}", site.channels, site.channels, (1,) * (len(site.shape) - 2))
        width = self._width(site)
        for i in range(self.layers):
            layer(f"hidden{i}", width, width)
        weights["weight"] = Weight((site.width, width), uniform(1.0 / math.sqrt(width)))
        weights["bias"] = Weight((site.width,), uniform(1.0 / math.sqrt(width)))
        return weights

    def forward(self, site: Site, weights: Weights, h: torch.Tensor) -> Any:
        """The auxiliary network."""
        if self._on_map(site):
            h = average_pool(h, [-(-int(size) // 4) for size in site.shape[2:]])
            conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[h.dim() - 2]
            for i in range(self.convs):
                h = self._normed(conv(h, weights[f"conv{i}_weight"]), weights, f"conv{i}")
            h = average_pool(h, self._last_size(site)).flatten(1)
        else:
            h = site.pooled(h)
        lead = h.shape[:-1]
        h = h.flatten(0, -2)
        for i in range(self.layers):
            h = self._normed(F.linear(h, weights[f"hidden{i}_weight"]), weights, f"hidden{i}")
        return site.answer(F.linear(h, weights["weight"], weights["bias"]).reshape([*lead, site.width]))

    @staticmethod
    def _normed(h: torch.Tensor, weights: Weights, name: str) -> torch.Tensor:
        scale, shift = weights[f"{name}_scale"], weights[f"{name}_shift"]
        normed: torch.Tensor = torch.batch_norm(h, scale, shift, None, None, True, 0.0, 1e-5, False)
        return F.relu(normed)


@dataclass(frozen=True)
class TargetProjection(Head):
    """Layer-wise targets by a fixed random projection of the labels (tpSGD): L = distance(h, onehot(y) B).

    Nothing in the head learns. Maps have a target per channel at every position, sequences with one answer per feature
    of every token.

    Args:
        distance: `"mse"`: mean squared distance; `"dot"`: minus the inner product, per sample divided by its width (its
            gradient is direct random target projection's).
        scale: B ~ U[-scale, scale) / sqrt(classes).
    """

    distance: Literal["mse", "dot"] = "mse"
    scale: float = 1.0

    learns: ClassVar[bool] = False
    answers: ClassVar[bool] = False

    def init(self, site: Site) -> Mapping[str, Weight]:
        """B."""
        known("distance", self.distance, ("mse", "dot"))
        require_codes(site, dense=True)
        rows = site.classes or site.width
        return {"projection": Weight((rows, site.channels), uniform(self.scale / math.sqrt(rows)), trainable=False)}

    def forward(self, site: Site, weights: Weights, h: torch.Tensor) -> Any:
        """One row per target: the features, averaged over positions that have no target of their own, and B."""
        if site.dense:
            rows = h.movedim(1, -1).flatten(0, -2)
        elif site.kind == "map":
            rows = h.flatten(2).movedim(1, -1)
        else:
            rows = h.flatten(0, site.batch - 1)
        return rows, weights["projection"]

    def loss(self, outputs: Any, teacher: Teacher) -> torch.Tensor:
        """The distance of each row to the target that its label is projected to."""
        rows, projection = outputs
        codes, counted = teacher.codes()
        target = codes.to(rows.dtype) @ projection
        while target.dim() < rows.dim():
            target = target.unsqueeze(1)
        gap = (rows - target).square() if self.distance == "mse" else -(rows * target)
        mean: torch.Tensor = (gap.flatten(1).mean(1) * counted).sum() / counted.sum().clamp(min=1.0)
        return mean


def require_codes(site: Site, *, dense: bool = False) -> None:
    """A head that reads the targets itself needs one of them for every row that it makes."""
    fits = len(site.target) <= 1 + site.batch
    if site.dense:
        fits = dense and site.dense == "last"
    if not fits:
        answer = ", ".join(map(str, site.target))
        raise RuleError(
            f"this head compares one row per sample with one target, but the model answers ({answer}) where the block "
            f"gives ({', '.join(map(str, site.shape))})",
            node=site.node.name,
            module=site.name,
            remedy="use head=pred",
        )


def known(option: str, given: Any, values: tuple[str, ...]) -> None:
    """Refuse an unknown value of an option."""
    if given not in values:
        raise RuleError(f"{option}={given!r} is unknown", remedy=f"use {' or '.join(map(repr, values))}")
