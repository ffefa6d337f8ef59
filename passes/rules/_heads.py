"""Local heads: one mechanism for every rule whose blocks learn through a head of their own.

A head is a small object: `init` names its weights, `forward` reads the block's output, `loss` judges what comes out.
`HeadRule` cuts the blocks from each other, puts a head on every boundary of every hidden block and lets the block that
computes the model's answer learn by the task loss.

A head of one's own takes five lines:

    class Probe(Head):
        def init(self, site):
            return {"weight": Weight((site.width, site.features()), normal(0.1))}

        def forward(self, site, weights, h):
            return site.answer(site.pooled(h) @ weights["weight"].t())
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from graphrewrite.passes.rules._boundary import names_of
from graphrewrite.passes.rules._local import hidden_blocks, refuse_blocks_before
from graphrewrite.passes.rules._site import Site, Teacher, answer_of, answer_of_forward
from torch import fx

from graphrewrite.errors import RuleError
from graphrewrite.graph.core import Block
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import LOSS_BLOCK, NodeInfo, Param, Role, Target, fix, info, spec_of, value
from graphrewrite.objective import default_loss
from graphrewrite.pipeline import PassResult
from graphrewrite.rule import Rule

Fill = Callable[[torch.Tensor, torch.Generator], Any]
Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Weight:
    """One tensor of a head: its shape, how it starts, and whether it learns."""

    shape: tuple[int, ...]
    fill: Fill
    trainable: bool = True


def zeros(tensor: torch.Tensor, _generator: torch.Generator) -> torch.Tensor:
    """Start at zero."""
    return tensor.zero_()


def ones(tensor: torch.Tensor, _generator: torch.Generator) -> torch.Tensor:
    """Start at one."""
    return tensor.fill_(1.0)


def normal(std: float) -> Fill:
    """Start from N(0, std^2)."""
    return lambda tensor, generator: tensor.normal_(0.0, std, generator=generator)


def uniform(bound: float) -> Fill:
    """Start from U[-bound, bound)."""
    return lambda tensor, generator: tensor.uniform_(-bound, bound, generator=generator)


@dataclass(frozen=True)
class Head:
    """A local objective on a boundary. Subclasses give `init` and `forward`; `loss` is the compile's own loss.

    Class attributes:
        learns: Whether a head has weights that learn.
        answers: Whether `forward` returns an answer of the model's kind, so that answers can be summed.
    """

    learns: ClassVar[bool] = True
    answers: ClassVar[bool] = True

    def read(self, graph: JointGraph, rule: Rule, name: str, boundary: fx.Node, hidden: Sequence[Block]) -> fx.Node:
        """The value that the head reads; a head may put operators of the graph behind the boundary."""
        del graph, rule, name, hidden
        return boundary

    def init(self, site: Site) -> Mapping[str, Weight]:
        """The head's weights by name."""
        raise RuleError(f"head {type(self).__name__} defines no init(site)", remedy="return {name: Weight(...)}")

    def forward(self, site: Site, weights: Weights, h: torch.Tensor) -> Any:
        """What the head makes of a block's output."""
        raise RuleError(f"head {type(self).__name__} defines no forward(site, weights, h)")

    def loss(self, outputs: Any, teacher: Teacher) -> torch.Tensor:
        """A scalar, the mean over the batch; default: the compile's loss."""
        return teacher.task(outputs)

    def answer(self, outputs: Any) -> Any:
        """The answer of the model's kind within what `forward` returns; None if there is none."""
        return outputs if self.answers else None


Share = Literal["none", "heads", "unembedding"]


@dataclass(frozen=True)
class HeadRule(Rule):
    """Base of the rules whose blocks learn through heads.

    Args:
        share: `"none"`: every head has weights of its own; `"heads"`: heads on boundaries of the same width share them;
            `"unembedding"`: the weight of every head is the matrix with which the model itself makes its answer
            (language models), which then learns from all of them.
        predict: What `compiled.predict` gives: `"last"`: the answer of the last block; `"sum"`: the sum of the
            answers of all heads and of the last block.
    """

    share: Share = "none"
    predict: Literal["last", "sum"] = "last"

    objective: ClassVar = "local"
    needs_loss = True

    def make_head(self) -> Head:
        """The head of this rule."""
        raise RuleError(f"{type(self).__name__} defines no make_head()")

    @property
    def learns_state(self) -> bool:  # type: ignore[override]
        """Heads with weights that learn are learned state."""
        return self.make_head().learns and self.share != "unembedding"

    @property
    def changes_forward(self) -> bool:  # type: ignore[override]
        """Summed answers are another forward than the model's own."""
        return self.predict == "sum"

    def requires(self, graph: JointGraph) -> None:
        """A loss over one output, a hidden block, and known options."""
        if self.share not in ("none", "heads", "unembedding"):
            raise RuleError(f"share={self.share!r} is unknown", remedy="use 'none', 'heads' or 'unembedding'")
        if self.predict not in ("last", "sum"):
            raise RuleError(f"predict={self.predict!r} is unknown", remedy="use 'last' or 'sum'")
        if not graph.has_loss:
            raise RuleError(
                f"{self.name} needs the targets in the graph",
                remedy="train with compiled.loss(x, y), give example_targets",
            )
        if self.predict == "sum":
            self._require_answers(self.make_head())
            if answer_of(graph).node is not answer_of_forward(graph).node:
                raise RuleError(
                    f"{self.name}{{predict=sum}} sums answers of the first output, the loss reads another one",
                    remedy="return the answer first, or use predict='last'",
                )
        refuse_blocks_before(graph, hidden_blocks(graph, {answer_of(graph).block}), self.name)

    def _require_answers(self, head: Head) -> None:
        if not head.answers:
            raise RuleError(
                f"head {type(head).__name__} gives no answer that could be summed", remedy="use predict='last'"
            )

    def run(self, graph: JointGraph) -> PassResult:
        """Cut every boundary, and teach every hidden block."""
        answer, head = answer_of(graph), self.make_head()
        hidden = hidden_blocks(graph, {answer.block})
        targets = _targets(graph)
        if graph.context.loss is default_loss and value(answer.node).dim() > 1:
            graph.context.label_classes = fix(value(answer.node).shape[-1])
        with graph.deferred():
            for block in graph.rule_blocks():
                last = block.name == answer.block
                for boundary in graph.boundaries(block.name):
                    graph.cut(boundary, graph.crossing(boundary, loss=not last))
            for block in hidden:
                boundaries = graph.boundaries(block.name)
                if not boundaries:
                    _refuse_blind(graph, block.name)
                    continue
                placed = [
                    self._place(graph, head, name, boundary, answer.node, hidden)
                    for name, boundary in zip(names_of(boundaries), boundaries, strict=True)
                ]
                self._teach(graph, head, block.name, placed, targets)
        return PassResult(graph, True)

    def _place(
        self, graph: JointGraph, head: Head, name: str, boundary: fx.Node, answer: fx.Node, hidden: Sequence[Block]
    ) -> _Placed:
        """A head on a boundary: its site, what it reads, its weights."""
        site = Site.at(head.read(graph, self, name, boundary, hidden), answer, name)
        weights: dict[str, fx.Node] = {}
        wanted = head.init(site)
        if self.share == "unembedding" and "weight" not in wanted:
            raise RuleError(
                f"head {type(head).__name__} has no matrix that the model's unembedding could stand for",
                remedy="use head=pred, or share='heads'",
            )
        for key, weight in wanted.items():
            if self.share == "unembedding" and key == "weight":
                weights[key] = _unembedding(graph, answer, weight.shape, site)
                continue
            weights[key] = graph.add_state(
                self.state_name(f"head.{'shared' if self.share != 'none' else name}.{key}"),
                weight.shape,
                weight.fill,
                trainable=weight.trainable,
            )
        return _Placed(site, weights)

    def _teach(
        self, graph: JointGraph, head: Head, block: str, placed: Sequence[_Placed], targets: Sequence[fx.Node]
    ) -> None:
        """One loss for a block: the sum over the heads on its boundaries."""
        context = graph.context
        inputs = [node for one in placed for node in one.nodes]

        def local_loss(*values: torch.Tensor) -> torch.Tensor:
            teacher_values = values[len(inputs) :]
            given, total = iter(values), None
            for one in placed:
                outputs = one.run(head, given)
                found = head.loss(outputs, Teacher(one.site, context, teacher_values))
                total = found if total is None else total + found
            assert total is not None
            return total

        graph.teach(block, local_loss, [*inputs, *targets], module=f"head.{block}")

    def _placed(self, graph: JointGraph, head: Head) -> list[tuple[str, _Placed]]:
        """The heads in a forward graph, with the blocks they read."""
        answer = answer_of_forward(graph)
        hidden = hidden_blocks(graph, {answer.block})
        return [
            (block.name, self._place(graph, head, name, boundary, answer.node, hidden))
            for block in hidden
            for boundaries in [graph.boundaries(block.name)]
            for name, boundary in zip(names_of(boundaries), boundaries, strict=True)
        ]

    def block_answers(self, graph: JointGraph) -> dict[str, fx.Node]:
        """What the heads answer, summed over the boundaries of a block, and the model's own output."""
        head, last = self.make_head(), answer_of_forward(graph)
        by_block: dict[str, list[_Placed]] = {}
        for block, one in self._placed(graph, head):
            by_block.setdefault(block, []).append(one)
        found = {}
        for block, placed in by_block.items():

            def total(*values: torch.Tensor, placed: Sequence[_Placed] = placed) -> torch.Tensor:
                given = iter(values)
                answers = [head.answer(one.run(head, given)) for one in placed]
                if answers[0] is None:
                    raise RuleError(
                        f"head {type(head).__name__} gives no answer of the model's kind",
                        remedy="use a head that predicts: pred, predsim, dgl, aug_local",
                    )
                return torch.stack(answers).sum(0)

            like = NodeInfo(role=Role.FORWARD, block=block, module=f"head.{block}")
            found[block] = graph.splice(total, [n for one in placed for n in one.nodes], like=like)
        return {**found, last.block: last.node}

    def rewrite_forward(self, graph: JointGraph) -> None:
        """Add the answers of all heads to that of the last block."""
        if self.predict != "sum":
            return
        head, answer = self.make_head(), answer_of_forward(graph)
        self._require_answers(head)
        placed = [one for _, one in self._placed(graph, head)]

        def total(answer: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
            given = iter(values)
            for one in placed:
                answer = answer + one.run(head, given).to(answer.dtype)
            return answer

        like = NodeInfo(role=Role.FORWARD, block=LOSS_BLOCK, module="heads")
        new = graph.splice(total, [answer.node, *(n for one in placed for n in one.nodes)], like=like)
        graph.set_outputs({spec: new if n is answer.node else n for spec, n in graph.outputs.items()})
        graph.model_outputs = [new if n is answer.node else n for n in graph.model_outputs]
        graph.sort()


@dataclass(frozen=True)
class _Placed:
    site: Site
    weights: Mapping[str, fx.Node]

    @property
    def nodes(self) -> list[fx.Node]:
        return [self.site.node, *self.weights.values()]

    def run(self, head: Head, given: Any) -> Any:
        """The head on the next values: the boundary's, then its weights'."""
        h = next(given)
        weights = {key: next(given) for key in self.weights}
        dtype = next((w.dtype for w in weights.values()), h.dtype)
        try:
            return head.forward(self.site, weights, h if h.dtype == dtype else h.to(dtype))
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            raise RuleError(
                f"head {type(head).__name__} does not fit the output of {self.site.name}, "
                f"({', '.join(map(str, self.site.shape))}): {error}",
                node=self.site.node.name,
                module=self.site.name,
                remedy="size its weights by site.features(), site.channels and site.width",
            ) from error


def _targets(graph: JointGraph) -> list[fx.Node]:
    found = {spec.index: node for spec, node in graph.inputs.items() if isinstance(spec, Target)}
    return [found[index] for index in sorted(found)]


def _refuse_blind(graph: JointGraph, block: str) -> None:
    """A block that hands on integers only has parameters that no head can reach."""
    for node in graph.forward_nodes():
        own = info(node)
        if own.block != block or own.role is not Role.FORWARD:
            continue
        if any(source in graph.leaves for source in node.all_input_nodes):
            raise RuleError(
                f"block {block} has parameters but no differentiable floating-point output for a head to read",
                node=node.name,
                module=own.module,
                remedy="choose blocks (blocks=) whose outputs are activations, or freeze its parameters",
            )


def _unembedding(graph: JointGraph, answer: fx.Node, shape: tuple[int, ...], site: Site) -> fx.Node:
    """The matrix with which the model makes its answer."""
    node = answer
    while node.op == "call_function" and node.target is not torch.ops.aten.linear.default:
        source = next((n for n in node.all_input_nodes if isinstance(value(n), torch.Tensor)), None)
        if source is None:
            break
        node = source
    weight = node.args[1] if node.op == "call_function" and node.target is torch.ops.aten.linear.default else None
    if not isinstance(weight, fx.Node) or not isinstance(spec_of(weight), Param):
        raise RuleError(
            "share='unembedding' needs a model whose answer is a linear map of its last hidden state",
            node=answer.name,
            module=info(answer).module,
            remedy="use share='heads'",
        )
    if tuple(value(weight).shape) != tuple(shape):
        raise RuleError(
            f"the unembedding has shape {tuple(value(weight).shape)}, the head of {site.name} needs {tuple(shape)}",
            module=site.name,
            remedy="use share='none', or choose blocks of the model's width",
        )
    return weight
