"""Highway backpropagation: cotangents run down the residual paths, what branches add follows by iteration."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from graphrewrite.passes.rules._feedback import hidden_boundaries
from graphrewrite.passes.rules._residual import ADDITIONS, HEAVY, Paths, active
from torch import fx

from graphrewrite.errors import RuleError
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import LOSS_BLOCK, NodeInfo, Role, info, is_backward, outputs_of, producer, value
from graphrewrite.pipeline import PassResult
from graphrewrite.rule import FINER_BLOCKS, Rule

aten = torch.ops.aten
Cotangents = dict[fx.Node, fx.Node]
Terms = dict[fx.Node, list[fx.Node]]
Mode = Literal["skip", "branch", "all"]


@dataclass(frozen=True)
class Highway(Rule):
    """Redirect each boundary to k fixed-point iterations over the blocks' branches, carried by their skips.

    A block f(x) = r(x, g(x)) has the Jacobian K + J, K through the skip (r's own x) and J through the branch g. With
    e the exact cotangents that the last block hands to its inputs,

        w_i^0 = sum_{j >= i} e_j K_j ... K_{i+1};   w_i^{k+1} = w_i^0 + u_i,   u_i = w_{i+1}^k J_{i+1} + u_{i+1} K_{i+1}

    and w_i^k is the cotangent that enters block i. In one iteration the branches of all blocks are differentiated
    independently of each other, so that they can run in parallel; only the skips are passed through in order. With k
    at least the number of blocks it is backpropagation, exactly.

    The split is found on the graph: the skip is the path through a block with the fewest products, convolutions and
    attentions on it, past at least one residual sum `x + z` or gated one `z1 * x + z2`, if it meets any product at
    all. Activations on it and learned shortcuts belong to it; of a layer norm its diagonal part (weight over standard
    deviation). A block without such a path has K = 0: there the rule is the plain fixed-point iteration, and w
    takes one iteration per block. Blocks of other rules, and those that compute the output, are differentiated
    exactly. A recurrent layer is one block, differentiated exactly through time.

    Transformers diverge with the plain split on the way to k = depth: use gamma, 0.2 for pre-norm (GPT-2) and 0.8 for
    post-norm ones (RoBERTa).

    Args:
        k: Number of iterations.
        gamma: Count this share of every skip as part of the branch: g = z + gamma x, r = (1 - gamma) x + z.
    """

    k: int = 4
    gamma: float = 0.0

    name = "highway"
    summary = "Highway-BP: cotangents along residual paths, branches added in k parallel iterations"
    formula = "w_i⁰ = Σ_{j≥i} e_j K_j…K_{i+1};  w_i^{k+1} = w_i⁰ + u_i, u_i = w_{i+1}^k J_{i+1} + u_{i+1} K_{i+1}"
    paper = "Fagnou, Caillon, Delattre, Allauzen: Accelerated training through iterative gradient propagation, 2025"

    def requires(self, graph: JointGraph) -> None:
        """Sensible options, and something to redirect."""
        if self.k < 0 or not 0 <= self.gamma <= 1:
            raise RuleError(f"highway needs k >= 0 and gamma in [0, 1], got k={self.k}, gamma={self.gamma}")
        if len(graph.blocks) < 2:
            raise RuleError(
                "highway needs at least two blocks: with one, nothing is left to redirect",
                remedy=FINER_BLOCKS,
            )

    def run(self, graph: JointGraph) -> PassResult:
        """Compute the cotangents beside the backward, then let them enter at the boundaries."""
        ends = [(b, consumers) for b, consumers in hidden_boundaries(graph) if graph.cotangent(b) is not None]
        if not ends:
            return PassResult(graph, False)
        hidden = {info(boundary).block for boundary, _ in ends}
        sweep = _Sweep(graph, hidden, self.gamma)
        for name in sweep.without_skip():
            self.fail(graph, f"block {name} has no residual path: its cotangent takes one iteration")
        signals = sweep.solve(self.k)
        silent = {info(boundary).block for boundary, _ in ends if boundary not in signals}
        starved = [block.name for block in graph.blocks if block.name in silent]
        if starved:
            raise RuleError(
                f"with k={self.k} no signal reaches blocks {', '.join(starved)}: too many blocks behind them have no "
                "residual path",
                module=starved[0],
                remedy=f"use k={sweep.iterations_needed([b for b, _ in ends])} or more, or blocks that hold a skip",
            )
        with graph.deferred():
            for boundary, consumers in ends:
                graph.redirect(boundary, _as_it_is, [signals[boundary]], consumers=consumers)
        return PassResult(graph, True)


def _as_it_is(signal: torch.Tensor) -> torch.Tensor:
    return signal


@dataclass
class _Split:
    """How one block is split: for each operator on its skip, the input the skip comes from."""

    paths: Paths
    skip: dict[fx.Node, fx.Node] = field(default_factory=dict)
    starts: set[fx.Node] = field(default_factory=set)
    """Values of the block from which a skip leads back to a value outside."""

    @staticmethod
    def of(paths: Paths) -> _Split:
        split = _Split(paths)
        for node in paths.nodes:
            if any(info(u).block != paths.block for u in node.users if u.op == "call_function"):
                chain = split._chain(node)
                if chain is not None:
                    split.skip.update(chain)
                    split.starts.add(node)
        return split

    def _chain(self, start: fx.Node) -> dict[fx.Node, fx.Node] | None:
        chain: dict[fx.Node, fx.Node] = {}
        current, merged, products = start, False, 0
        while current.op == "call_function" and info(current).block == self.paths.block:
            op = producer(current)
            sources = self.paths.sources(op)
            costs = sorted(self.paths.of(s) for s in sources)
            if not sources or (len(sources) > 1 and (costs[0] == costs[1] or op.target in HEAVY)):
                return None
            chain[op] = current = min(sources, key=self.paths.of)
            merged = merged or (op.target in ADDITIONS and len(sources) > 1)
            products += op.target in HEAVY
        return chain if merged or not products else None


class _Sweep:
    """Walks the blocks in reverse, carrying cotangents through skips, branches or both."""

    def __init__(self, graph: JointGraph, hidden: set[str], gamma: float) -> None:
        self.graph = graph
        self.gamma = gamma
        self.order = [block.name for block in reversed(graph.blocks)]
        is_active = active(graph)
        self.splits = {name: _Split.of(Paths(graph, name, is_active)) for name in self.order}
        self.hidden = hidden
        self._made: dict[tuple[object, ...], object] = {}

    def without_skip(self) -> list[str]:
        """The redirected blocks behind others that have no skip."""
        return [
            name
            for name in reversed(self.order)
            if name in self.hidden and not self.splits[name].starts and self._reads_others(name)
        ]

    def _reads_others(self, block: str) -> bool:
        paths = self.splits[block].paths
        return any(info(source).block != block for node in paths.nodes for source in paths.sources(node))

    def solve(self, k: int) -> Cotangents:
        """The cotangents that come back from the other blocks after k iterations, by value."""
        direct = self._from_loss()
        first = self._down(direct, {})
        total, signals = self._totals(direct, first), first
        for _ in range(k):
            added = self._down({}, total)
            signals = {v: [*first.get(v, ()), *added.get(v, ())] for v in first | added}
            before, total = total, self._totals(direct, signals)
            if before == total:
                break
        return {v: self._sum(v, terms) for v, terms in signals.items() if terms}

    def iterations_needed(self, boundaries: Sequence[fx.Node]) -> int:
        """The least k with which a signal reaches all of these values."""
        k = 0
        while k < len(self.order) and not set(boundaries) <= set(self.solve(k)):
            k += 1
        return k

    def _from_loss(self) -> Terms:
        """What comes back to values of the model from the task loss, or from the caller."""
        found: Terms = {}
        for node in self.graph.forward_nodes():
            if info(node).block == LOSS_BLOCK:
                continue
            readers = [u for u in node.users if u.op == "call_function" and not is_backward(u)]
            terms = self.graph.returned(node, [u for u in readers if info(u).block == LOSS_BLOCK])
            if terms:
                found[node] = terms
        return found

    def _totals(self, direct: Terms, signals: Terms) -> Cotangents:
        both = {v: [*direct.get(v, ()), *signals.get(v, ())] for v in direct | signals}
        return {v: self._sum(v, terms) for v, terms in both.items() if terms}

    def _down(self, direct: Terms, branches: Cotangents) -> Terms:
        """One pass over all blocks: what starts at `direct` takes skips, `branches` are taken by branches."""
        arrived: Terms = {v: list(terms) for v, terms in direct.items()}
        returned: Terms = {}
        for name in self.order:
            mode: Mode = "skip" if name in self.hidden else "all"
            carried = {v: self._sum(v, t) for v, t in arrived.items() if info(v).block == name and t}
            results = [self._through(name, carried, mode)]
            if name in self.hidden:
                known = {v: c for v, c in branches.items() if info(v).block == name}
                results.append(self._through(name, known, "branch"))
            for result in results:
                for source, terms in result.items():
                    arrived.setdefault(source, []).extend(terms)
                    returned.setdefault(source, []).extend(terms)
        return returned

    def _through(self, block: str, cotangents: Cotangents, mode: Mode) -> Terms:
        """What a block hands to values outside of it, for cotangents of values inside."""
        if not cotangents:
            return {}
        split = self.splits[block]
        pure: Terms = {}
        mixed: Terms = {}
        for node, held in cotangents.items():
            (pure if mode != "all" and node in split.starts else mixed)[node] = [held]
        if mode == "skip":
            mixed = {}
        for op in reversed(split.paths.nodes):
            if producer(op) is not op:
                continue
            outs = [v for v in outputs_of(op).values() if v in pure or v in mixed]
            if outs:
                self._past(op, outs, split, pure, mixed, mode)
        found = pure if mode == "skip" else mixed
        return {v: terms for v, terms in found.items() if v.op == "call_function" and info(v).block != block and terms}

    def _past(self, op: fx.Node, outs: list[fx.Node], split: _Split, pure: Terms, mixed: Terms, mode: Mode) -> None:
        """From the outputs of one operator to its inputs."""
        straight = {v: self._sum(v, pure[v]) for v in outs if pure.get(v)}
        others = {v: self._sum(v, mixed[v]) for v in outs if mixed.get(v)}
        source = split.skip.get(op) if straight else None
        if source is not None:
            kept, rest = self._along_skip(op, straight, source)
            pure.setdefault(source, []).extend(kept)
            if mode == "branch":
                mixed.setdefault(source, []).extend(rest)
        if mode == "skip":
            return
        everything = {v: self._sum(v, [*pure.get(v, ()), *mixed.get(v, ())]) for v in outs}
        for read in split.paths.sources(op):
            from_here = others if read is source else everything
            if from_here:
                mixed.setdefault(read, []).extend(self._vjp(op, from_here, read))

    def _along_skip(self, op: fx.Node, held: Cotangents, source: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
        """The part of an operator's derivative that counts as skip, and what is left of it for the branch."""
        whole = self._vjp(op, held, source)
        if op.target is aten.layer_norm.default:
            ((_, cotangent),) = held.items()
            kept = self._once(("norm", op, cotangent), lambda: self._norm_gate(op, cotangent))
            return [kept], [self._once(("rest", op, cotangent), lambda: self._minus(source, whole[0], kept))]
        if self.gamma and op.target in ADDITIONS and len(self.splits[info(op).block].paths.sources(op)) > 1:
            share = [self._scaled(source, term, 1 - self.gamma) for term in whole]
            return share, [self._scaled(source, term, self.gamma) for term in whole]
        return whole, []

    # --- nodes, each made once -------------------------------------------------------------------------------------

    def _once(self, key: tuple[object, ...], make: Callable[[], object]) -> fx.Node:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]  # type: ignore[return-value]

    def _vjp(self, op: fx.Node, held: Cotangents, source: fx.Node) -> list[fx.Node]:
        key = ("vjp", op, source, *held.items())
        if key not in self._made:
            self._made[key] = self.graph.pull_back(op, held, [source]).get(source, [])
        return self._made[key]  # type: ignore[return-value]

    def _sum(self, node: fx.Node, terms: Sequence[fx.Node]) -> fx.Node:
        total = terms[0]
        for term in terms[1:]:
            total = self._once(("sum", node, total, term), functools.partial(self._add, node, total, term))
        return total

    def _add(self, node: fx.Node, left: fx.Node, right: fx.Node) -> fx.Node:
        return self.graph.emit(aten.add.Tensor, (left, right), like=self._like(node).but(role=Role.ACCUMULATE))

    def _minus(self, node: fx.Node, left: fx.Node, right: fx.Node) -> fx.Node:
        return self.graph.emit(aten.sub.Tensor, (left, right), like=self._like(node))

    def _scaled(self, node: fx.Node, term: fx.Node, factor: float) -> fx.Node:
        return self._once(
            ("scaled", node, term, factor),
            lambda: self.graph.emit(aten.mul.Tensor, (term, factor), like=self._like(node)),
        )

    @staticmethod
    def _like(node: fx.Node) -> NodeInfo:
        return info(node).but(role=Role.COTANGENT, mirrors=producer(node), cotangent_of=node)

    def _norm_gate(self, op: fx.Node, cotangent: fx.Node) -> fx.Node:
        """The diagonal of a layer norm's derivative with its statistics held: weight / standard deviation."""
        dims = tuple(range(-len(op.args[1]), 0))  # type: ignore[arg-type]
        eps = float(op.args[4]) if len(op.args) > 4 else float(op.kwargs.get("eps", 1e-5))  # type: ignore[arg-type]
        weight = op.args[2] if len(op.args) > 2 else op.kwargs.get("weight")

        def gate(x: torch.Tensor, held: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
            found = held * (x.var(dims, correction=0, keepdim=True) + eps).rsqrt()
            return found if scale is None else found * scale

        like = info(op).but(role=Role.COTANGENT, mirrors=op)
        given = [op.args[0], cotangent, weight if isinstance(weight, fx.Node) else None]
        made: fx.Node = self.graph.splice(gate, given, like=like, whole=False)  # type: ignore[arg-type]
        assert value(made).shape == value(op).shape
        return made
