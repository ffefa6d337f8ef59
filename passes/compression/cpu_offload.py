"""Keep saved tensors of a GPU in the memory of the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graphrewrite.analysis.demands import SavedValue
from graphrewrite.graph.codec import FLOATS, Declined, SavedCodec
from graphrewrite.graph.nodes import value


@dataclass(frozen=True)
class CpuOffload(SavedCodec):
    """Copied to pinned memory while the forward goes on, and back before its first reader in the backward; exact.

    Both copies are asynchronous and in the order of the stream: nothing waits for the CPU.
    """

    name = "cpu_offload"
    summary = "pinned memory of the CPU; exact"
    paper = "vDNN (Rhu et al., 2016), ZeRO-Offload (Ren et al., 2021)"
    error = "none"
    exact = True
    dtypes = (*FLOATS, torch.bool, torch.int64, torch.int32, torch.uint8)
    on_host = True
    passes = 60.0

    def bits_per_element(self, dtype: torch.dtype) -> float:
        """None on the device."""
        return 0.0

    def fit(self, saved: SavedValue) -> SavedCodec | Declined:
        """What lies in the memory of a device."""
        if value(saved.node).device.type == "cpu":
            return Declined("it lies in the memory of the CPU already")
        return super().fit(saved)

    def encode(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in pinned memory; torch pins the target of an asynchronous copy from a GPU."""
        return tensor.to("cpu", non_blocking=True)

    def decode(self, residuals: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """Back on the device."""
        return residuals[0].to(like.device, non_blocking=True)
