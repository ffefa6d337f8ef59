"""Choose per saved value how it is kept, under a budget of bytes: `gr.compile(memory_budget=...)`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
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
from graphrewrite.analysis.demands import SavedValue, saved_values
from graphrewrite.analysis.recomputation import repeatable
from graphrewrite.analysis.sensitivity import Sensitivity
from graphrewrite.errors import GraphRewriteError, RuleError, VerifyError
from graphrewrite.graph.aliasing import base_of, views_of
from graphrewrite.graph.codec import Codec, Declined
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

FLOPS_PER_BYTE = 10.0
"""Operations that a machine does while it moves one byte, for the prediction of time."""
CODEC_PASSES, MASK_PASSES, HOST_PASSES = 16.0, 4.0, 60.0
"""How often encoding and decoding move the bytes of a value."""
HELD = 1000.0
"""What it weighs to bring all saved bytes back before their readers; more than time, less than a ruined gradient."""
UNIT = 0.01
"""One per cent of gradient error weighs as much as one per cent of the step's time."""


@dataclass
class Choice:
    """One way to treat one value.

    Attributes:
        codec: None: keep it.
        text: Its text form.
        nbytes: What is saved on the device.
        error: Relative error of the gradient, alone.
        time: Extra time, as a part of the step's.
    """

    codec: Codec | None
    text: str
    nbytes: int
    error: float = 0.0
    time: float = 0.0

    @property
    def lossy(self) -> bool:
        """Whether the value comes back changed."""
        return self.codec is not None and not getattr(self.codec, "exact", False)

    @property
    def cost(self) -> float:
        """What is minimised, before the terms of pairs."""
        return (self.error / UNIT) ** 2 + self.time / UNIT

    def __str__(self) -> str:
        return f"{self.text} ({self.nbytes:,} bytes, error {self.error:.2%}, time +{self.time:.2%})"


@dataclass
class Candidate:
    """A saved value, what may be done about it, and what recomputing it needs.

    Attributes:
        saved: The value.
        choices: Keep it comes first.
        chain: The operators that compute it again, in order; empty if it cannot be.
        frontier: The saved values that the chain starts from.
        ancestors: Those, and what they are recomputed from in turn.
    """

    saved: SavedValue
    choices: list[Choice]
    chain: list[fx.Node] = field(default_factory=list)
    frontier: list[fx.Node] = field(default_factory=list)
    ancestors: set[fx.Node] = field(default_factory=set)

    @property
    def recompute(self) -> int | None:
        """The position of the choice to compute it again."""
        return next((i for i, c in enumerate(self.choices) if getattr(c.codec, "how", "") == "recompute"), None)


@dataclass
class Problem:
    """What the solver gets."""

    candidates: list[Candidate]
    pairs: dict[tuple[int, int, int], float]
    """(value that is recomputed, value it is recomputed from, choice of the latter) -> added cost."""
    budget: int
    apart: frozenset[tuple[int, int]] = frozenset()
    """Values of which not both are recomputed."""


@dataclass(frozen=True)
class PlanMemory(Pass):
    """Keep, mask, encode, recompute or offload every saved value, so that all together fit the budget.

    An integer program minimises (gradient error / 1 %)^2 + time / 1 %, summed over values. The error that each codec
    brings is measured: the backward runs again with the one value changed, on the example batch. Where a value is
    recomputed from an encoded one, the error of the pair is measured. Time is predicted from operations and bytes.

    Args:
        budget: A fraction of backpropagation's saved bytes, or an integer: bytes at the example's sizes.
        codecs: Codecs to choose from; exact ones cost no error.
        time_limit: Seconds after which the solver returns the best plan it has.
    """

    budget: float = 1.0
    codecs: tuple[Any, ...] = ("mask", "recompute", "cpu_offload", "bf16", "int8", "int4", "int2")
    time_limit: float = 10.0

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
        pairs: dict[tuple[int, int, int], float] = {}
        lowest = rest + _bytes_of(candidates, solve(Problem(candidates, {}, -1), self.time_limit))
        if lowest > limit:
            raise RuleError(
                f"memory_budget={self.budget} allows {limit:,} bytes, but the lowest feasible is {lowest:,} bytes "
                f"({lowest / max(whole, 1):.4f} of the {whole:,} that backpropagation saves)",
                remedy=f"use memory_budget={lowest} or more",
            )
        if total > limit:
            pairs = self._measure(graph, candidates)
        chosen = self._solve(candidates, pairs, limit - rest)
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
            graph.recompute(set(again))
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

    def _solve(self, candidates: list[Candidate], pairs: dict[tuple[int, int, int], float], budget: int) -> list[int]:
        """The plan; if the budget allows it, one in which no block recomputes from what another block reads.

        What is recomputed on the way to a value that is read sooner lives until its own reader: chains through several
        blocks would bring all of their values back at once, and the peak would grow as the budget shrinks.
        """
        index = {c.saved.node: i for i, c in enumerate(candidates)}
        read_in = [info(min(r.reader for r in c.saved.readings)).block for c in candidates]
        apart = frozenset(
            (i, index[source])
            for i, c in enumerate(candidates)
            for source in c.frontier
            if source in index and read_in[index[source]] != read_in[i] != LOSS_BLOCK
        )
        separate = Problem(candidates, pairs, -1, apart)
        if _bytes_of(candidates, solve(separate, self.time_limit)) <= budget:
            return solve(Problem(candidates, pairs, budget, apart), self.time_limit)
        # as little of it as the budget allows
        whole = sum(c.saved.nbytes for c in candidates)
        weighed = dict(pairs)
        for i, k in apart:
            again = candidates[k].recompute
            if again is not None and candidates[i].recompute is not None:
                key = (i, k, again)
                weighed[key] = weighed.get(key, 0.0) + HELD * candidates[k].saved.nbytes / whole
        return solve(Problem(candidates, weighed, budget), self.time_limit)

    # --- what can be done ---------------------------------------------------------------------------------------------

    def _candidates(self, graph: JointGraph, values: Sequence[SavedValue]) -> list[Candidate]:
        offered = [build_codec(one) for one in self.codecs]
        stored = {v.node for v in values}
        free = repeatable(graph)
        copied = {graph.inputs[spec]: size for spec, size in _overwritten(graph).items()}
        position = {node: i for i, node in enumerate(graph.nodes)}
        step = sum(_work(n) for n in graph.nodes if n.op == "call_function") or 1.0
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
                    time = sum(_work(n) for n in candidate.chain) / step
                    read = {s for n in candidate.chain for s in n.all_input_nodes}
                    held = sum(size for node, size in copied.items() if node in read)
                    candidate.choices.append(Choice(codec, text, held, time=time))
                    continue
                chosen = fit(codec, v)
                if isinstance(chosen, Declined) or getattr(chosen, "how", "encode") == "keep":
                    continue
                host, exact = getattr(chosen, "on_host", False), getattr(chosen, "exact", False)
                moved = v.nbytes * (HOST_PASSES if host else MASK_PASSES if exact else CODEC_PASSES)
                size = 0 if host else saved_with_signs(v, chosen)
                candidate.choices.append(Choice(chosen, text, size, time=moved * FLOPS_PER_BYTE / step))
            found.append(candidate)
        by_node = {c.saved.node: c for c in found}
        for candidate in found:
            stack = list(candidate.frontier)
            while stack:
                node = stack.pop()
                if node not in candidate.ancestors:
                    candidate.ancestors.add(node)
                    stack += by_node[node].frontier if node in by_node else []
        return found

    # --- what it costs ------------------------------------------------------------------------------------------------

    @staticmethod
    def _measure(graph: JointGraph, candidates: list[Candidate]) -> dict[tuple[int, int, int], float]:
        """Fill in the errors of lossy choices; returns the added cost of pairs.

        Of each value one codec is measured, the coarsest; the others by the ratio of their round-trip errors.
        """
        assert graph.context.example is not None
        if not any(choice.lossy for c in candidates for choice in c.choices):
            return {}
        run = Sensitivity(graph, graph.context.example(graph))
        values = {c.saved.node: c.saved for c in candidates}
        ratios: dict[int, dict[int, float]] = {}
        changed: dict[int, torch.Tensor] = {}
        for i, c in enumerate(candidates):
            exact = run.number(c.saved.node)
            worst = (-1.0, -1)
            apart: dict[int, float] = {}
            for j, choice in enumerate(c.choices):
                if choice.lossy and choice.codec is not None:
                    apart[j] = float((run.round_trip(c.saved, choice.codec) - exact).to(torch.float64).norm())
                    worst = max(worst, (apart[j], j))
            if worst[1] < 0:
                continue
            coarsest = c.choices[worst[1]].codec
            assert coarsest is not None
            changed[i] = run.round_trip(c.saved, coarsest)
            error = run.error({c.saved.node: changed[i]}, values)
            ratios[i] = {j: one / worst[0] if worst[0] else 0.0 for j, one in apart.items()}
            for j, ratio in ratios[i].items():
                c.choices[j].error = error * ratio
        pairs: dict[tuple[int, int, int], float] = {}
        index = {c.saved.node: i for i, c in enumerate(candidates)}
        for i, c in enumerate(candidates):
            for source in c.frontier:
                k = index.get(source)
                if k is None or k not in changed:
                    continue
                new = {source: changed[k]}
                both = run.error({**new, c.saved.node: run.again(c.chain, c.saved.node, new)}, values)
                alone = max((candidates[k].choices[j].error for j in ratios[k]), default=0.0)
                for j, ratio in ratios[k].items():
                    pairs[i, k, j] = max(0.0, both**2 - alone**2) * ratio**2 / UNIT**2
        return pairs


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


def solve(problem: Problem, time_limit: float) -> list[int]:
    """The choice for each candidate; a negative budget asks for the fewest bytes.

    Raises:
        GraphRewriteError: scipy is missing, or it found no plan in time.
    """
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError as error:
        raise GraphRewriteError(
            "memory_budget= needs scipy", remedy="install graphrewrite[plan], which brings scipy"
        ) from error
    candidates = problem.candidates
    if not candidates:
        return []
    first, count = [], 0
    for c in candidates:
        first.append(count)
        count += len(c.choices)
    pairs = [(key, cost) for key, cost in problem.pairs.items() if cost > 1e-9]
    fewest = problem.budget < 0
    cost = [float(x.nbytes) if fewest else x.cost for c in candidates for x in c.choices] + [p for _, p in pairs]
    rows: list[dict[int, float]] = []
    low: list[float] = []
    high: list[float] = []

    def constrain(row: dict[int, float], least: float, most: float) -> None:
        rows.append(row)
        low.append(least)
        high.append(most)

    index = {c.saved.node: i for i, c in enumerate(candidates)}
    for i, c in enumerate(candidates):
        constrain({first[i] + j: 1.0 for j in range(len(c.choices))}, 1, 1)
        if c.recompute is None:
            continue
        for source in c.ancestors:
            k = index.get(source)
            if k is None:
                continue
            for j, choice in enumerate(candidates[k].choices):
                whole = getattr(choice.codec, "name", "") == "mask"
                if whole or (choice.lossy and c.saved.needed_exactly):
                    constrain({first[i] + c.recompute: 1.0, first[k] + j: 1.0}, -np.inf, 1)
    for i, k in problem.apart:
        again, before = candidates[i].recompute, candidates[k].recompute
        if again is not None and before is not None:
            constrain({first[i] + again: 1.0, first[k] + before: 1.0}, -np.inf, 1)
    if not fewest:
        constrain(
            {first[i] + j: float(x.nbytes) for i, c in enumerate(candidates) for j, x in enumerate(c.choices)},
            -np.inf,
            problem.budget,
        )
    for n, ((i, k, j), _) in enumerate(pairs):
        recompute = candidates[i].recompute
        assert recompute is not None
        constrain({first[i] + recompute: 1.0, first[k] + j: 1.0, count + n: -1.0}, -np.inf, 1)
    data = [v for row in rows for v in row.values()]
    columns = [k for row in rows for k in row]
    starts = np.cumsum([0, *[len(row) for row in rows]])
    matrix = csr_array((data, columns, starts), shape=(len(rows), len(cost)))
    result = milp(
        np.array(cost),
        constraints=LinearConstraint(matrix, np.array(low), np.array(high)),
        integrality=np.array([1] * count + [0] * len(pairs)),
        bounds=Bounds(0, 1),
        options={"time_limit": time_limit, "mip_rel_gap": 1e-3},
    )
    if result.x is None:
        raise GraphRewriteError(f"the solver found no plan: {result.message}", remedy="raise time_limit or the budget")
    return [
        max(range(len(c.choices)), key=lambda j, i=i: result.x[first[i] + j])  # type: ignore[misc]
        for i, c in enumerate(candidates)
    ]


def _overwritten(graph: JointGraph) -> dict[InputSpec, int]:
    """Inputs that the call writes to once it is over, and the bytes of the copy that a recomputation would need."""
    names = {s.name for s in graph.outputs if isinstance(s, BufferUpdate)}
    places = {s.index for s in graph.outputs if isinstance(s, InputUpdate)}
    return {
        spec: nbytes(value(node))
        for spec, node in graph.inputs.items()
        if (isinstance(spec, Buffer) and spec.name in names) or (isinstance(spec, UserInput) and spec.index in places)
    }


def _bytes_of(candidates: Sequence[Candidate], chosen: Sequence[int]) -> int:
    return sum(c.choices[j].nbytes for c, j in zip(candidates, chosen, strict=True))


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


def _work(node: fx.Node) -> float:
    """Operations of a node, with the bytes that it writes and reads counted as operations."""
    if not isinstance(value(node), (torch.Tensor, tuple, list)):
        return 0.0
    moved = nbytes(value(node)) + sum(nbytes(value(s)) for s in node.all_input_nodes)
    return flops(node) + FLOPS_PER_BYTE * moved
