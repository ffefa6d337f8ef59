"""How well a rule's gradient points where backpropagation's does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from graphrewrite.inputs import as_inputs, as_targets

if TYPE_CHECKING:
    from graphrewrite.runtime.module import CompiledModule


@dataclass(frozen=True)
class Angle:
    """A rule's gradient of one parameter (or of a block's) against backpropagation's.

    Attributes:
        cosine: Of the angle between them; nan where one of them is zero.
        norm_ratio: Norm of the rule's over the norm of backpropagation's.
    """

    cosine: float
    norm_ratio: float

    @property
    def degrees(self) -> float:
        """The angle, 0 to 180."""
        return float(torch.rad2deg(torch.acos(torch.tensor(self.cosine).clamp(-1, 1))))


class Alignment(Mapping[str, Angle]):
    """Per-parameter angles, by name; `blocks` holds the same for each block's parameters taken together."""

    def __init__(self, angles: dict[str, Angle], blocks: dict[str, Angle]) -> None:
        self._angles = angles
        self.blocks = blocks

    def __getitem__(self, name: str) -> Angle:
        return self._angles[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._angles)

    def __len__(self) -> int:
        return len(self._angles)

    def __str__(self) -> str:
        width = max((len(n) for n in self), default=0)
        return "\n".join(f"{n:<{width}}  cos {a.cosine:+.3f}  norm ratio {a.norm_ratio:.3g}" for n, a in self.items())


def measure(compiled: CompiledModule, x: Any, y: Any) -> Alignment:
    """Both gradients on one batch. `.grad`, buffers, rule state and random generators are left as they were."""
    named = {n: p for n, p in compiled.module.named_parameters() if p.requires_grad}
    with _undisturbed(compiled):
        rule = compiled.gradients_of(compiled.loss(x, y), named)
    inputs, targets = as_inputs(x), as_targets(y)
    with _undisturbed(compiled):
        outputs = compiled.module(*inputs.args, **inputs.kwargs)
        loss = compiled.task_loss(outputs, targets)
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        exact = dict(zip(named, found, strict=True))
    both = {n: (rule[n], exact[n]) for n in named if rule[n] is not None and exact[n] is not None}
    angles = {n: _angle([r], [e]) for n, (r, e) in both.items()}  # type: ignore[list-item]
    blocks = {
        block: _angle([both[n][0] for n in names if n in both], [both[n][1] for n in names if n in both])  # type: ignore[misc]
        for block, names in compiled.parameters_by_block().items()
        if any(n in both for n in names)
    }
    return Alignment(angles, blocks)


def _angle(rule: list[torch.Tensor], exact: list[torch.Tensor]) -> Angle:
    a = torch.cat([g.detach().flatten().double() for g in rule])
    b = torch.cat([g.detach().flatten().double() for g in exact])
    na, nb = a.norm(), b.norm()
    return Angle(float(a @ b / (na * nb)), float(na / nb))


@contextlib.contextmanager
def _undisturbed(compiled: CompiledModule) -> Iterator[None]:
    """Puts back buffers, rule state, the step counter and random generators."""
    buffers = {n: b.clone() for n, b in compiled.named_buffers()}
    step, calls, losses = compiled._step, compiled._calls, compiled.losses
    with torch.random.fork_rng():
        yield
    with torch.no_grad():
        for name, buffer in compiled.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])
    compiled._step, compiled._calls, compiled.losses = step, calls, losses
