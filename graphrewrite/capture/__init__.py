"""Capture: `nn.Module` -> forward graph, by `torch.export`."""

from graphrewrite.capture.export import Captured, capture

__all__ = ["Captured", "capture"]
