"""Where a local head sits: the shape of its boundary, the shape of the answer it has to give, and its teacher."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from graphrewrite.passes.rules._boundary import is_map
from torch import fx
from torch.nn import functional as F

from graphrewrite.errors import RuleError
from graphrewrite.graph.core import Context
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import LOSS_BLOCK, fix, info, is_backward, same_shape, same_size, value

IGNORED = -100
"""The class index of samples that do not count, as in `torch.nn.functional.cross_entropy`."""

Kind = Literal["vector", "map", "tokens"]


@dataclass(frozen=True)
class Answer:
    """The model output that the loss reads, and the block that computes it."""

    node: fx.Node
    block: str


def answer_of(graph: JointGraph) -> Answer:
    """The one output of the model that the task loss reads."""
    read = [
        node
        for node in graph.model_outputs
        if any(u.op == "call_function" and not is_backward(u) and info(u).block == LOSS_BLOCK for u in node.users)
    ]
    if len(read) != 1:
        names = ", ".join(n.name for n in read) or "none"
        raise RuleError(
            f"local heads stand for one output of the model, the loss reads: {names}",
            remedy="let the loss read one floating-point output",
        )
    return Answer(read[0], info(read[0]).block)


def answer_of_forward(graph: JointGraph) -> Answer:
    """The first output of the model, where no loss says which one counts."""
    if not graph.model_outputs:
        raise RuleError("the model has no floating-point output, so heads have nothing to stand for")
    node = graph.model_outputs[0]
    return Answer(node, info(node).block)


@dataclass(frozen=True)
class Site:
    """Where a head sits.

    Attributes:
        name: The block, numbered from its second boundary on.
        node: What the head reads.
        kind: `"vector"`: features only; `"map"`: channels first, then positions; `"tokens"`: positions, then features.
        batch: How many leading dimensions boundary and answer share: samples; samples and tokens; nodes.
        target: Shape of the answer.
        width: Numbers in an answer per sample (or token, or node): the number of classes, or of targets.
        classes: Size of the answer's last dimension; 0 if the answer is one number per sample.
        dense: Whether the answer has the positions of the map: `"last"` or `"first"` says where its channels are.
    """

    name: str
    node: fx.Node
    kind: Kind
    batch: int
    target: tuple[Any, ...]
    width: int
    classes: int
    dense: Literal["", "first", "last"] = ""

    @staticmethod
    def at(node: fx.Node, answer: fx.Node, name: str) -> Site:
        """The site at a boundary.

        Raises:
            RuleError: Boundary and answer share no batch dimension.
        """
        h, a = value(node), value(answer)
        channels = h.dim() > 2 and is_map(node)
        shared = 0
        while (
            shared < min(max(a.dim() - 1, 1), h.dim() - 1)
            and same_size(h.shape[shared], a.shape[shared])
            and not (channels and shared == 1)
        ):
            shared += 1
        if shared == 0:
            raise RuleError(
                f"no head fits: the boundary {_shape(h)} and the model's answer {_shape(a)} share no batch dimension",
                node=node.name,
                module=info(node).module or name,
                remedy="keep the batch dimension first, or choose blocks (blocks=) that do",
            )
        kind: Kind = "map" if channels else "vector" if h.dim() == shared + 1 else "tokens"
        dense = _dense(h, a) if channels else ""
        if dense:
            width = fix(a.shape[-1 if dense == "last" else 1])
        else:
            width = math.prod(fix(size) for size in a.shape[shared:])
        classes = fix(a.shape[-1]) if a.dim() > 1 else 0
        return Site(name, node, kind, shared, tuple(a.shape), width, classes, dense)

    @property
    def shape(self) -> tuple[Any, ...]:
        """Shape of the boundary; sizes that may change are symbols."""
        return tuple(value(self.node).shape)

    @cached_property
    def channels(self) -> int:
        """Features of one position."""
        return fix(self.shape[1] if self.kind == "map" else self.shape[-1])

    def pool_size(self, limit: int) -> tuple[int, ...]:
        """Positions that are left of a map when its sizes are halved in turn until `limit` features remain."""
        sizes = [fix(size) for size in self.shape[2:]]
        turn = 0
        while self.channels * math.prod(sizes) > limit and max(sizes) > 1:
            axis = turn % len(sizes)
            sizes[axis] = -(-sizes[axis] // 2)
            turn += 1
        return tuple(sizes)

    def features(self, limit: int = 2048) -> int:
        """Width of `pooled`."""
        if self.dense:
            return self.channels
        if self.kind == "map":
            return self.channels * math.prod(self.pool_size(limit))
        return self.channels

    def pooled(self, h: torch.Tensor, limit: int = 2048, tokens: str = "mean") -> torch.Tensor:
        """One feature vector per answer.

        Maps are average-pooled until at most `limit` features remain (to one position per channel at the least) and
        flattened; of sequences the mean (or the first, or the last) token is taken; vectors are as they are.

        Args:
            h: The boundary's value.
            limit: See above.
            tokens: `"mean"`, `"first"` or `"last"`, for a sequence that has one answer.
        """
        if self.dense:
            return h.movedim(1, -1)
        if self.kind == "map":
            return average_pool(h, self.pool_size(limit)).flatten(1)
        if self.kind == "tokens":
            h = h.flatten(self.batch, -2)
            if tokens == "mean":
                return h.mean(self.batch)
            return h.select(self.batch, 0 if tokens == "first" else -1)
        return h

    def answer(self, outputs: torch.Tensor) -> torch.Tensor:
        """Numbers per sample (batch dims, width) in the shape of the model's answer."""
        if self.dense:
            return outputs if self.dense == "last" else outputs.movedim(-1, 1)
        if outputs.dim() == len(self.target):
            return outputs
        return outputs.reshape([*outputs.shape[: self.batch], *(int(size) for size in self.target[self.batch :])])


def average_pool(h: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Average-pool the positions of a map to `size`."""
    if same_shape(h.shape[2:], size):
        return h
    pool: Any = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[len(size)]
    pooled: torch.Tensor = pool(h, list(size))
    return pooled


def _dense(h: torch.Tensor, a: torch.Tensor) -> Literal["", "first", "last"]:
    """Whether an answer has one entry per position of a map."""
    if a.dim() != h.dim():
        return ""
    if same_shape(a.shape[1:-1], h.shape[2:]):
        return "last"
    return "first" if same_shape(a.shape[2:], h.shape[2:]) else ""


def _shape(tensor: torch.Tensor) -> str:
    return f"({', '.join(str(size) for size in tensor.shape)})"


@dataclass(frozen=True)
class Teacher:
    """What a head's loss may ask: the compile's loss on the head's answer, and the targets."""

    site: Site
    context: Context
    values: tuple[torch.Tensor, ...]

    @property
    def targets(self) -> Any:
        """The targets as `compiled.loss(x, y)` got them."""
        assert self.context.targets is not None
        return self.context.targets(self.values)

    def task(self, answer: torch.Tensor) -> torch.Tensor:
        """The compile's loss with the head's answer in the place of the model's."""
        want = self.site.target
        if not isinstance(answer, torch.Tensor) or len(answer.shape) != len(want):
            got = _shape(answer) if isinstance(answer, torch.Tensor) else type(answer).__name__
            self._misfit(got)
        if not same_shape(answer.shape, want):
            self._misfit(_shape(answer))
        assert self.context.loss is not None
        assert self.context.outputs is not None
        return self.context.loss(self.context.outputs(OneAnswer(answer)), self.targets)

    def _misfit(self, got: str) -> None:
        raise RuleError(
            f"the head of {self.site.name} answers {got}, the model answers ({', '.join(map(str, self.site.target))})",
            module=self.site.name,
            remedy="return site.answer(...) from the head's forward",
        )

    def codes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The targets as rows of numbers, and which rows count.

        Class indices become one-hot rows of `site.classes` numbers; floating-point targets (soft labels, values to
        regress) are rows already. All dimensions but the last are flattened.
        """
        y = self.targets
        if not isinstance(y, torch.Tensor):
            raise RuleError(
                f"this head needs one tensor as target, got {type(y).__name__}", remedy="pass class indices or rows"
            )
        if y.is_floating_point():
            rows = y.reshape(-1, y.shape[-1]) if y.dim() > 1 else y.unsqueeze(1)
            return rows, torch.ones_like(rows[:, 0])
        if not self.site.classes:
            raise RuleError(
                f"the number of classes is unknown: the model answers ({', '.join(map(str, self.site.target))})",
                module=self.site.name,
                remedy="let the model return one score per class in the last dimension",
            )
        self.context.label_classes = self.site.classes
        y = y.reshape(-1)
        counted = y != IGNORED
        dtype = value(self.site.node).dtype
        table = torch.eye(self.site.classes, dtype=dtype, device=y.device)
        weight = counted.to(dtype)
        return table[torch.where(counted, y, 0)] * weight.unsqueeze(1), weight


class OneAnswer(Sequence[Any]):
    """The model's outputs, of which a head gives only the one that the loss reads."""

    def __init__(self, answer: torch.Tensor) -> None:
        self._answer = answer

    def __len__(self) -> int:
        return 1

    def __getitem__(self, _index: Any) -> Any:
        return self._answer
