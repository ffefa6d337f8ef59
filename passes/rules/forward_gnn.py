"""ForwardGNN: graph networks whose layers learn from virtual class nodes, without a backward pass across layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from graphrewrite.passes.rules._boundary import names_of
from graphrewrite.passes.rules._forward_forward import (
    Contrast,
    Taught,
    in_single,
    known,
    pass_info,
    refuse_silent_blocks,
    sized_like,
    teach_goodness,
)
from graphrewrite.passes.rules._labels import NO_LABEL, checked_labels, codes, other_labels, overlay
from graphrewrite.passes.rules._local import (
    class_count,
    float_input,
    hidden_blocks,
    label_input,
    refuse_blocks_before,
    refuse_other_batches,
)
from torch import fx
from torch.nn import functional as F

from graphrewrite.errors import RuleError
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import LOSS_BLOCK, Loss, LossTerm, NodeInfo, Role, UserInput, fix, hint, info, value
from graphrewrite.pipeline import PassResult
from graphrewrite.rule import Rule


@dataclass(frozen=True)
class ForwardGNN(Rule):
    """Node classification on one graph: every layer, the last one included, learns from its own output.

    The model takes node features and `edge_index` (2, edges); the labels are one class per node, -100 for nodes that
    are not trained on. Features are divided by their L2 norm, node by node, in front of every layer, and no cotangent
    crosses from layer to layer.

    `"single"` (one forward pass): the graph gets one virtual node per class, with fixed random features, joined in
    both directions to the nodes of its class. Each layer classifies nodes by their products with the virtual nodes'
    outputs, and learns by cross-entropy. `"virtual"` (FF-VN): goodness; in the negative passes nodes are joined to
    the virtual node of another class. `"label"` (FF-LA): goodness; the label's code is written over the first
    features (give the inputs spare leading columns to append it), the neutral code where there is none.

    The labelled nodes are part of the graph: they are remembered from the last training step and used by `predict`,
    which is for the same nodes. An isolated extra node takes the edges of nodes without a label, so that shapes do
    not depend on how many there are.

    Args:
        method: See above.
        top_down: For `"single"`: how a layer sees those above it, as of the step before: `"none"`; `"loss"`: what is
            scored is the mean of its output and of the outputs above that are as wide; `"input"`: the normalised
            output of the next layer is added to its input, through a learned matrix (the paper concatenates it, for
            which a captured layer has no room).
        temperature: Divides the products.
        threshold: Theta of the goodness methods; goodness is the sum of squares, its mean in `predict`.
        num_classes: Default: the last dimension of the model's output.
    """

    method: Literal["single", "label", "virtual"] = "single"
    top_down: Literal["none", "loss", "input"] = "none"
    temperature: float = 1.0
    threshold: float = 2.0
    num_classes: int | None = None

    name = "forward_gnn"
    summary = "ForwardGNN: layers of a graph network learn from virtual class nodes"
    formula = "L_l = CE(H H_virtualᵀ / τ, y)"
    paper = "Park et al., Forward Learning of Graph Neural Networks, 2024"
    objective: ClassVar = "local"
    needs_loss = True
    changes_forward = True

    @property
    def learns_state(self) -> bool:  # type: ignore[override]
        """The matrices that read the layer above are learned state."""
        return self.top_down == "input"

    def requires(self, graph: JointGraph) -> None:
        """Node features, edges, one class per node, and two layers."""
        known("method", self.method, ("single", "label", "virtual"))
        known("top_down", self.top_down, ("none", "loss", "input"))
        if self.top_down != "none" and self.method != "single":
            raise RuleError(
                f"top_down={self.top_down!r} belongs to method='single', not {self.method!r}",
                remedy="use method='single', or no top-down signal",
            )
        x = float_input(graph)
        edge_input(graph)
        label_input(graph)
        class_count(graph, self.num_classes)
        if value(x).dim() != 2:
            raise RuleError(f"node features are (nodes, features), got {value(x).dim()} dimensions", node=x.name)
        hidden = hidden_blocks(graph)
        refuse_blocks_before(graph, hidden, self.name)
        refuse_silent_blocks(graph, [b.name for b in hidden])
        layers = _layers(graph)
        refuse_other_batches(layers, label_input(graph))
        widths = [fix(value(layer).shape[1]) for layer in layers]
        if self.top_down == "loss" and all(width not in widths[i + 1 :] for i, width in enumerate(widths)):
            raise RuleError(
                f"top_down='loss' averages a layer's output with those above that are as wide, and there is none: the "
                f"layers have {', '.join(map(str, widths))} features",
                remedy="use top_down='input', or layers of equal width",
            )

    # --- training --------------------------------------------------------------------------------------------------

    def run(self, graph: JointGraph) -> PassResult:
        """One pass over the augmented graph, or one positive and C - 1 negative ones; cut and taught."""
        classes = class_count(graph, self.num_classes)
        layers = _layers(graph)
        with graph.deferred():
            graph.drop_backward()
            like = pass_info(graph, "pos")
            y = graph.splice(lambda y: checked_labels(y, classes), [label_input(graph)], like=like)
            self._remember_labels(graph, y)
            labels = [y]
            if self.method != "single":
                labels += [
                    graph.splice(lambda y, k=k: other_labels(y, classes, k), [y], like=pass_info(graph, f"neg{k}"))
                    for k in range(1, classes)
                ]
            passes = [
                self._pass(graph, given, classes, layers, f"neg{k}" if k else "pos") for k, given in enumerate(labels)
            ]
            graph.move_updates(passes[0])
            graph.remove_outputs(Loss, LossTerm)
            if self.method == "single":
                self._teach_products(graph, layers, passes[0], y, classes)
            else:
                self._teach_goodness(graph, layers, passes, y)
        graph.prune()
        for copies in passes[:1]:
            graph.drop_originals(copies)
        return PassResult(graph, True)

    def _teach_products(
        self, graph: JointGraph, layers: Sequence[fx.Node], copies: dict[fx.Node, fx.Node], y: fx.Node, classes: int
    ) -> None:
        for i, layer in enumerate(layers):
            above = self._seen_above(graph, layers, copies, i) if self.top_down == "loss" else []

            def loss(y: torch.Tensor, h: torch.Tensor, *above: torch.Tensor) -> torch.Tensor:
                scored = torch.stack([h, *(a.to(h.dtype) for a in above)]).mean(0) if above else h
                logits = in_single(self._products(scored, y.shape[0], classes))
                return F.cross_entropy(logits, y, ignore_index=NO_LABEL)

            graph.teach(info(layer).block, loss, [y, copies[layer], *above])
            if self.top_down != "none" and i > 0:  # nobody looks down on the first layer
                self._stored(graph, layers, i)
                graph.update_state(
                    self._stored_name(layers, i), lambda old, h: h.detach().to(old.dtype, copy=True), [copies[layer]]
                )

    def _products(self, h: torch.Tensor, nodes: int, classes: int) -> torch.Tensor:
        return h[:nodes] @ h[nodes : nodes + classes].t() / self.temperature

    def _teach_goodness(
        self, graph: JointGraph, layers: Sequence[fx.Node], passes: Sequence[dict[fx.Node, fx.Node]], y: fx.Node
    ) -> None:
        def real(layer: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
            like = NodeInfo(role=Role.LOSS, block=info(layer).block, module=info(layer).block)
            node: fx.Node = graph.splice(lambda h, y: h[: y.shape[0]], [copies[layer], y], like=like)
            return node

        taught = [Taught(n, real(n, passes[0]), tuple(real(n, copies) for copies in passes[1:])) for n in layers]
        counted = graph.splice(lambda y: y >= 0, [y], like=pass_info(graph, "pos"))
        contrast = Contrast("sum", self.threshold, "hinton", 0.0, per_unit=False, negatives=len(passes) - 1)
        teach_goodness(graph, taught, counted, contrast)

    # --- passes ----------------------------------------------------------------------------------------------------

    def _pass(
        self, graph: JointGraph, y: fx.Node, classes: int, layers: Sequence[fx.Node], label: str
    ) -> dict[fx.Node, fx.Node]:
        """A forward pass with these labels in it, normalised and cut between the layers."""
        x, edges = float_input(graph), edge_input(graph)
        like = pass_info(graph, label)
        if self.method == "label":
            inputs = {x: graph.splice(lambda x, y: overlay(x, codes(y, classes, 1.0, x.dtype)), [x, y], like=like)}
        else:
            virtual = graph.add_state(
                self.state_name("virtual"),
                (classes, fix(value(x).shape[1])),
                lambda tensor, generator: tensor.normal_(generator=generator),
            )
            inputs = {
                x: graph.splice(
                    lambda x, virtual: torch.cat([x, virtual.to(x.dtype), x.new_zeros(1, x.shape[1])]),
                    [x, virtual],
                    like=like,
                ),
                edges: graph.splice(lambda e, y: join(e, y, classes), [edges, y], like=like),
            }
        ours: fx.Node = graph.splice(lambda x: F.normalize(x, dim=1), [inputs[x]], like=like)
        if self.top_down == "input":
            ours = graph.splice(_with_signal, [ours, *self._signal(graph, layers, 0, value(x))], like=like)
        copies = graph.clone_forward({**inputs, x: ours, **sized_like(graph, x, ours, label)}, label, loss=False)
        for i, layer in enumerate(layers[:-1]):
            given = self._signal(graph, layers, i + 1, value(layer)) if self.top_down == "input" else []
            graph.map_value(
                copies[layer],
                lambda h, *signal: _with_signal(F.normalize(h, dim=1), *signal),
                inputs=given,
            )
            graph.cut(copies[layer])
        return copies

    def _signal(self, graph: JointGraph, layers: Sequence[fx.Node], i: int, below: torch.Tensor) -> list[fx.Node]:
        """What layer i sees of the next one: its stored output, and the matrix that reads it; nothing for the top."""
        if i + 1 >= len(layers):
            return []
        stored = self._stored(graph, layers, i + 1)
        shape = (fix(below.shape[1]), fix(value(layers[i + 1]).shape[1]))
        name = self.state_name(f"top_down.{names_of(layers)[i]}")
        return [stored, graph.add_state(name, shape, lambda t, _g: t.zero_(), trainable=True)]

    def _seen_above(
        self, graph: JointGraph, layers: Sequence[fx.Node], copies: dict[fx.Node, fx.Node], i: int
    ) -> list[fx.Node]:
        """Stored outputs of the layers above that are as wide."""
        width = fix(value(copies[layers[i]]).shape[1])
        above = [k for k in range(i + 1, len(layers)) if fix(value(layers[k]).shape[1]) == width]
        return [self._stored(graph, layers, k) for k in above]

    def _stored_name(self, layers: Sequence[fx.Node], i: int) -> str:
        return self.state_name(f"stored.{names_of(layers)[i]}")

    def _stored(self, graph: JointGraph, layers: Sequence[fx.Node], i: int) -> fx.Node:
        """A layer's output of the step before, virtual nodes and all; zero at first."""
        rows = fix(value(float_input(graph)).shape[0]) + class_count(graph, self.num_classes) + 1
        shape = (rows, fix(value(layers[i]).shape[1]))
        return graph.add_state(self._stored_name(layers, i), shape, lambda t, _g: t.zero_())

    def _labels(self, graph: JointGraph) -> fx.Node:
        nodes = fix(value(float_input(graph)).shape[0])
        return graph.add_state(self.state_name("labels"), (nodes,), lambda t, _g: t.fill_(NO_LABEL), dtype=torch.int64)

    def _remember_labels(self, graph: JointGraph, y: fx.Node) -> None:
        state = self._labels(graph)
        if value(y).shape[0] != value(state).shape[0]:
            raise RuleError(
                f"{hint(value(y).shape[0])} labels for {value(state).shape[0]} nodes",
                remedy=f"give every node a label, {NO_LABEL} to those that are not trained on",
            )
        graph.update_state(self.state_name("labels"), lambda _old, y: y.clone(), [y])

    # --- prediction ------------------------------------------------------------------------------------------------

    def rewrite_forward(self, graph: JointGraph) -> None:
        """Summed softmax over the layers, or the goodness of every class for the nodes without a label."""
        classes, layers, x = class_count(graph, self.num_classes), _layers(graph), float_input(graph)
        y = self._labels(graph)
        like = NodeInfo(role=Role.FORWARD, block=LOSS_BLOCK, module="readout", copy="read")
        if self.method == "single":
            answers = self._answers_of_layers(graph, y, layers, classes)
            answer = graph.splice(lambda *scores: torch.stack(scores).sum(0), answers, like=like)
        else:
            answer = self._goodness_of_classes(graph, x, y, layers, classes, like)
        first = graph.model_outputs[0]
        graph.set_outputs({spec: answer if node is first else node for spec, node in graph.outputs.items()})
        graph.model_outputs = [answer if node is first else node for node in graph.model_outputs]
        graph.sort()

    def block_answers(self, graph: JointGraph) -> dict[str, fx.Node]:
        """For the method without negatives: the softmax over a layer's products with the virtual nodes."""
        if self.method != "single":
            return {}
        layers = _layers(graph)
        answers = self._answers_of_layers(graph, self._labels(graph), layers, class_count(graph, self.num_classes))
        return dict(zip((info(layer).block for layer in layers), answers, strict=True))

    def _answers_of_layers(
        self, graph: JointGraph, y: fx.Node, layers: Sequence[fx.Node], classes: int
    ) -> list[fx.Node]:
        copies, x = self._pass(graph, y, classes, layers, "read"), float_input(graph)

        def scores(x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
            return self._products(h, x.shape[0], classes).softmax(1)

        return [graph.splice(scores, [x, copies[layer]], like=info(copies[layer])) for layer in layers]

    def _goodness_of_classes(
        self, graph: JointGraph, x: fx.Node, y: fx.Node, layers: Sequence[fx.Node], classes: int, like: NodeInfo
    ) -> fx.Node:
        outputs = []
        for c in range(classes):
            label = f"read{c}"
            given = graph.splice(lambda y, c=c: torch.where(y == NO_LABEL, c, y), [y], like=pass_info(graph, label))
            copies = self._pass(graph, given, classes, layers, label)
            outputs += [copies[layer] for layer in layers]

        def total(x: torch.Tensor, y: torch.Tensor, *outputs: torch.Tensor) -> torch.Tensor:
            goodness = [h[: x.shape[0]].square().mean(1) - self.threshold for h in outputs]
            scores = torch.stack(goodness).reshape(classes, len(layers), -1).sum(1).t()
            # a known label is known
            return torch.where((y == NO_LABEL).unsqueeze(1), scores, codes(y, classes, 1.0, scores.dtype))

        answer: fx.Node = graph.splice(total, [x, y, *outputs], like=like)
        return answer


def edge_input(graph: JointGraph) -> fx.Node:
    """The model's `edge_index`: an integer input of shape (2, edges)."""
    for spec, node in graph.inputs.items():
        val = value(node)
        if not isinstance(spec, UserInput) or not isinstance(val, torch.Tensor):
            continue
        if val.dtype == torch.int64 and val.dim() == 2 and hint(val.shape[0]) == 2:
            return node
    raise RuleError(
        "forward_gnn adds nodes and edges to a graph, and the model has no input edge_index of shape (2, edges)",
        remedy="pass the edges as an int64 tensor, or use another rule",
    )


def join(edge_index: torch.Tensor, y: torch.Tensor, classes: int) -> torch.Tensor:
    """The edges, and two between every node with a label and the virtual node of its class.

    Nodes 0 to n - 1 are the graph's own, n + c is class c, n + classes an isolated one, whose self loops stand for
    the edges of nodes without a label.
    """
    nodes = torch.arange(y.shape[0], device=y.device)
    nobody = y.shape[0] + classes
    ours = torch.where(y >= 0, nodes, nobody)
    theirs = torch.where(y >= 0, y.shape[0] + y, nobody)
    return torch.cat([edge_index, torch.stack([ours, theirs]), torch.stack([theirs, ours])], dim=1)


def _with_signal(h: torch.Tensor, *signal: torch.Tensor) -> torch.Tensor:
    if not signal:
        return h
    stored, weight = signal
    return h + F.linear(F.normalize(stored, dim=1), weight).to(h.dtype)


def _layers(graph: JointGraph) -> list[fx.Node]:
    """Outputs of the hidden blocks and of the model."""
    return [*(n for block in hidden_blocks(graph) for n in graph.boundaries(block.name)), graph.model_outputs[0]]
