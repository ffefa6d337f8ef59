"""Zeroth-order training: gradients from loss values at perturbed weights, without any backward."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from graphrewrite.passes.rules._feedback_weights import same_on_all_ranks
from graphrewrite.passes.rules._replay import Replay, refuse_empty_batch, task_loss, trained_leaves
from torch import fx

from graphrewrite import random
from graphrewrite.errors import RuleError
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.loop import labelled
from graphrewrite.graph.nodes import LOSS_BLOCK, NodeInfo, Role, ancestors, fix, info, is_float, spec_of, value
from graphrewrite.pipeline import PassResult
from graphrewrite.rule import Rule

WORTH_A_WARNING = 1000.0
"""Predicted variance, relative to the squared gradient, from which on a warning names it."""

_LOSSES = NodeInfo(role=Role.SIGNAL, block=LOSS_BLOCK, stage="forward")


@dataclass(frozen=True)
class ZerothOrder(Rule):
    """Replace the gradients of this rule's blocks by differences of the task loss at perturbed weights.

    `"spsa"` and `"stein"`: G = 1/K sum_k c_k z_k with random directions z_k over all weights at once and

        central:  c = (L(w + eps z) - L(w - eps z)) / 2 eps     (MeZO; the default of spsa)
        forward:  c = (L(w + eps z) - L(w)) / eps               (BAFFLE; the default of stein)
        single:   c = L(w + eps z) / eps                        (one evaluation; a much larger variance)

    The K queries are one loop of the graph. It keeps K numbers; the directions are drawn again, from (seed, step,
    rank, parameter), where the gradient is formed: no activation is held between blocks, nor between forward and
    backward. The relative variance is (d + 1) / K for normal directions, (d - 1) / K for signs, d weights in all.

    `"coordinate"`: one weight after the other, G_i = (L(w + eps e_i) - L(w)) / eps, or the central difference. For
    each parameter there is one loop over its coordinates, which starts at the operator that reads the parameter: what
    lies before it is computed once (common-prefix reuse). With `sparsity`, coordinates of each parameter are left out,
    others in every step; their gradient is zero. Which ones is random, or, with `mask="salient"`, in half of the
    queries those whose differences were largest when they were last asked for, and random in the other half.

    The loss that is returned is that of the unperturbed weights, whose pass alone updates batch-norm statistics; every
    pass normalises by its own batch statistics. Dropout draws one mask per step, which all passes share.
    `compiled.zo_step` updates the weights in place instead, without the unperturbed pass and without `.grad`.

    Args:
        method: See above.
        scale: eps.
        queries: K; default: 1 for spsa, 32 for stein.
        difference: See above; coordinate takes `"forward"` (the default there) or `"central"`.
        distribution: `"normal"`, or `"sign"` for -1 and 1.
        sparsity: Share of the coordinates of each parameter that coordinate leaves out.
        mask: See above: `"random"` or `"salient"`. The saliency is a running mean of |G_i|, made of the queries of
            earlier steps: it costs none of its own, and as much state as there are weights.
        shared: The same directions on all ranks of a distributed run, instead of their own on each.
    """

    method: Literal["spsa", "coordinate", "stein"] = "spsa"
    scale: float = 1e-3
    queries: int | None = None
    difference: Literal["central", "forward", "single"] | None = None
    distribution: Literal["normal", "sign"] = "normal"
    sparsity: float = 0.0
    mask: Literal["random", "salient"] = "random"
    shared: bool = False

    name = "zeroth_order"
    summary = "zeroth order: differences of the loss at perturbed weights (SPSA, coordinate-wise, Stein)"
    formula = "G = 1/K Σ_k c_k z_k,  c = (L(w + εz) − L(w − εz)) / 2ε"
    paper = (
        "Spall, SPSA, 1992; Malladi et al., Fine-tuning language models with just forward passes (MeZO), 2023; Chen et "
        "al., DeepZero, 2024; Feng et al., BAFFLE, 2023"
    )
    needs_loss = True

    # --- options ---------------------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """K."""
        return self.queries if self.queries is not None else (32 if self.method == "stein" else 1)

    @property
    def kind(self) -> str:
        """How losses are compared."""
        return self.difference or ("central" if self.method == "spsa" else "forward")

    @property
    def in_place(self) -> bool:
        """Whether `zo_step` can take a step of this rule: there is no gradient to hold."""
        return self.method != "coordinate"

    def streams(self, names: Sequence[str]) -> list[int]:
        """The random stream of each parameter, told by its name: the same in the graph and outside of it."""
        used: set[int] = set()
        found = []
        for name in names:
            stream = 0x80000000 | zlib.crc32(name.encode())
            while stream in used:
                stream = 0x80000000 | (stream + 1)
            used.add(stream)
            found.append(stream)
        return found

    def requires(self, graph: JointGraph) -> None:
        """Options that make sense, and a loss."""
        if self.method not in ("spsa", "coordinate", "stein"):
            raise RuleError(f"method={self.method!r} is unknown", remedy="use 'spsa', 'coordinate' or 'stein'")
        if self.kind not in ("central", "forward", "single"):
            raise RuleError(f"difference={self.kind!r} is unknown", remedy="use 'central', 'forward' or 'single'")
        if self.distribution not in ("normal", "sign"):
            raise RuleError(f"distribution={self.distribution!r} is unknown", remedy="use 'normal' or 'sign'")
        if not (self.scale > 0 and math.isfinite(self.scale)):
            raise RuleError(f"a perturbation of scale={self.scale:g} tells nothing", remedy="use scale > 0, e.g. 1e-3")
        if self.count < 1:
            raise RuleError(f"queries={self.count} asks for no loss at all", remedy="use 1 or more")
        if not 0 <= self.sparsity < 1:
            raise RuleError(f"sparsity={self.sparsity:g} leaves no coordinate", remedy="use 0 <= sparsity < 1")
        if self.method == "coordinate" and self.kind == "single":
            raise RuleError("coordinates are compared with the loss they start from", remedy="use difference='forward'")
        if self.method == "coordinate" and self.queries is not None:
            raise RuleError("coordinate has one query per coordinate", remedy="leave queries out; sparsity saves some")
        if self.sparsity and self.method != "coordinate":
            raise RuleError(f"{self.method} perturbs all weights at once", remedy="use sparsity with method=coordinate")
        if self.mask not in ("random", "salient"):
            raise RuleError(f"mask={self.mask!r} is unknown", remedy="use 'random' or 'salient'")
        if self.mask == "salient" and not self.sparsity:
            raise RuleError("no coordinate is left out: there is nothing to choose", remedy="use mask with sparsity")
        if not graph.has_loss:
            raise RuleError("zeroth_order needs the loss", remedy="train with compiled.loss(x, y)")
        refuse_empty_batch(graph, self.name)

    # --- the rewrite -----------------------------------------------------------------------------------------------

    def run(self, graph: JointGraph) -> PassResult:
        """Give every weight of this rule's blocks a gradient made of losses."""
        loss = task_loss(graph)
        leaves = self._leaves(graph, loss)
        if not leaves:
            return PassResult(graph, False)
        self._warn_about_rounding(graph)
        with graph.deferred():
            if self.method == "coordinate":
                for leaf in leaves:
                    self._by_coordinate(graph, leaf, loss)
            else:
                self._by_direction(graph, leaves, loss)
        return PassResult(graph, True)

    def _leaves(self, graph: JointGraph, loss: fx.Node) -> list[fx.Node]:
        """The weights that the loss depends on; the others keep no gradient."""
        reached = ancestors([loss])
        return [leaf for leaf in trained_leaves(graph) if leaf in reached]

    def _by_direction(self, graph: JointGraph, leaves: Sequence[fx.Node], loss: fx.Node) -> None:
        streams = dict(zip(leaves, self.streams([str(spec_of(leaf)) for leaf in leaves]), strict=True))
        self._warn_about_variance(leaves)
        replay = Replay(graph, [loss], leaves, self.name)
        counter = graph.counter()
        start = graph.splice(self._start(value(loss).dtype), [counter], like=_LOSSES, whole=False)
        given = [counter, loss, *leaves, *replay.inputs]
        size, kind, eps = len(leaves), self.kind, self.scale

        def ask(number: torch.Tensor, found: torch.Tensor, *values: torch.Tensor) -> list[torch.Tensor]:
            drawn, base, held, inputs = values[0], values[1], values[2 : 2 + size], values[2 + size :]
            seed = self.counter_of(drawn)

            def loss_at(sign: int) -> torch.Tensor:
                copy = "plus" if sign > 0 else "minus"
                moved = {
                    leaf: self._moved(held[i], seed, number, streams[leaf], sign, _weights(leaf, graph).but(copy=copy))
                    for i, leaf in enumerate(leaves)
                }
                return replay(moved, inputs, copy=copy)[0]

            above = loss_at(1)
            if kind == "central":
                slope = (above - loss_at(-1)) / (2 * eps)
            else:
                slope = (above - base if kind == "forward" else above) / eps
            position = torch.arange(found.shape[0], device=found.device)
            return [number + 1, torch.where(position == number, slope, found)]

        _, slopes = graph.repeat(ask, start, self.count, inputs=given, like=_LOSSES)
        for leaf in leaves:
            self._spread(graph, leaf, slopes, counter, streams[leaf])

    def _start(self, dtype: torch.dtype) -> Callable[[torch.Tensor], list[torch.Tensor]]:
        def start(counter: torch.Tensor) -> list[torch.Tensor]:
            return [counter.new_zeros(()), counter.new_zeros((self.count,), dtype=dtype)]

        return start

    def _moved(
        self,
        weight: torch.Tensor,
        counter: torch.Tensor,
        number: torch.Tensor,
        stream: int,
        sign: int,
        like: NodeInfo,
    ) -> Callable[[], torch.Tensor]:
        """The perturbed weight, made where it is first read: one at a time is alive."""

        def make() -> torch.Tensor:
            with labelled(like):
                return weight + sign * self.scale * self._direction(counter, number, stream, weight)

        return make

    def _direction(self, counter: torch.Tensor, number: torch.Tensor, stream: int, like: torch.Tensor) -> torch.Tensor:
        return random.direction(counter, stream, like.shape, number, self.distribution, like.dtype)

    def _spread(self, graph: JointGraph, leaf: fx.Node, slopes: fx.Node, counter: fx.Node, stream: int) -> None:
        """The gradient of a weight: the directions, drawn again, times the differences."""
        count, like = self.count, _weights(leaf, graph).but(role=Role.SIGNAL)

        def once(weight: torch.Tensor, slopes: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
            seed = self.counter_of(drawn)
            return (slopes[0] * self._direction(seed, drawn.new_zeros(()), stream, weight)).to(weight.dtype)

        def step(
            number: torch.Tensor, total: torch.Tensor, slopes: torch.Tensor, drawn: torch.Tensor
        ) -> list[torch.Tensor]:
            direction = self._direction(self.counter_of(drawn), number, stream, total)
            slope = slopes.index_select(0, number.reshape(1)).reshape(()) / count
            return [number + 1, (total + slope * direction).to(total.dtype)]

        if count == 1:
            made = graph.splice(once, [leaf, slopes, counter], like=like, whole=False)
        else:
            start = graph.splice(
                lambda drawn, weight: [drawn.new_zeros(()), torch.zeros_like(weight)],
                [counter, leaf],
                like=like,
                whole=False,
            )
            made = graph.repeat(step, start, count, inputs=[slopes, counter], like=like)[1]
        self._give(graph, leaf, made)

    def _by_coordinate(self, graph: JointGraph, leaf: fx.Node, loss: fx.Node) -> None:
        total = math.prod(fix(size) for size in value(leaf).shape)
        chosen = max(1, round(total * (1 - self.sparsity)))
        (stream,) = self.streams([str(spec_of(leaf))])
        replay = Replay(graph, [loss], [leaf], self.name)
        counter, eps, kind = graph.counter(), self.scale, self.kind
        start = graph.splice(
            lambda drawn, weight: [drawn.new_zeros(()), torch.zeros_like(weight).flatten()],
            [counter, leaf],
            like=_LOSSES,
            whole=False,
        )

        salient = self.mask == "salient"
        name = self.state_name(f"saliency.{spec_of(leaf)}".replace("parameter ", ""))
        held = []
        if salient:
            held = [graph.add_state(name, (total,), lambda tensor, _: tensor.zero_(), dtype=value(leaf).dtype)]

        def choose(drawn: torch.Tensor, *saliency: torch.Tensor) -> torch.Tensor:
            if chosen == total:
                return torch.arange(total, device=drawn.device)
            drawn_at = random.uniform(self.counter_of(drawn), stream, [total])
            if salient:
                # numbers in front of all drawn ones; where nothing is known yet, the draw decides
                known = (saliency[0].to(drawn_at.dtype) + 1e-30 * drawn_at).topk((chosen + 1) // 2).indices
                drawn_at = drawn_at.index_fill(0, known, -1.0)
            return drawn_at.argsort()[:chosen]

        where = graph.splice(choose, [counter, *held], like=_LOSSES, whole=False)

        def ask(number: torch.Tensor, found: torch.Tensor, *values: torch.Tensor) -> list[torch.Tensor]:
            weight, base, order, inputs = values[0], values[1], values[2], values[3:]
            here = torch.arange(total, device=found.device) == order.index_select(0, number.reshape(1))
            one = here.to(weight.dtype).reshape(weight.shape)

            def loss_at(sign: int) -> torch.Tensor:
                copy = "plus" if sign > 0 else "minus"
                with labelled(_weights(leaf, graph).but(copy=copy)):
                    moved = weight + sign * eps * one
                return replay({leaf: moved}, inputs, copy=copy)[0]

            above = loss_at(1)
            slope = (above - loss_at(-1)) / (2 * eps) if kind == "central" else (above - base) / eps
            return [number + 1, torch.where(here, slope.to(found.dtype), found)]

        _, flat = graph.repeat(ask, start, chosen, inputs=[leaf, loss, where, *replay.inputs], like=_LOSSES)
        if salient:
            graph.update_state(name, _seen, [flat, where])
        self._give(
            graph, leaf, graph.splice(lambda flat, weight: flat.reshape(weight.shape), [flat, leaf], like=_LOSSES)
        )

    def _give(self, graph: JointGraph, leaf: fx.Node, gradient: fx.Node) -> None:
        tangent = graph.loss_tangent(value(leaf).dtype)
        graph.redirect(leaf, lambda gradient, tangent: gradient * tangent, [gradient, tangent])

    def counter_of(self, counter: torch.Tensor) -> torch.Tensor:
        """The random counter; without the rank, if directions are shared."""
        return same_on_all_ranks(counter) if self.shared else counter

    def _warn_about_rounding(self, graph: JointGraph) -> None:
        dtypes = {value(node).dtype for node in (*graph.leaves, *graph.forward_nodes()) if is_float(node)}
        coarse = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
        name, eps = str(coarse).removeprefix("torch."), torch.finfo(coarse).eps
        if self.scale < 10 * eps:
            warnings.warn(
                f"zeroth_order moves weights by scale={self.scale:g} and compares losses, through {name} values "
                f"that are rounded to {eps:.2g} of themselves: what is found may be rounding. Use float32, or a larger "
                "scale",
                stacklevel=2,
            )

    def _warn_about_variance(self, leaves: Iterable[fx.Node]) -> None:
        width = sum(math.prod(fix(size) for size in value(leaf).shape) for leaf in leaves)
        predicted = (width + (1 if self.distribution == "normal" else -1)) / self.count
        if predicted <= WORTH_A_WARNING:
            return
        warnings.warn(
            f"zeroth_order: {self.count} random direction{'s' if self.count > 1 else ''} for {width} weights: the "
            f"estimate's variance is {predicted:.3g} times the squared gradient. More queries, fewer trained weights "
            "or a small learning rate make up for it",
            stacklevel=2,
        )


def _weights(leaf: fx.Node, graph: JointGraph) -> NodeInfo:
    """For operators on a weight itself."""
    return NodeInfo(role=Role.FORWARD, block=graph.table.block_of(leaf), module=info(leaf).module)


def _seen(saliency: torch.Tensor, found: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """The running mean of the differences' size, moved where they were asked for."""
    sizes = 0.5 * (saliency + found.abs()).index_select(0, asked)
    return saliency.index_copy(0, asked, sizes.to(saliency.dtype))
