"""The backward in segments, so that data parallel training reduces gradients while the rest is computed.

One autograd function hands all gradients over when its whole backward is done; what waits for them, such as the
reduction of a bucket of DDP, could start no earlier. Here the backward stage is cut behind the last gradient of each
block, and autograd sees a function per segment. They are chained by empty tensors; autograd accumulates what a segment
returns, and calls the hooks on it, before it goes on to the next. The operators, and their order, are the same.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from graphrewrite.graph.aliasing import base_of
from graphrewrite.graph.nodes import Grad, info
from graphrewrite.graph.partition import Partition
from graphrewrite.runtime.concat import excerpt

if TYPE_CHECKING:
    from graphrewrite.runtime.program import Program


class Segments:
    """How the backward stage of a partition runs in pieces.

    Attributes:
        results: Per segment, the positions in `partition.backward_outputs` of the gradients that are ready behind it.
        runs: Per segment, what computes them: it takes what lives in front of it, and returns them and what lives on.
        copied: Positions of gradients that share memory with what later segments read.
    """

    def __init__(self, part: Partition) -> None:
        module = part.backward
        nodes = [n for n in module.graph.nodes if n.op not in ("placeholder", "output")]
        given = [n for n in module.graph.nodes if n.op == "placeholder"]
        outputs: tuple[fx.Node, ...] = module.graph.output_node().args[0]  # type: ignore[assignment]
        place = {node: i for i, node in enumerate(nodes)}
        at = [place.get(node, -1) for node in outputs]
        ready = sorted(range(len(outputs)), key=at.__getitem__)
        ends = [
            at[a] + 1
            for a, b in itertools.pairwise(ready)
            if info(outputs[a]).block != info(outputs[b]).block and at[a] < at[b]
        ]
        self.results: list[list[int]] = []
        self.runs = []
        self.copied: set[int] = set()
        start, live = 0, given
        for end in (*ends, len(nodes)):
            own = [i for i in ready if (start or -1) <= at[i] < end]
            later = {source for node in nodes[end:] for source in node.all_input_nodes}
            after = [n for n in (*live, *nodes[start:end]) if n in later]
            shared = {base_of(n) for n in after}
            self.copied.update(i for i in own if base_of(outputs[i]) in shared)
            self.results.append(own)
            self.runs.append(excerpt(module, live, nodes[start:end], [*(outputs[i] for i in own), *after]))
            start, live = end, after

    def __len__(self) -> int:
        return len(self.results)


def cut(part: Partition) -> Segments | None:
    """The backward in segments; None if there is but one, or if it does more than compute gradients."""
    if part.backward_weight is not None or not all(isinstance(s, Grad) for s in part.backward_outputs):
        return None
    if any(s.carried for s in part.saved):
        return None  # they were ready in front of the backward
    found = Segments(part)
    return found if len(found) > 1 else None


class Chain:
    """The running backward of one step. The functions of all segments refer to it, and it to no tensor of theirs."""

    def __init__(self, program: Program, segments: Segments, device: torch.device) -> None:
        self._program, self._segments = program, segments
        self._token = torch.empty(0, device=device)
        self._values: list[Any] = []
        self._missing: frozenset[int] = frozenset()

    def link(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Put the functions of all segments but the first in front of the one that runs the forward.

        Args:
            tensors: What gets a gradient, in the order of the backward's results.

        Returns:
            What that function takes: the token that it reaches the others by, and what the first segment's gradients
            belong to.
        """
        token: list[torch.Tensor] = []
        own = [[tensors[i] for i in results] for results in self._segments.results]
        for k in reversed(range(1, len(own))):
            token = [_Link.apply(self, k, self._token, *token, *own[k])]  # type: ignore[no-untyped-call]
        return [*token, *own[0]]

    def begin(self, values: list[Any], missing: frozenset[int]) -> tuple[Any, ...]:
        """Run the first segment on what the backward stage takes."""
        self._values, self._missing = values, missing
        return self.run(0)

    def run(self, k: int) -> tuple[Any, ...]:
        """A cotangent for the token that the next segment is called by, and the gradients of this one."""
        own = self._segments.results[k]
        results = list(self._program.execute(self._segments.runs[k], self._values))
        self._values = results[len(own) :]
        grads = [
            None
            if self._program.is_unused(i, self._missing)
            else (result.clone() if i in self._segments.copied else result)
            for i, result in zip(own, results, strict=False)
        ]
        return (*([self._token] if k + 1 < len(self._segments) else []), *grads)


class _Link(torch.autograd.Function):
    """Its backward runs a segment; its output is what the segment in front of it reaches it by."""

    @staticmethod
    def forward(ctx: Any, chain: Chain, k: int, empty: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.chain, ctx.k = chain, k
        return torch.empty_like(empty)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return (None, None, None, *ctx.chain.run(ctx.k))
