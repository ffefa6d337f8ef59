"""Choose per saved value how it is kept, under a budget of bytes: `gr.compile(memory_budget=...)`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from graphrewrite.passes.compression._plan_solver import UNIT, Candidate, Choice, Pair, Problem, bytes_of, solve
from graphrewrite.passes.compression.compress_saved import (
    CompressSaved,
    build_codec,
    fit,
    saved_with_signs,
    treatment,
)
from torch import fx

from graphrewrite import textform
from graphrewrite.analysis.cost import flops
from graphrewrite.analysis.demands import Demand, SavedValue, saved_values
from graphrewrite.analysis.recomputation import repeatable
from graphrewrite.analysis.sensitivity import Sensitivity
from graphrewrite.errors import RuleError, VerifyError
from graphrewrite.graph.aliasing import base_of, views_of
from graphrewrite.graph.codec import Declined, SavedCodec
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import (
    LOSS_BLOCK,
    Buffer,
    BufferUpdate,
    InputSpec,
    InputUpdate,
    UserInput,
    info,
    nbytes,
    value,
)
from graphrewrite.graph.partition import partition
from graphrewrite.graph.text import Names
from graphrewrite.pipeline import Pass, PassResult


@dataclass(frozen=True)
class Speed:
    """Floating-point operations that a machine does while it moves one byte, for the prediction of time.

    Attributes:
        operator: A byte that an operator reads or writes.
        codec: A byte of a value in one of its codec's passes.
    """

    operator: float
    codec: float


EAGER, FUSED = Speed(10.0, 10.0), Speed(2.0, 0.75)
"""Operator by operator, and with neighbours fused into one loop: measured on a CPU."""

ROUNDS = 4
"""How often a plan is made anew because its error, measured with everything changed at once, was above the limit."""
DEPTH = 8
"""Over how many other values an error is followed through recomputations."""
HELD = 1000.0
"""What it weighs to recompute all saved bytes for other blocks than that of their readers; more than time, less than a
ruined gradient."""
INSIDE = 3.0
"""What it weighs to bring them back before their readers, within a block."""


@dataclass(frozen=True)
class PlanMemory(Pass):
    """Keep, mask, encode, recompute or offload every saved value, so that all together fit the budget.

    An integer program minimises (gradient error / 1 %)^2 + time / 1 %, summed over values, with the sum of the errors
    below `error` if any plan that fits the budget is. The error that each codec brings is measured: the backward runs
    again with the one value changed, on the example batch. Where a value is recomputed from an encoded one, over others
    or not, it is computed again from the decoded numbers, and its change weighs as much as one of its own codec;
    statistics, which no codec takes, may change with what they summarise. The plan is measured as a whole, and made
    again with less error if it is above the limit. Time is predicted from operations and bytes.

    Args:
        budget: A fraction of backpropagation's saved bytes, or an integer: bytes at the example's sizes.
        codecs: Codecs to choose from; exact ones cost no error.
        error: Relative error of all gradients together that is not exceeded if the budget allows it.
        time_limit: Seconds after which the solver returns the best plan it has.
        peak: Whether plans avoid what raises the peak: a block that recomputes from what another one reads, and values
            that are recomputed long before they are read. What several blocks recompute runs for each of them then.
            Without, fewer operations run twice.
    """

    budget: float = 1.0
    codecs: tuple[Any, ...] = (
        "mask",
        "recompute",
        "cpu_offload",
        "bf16",
        "int8",
        "int8{symmetric=true,group=64}",
        "int4",
        "int2",
    )
    error: float = 0.01
    time_limit: float = 10.0
    peak: bool = True

    name = "plan_memory"
    level = "aten"
    summary = "choose per saved value among keep, mask, codec, recompute and offload, under a budget"

    @property
    def relative(self) -> bool:
        """Whether the budget is a fraction of what backpropagation saves."""
        return isinstance(self.budget, float)

    def requires(self, graph: JointGraph) -> None:
        """The budget is a fraction or a number of bytes."""
        check_budget(self.budget)
        if graph.context.example is None:
            raise RuleError("plan_memory needs an example batch", remedy="use compile(memory_budget=...)")

    def run(self, graph: JointGraph) -> PassResult:
        """Measure, solve, apply."""
        part = partition(graph)
        total = part.saved_bytes
        whole = graph.context.bp_bytes or total
        limit = self.budget if isinstance(self.budget, int) else int(self.budget * whole)
        values = saved_values(graph, part)
        names = Names(graph)
        candidates = self._candidates(graph, values)
        rest = total - sum(c.saved.nbytes for c in candidates)
        lowest = rest + bytes_of(candidates, self._first([Problem(candidates, -1)], None))
        if lowest > limit:
            raise RuleError(
                f"memory_budget={self.budget} allows {limit:,} bytes, but the lowest feasible is {lowest:,} bytes "
                f"({lowest / max(whole, 1):.4f} of the {whole:,} that backpropagation saves)",
                remedy=f"use memory_budget={lowest} or more",
            )
        chosen = self.choose(graph, candidates, limit - rest)
        known = {c.saved.node for c in candidates}
        done = [treatment(v, names, "keep", v.nbytes, v.closed) for v in values if v.node not in known]
        again: list[fx.Node] = []
        encoded: list[tuple[Candidate, Choice]] = []
        for candidate, number in zip(candidates, chosen, strict=True):
            choice = candidate.choices[number]
            others = "; ".join(str(c) for c in candidate.choices if c is not choice)
            why = f"{choice}{f'; instead of {others}' if others else ''}"
            done.append(treatment(candidate.saved, names, choice.text, choice.nbytes, why, choice.error))
            if number == candidate.recompute:
                again += [*candidate.chain, *views_of(candidate.saved.node)]
            elif choice.codec is not None:
                encoded.append((candidate, choice))
        if again:
            graph.recompute(set(again), each_block=self.peak)
        by_node = {v.node: v for v in saved_values(graph)} if again else {v.node: v for v in values}
        for candidate, choice in encoded:
            # recomputation may have added readers
            now = by_node.get(candidate.saved.node)
            if now is not None and choice.codec is not None:
                CompressSaved.encode(graph, now, choice.codec)
        graph.prune(backward_only=True)
        graph.treatments = done
        saved = partition(graph).saved_bytes
        if saved > limit:
            raise VerifyError(f"the plan keeps {saved:,} bytes, more than the {limit:,} that it was made for")
        return PassResult(graph, bool(again or encoded))

    def choose(self, graph: JointGraph, candidates: list[Candidate], budget: int) -> list[int]:
        """The plan: the number of each candidate's choice.

        With `peak`, if the budget allows it, one in which no block recomputes from what another block reads: chains
        through several blocks run once for each of them. Within a block, what is recomputed on the way to a value that
        is read sooner lives until its own reader: the more of that, the higher the peak.
        """
        kept = sum(c.saved.nbytes for c in candidates)
        errors = _Errors(graph, candidates) if kept > budget and any(c.lossy for c in candidates) else None
        caused = errors.pairs if errors else []
        if not self.peak:
            return self._first([Problem(candidates, budget, caused)], errors)
        index = {c.saved.node: i for i, c in enumerate(candidates)}
        first = [min(r.reader for r in c.saved.readings) for c in candidates]
        turn = {reader: i for i, reader in enumerate(sorted(set(first)))}
        read_in = [info(reader).block for reader in first]
        apart = frozenset(
            (i, index[source])
            for i, c in enumerate(candidates)
            for source in c.frontier
            if source in index and read_in[index[source]] != read_in[i] != LOSS_BLOCK
        )
        held = [
            Pair(i, k, (), {again: HELD * candidates[k].saved.nbytes / kept}, lossy=False)
            for i, k in apart
            if candidates[i].recompute is not None and (again := candidates[k].recompute) is not None
        ]
        inside = [
            Pair(i, k, over, {again: INSIDE * candidates[k].saved.nbytes / kept}, lossy=False)
            for k, c in enumerate(candidates)
            if (again := c.recompute) is not None
            for i, over in _recomputed_from(candidates, index, k).items()
            if read_in[i] == read_in[k] and turn[first[i]] + 1 < turn[first[k]]
        ]
        pairs = [*caused, *inside]
        problems = [Problem(candidates, budget, pairs, apart), Problem(candidates, budget, [*pairs, *held])]
        return self._first(problems, errors)

    def _first(self, problems: Sequence[Problem], errors: _Errors | None) -> list[int]:
        """A plan of the first problem that has one that errs little enough; else the one that errs least."""
        if errors is None:
            found = (solve(problem, self.time_limit) for problem in problems)
            return next(plan for plan in found if plan is not None)
        plans: list[tuple[float, list[int]]] = []
        for problem in problems:
            plans += self._with_errors(problem, errors)
            if plans and plans[-1][0] <= self.error:
                return plans[-1][1]
        return min(plans)[1]

    def _with_errors(self, problem: Problem, errors: _Errors) -> list[tuple[float, list[int]]]:
        """Plans and what they are measured to err; the last is below the limit, or meant to err as little as it can."""
        most = (self.error / UNIT) ** 2
        plans: list[tuple[float, list[int]]] = []
        for _ in range(ROUNDS):
            chosen = solve(replace(problem, most=most), self.time_limit)
            if chosen is None:
                break
            plans.append((errors.of(chosen), chosen))
            if plans[-1][0] <= self.error:
                return plans
            most *= 0.8 * (self.error / plans[-1][0]) ** 2
        # predictions add up what may cancel: whatever they say, try the least
        chosen = solve(replace(problem, time=0.01), self.time_limit)
        return plans if chosen is None else [*plans, (errors.of(chosen), chosen)]

    # --- what can be done ---------------------------------------------------------------------------------------------

    def _candidates(self, graph: JointGraph, values: Sequence[SavedValue]) -> list[Candidate]:
        offered = [build_codec(one) for one in self.codecs]
        stored = {v.node for v in values}
        free = repeatable(graph)
        copied = {graph.inputs[spec]: size for spec, size in _overwritten(graph).items()}
        position = {node: i for i, node in enumerate(graph.nodes)}
        speed = FUSED if graph.context.fuses else EAGER
        step = sum(_work(n, speed) for n in graph.nodes if n.op == "call_function") or 1.0
        found = []
        for v in values:
            if v.closed:
                continue
            candidate = Candidate(v, [Choice(None, "keep", v.nbytes)])
            for codec in offered:
                text = textform.to_text(codec)
                if getattr(codec, "how", "encode") == "recompute":
                    chain = _chain(v.node, stored, free)
                    if chain is None or getattr(codec, "selects", lambda _: "")(v):
                        continue
                    candidate.chain = sorted(chain[0], key=position.__getitem__)
                    candidate.frontier = sorted(chain[1], key=position.__getitem__)
                    time = sum(_work(n, speed) for n in candidate.chain) / step
                    read = {s for n in candidate.chain for s in n.all_input_nodes}
                    held = sum(size for node, size in copied.items() if node in read)
                    candidate.choices.append(Choice(codec, text, held, time=time))
                    continue
                chosen = fit(codec, v)
                if isinstance(chosen, Declined) or getattr(chosen, "how", "encode") == "keep":
                    continue
                host = getattr(chosen, "on_host", False)
                size = 0 if host else saved_with_signs(v, chosen)
                # nothing fuses with a copy to another memory
                moved = v.nbytes * getattr(chosen, "passes", SavedCodec.passes) * (EAGER if host else speed).codec
                candidate.choices.append(Choice(chosen, text, size, time=moved / step))
            found.append(candidate)
        by_node = {c.saved.node: c for c in found}
        for candidate in found:
            stack = list(candidate.frontier)
            while stack:
                node = stack.pop()
                if node not in candidate.ancestors:
                    candidate.ancestors.add(node)
                    stack += by_node[node].frontier if node in by_node else []
        there = 0
        for candidate in sorted(found, key=lambda c: min(r.reader for r in c.saved.readings), reverse=True):
            there += candidate.saved.nbytes
            candidate.beside = there / sum(c.saved.nbytes for c in found)
        return found


class _Errors:
    """Measured errors: those of choices, which are filled in, of pairs, and of whole plans.

    Attributes:
        pairs: What recomputing from encoded values adds.
    """

    def __init__(self, graph: JointGraph, candidates: list[Candidate]) -> None:
        assert graph.context.example is not None
        self._run = Sensitivity(graph, graph.context.example(graph))
        self._candidates = candidates
        self._index = {c.saved.node: i for i, c in enumerate(candidates)}
        self._weights: dict[tuple[int, bool], float] = {}
        """Gradient error for a change of norm one of a value, encoded or recomputed."""
        self.pairs = [pair for i in range(len(candidates)) for pair in self._choices(i)]

    def of(self, chosen: Sequence[int]) -> float:
        """The error of a plan, everything changed at once."""
        changed: dict[fx.Node, torch.Tensor] = {}
        again, encoded = [], []
        for c, j in zip(self._candidates, chosen, strict=True):
            choice = c.choices[j]
            if choice.codec is not None and choice.lossy:
                changed[c.saved.node] = self._run.round_trip(c.saved, choice.codec)
                encoded.append(c.saved)
            elif j == c.recompute:
                again.append(c)
        env = self._run.again(sorted({n for c in again for n in c.chain}), changed)
        changed.update({c.saved.node: env[c.saved.node] for c in again})
        return self._run.error(changed, encoded)

    def _choices(self, k: int) -> list[Pair]:
        """Fill in the errors of a value's lossy choices; returns what those bring to what is recomputed from it.

        One codec is measured, the coarsest; the others by the ratio of their round-trip errors.
        """
        candidate = self._candidates[k]
        exact = self._run.number(candidate.saved.node)
        back = {
            j: self._run.round_trip(candidate.saved, choice.codec)
            for j, choice in enumerate(candidate.choices)
            if choice.lossy and choice.codec is not None
        }
        norms = {j: float((one - exact).to(torch.float64).norm()) for j, one in back.items()}
        coarsest = max(norms, key=norms.__getitem__, default=-1)
        if coarsest < 0 or not norms[coarsest]:
            return []
        weight = self._weight(k, norms[coarsest], back[coarsest])
        for j, norm in norms.items():
            candidate.choices[j].error = weight * norm
        through = _recomputed_from(self._candidates, self._index, k, changed=True)
        env = self._run.again(
            sorted({n for i in through for n in self._candidates[i].chain}), {candidate.saved.node: back[coarsest]}
        )
        pairs = []
        for i, over in through.items():
            node = self._candidates[i].saved.node
            if not env[node].is_floating_point():
                continue
            norm = float((env[node] - self._run.number(node)).to(torch.float64).norm())
            harm = (self._weight(i, norm, env[node], again=True) * norm / UNIT) ** 2
            # as many comparisons change as numbers are near the constant: their error grows with the root of the change
            power = 1 if self._compared(i) else 2
            pairs.append(Pair(i, k, over, {j: harm * (one / norms[coarsest]) ** power for j, one in norms.items()}))
        return pairs

    def _weight(self, i: int, norm: float, changed: torch.Tensor, *, again: bool = False) -> float:
        saved, key = self._candidates[i].saved, (i, again and self._compared(i))
        if key not in self._weights and norm:
            self._weights[key] = self._run.error({saved.node: changed}, () if key[1] else (saved,)) / norm
        return self._weights.get(key, 0.0)

    def _compared(self, i: int) -> bool:
        return any(one.demand is Demand.SIGN for one in self._candidates[i].saved.readings)


def _recomputed_from(
    candidates: Sequence[Candidate], index: dict[fx.Node, int], k: int, *, changed: bool = False
) -> dict[int, tuple[int, ...]]:
    """Values that may be recomputed from one -> the fewest that have to be recomputed in between.

    With `changed`: from one that comes back changed.
    """
    found: dict[int, tuple[int, ...]] = {k: ()}
    for i, c in enumerate(candidates):
        exactly = changed and c.saved.needed_exactly and not c.saved.is_statistic
        if i == k or c.recompute is None or exactly:
            continue
        sources = [index[s] for s in c.frontier if index.get(s) in found]
        if sources:
            over = min((() if s == k else (*found[s], s) for s in sources), key=len)
            if len(over) <= DEPTH:
                found[i] = over
    del found[k]
    return found


def check_budget(budget: Any) -> None:
    """A fraction in (0, 1], or bytes.

    Raises:
        RuleError: Something else.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise RuleError(f"memory_budget={budget!r} is no number", remedy="use a fraction in (0, 1] or an int: bytes")
    if budget < 0 or (isinstance(budget, float) and budget > 1) or budget != budget:
        raise RuleError(
            f"memory_budget={budget} is neither a fraction nor a number of bytes",
            remedy="a float is a fraction of backpropagation's saved bytes, an int is bytes",
        )


def _overwritten(graph: JointGraph) -> dict[InputSpec, int]:
    """Inputs that the call writes to once it is over, and the bytes of the copy that a recomputation would need."""
    names = {s.name for s in graph.outputs if isinstance(s, BufferUpdate)}
    places = {s.index for s in graph.outputs if isinstance(s, InputUpdate)}
    return {
        spec: nbytes(value(node))
        for spec, node in graph.inputs.items()
        if (isinstance(spec, Buffer) and spec.name in names) or (isinstance(spec, UserInput) and spec.index in places)
    }


def _chain(node: fx.Node, stored: set[fx.Node], free: set[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]] | None:
    """What computes a value again from saved ones and inputs, and those saved ones; None if something is random."""
    chain: set[fx.Node] = set()
    frontier: set[fx.Node] = set()
    stack = [node]
    while stack:
        one = stack.pop()
        if one in chain or one.op == "placeholder" or isinstance(value(one), (torch.SymInt, int)):
            continue
        if one is not node and one in stored:
            frontier.add(one)
            continue
        if one not in free:
            return None
        chain.add(one)
        stack += one.all_input_nodes
    frontier.discard(base_of(node))
    return chain, frontier


def _work(node: fx.Node, speed: Speed) -> float:
    """Operations of a node, with the bytes that it writes and reads counted as operations."""
    if not isinstance(value(node), (torch.Tensor, tuple, list)):
        return 0.0
    moved = nbytes(value(node)) + sum(nbytes(value(s)) for s in node.all_input_nodes)
    return flops(node) + speed.operator * moved
