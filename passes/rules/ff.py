"""The Forward-Forward algorithm: each block tells real data from data with a wrong label, by its own goodness."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from graphrewrite.passes.rules._boundary import feature_axis, names_of, sample_width
from graphrewrite.passes.rules._local import (
    class_count,
    entry_block,
    float_input,
    hidden_blocks,
    label_input,
    refuse_blocks_before,
    rms_normalise,
)
from torch import fx
from torch.nn import functional as F

from graphrewrite import random
from graphrewrite.errors import RuleError
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import LOSS_BLOCK, Loss, LossTerm, NodeInfo, Role, fix, info, value
from graphrewrite.pipeline import PassResult
from graphrewrite.rule import Rule

Embed = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def overlay(x: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """Write a class code over the first elements of each sample: the first pixels of the first row.

    Args:
        x: Samples, (batch, ...), at least as many elements each as there are classes.
        code: One-hot or neutral class codes, (batch, classes).
    """
    flat = x.flatten(1)
    return torch.cat([code.to(x.dtype), flat[:, code.shape[1] :]], dim=1).reshape(x.shape)


@dataclass(frozen=True)
class ForwardForward(Rule):
    """Normalise and cut at every boundary, run a positive and a negative pass, and teach each block by its goodness.

    The input carries the label. Goodness of a block's output h is its sum of squares; positive samples shall exceed
    the threshold, negative ones stay below it. Between blocks h is divided by its RMS, so that goodness does not
    leak on, and no cotangent crosses. The model's last block reads the normalised activations of a third pass, on
    the input with a neutral label, and is trained by the task loss.

    Args:
        goodness: `"sum"` of squares, or `"mean"`.
        threshold: Theta per unit: the goodness at which a sample counts as positive is `threshold` times the number
            of units for the sum, `threshold` itself for the mean.
        embed: Writes a class code into the input: `embed(x, code)` with codes of shape (batch, classes); default:
            `overlay`, the first elements of each sample.
        label_scale: The value that stands for 1 in the codes.
        peer: Weight of peer normalisation, which keeps units from dying: `peer * mean_j (mean(m) - m_j)^2`, m the
            running mean activity on positives.
        peer_momentum: Momentum of m, which starts at 0.5.
        readout: `"last"`: the last block on the last hidden block; `"all"`: a linear head on the outputs of the hidden
            blocks but the first; `"goodness"`: the class with the most goodness over the hidden blocks but the first.
    """

    goodness: Literal["sum", "mean"] = "sum"
    threshold: float = 1.0
    embed: Embed | None = None
    label_scale: float = 1.0
    peer: float = 0.03
    peer_momentum: float = 0.9
    readout: Literal["last", "all", "goodness"] = "last"

    name = "ff"
    summary = "Forward-Forward: positive and negative data, a goodness per block"
    formula = "L_l = softplus(θ − g⁺) + softplus(g⁻ − θ),  g = Σ h²"
    paper = "Hinton, The Forward-Forward Algorithm: Some Preliminary Investigations, 2022"
    objective: ClassVar = "local"
    needs_loss = True
    changes_forward = True

    @property
    def learns_state(self) -> bool:  # type: ignore[override]
        """The head over all layers is learned state."""
        return self.readout == "all"

    def requires(self, graph: JointGraph) -> None:
        """A float input, one class per sample, and a hidden block."""
        _known("goodness", self.goodness, ("sum", "mean"))
        _known("readout", self.readout, ("last", "all", "goodness"))
        float_input(graph)
        label_input(graph)
        refuse_blocks_before(graph, hidden_blocks(graph), self.name)

    # --- training --------------------------------------------------------------------------------------------------

    def run(self, graph: JointGraph) -> PassResult:
        """Three forward passes, cut and taught."""
        x, y, classes = float_input(graph), label_input(graph), class_count(graph)
        hidden = [b.name for b in hidden_blocks(graph)]
        outputs = graph.outputs
        task = outputs[Loss()]
        with graph.deferred():
            graph.drop_backward()
            first = entry_block(graph, x)
            like = NodeInfo(role=Role.FORWARD, block=first, module=first)
            counter, stream = graph.counter(), graph.stream()
            positive = graph.splice(
                lambda x, y: self._input(x, self._codes(y, classes)), [x, y], like=like.but(copy="pos")
            )
            negative = graph.splice(
                lambda x, y, counter: self._input(x, self._codes(_wrong(y, classes, counter, stream), classes)),
                [x, y, counter],
                like=like.but(copy="neg"),
            )
            neutral = graph.splice(lambda x: self._neutral_input(x, classes), [x], like=like.but(copy="neutral"))
            raw = self._normalise(graph, hidden)
            passes = {
                label: graph.clone_forward({x: new}, label)
                for label, new in (("pos", positive), ("neg", negative), ("neutral", neutral))
            }
            graph.move_updates(passes["pos"])
            for copies in passes.values():
                for boundary in raw:
                    graph.cut(copies[boundary])
            graph.remove_outputs(Loss, LossTerm)
            self._read_out(graph, passes["neutral"], raw, task, classes)
            for name, boundary in zip(names_of(raw), raw, strict=True):
                self._teach(graph, boundary, passes["pos"][boundary], passes["neg"][boundary], name)
        # the pass on the input without a label: dropout would keep it running
        graph.discard(passes["pos"])
        return PassResult(graph, True)

    def _normalise(self, graph: JointGraph, hidden: list[str]) -> list[fx.Node]:
        """Let the blocks behind each hidden boundary read it divided by its RMS; returns the boundaries."""
        raw = [boundary for block in hidden for boundary in graph.boundaries(block)]
        for boundary in raw:
            graph.map_value(boundary, rms_normalise)
        return raw

    def _read_out(
        self, graph: JointGraph, neutral: dict[fx.Node, fx.Node], raw: list[fx.Node], task: fx.Node, classes: int
    ) -> None:
        """The task loss, on the neutral pass."""
        if self.readout == "all":
            logits = self._head(graph, [neutral[boundary] for boundary in raw], classes, cut=True)
            loss_fn, targets = graph.context.loss, graph.context.targets
            assert loss_fn is not None
            assert targets is not None
            loss = graph.splice(
                lambda logits, y: loss_fn(logits, targets([y])),
                [logits, label_input(graph)],
                like=NodeInfo(role=Role.LOSS, block=LOSS_BLOCK),
            )
        else:
            loss = neutral[task]
        graph.add_loss(LossTerm("task"), loss)
        graph.seed_loss(loss)

    def _teach(self, graph: JointGraph, boundary: fx.Node, positive: fx.Node, negative: fx.Node, name: str) -> None:
        block = info(boundary).block
        if not self.peer:
            graph.teach(block, self._goodness_loss, [positive, negative])
            return
        axis = feature_axis(boundary)
        state = self.state_name(f"activity.{name}")
        mean = graph.add_state(
            state,
            (fix(value(boundary).shape[axis]),),
            lambda tensor, _generator: tensor.fill_(0.5),
            dtype=value(boundary).dtype,
        )

        def activity(mean: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
            batch = h.mean(dim=tuple(d for d in range(h.dim()) if d != axis))
            return self.peer_momentum * mean + (1 - self.peer_momentum) * batch

        def loss(positive: torch.Tensor, negative: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
            m = activity(mean, positive)
            return self._goodness_loss(positive, negative) + self.peer * (m.mean() - m).square().mean()

        graph.teach(block, loss, [positive, negative, mean])
        graph.update_state(state, activity, [positive])

    def _goodness_loss(self, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        """Binary cross-entropy of the goodness logits, averaged over both passes."""
        return 0.5 * (F.softplus(-self._logit(positive)).mean() + F.softplus(self._logit(negative)).mean())

    def _logit(self, h: torch.Tensor) -> torch.Tensor:
        """Goodness minus threshold, one number per sample."""
        squares = h.flatten(1).square()
        if self.goodness == "mean":
            return squares.mean(1) - self.threshold
        return squares.sum(1) - self.threshold * squares.shape[1]

    # --- inputs ----------------------------------------------------------------------------------------------------

    def _codes(self, y: torch.Tensor, classes: int) -> torch.Tensor:
        return (y.unsqueeze(1) == torch.arange(classes, device=y.device)) * self.label_scale

    def _neutral(self, x: torch.Tensor, classes: int) -> torch.Tensor:
        return x.new_full((x.shape[0], classes), self.label_scale / classes)

    def _input(self, x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """The input of a pass: the code written in, then normalised as between blocks."""
        return rms_normalise((self.embed or overlay)(x, codes))

    # --- prediction ------------------------------------------------------------------------------------------------

    def rewrite_forward(self, graph: JointGraph) -> None:
        """The neutral pass and its read-out, or the goodness of every label."""
        x, classes = float_input(graph), class_count(graph)
        hidden = [b.name for b in hidden_blocks(graph)]
        first = entry_block(graph, x)
        like = NodeInfo(role=Role.FORWARD, block=first, module=first)
        make = self._all_labels if self.readout == "goodness" else self._neutral_input
        new = graph.splice(lambda x: make(x, classes), [x], like=like.but(copy="read"))
        raw = self._normalise(graph, hidden)
        copies = graph.clone_forward({x: new}, "read")
        read = [copies[boundary] for boundary in raw]
        first_output = graph.model_outputs[0]
        if self.readout == "all":
            copies[first_output] = self._head(graph, read, classes, cut=False)
        elif self.readout == "goodness":
            copies[first_output] = self._total_goodness(graph, read, classes)
        graph.set_outputs({spec: copies.get(node, node) for spec, node in graph.outputs.items()})
        graph.model_outputs = [copies.get(node, node) for node in graph.model_outputs]
        graph.sort()

    def _neutral_input(self, x: torch.Tensor, classes: int) -> torch.Tensor:
        return self._input(x, self._neutral(x, classes))

    def _total_goodness(self, graph: JointGraph, boundaries: list[fx.Node], classes: int) -> fx.Node:
        """Mean squares of the hidden blocks but the first, (batch, classes)."""

        def total(*values: torch.Tensor) -> torch.Tensor:
            goodness = torch.stack([v.flatten(1).square().mean(1) for v in values]).sum(0)
            return goodness.reshape(classes, -1).t()

        like = NodeInfo(role=Role.FORWARD, block=LOSS_BLOCK, module="goodness", copy="read")
        answer: fx.Node = graph.splice(total, boundaries[1:] or boundaries, like=like)
        return answer

    def _all_labels(self, x: torch.Tensor, classes: int) -> torch.Tensor:
        """Every sample with every label, labels first: (classes * batch, ...)."""
        labels = torch.arange(classes, device=x.device).repeat_interleave(x.shape[0])
        return self._input(x.repeat(classes, *([1] * (x.dim() - 1))), self._codes(labels, classes).to(x.dtype))

    def _head(self, graph: JointGraph, boundaries: list[fx.Node], classes: int, *, cut: bool) -> fx.Node:
        """A linear head, zero at first, on the normalised outputs of the hidden blocks but the first."""
        scored = boundaries[1:] or boundaries
        widths = [sample_width(b) for b in scored]
        weight = graph.add_state(
            self.state_name("readout.weight"),
            (classes, sum(widths)),
            lambda tensor, _generator: tensor.zero_(),
            trainable=True,
            dtype=value(scored[0]).dtype,
        )

        def head(weight: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
            features = torch.cat([rms_normalise(v).flatten(1) for v in values], dim=1)
            return F.linear(features, weight)

        like = NodeInfo(role=Role.FORWARD, block=LOSS_BLOCK, module="readout")
        node: fx.Node = graph.splice(head, [weight, *scored], like=like)
        if cut:
            for boundary in scored:
                graph.cut(boundary)
        return node


def _wrong(y: torch.Tensor, classes: int, counter: torch.Tensor, stream: int) -> torch.Tensor:
    """A uniformly random class that is not y."""
    return (y + 1 + random.integers(counter, stream, y.shape, classes - 1)) % classes


def _known(option: str, given: Any, known: tuple[str, ...]) -> None:
    if given not in known:
        raise RuleError(f"{option}={given!r} is unknown", remedy=f"use {' or '.join(map(repr, known))}")
