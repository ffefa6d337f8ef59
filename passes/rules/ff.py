"""The Forward-Forward algorithm: each block tells real data from data with a wrong label, by its own goodness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from graphrewrite.passes.rules._boundary import sample_width
from graphrewrite.passes.rules._forward_forward import (
    Contrast,
    Peer,
    Taught,
    known,
    mean_square,
    pass_info,
    refuse_silent_blocks,
    run_passes,
    shares_batch,
    sum_of_squares,
    teach_goodness,
)
from graphrewrite.passes.rules._labels import (
    checked_labels,
    codes,
    hybrid_images,
    other_labels,
    overlay,
    wrong_labels,
)
from graphrewrite.passes.rules._local import (
    class_count,
    float_input,
    hidden_blocks,
    label_input,
    refuse_blocks_before,
    refuse_other_batches,
    rms_normalise,
)
from torch import fx
from torch.nn import functional as F

from graphrewrite.errors import RuleError
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import LOSS_BLOCK, Loss, LossTerm, NodeInfo, Role, fix, info, value
from graphrewrite.pipeline import PassResult
from graphrewrite.rule import Rule


@dataclass(frozen=True)
class ForwardForward(Rule):
    """Normalise and cut at every boundary, run a positive and a negative pass, and teach each block by its goodness.

    The input carries the label. Goodness of a block's output h is its sum of squares; positive samples shall exceed
    the threshold, negative ones stay below it. Between blocks h is divided by its RMS, so that goodness does not
    leak on, and no cotangent crosses. The model's last block reads the normalised activations of a third pass, on
    the input with a neutral label, and is trained by the task loss. Inside a block the derivative is exact: with
    `blocks="auto"` a residual or transformer block learns by backpropagation inside, by Forward-Forward across.

    A label of -100 means none: the sample gets the neutral code and has no part in the losses (nodes of a graph that
    are not in the training set).

    Args:
        goodness: `"sum"` of squares, or `"mean"`.
        threshold: Theta per unit: the goodness at which a sample counts as positive is `threshold` times the number
            of units for the sum, `threshold` itself for the mean.
        loss: `"hinton"`: softplus(theta - g+) + softplus(g- - theta), halved; `"symba"`: softplus(-alpha (g+ - g-)).
        alpha: Slope of the `"symba"` loss.
        collaboration: Whose goodness is added to a block's own, as a constant: that of no other block, of all
            `"previous"` ones, or of `"all"` others. The threshold is then that of all that are summed.
        negatives: `"random"`: the same sample with a random wrong label; `"all"`: with each wrong label in turn;
            `"hybrid"`: images mixed from two of the batch, and no labels in the input at all (unsupervised; the
            read-out alone learns labels); or `negatives(x, y)`, which returns wrong labels (integers like y) or the
            negative inputs themselves (like x, label written in).
        blurs: How often the mask of `"hybrid"` negatives is blurred.
        embed: Writes a class code into the input: `embed(x, code)` with codes of shape (batch, classes); default:
            `overlay`, the first elements of each sample.
        label_scale: The value that stands for 1 in the codes.
        peer: Weight of peer normalisation, which keeps units from dying: `peer * mean_j (mean(m) - m_j)^2`, m the
            running mean activity on positives.
        peer_momentum: Momentum of m, which starts at 0.5.
        readout: `"last"`: the last block on the last hidden block; `"all"`: a linear head on the outputs of the hidden
            blocks but the first, which are all kept until it has learned; `"goodness"`: the class with the most mean
            goodness over the hidden blocks but the first; with collaboration, over all that learn together, summed as
            in training. Collaborating blocks learn what their sum lacks, so alone the last one says little: read them
            by their goodness.
        num_classes: Default: the last dimension of the model's first output.
    """

    goodness: Literal["sum", "mean"] = "sum"
    threshold: float = 1.0
    loss: Literal["hinton", "symba"] = "hinton"
    alpha: float = 4.0
    collaboration: Literal["none", "previous", "all"] = "none"
    negatives: str | Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = "random"
    blurs: int = 6
    embed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    label_scale: float = 1.0
    peer: float = 0.03
    peer_momentum: float = 0.9
    readout: Literal["last", "all", "goodness"] = "last"
    num_classes: int | None = None

    name = "ff"
    summary = "Forward-Forward: positive and negative data, a goodness per block"
    formula = "L_l = softplus(θ − g⁺) + softplus(g⁻ − θ),  g = Σ h²"
    paper = (
        "Hinton, The Forward-Forward Algorithm: Some Preliminary Investigations, 2022; SymBa: Lee and Song, 2023; "
        "layer collaboration: Lorberbom et al., 2023"
    )
    objective: ClassVar = "local"
    needs_loss = True
    changes_forward = True

    @property
    def learns_state(self) -> bool:  # type: ignore[override]
        """The head over all layers is learned state."""
        return self.readout == "all"

    def requires(self, graph: JointGraph) -> None:
        """A float input, one class per sample, and a hidden block."""
        known("goodness", self.goodness, ("sum", "mean"))
        known("loss", self.loss, ("hinton", "symba"))
        known("collaboration", self.collaboration, ("none", "previous", "all"))
        known("readout", self.readout, ("last", "all", "goodness"))
        if not callable(self.negatives):
            known("negatives", self.negatives, ("random", "all", "hybrid"))
        x = float_input(graph)
        classes = class_count(graph, self.num_classes)
        if classes < 2:
            raise RuleError(f"ff tells classes apart, the model has {classes}", remedy="give num_classes")
        hidden = hidden_blocks(graph)
        refuse_other_batches([x, *(n for b in hidden for n in graph.boundaries(b.name))], label_input(graph))
        refuse_blocks_before(graph, hidden, self.name)
        refuse_silent_blocks(graph, [b.name for b in hidden])
        if self._hybrid:
            self._require_images(x)
        elif self.embed is None and sample_width(x) < classes:
            raise RuleError(
                f"a sample of {sample_width(x)} elements has no room for the code of {classes} classes",
                remedy="give `embed`, a function that writes a code into the input",
            )

    def _require_images(self, x: fx.Node) -> None:
        if value(x).dim() != 4:
            raise RuleError(
                f"hybrid negatives mix images, (batch, channels, height, width); the input has {value(x).dim()} "
                "dimensions",
                remedy="let the model take images and flatten them itself, or use other negatives",
            )
        if self.readout == "goodness":
            raise RuleError(
                "with hybrid negatives no label is in the input, so goodness cannot choose one",
                remedy="use readout='last' or readout='all'",
            )

    @property
    def _hybrid(self) -> bool:
        return self.negatives == "hybrid"

    # --- training --------------------------------------------------------------------------------------------------

    def run(self, graph: JointGraph) -> PassResult:
        """A positive, one or several negative and a neutral pass, cut and taught."""
        x, classes = float_input(graph), class_count(graph, self.num_classes)
        hidden = [b.name for b in hidden_blocks(graph)]
        task = graph.outputs[Loss()]
        with graph.deferred():
            graph.drop_backward()
            like = pass_info(graph, "pos")
            y: fx.Node = graph.splice(lambda y: checked_labels(y, classes), [label_input(graph)], like=like)
            positive: fx.Node = graph.splice(lambda x, y: self._input(x, y, classes), [x, y], like=like)
            negatives = self._negative_inputs(graph, x, y, classes)
            neutral = graph.splice(lambda x: self._neutral_input(x, classes), [x], like=pass_info(graph, "neutral"))
            raw = self._normalise(graph, hidden)
            (pos,) = run_passes(graph, x, [positive], "pos")
            neg = run_passes(graph, x, negatives, "neg")
            (read,) = run_passes(graph, x, [neutral], "neutral", loss=True)
            graph.move_updates(pos)
            for copies in (pos, *neg, read):
                for boundary in raw:
                    graph.cut(copies[boundary])
            graph.remove_outputs(Loss, LossTerm)
            self._read_out(graph, read, raw, task, classes)
            counted = graph.splice(
                lambda y: torch.ones_like(y, dtype=torch.bool) if self._hybrid else y >= 0, [y], like=like
            )
            teach_goodness(
                graph,
                [Taught(b, pos[b], tuple(copies[b] for copies in neg)) for b in raw],
                counted,
                Contrast(
                    self.goodness,
                    self.threshold,
                    self.loss,
                    self.alpha,
                    negatives=classes - 1 if self.negatives == "all" else 1,
                ),
                collaboration=self.collaboration,
                peer=Peer(self.peer, self.peer_momentum) if self.peer else None,
                state_name=self.state_name,
            )
        graph.drop_originals(read)
        return PassResult(graph, True)

    def _normalise(self, graph: JointGraph, hidden: Sequence[str]) -> list[fx.Node]:
        """Let the blocks behind each hidden boundary read it divided by its RMS; returns the boundaries."""
        raw = [boundary for block in hidden for boundary in graph.boundaries(block)]
        for boundary in raw:
            graph.map_value(boundary, graph.context.form(rms_normalise))
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

    # --- inputs ----------------------------------------------------------------------------------------------------

    def _negative_inputs(self, graph: JointGraph, x: fx.Node, y: fx.Node, classes: int) -> list[fx.Node]:
        """The inputs of the negative passes."""
        like = pass_info(graph, "neg")
        if self.negatives == "all":
            return self._one_input_each(
                graph, x, y, range(1, classes), lambda y, k: other_labels(y, classes, k), classes, "neg"
            )
        if callable(self.negatives):
            made = graph.splice(lambda x, y: self._users_negatives(x, y, classes), [x, y], like=like)
            if tuple(value(made).shape) != tuple(value(x).shape):
                raise RuleError(
                    f"negatives(x, y) gave samples of shape {tuple(value(made).shape)} for inputs of shape "
                    f"{tuple(value(x).shape)}",
                    remedy="return wrong labels shaped like y, or negative inputs shaped like x",
                )
            return [made]
        counter, stream = graph.counter(), graph.stream()
        if self._hybrid:
            return [
                graph.splice(
                    lambda x, counter: rms_normalise(hybrid_images(x, counter, stream, self.blurs)),
                    [x, counter],
                    like=like,
                )
            ]
        return [
            graph.splice(
                lambda x, y, counter: self._input(x, wrong_labels(y, classes, counter, stream), classes),
                [x, y, counter],
                like=like,
            )
        ]

    def _users_negatives(self, x: torch.Tensor, y: torch.Tensor, classes: int) -> torch.Tensor:
        assert callable(self.negatives)
        made = self.negatives(x, y)
        if made.is_floating_point():
            return rms_normalise(made)
        if tuple(made.shape) != tuple(y.shape):
            raise RuleError(
                f"negatives(x, y) gave labels of shape {tuple(made.shape)} for labels of shape {tuple(y.shape)}",
                remedy="return one wrong label per sample, or negative inputs shaped like x",
            )
        return self._input(x, checked_labels(made, classes), classes)

    def _one_input_each(
        self,
        graph: JointGraph,
        x: fx.Node,
        y: fx.Node,
        numbers: Sequence[int],
        labels: Callable[[torch.Tensor, int], torch.Tensor],
        classes: int,
        label: str,
    ) -> list[fx.Node]:
        """The input under `labels(y, k)` for each number k: as one large batch where possible, else one by one."""

        def make(x: torch.Tensor, y: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
            return torch.cat([self._input(x, labels(y, k), classes) for k in numbers])

        if not shares_batch(graph):
            return [graph.splice(lambda x, y: make(x, y, numbers), [x, y], like=pass_info(graph, label))]
        return [
            graph.splice(lambda x, y, k=k: make(x, y, [k]), [x, y], like=pass_info(graph, f"{label}{i or ''}"))
            for i, k in enumerate(numbers)
        ]

    def _input(self, x: torch.Tensor, y: torch.Tensor, classes: int) -> torch.Tensor:
        """The input of a pass: the code written in, then normalised as between blocks."""
        if self._hybrid:
            return rms_normalise(x)
        return self._coded(x, codes(y, classes, self.label_scale, x.dtype))

    def _neutral_input(self, x: torch.Tensor, classes: int) -> torch.Tensor:
        if self._hybrid:
            return rms_normalise(x)
        return self._coded(x, x.new_full((x.shape[0], classes), self.label_scale / classes))

    def _coded(self, x: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        return rms_normalise((self.embed or overlay)(x, code))

    # --- prediction ------------------------------------------------------------------------------------------------

    def rewrite_forward(self, graph: JointGraph) -> None:
        """The neutral pass and its read-out, or the goodness of every label."""
        x, classes = float_input(graph), class_count(graph, self.num_classes)
        hidden = [b.name for b in hidden_blocks(graph)]
        if self.readout == "goodness":
            inputs = self._one_input_each(graph, x, x, range(classes), lambda x, k: _every(x, k), classes, "read")
        else:
            inputs = [graph.splice(lambda x: self._neutral_input(x, classes), [x], like=pass_info(graph, "read"))]
        raw = self._normalise(graph, hidden)
        passes = run_passes(graph, x, inputs, "read")
        copies = passes[0]
        first_output = graph.model_outputs[0]
        if self.readout == "all":
            copies[first_output] = self._head(graph, [copies[boundary] for boundary in raw], classes, cut=False)
        elif self.readout == "goodness":
            together = self.collaboration != "none"
            scored = raw if together else raw[1:] or raw
            kind = self.goodness if together else "mean"
            copies[first_output] = self._total_goodness(graph, passes, scored, classes, kind)
        graph.set_outputs({spec: copies.get(node, node) for spec, node in graph.outputs.items()})
        graph.model_outputs = [copies.get(node, node) for node in graph.model_outputs]
        graph.sort()

    def block_answers(self, graph: JointGraph) -> dict[str, fx.Node]:
        """The goodness of every label, of each hidden block."""
        if self._hybrid:
            return {}
        x, classes = float_input(graph), class_count(graph, self.num_classes)
        hidden = [b.name for b in hidden_blocks(graph)]
        inputs = self._one_input_each(graph, x, x, range(classes), lambda x, k: _every(x, k), classes, "read")
        raw = self._normalise(graph, hidden)
        passes = run_passes(graph, x, inputs, "read")
        return {
            block: self._total_goodness(graph, passes, [n for n in raw if info(n).block == block], classes, "mean")
            for block in hidden
        }

    @staticmethod
    def _total_goodness(
        graph: JointGraph,
        passes: Sequence[dict[fx.Node, fx.Node]],
        boundaries: Sequence[fx.Node],
        classes: int,
        kind: str,
    ) -> fx.Node:
        """Sums or means of squares, summed over the boundaries, (batch, classes)."""
        goodness_of = mean_square if kind == "mean" else sum_of_squares

        def total(*values: torch.Tensor) -> torch.Tensor:
            goodness = torch.cat([goodness_of(v) for v in values])
            return goodness.reshape(len(boundaries), classes, -1).sum(0).t()

        like = NodeInfo(role=Role.FORWARD, block=LOSS_BLOCK, module="goodness", copy="read")
        answer: fx.Node = graph.splice(total, [copies[b] for b in boundaries for copies in passes], like=like)
        return answer

    def _head(self, graph: JointGraph, boundaries: list[fx.Node], classes: int, *, cut: bool) -> fx.Node:
        """A linear head, zero at first, on the normalised outputs of the hidden blocks but the first."""
        scored = boundaries[1:] or boundaries
        widths = [sample_width(b) for b in scored]
        weight = graph.add_state(
            self.state_name("readout.weight"),
            (fix(classes), sum(widths)),
            lambda tensor, _generator: tensor.zero_(),
            trainable=True,
        )

        def head(weight: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
            features = torch.cat([rms_normalise(v).flatten(1) for v in values], dim=1).to(weight.dtype)
            return F.linear(features, weight)

        like = NodeInfo(role=Role.FORWARD, block=LOSS_BLOCK, module="readout")
        node: fx.Node = graph.splice(head, [weight, *scored], like=like)
        if cut:
            for boundary in scored:
                graph.cut(boundary)
        return node


def _every(x: torch.Tensor, label: int) -> torch.Tensor:
    """The same label for each sample."""
    return torch.full((x.shape[0],), label, dtype=torch.int64, device=x.device)
