"""Common parts of rules that carry the output error to the blocks by feedback weights."""

from __future__ import annotations

import math
import os
import pathlib
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from graphrewrite.passes.rules._boundary import is_map, names_of
from graphrewrite.passes.rules._residual import sublayer_points
from torch import fx

from graphrewrite import random
from graphrewrite.errors import RuleError
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import fix, hint, info, is_backward, same_size, value
from graphrewrite.pipeline import PassResult
from graphrewrite.rule import FINER_BLOCKS, Rule

Distribution = Literal["uniform", "normal"]
Fill = Callable[[torch.Tensor, torch.Generator], Any]


def fill_feedback(distribution: str, bound: float) -> Fill:
    """Fills with U[-bound, bound) or with a normal of the same variance, bound^2 / 3."""
    if not bound >= 0:
        raise RuleError(f"feedback weights in [-{bound:g}, {bound:g}) do not exist", remedy="use scale=0 or more")
    if distribution == "uniform":
        return lambda tensor, generator: tensor.uniform_(-bound, bound, generator=generator)
    if distribution == "normal":
        return lambda tensor, generator: tensor.normal_(0.0, bound / math.sqrt(3.0), generator=generator)
    raise RuleError(f"distribution={distribution!r} is unknown", remedy="use 'uniform' or 'normal'")


def same_at_every_step(counter: torch.Tensor) -> torch.Tensor:
    """The random counter without step and rank."""
    return torch.stack([counter[0], counter[0] * 0, counter[0] * 0])


def random_product(
    x: torch.Tensor, counter: torch.Tensor, stream: int, features: int, distribution: str, bound: float
) -> torch.Tensor:
    """`x @ B` for feedback weights B that are drawn for this product: the same at every step, on every rank."""
    number = same_at_every_step(counter)
    size, work = [x.shape[-1], features], torch.promote_types(x.dtype, torch.float32)
    if distribution == "uniform":
        drawn = (2 * random.uniform(number, stream, size, work) - 1) * bound
    else:
        drawn = random.normal(number, stream, size, work) * (bound / math.sqrt(3.0))
    found: torch.Tensor = x @ drawn.to(x.dtype)
    return found


def output_errors(graph: JointGraph) -> list[tuple[fx.Node, fx.Node]]:
    """The outputs of the last block that has any, with their cotangents: where the error enters the network.

    Outputs of earlier blocks (a cache, hidden states) are not the network's answer and carry no error here.
    """
    rank = {block.name: block.index for block in graph.blocks}
    found = [(o, c) for o in graph.model_outputs if (c := graph.cotangent(o)) is not None]
    if not found:
        raise RuleError("no output of the model has a cotangent", remedy="the loss must depend on the model's output")
    last = max(rank.get(info(o).block, -1) for o, _ in found)
    return [(o, c) for o, c in found if rank.get(info(o).block, -1) == last]


@dataclass(frozen=True)
class Projection:
    """How an error of shape (batch dims, ..., classes) reaches a boundary of shape (batch dims, ..., features).

    Attributes:
        batch: How many leading dimensions the two share: samples; samples and tokens; nodes.
        axis: The boundary's feature dimension: 1 behind convolutions, the last one otherwise.
        tiled: Whether every other position gets the same signal; else each has feedback weights of its own.
        features: Rows of feedback weights that are needed.
        classes: Size of the error's last dimension.
    """

    batch: int
    axis: int
    tiled: bool
    features: int
    classes: int

    @staticmethod
    def between(error: fx.Node, boundary: fx.Node, spatial: str, limit: int) -> Projection:
        """Choose the projection for a boundary.

        Args:
            error: The cotangent of the output.
            boundary: The value it is carried to.
            spatial: `"dense"`: own weights for every position; `"tile"`: one signal for all; `"auto"`: dense for maps
                behind convolutions, if the matrix has at most `limit` elements, tiled for sequences.
            limit: See `spatial`.
        """
        e, h = value(error), value(boundary)
        classes = fix(e.shape[-1])
        batch = 0
        while batch < min(e.dim() - 1, h.dim() - 1) and same_size(e.shape[batch], h.shape[batch]):
            batch += 1
        if batch == 0:
            raise RuleError(
                f"the output error {tuple(e.shape)} and the boundary {tuple(h.shape)} share no batch dimension",
                node=boundary.name,
                module=info(boundary).module,
                remedy="keep the batch dimension first, or choose blocks that do",
            )
        rest = list(h.shape[batch:])
        channels_first = len(rest) > 1 and is_map(boundary)
        axis = batch if channels_first else h.dim() - 1
        dense = len(rest) == 1 or spatial == "dense"
        if spatial == "auto" and channels_first:
            dense = classes * math.prod(hint(size) for size in rest) <= limit
        # feedback weights need a size: from here on the graph holds for this one only, and is captured again for
        # another
        features = math.prod(fix(size) for size in rest) if dense else fix(h.shape[axis])
        return Projection(batch, axis, not dense, features, classes)

    def __call__(self, error: torch.Tensor, weight: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The signal: `error @ weight`, weight of shape (classes, features), in the shape and dtype of `like`."""
        return self.spread(self.gathered(error).to(weight.dtype) @ weight, like)

    def gathered(self, error: torch.Tensor) -> torch.Tensor:
        """The error of each position that the boundary has, (batch dims, classes)."""
        extra = tuple(range(self.batch, error.dim() - 1))
        # positions that the boundary does not have (a mask per pixel, a token per sequence) add up
        return error.sum(extra) if extra else error

    def lookup(self, classes: torch.Tensor, weight: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The signal of an error that is one-hot: rows of `weight`; negative classes (ignored targets) give zero."""
        rows = weight[classes.clamp(min=0)] * (classes >= 0).unsqueeze(-1)
        extra = tuple(range(self.batch, classes.dim()))
        return self.spread(rows.sum(extra) if extra else rows, like)

    def spread(self, signal: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """A signal of shape (batch dims, features) over the positions of `like`, in its dtype."""
        signal = signal.to(like.dtype)
        if self.tiled:
            shape = [*like.shape[: self.batch], *([1] * (like.dim() - self.batch))]
            shape[self.axis] = self.features
            return signal.reshape(shape).expand(like.shape)
        return signal if signal.dim() == like.dim() else signal.reshape(like.shape)


@dataclass(frozen=True)
class Injection:
    """Where a signal enters, on its way from one output of the model.

    Attributes:
        name: Name of the feedback weights.
        boundary: The value whose cotangent it becomes.
        consumers: The operators that send none any more.
        source: What carries the error: its last dimension is projected.
        projection: How it gets there.
    """

    name: str
    boundary: fx.Node
    consumers: Sequence[fx.Node]
    source: fx.Node
    projection: Projection


@dataclass(frozen=True)
class ProjectedSignal(Rule):
    """Common part of the rules that carry one signal from the output to all boundaries by fixed random matrices.

    Args:
        placement: `"macro"`: at the boundaries between blocks; `"micro"`: between the sublayers inside of a block as
            well: after each residual sum (a transformer's attention and feed-forward sublayers) and each activation
            of a feed-forward sublayer.
        shared: One matrix for all boundaries; a boundary of n features uses its first n columns (TinyDFA).
        distribution: `"uniform"` on [-1, 1) times `scale` / sqrt(n), or `"normal"` of the same variance; n is the
            number of features of the boundary (the largest one, if shared).
        scale: Factor on the feedback weights.
        spatial: Feedback weights for positions that the error does not have: `"dense"`: own ones for every position;
            `"tile"`: the same for all; `"auto"`: dense for maps behind convolutions, if the matrix has at most
            `limit` elements, tiled for sequences. Dense feedback holds for one input size.
        limit: See `spatial`.
    """

    placement: Literal["macro", "micro"] = "macro"
    shared: bool = False
    distribution: Distribution = "uniform"
    scale: float = 1.0
    spatial: str = "auto"
    limit: int = 1 << 24

    def requires(self, graph: JointGraph) -> None:
        """Two blocks at least, and known options."""
        if self.spatial not in ("auto", "dense", "tile"):
            raise RuleError(f"spatial={self.spatial!r} is unknown", remedy="use 'auto', 'dense' or 'tile'")
        if self.placement not in ("macro", "micro"):
            raise RuleError(f"placement={self.placement!r} is unknown", remedy="use 'macro' or 'micro'")
        if len(graph.blocks) < 2:
            raise RuleError(
                f"{self.name} needs at least two blocks: with one, nothing is left to redirect",
                remedy=FINER_BLOCKS,
            )

    @abstractmethod
    def sources(self, graph: JointGraph) -> list[fx.Node]:
        """What carries the error, one per output of the model; its last dimension is the classes."""

    @abstractmethod
    def signal(self, graph: JointGraph, one: Injection) -> tuple[Callable[..., torch.Tensor], list[fx.Node]]:
        """`signal(weight, boundary, *inputs)` and its inputs."""

    def run(self, graph: JointGraph) -> PassResult:
        """Redirect every boundary of this rule's blocks."""
        planned = self._plan(graph)
        widest = max((one.projection.features for one in planned), default=1)
        widths = {one.name: widest if self.shared else one.projection.features for one in planned}
        self._check_memory(graph, planned, widths)
        self._warn_about_narrow(graph, planned)
        with graph.deferred():
            for one in planned:
                weight = self.feedback(graph, one, widths[one.name])
                signal, inputs = self.signal(graph, one)
                graph.redirect(one.boundary, signal, [weight, one.boundary, *inputs], consumers=one.consumers)
        return PassResult(graph, bool(planned))

    def feedback(self, graph: JointGraph, one: Injection, width: int) -> fx.Node:
        """What `signal` reads as the weight: state of the rule."""
        node: fx.Node = graph.add_state(
            self.state_name(f"feedback.{one.name}"),
            (one.projection.classes, width),
            fill_feedback(self.distribution, self.scale / math.sqrt(width)),
            dtype=value(one.source).dtype,
        )
        return node

    def _plan(self, graph: JointGraph) -> list[Injection]:
        sources = self.sources(graph)
        ends = hidden_boundaries(graph)
        places = list(zip(names_of([b for b, _ in ends]), ends, strict=True))
        if self.placement == "micro":
            places += self._inner(graph, {info(boundary).block for boundary, _ in ends})
        planned = []
        for name, (boundary, consumers) in places:
            for number, source in enumerate(sources):
                full = ("shared" if self.shared else name) + (f".{number}" if number else "")
                projection = Projection.between(source, boundary, self.spatial, self.limit)
                planned.append(Injection(full, boundary, consumers, source, projection))
        return planned

    def _inner(self, graph: JointGraph, blocks: set[str]) -> list[tuple[str, tuple[fx.Node, Sequence[fx.Node]]]]:
        found: list[tuple[str, tuple[fx.Node, Sequence[fx.Node]]]] = []
        for block in graph.rule_blocks():
            if block.name not in blocks:
                continue
            points = sublayer_points(graph, block.name)
            if not points:
                self.fail(graph, f"placement=micro: no residual sum and no activation lies inside block {block.name}")
            for number, point in enumerate(points):
                readers = [u for u in point.users if u.op == "call_function" and not is_backward(u)]
                found.append((f"{block.name}_inner{number}", (point, readers)))
        if not found:
            raise RuleError(
                "placement=micro found no point between sublayers inside of a block",
                remedy="use placement=macro: with these blocks it injects everywhere already",
            )
        return found

    def _check_memory(self, graph: JointGraph, planned: Sequence[Injection], widths: dict[str, int]) -> None:
        """Refuse feedback matrices that cannot be held, before the first one is drawn."""
        if not planned:
            return
        sizes = {
            one.name: one.projection.classes * widths[one.name] * value(one.source).dtype.itemsize for one in planned
        }
        room = memory_of(graph.device)
        if sum(sizes.values()) <= room:
            return
        largest = max(planned, key=lambda one: sizes[one.name])
        shape = f"({largest.projection.classes}, {widths[largest.name]})"
        alone = max(sizes.values())
        raise RuleError(
            f"the feedback matrices take {_size_text(sum(sizes.values()))}, the largest is {shape}: "
            f"{_size_text(alone)}; {_size_text(room)} of memory are there",
            node=largest.boundary.name,
            module=info(largest.boundary).module,
            remedy=(
                f"{self.name}{{shared=true}} keeps one matrix for all boundaries ({_size_text(alone)}); "
                f"{self.name}{{spatial=tile}} keeps one row per channel instead of one per position"
            ),
        )

    def _warn_about_narrow(self, graph: JointGraph, planned: Sequence[Injection]) -> None:
        """A boundary with fewer features than the error has dimensions cannot be told everything."""
        narrow = {
            info(one.boundary).block: f"{info(one.boundary).block} ({one.projection.features})"
            for one in planned
            if one.projection.features < one.projection.classes
        }
        if not narrow:
            return
        classes = max(one.projection.classes for one in planned)
        text = f"narrower than the output error, whose rank is up to {classes}: blocks {', '.join(narrow.values())}"
        self.fail(graph, text)
        warnings.warn(
            f"{self.name}: {text}. Feedback through fewer features loses part of the error; wider blocks would keep it",
            stacklevel=2,
        )


def memory_of(device: torch.device) -> int:
    """Bytes of memory that a device has: of the machine, or of the container if that is less; free ones on a GPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = pathlib.Path("/sys/fs/cgroup/memory.max")
    try:
        text = limit.read_text().strip()
    except OSError:
        return room
    return min(room, int(text)) if text.isdigit() else room


def _size_text(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def hidden_boundaries(graph: JointGraph) -> list[tuple[fx.Node, Sequence[fx.Node]]]:
    """The boundaries of the running rule's blocks that lead on into the model, with the consumers they lead to."""
    found: list[tuple[fx.Node, Sequence[fx.Node]]] = []
    for block in graph.rule_blocks():
        for boundary in graph.boundaries(block.name):
            consumers = graph.crossing(boundary, loss=False)
            if consumers:
                found.append((boundary, consumers))
    return found
