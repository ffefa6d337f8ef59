"""Views of a compiled module, and outputs that tell why they have no backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from graphrewrite.errors import RuleError

if TYPE_CHECKING:
    from graphrewrite.runtime.module import CompiledModule


class LossModule(nn.Module):
    """`forward(x, y)` is `compiled.loss(x, y)`."""

    def __init__(self, compiled: CompiledModule) -> None:
        super().__init__()
        self.compiled = compiled
        self.training = compiled.training

    def forward(self, x: Any, y: Any) -> torch.Tensor:
        """The rule's loss."""
        return self.compiled.loss(x, y)


class NoBackward(torch.autograd.Function):
    """An output whose backward tells what to do instead."""

    @staticmethod
    def forward(ctx: Any, rule: str, anchor: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The output itself."""
        ctx.rule = rule
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *_cotangents: Any) -> Any:
        """Says what to do instead."""
        raise RuleError(
            f"rule {ctx.rule} has no backward through compiled(x): its objective needs the targets",
            remedy="train with compiled.loss(x, y).backward()",
        )
