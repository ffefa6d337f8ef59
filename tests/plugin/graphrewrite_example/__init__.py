"""A rule, a pass, a codec and a backend that graphrewrite finds through entry points."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from graphrewrite.backends import eager

import graphrewrite as gr


@dataclass(frozen=True)
class ScaledErrors(gr.Rule):
    """Hand `scale` times the cotangent on at every boundary between blocks.

    Args:
        scale: The factor.
    """

    scale: float = 2.0

    name = "example_rule"
    summary = "errors that grow from block to block"
    formula = "δ_l = s (W_{l+1}ᵀ δ_{l+1}) ⊙ φ'(z_l)"

    def run(self, graph):
        """Insert an identity with another derivative behind every boundary."""
        boundaries = [
            b for block in graph.rule_blocks() for b in graph.boundaries(block.name) if graph.crossing(b, loss=False)
        ]
        for boundary in boundaries:
            consumer = graph.crossing(boundary, loss=False)[0]
            graph.replace_vjp(consumer, lambda r, g: self.scale * (g @ r[1]), part="d")
        return gr.PassResult(graph, bool(boundaries))


@dataclass(frozen=True)
class TapLogits(gr.Pass):
    """Expose the model's output."""

    name = "example_pass"
    summary = "expose the logits"

    def run(self, graph):
        """Tap the first output."""
        graph.tap(graph.model_outputs[0], "logits")
        return gr.PassResult(graph, True)


class Half:
    """Store in float16."""

    def encode(self, tensor):
        """Round."""
        return tensor.to(torch.float16)

    def decode(self, residuals, like):
        """Back."""
        return residuals[0].to(like.dtype)


calls = []


def lower(partition):
    """The eager backend, counting its calls."""
    forward, backward = eager.lower(partition)

    def counted(name, run):
        def call(values):
            calls.append(name)
            return run(values)

        return call

    return counted("forward", forward), counted("backward", backward)
