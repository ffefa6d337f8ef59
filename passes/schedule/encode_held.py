"""Store in another form what a split backward holds between its stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graphrewrite.passes.compression.compress_saved import CompressSaved, build_codec, fit

from graphrewrite.analysis.demands import held_values
from graphrewrite.errors import RuleError
from graphrewrite.graph.codec import Declined
from graphrewrite.graph.joint import JointGraph
from graphrewrite.pipeline import Pass, PassResult


@dataclass(frozen=True)
class EncodeHeld(Pass):
    """Offer each cotangent that is held for the weight stage to the codecs in order; the first that accepts it wins.

    The first stage reads the values as they are: the gradients of inputs, and all cotangents, stay bitwise the same;
    only weight gradients read what is decoded. Activations that the first stage has computed again are encoded as well.
    What the forward saved is held in the form in which it was saved: that is `compress=`.

    Args:
        codecs: Names, text forms or objects.
    """

    codecs: tuple[Any, ...] = ("int8",)

    name = "encode_held"
    level = "aten"
    summary = "store what waits for the weight stage in the form that codecs give it"
    paper = "ActNN (Chen et al., 2021), for the codecs; Rae, Lee, Richings 2024, for what is held"

    def requires(self, graph: JointGraph) -> None:
        """The codecs exist, and encode."""
        for codec in map(build_codec, self.codecs):
            if getattr(codec, "how", "encode") != "encode":
                raise RuleError(
                    f"{codec} stores nothing in another form",
                    remedy="use a codec such as int8, or budget= to recompute",
                )

    def run(self, graph: JointGraph) -> PassResult:
        """Encode what is held and taken."""
        codecs = [build_codec(one) for one in self.codecs]
        encoded = 0
        for held in held_values(graph):
            if held.closed:
                self.fail(graph, held.closed, held.node)
                continue
            chosen = [fit(codec, held) for codec in codecs]
            taken = next((one for one in chosen if not isinstance(one, Declined)), None)
            if taken is None:
                self.fail(graph, "; ".join(one.reason for one in chosen if isinstance(one, Declined)), held.node)
                continue
            CompressSaved.encode(graph, held, taken, held=True)
            encoded += 1
        if encoded:
            graph.sort()
            graph.prune(backward_only=True)
        return PassResult(graph, bool(encoded))
