"""Measuring what a training step keeps alive: peak bytes, and bytes saved between forward and backward."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from graphrewrite.analysis.liveness import LiveBytes, backward_curve, forward_curve
from graphrewrite.runtime.module import CompiledModule


class EqualBlock(nn.Module):
    """A linear layer and a ReLU: as many of them as one likes make a network of equal blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One activation of the input's shape."""
        return torch.relu(self.linear(x))


def equal_blocks(depth: int, width: int, classes: int = 10) -> nn.Sequential:
    """A chain of `depth` equal blocks with a linear head."""
    return nn.Sequential(*[EqualBlock(width) for _ in range(depth)], nn.Linear(width, classes))


def peak_bytes(step: Callable[[], Any], known: Iterable[torch.Tensor]) -> int:
    """The most bytes alive at once in a step, those of `known` tensors not counted.

    Args:
        step: Runs forward and backward.
        known: Inputs, parameters and buffers.
    """
    gc.collect()
    with LiveBytes(known) as live:
        step()
    peak: int = live.peak
    return peak


def measured_peak(compiled: CompiledModule, x: torch.Tensor, y: torch.Tensor) -> int:
    """Peak bytes of one training step of a compiled model, which has been captured for `x` and `y` before.

    Gradients that the step leaves in `.grad` are counted; parameters, buffers and inputs are not.
    """
    compiled.zero_grad()
    known = [*compiled.parameters(), *compiled.buffers(), x, y]
    found = peak_bytes(lambda: compiled.loss(x, y).backward(), known)
    compiled.zero_grad()
    return found


def predicted_peak(compiled: CompiledModule) -> int:
    """The same, from the graph of the most recent program, at the sizes that it was captured with."""
    part = compiled.program().partition
    return max(forward_curve(part).peak, backward_curve(part).peak)


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of the gradients that a step leaves behind: those of the parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def saved_bytes(forward: Callable[[], torch.Tensor], known: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages that autograd holds for the backward, those of `known` tensors not counted."""
    storages: dict[int, int] = {}
    held: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
        # kept, so that no other storage can take the same place
        held.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    for tensor in known:
        storages.pop(tensor.untyped_storage()._cdata, None)
    del loss
    return sum(storages.values())
