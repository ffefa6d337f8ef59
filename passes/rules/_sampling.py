"""Sampled one-hot vectors and quantisers, found on the graph, and a stand-in whose derivative a pass chooses."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphrewrite.errors import RuleError
from graphrewrite.graph.aliasing import is_view
from graphrewrite.graph.differentiate import seed_outputs
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import ancestors, info, is_backward, is_float, is_getitem, value
from graphrewrite.graph.ops import is_random
from graphrewrite.pipeline import PassResult
from graphrewrite.rule import Rule, select

aten = torch.ops.aten

QUANTISERS = frozenset(
    {
        aten.sign.default,
        aten.sgn.default,
        aten.round.default,
        aten.round.decimals,
        aten.floor.default,
        aten.ceil.default,
        aten.trunc.default,
    }
)
"""Step functions with a float result: their own derivative is zero."""

_COMPARISONS = frozenset({aten.gt.Scalar, aten.ge.Scalar, aten.lt.Scalar, aten.le.Scalar})
_FALLING = frozenset({aten.lt.Scalar, aten.le.Scalar})
_MONOTONE = frozenset({aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default})
_CASTS = frozenset({aten._to_copy.default, aten.clone.default, aten.detach.default, aten.contiguous.default})
_SCALED = frozenset({aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar})


class NotFoundError(Exception):
    """A candidate is no sampled one-hot vector, for a reason."""


@dataclass(frozen=True)
class OneHot:
    """A one-hot vector drawn from, or chosen by, logits.

    Attributes:
        sample: The one-hot vectors.
        read: What the model reads: `sample`, or the sum in which `gumbel_softmax(hard=True)` hides it.
        logits: What the choice was made by, without noise and temperature.
        random: Whether noise was added or a multinomial drawn: else it is the arg max.
    """

    sample: fx.Node
    read: fx.Node
    logits: fx.Node
    random: bool


def find_one_hots(graph: JointGraph, fail: Callable[[str, fx.Node], None]) -> list[OneHot]:
    """All one-hot vectors of the forward; `fail(reason, node)` for those whose logits are not found."""
    found = []
    for node in graph.forward_nodes():
        index = _index_of(node)
        if index is None or info(node).copy:
            continue
        try:
            found.append(_trace(graph, node, index))
        except NotFoundError as error:
            fail(str(error), node)
    return found


def _index_of(node: fx.Node) -> fx.Node | None:
    """The index behind a one-hot vector: of `one_hot`, or of a one scattered into zeros."""
    if node.target is aten.one_hot.default:
        return node.args[0]  # type: ignore[return-value]
    if node.target is aten.scatter.value and node.args[3] in (1, 1.0, True):
        zeros = node.args[0]
        if isinstance(zeros, fx.Node) and zeros.target in (
            aten.zeros_like.default,
            aten.zeros.default,
            aten.new_zeros.default,
        ):
            return node.args[2]  # type: ignore[return-value]
    return None


def _trace(graph: JointGraph, node: fx.Node, index: fx.Node) -> OneHot:
    sampler, dim = _sampler(index)
    source = sampler.args[0]
    assert isinstance(source, fx.Node)
    if sampler.target is aten.multinomial.default:
        logits, drawn = _logits_of_probabilities(source), True
    else:
        logits, drawn = _without_noise(graph, source)
    sample = node
    while not is_float(sample) and len(sample.users) == 1 and next(iter(sample.users)).target in _CASTS:
        sample = next(iter(sample.users))
    if not is_float(sample):
        raise NotFoundError("the one-hot vector is never cast to floating point")
    dims = value(logits).dim()
    if tuple(value(sample).shape) != tuple(value(logits).shape) or dim not in (-1, dims - 1):
        raise NotFoundError("the categories are not the last dimension of both the logits and the one-hot vector")
    assert graph.backward is not None
    if not graph.backward.requires_grad(logits):
        raise NotFoundError("the logits do not depend on a parameter")
    return OneHot(sample, _read_by_model(sample), logits, drawn)


def _sampler(index: fx.Node) -> tuple[fx.Node, int]:
    """The operator that chose the index, and over which dimension."""
    node = index
    while is_view(node) or node.target in _CASTS or is_getitem(node):
        if is_getitem(node) and node.args[1] != 1:
            break
        node = node.args[0]  # type: ignore[assignment]
    args = [*node.args, *([None] * 3)]
    if node.target is aten.multinomial.default:
        if args[1] != 1:
            raise NotFoundError("the multinomial draws several categories")
        return node, -1
    if node.target in (aten.argmax.default, aten.max.dim):
        dim = args[1] if args[1] is not None else node.kwargs.get("dim")
        if dim is None:
            raise NotFoundError("the arg max is over all dimensions")
        assert isinstance(dim, int)
        return node, dim
    raise NotFoundError(f"its index comes from {node.target}, which is no argmax, max or multinomial")


def _logits_of_probabilities(node: fx.Node) -> fx.Node:
    while is_view(node):
        node = node.args[0]  # type: ignore[assignment]
    if node.target in (aten.softmax.int, aten._softmax.default):
        return node.args[0]  # type: ignore[return-value]
    raise NotFoundError("the probabilities of the multinomial are no softmax of logits")


def _without_noise(graph: JointGraph, node: fx.Node) -> tuple[fx.Node, bool]:
    """The logits behind softmax, temperature and noise; none of them changes the order of noiseless logits."""
    table = graph.backward
    assert table is not None
    while True:
        if node.target in _MONOTONE or (node.target in _SCALED and not isinstance(node.args[1], fx.Node)):
            node = node.args[0]  # type: ignore[assignment]
        elif node.target is aten.add.Tensor:
            left, right = (a if isinstance(a, fx.Node) else None for a in node.args[:2])
            if left is None or right is None:
                return node, False
            if not table.requires_grad(right) and _draws(right):
                return left, True
            if not table.requires_grad(left) and _draws(left):
                return right, True
            return node, False
        else:
            return node, False


def _draws(node: fx.Node) -> bool:
    """Whether a value is made of random numbers."""
    return any(is_random(source) for source in ancestors([node]))


def _read_by_model(sample: fx.Node) -> fx.Node:
    """`sample - soft.detach() + soft`: the model reads the sum, in value the sample."""
    users = [u for u in sample.users if not is_backward(u)]
    if len(users) != 1 or users[0].target is not aten.sub.Tensor or users[0].args[0] is not sample:
        return sample
    detached = users[0].args[1]
    sums = [u for u in users[0].users if u.target is aten.add.Tensor and not is_backward(u)]
    if not isinstance(detached, fx.Node) or detached.target is not aten.detach.default or len(sums) != 1:
        return sample
    return sums[0] if detached.args[0] in sums[0].args else sample


@dataclass(frozen=True)
class Step:
    """A step function of a float: a quantiser, or a comparison with a number that is cast to float.

    Attributes:
        result: Its float value.
        argument: What it is a function of.
        own: Whether `result` is one operator of `argument`, whose derivative is there to be replaced.
        sign: -1 where the step falls.
    """

    result: fx.Node
    argument: fx.Node
    own: bool
    sign: int


def find_steps(graph: JointGraph, fail: Callable[[str, fx.Node], None]) -> list[Step]:
    """All step functions of the forward whose argument depends on a parameter."""
    table = graph.backward
    assert table is not None
    found = []
    for node in graph.forward_nodes():
        argument = node.args[0] if node.args else None
        if info(node).copy or not isinstance(argument, fx.Node) or node.target not in QUANTISERS | _COMPARISONS:
            continue
        if not is_float(argument) or not table.requires_grad(argument):
            fail("its argument does not depend on a parameter", node)
        elif node.target in QUANTISERS:
            if graph.cotangent(node) is None:
                fail("no cotangent reaches it: it is detached, or straight through already", node)
            else:
                found.append(Step(node, argument, True, 1))
        else:
            casts = [u for u in node.users if u.target is aten._to_copy.default and is_float(u)]
            if len(casts) != 1 or len([u for u in node.users if not is_backward(u)]) != 1:
                fail("the comparison is no number: it is not cast to floating point", node)
            else:
                found.append(Step(casts[0], argument, False, -1 if node.target in _FALLING else 1))
    return found


def stand_in(graph: JointGraph, read: fx.Node, argument: fx.Node) -> fx.Node | None:
    """Let consumers of `read` read an equal value that depends differentiably on `argument` alone.

    The new operator is `where(true, read, argument)`: its value is `read`'s, bit by bit, and its derivative is
    there to be replaced (`replace_vjp`).

    Returns:
        The new value; None if nothing in the forward reads `read`.
    """
    consumers = [u for u in read.users if u.op == "call_function" and not is_backward(u)]
    if not consumers:
        return None
    if read in graph.model_outputs:
        raise RuleError(
            f"the model returns {read.name}, whose derivative is to be replaced",
            node=read.name,
            module=info(read).module,
            remedy="return it detached, or return a copy",
        )

    def same(held: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.ones_like(by, dtype=torch.bool), held.detach(), by)

    return graph.map_value(read, same, consumers=consumers, inputs=[argument], block=info(read).block)


@dataclass(frozen=True)
class SampleDerivative(Rule):
    """Common part of the passes that give samples a derivative.

    A rule and a pass at once: as a rule it is backpropagation with the samples' derivatives in place, in the blocks
    assigned to it; as a pass it does the same in the whole graph, in front of any rule.

    Args:
        tau: Temperature of the derivative's softmax; the one the model samples with has nothing to do with it.
        only: Globs of module paths: leave samples of other modules alone.
        skip: Globs of module paths whose samples are left alone.
    """

    tau: float = 1.0
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    before_rules: ClassVar[bool] = True

    @abstractmethod
    def rewrite(self, graph: JointGraph, wanted: Callable[[fx.Node], bool]) -> int:
        """Replace derivatives where `wanted(node)`; returns of how many samples."""

    def run(self, graph: JointGraph) -> PassResult:
        """Find the samples and replace their derivatives."""
        assert graph.backward is not None
        if not graph.backward.seeded:
            return PassResult(graph, False)
        blocks = {block.name for block in graph.rule_blocks()}
        paths = {info(n).module for n in graph.forward_nodes()}
        modules = set(select(sorted(paths), self.only, self.skip))
        with graph.deferred():
            count = self.rewrite(graph, lambda node: info(node).block in blocks and info(node).module in modules)
        seed_outputs(graph)
        if not count:
            self.fail(graph, "found nothing to give a derivative to")
            reasons = "; ".join(text for made_by, _, text in graph.log.entries if made_by == self.name)
            warnings.warn(f"{self.name} changes nothing in this model: {reasons}", stacklevel=2)
        return PassResult(graph, count > 0)

    def replace_one_hots(
        self,
        graph: JointGraph,
        wanted: Callable[[fx.Node], bool],
        derivative: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        *,
        sampled_only: bool,
    ) -> int:
        """Let `derivative(logits, sample, cotangent)` be what comes back from each one-hot vector to its logits."""
        count = 0
        for one in find_one_hots(graph, lambda text, node: self.fail(graph, text, node)):
            if not wanted(one.sample):
                continue
            if sampled_only and not one.random:
                self.fail(graph, "an arg max without noise is no sample", one.sample)
                continue

            def bwd(residuals: tuple[torch.Tensor, ...], cotangent: torch.Tensor) -> torch.Tensor:
                logits, sample = residuals
                return derivative(logits, sample, cotangent).to(logits.dtype)

            if self._replace(graph, one.read, one.logits, bwd, [one.logits, one.sample]):
                count += 1
        return count

    def _replace(
        self,
        graph: JointGraph,
        read: fx.Node,
        argument: fx.Node,
        bwd: Callable[..., torch.Tensor],
        residuals: Sequence[fx.Node],
    ) -> bool:
        made = stand_in(graph, read, argument)
        if made is None:
            self.fail(graph, "nothing reads it", read)
            return False
        graph.replace_vjp(made, bwd, residuals=residuals)
        return True


def softmax_vjp(probabilities: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
    """J(p) g with J(p) = diag(p) - p p^T."""
    weighted = probabilities * cotangent
    return weighted - probabilities * weighted.sum(-1, keepdim=True)
