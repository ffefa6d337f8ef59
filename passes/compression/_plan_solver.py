"""The integer program of a memory plan: one choice for each saved value, the least error and time within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from graphrewrite.analysis.demands import SavedValue
from graphrewrite.errors import GraphRewriteError
from graphrewrite.graph.codec import Codec

INFEASIBLE = 2
"""What scipy calls a problem without a solution."""
UNIT = 0.01
"""One per cent of gradient error weighs as much as one per cent of the step's time."""
EARLY = 0.1
"""How much more it weighs to bring a value back when everything else is still saved than when nothing is."""


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
    def harm(self) -> float:
        """The error, as it adds up."""
        return (self.error / UNIT) ** 2

    def cost(self, time: float = 1.0) -> float:
        """What is minimised, before the terms of pairs."""
        return self.harm + time * self.time / UNIT

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
        beside: The part of all saved bytes that is still there when it is read first: the peak grows by what is brought
            back then.
    """

    saved: SavedValue
    choices: list[Choice]
    chain: list[fx.Node] = field(default_factory=list)
    frontier: list[fx.Node] = field(default_factory=list)
    ancestors: set[fx.Node] = field(default_factory=set)
    beside: float = 0.0

    @property
    def lossy(self) -> bool:
        """Whether a choice changes it."""
        return any(choice.lossy for choice in self.choices)

    @property
    def recompute(self) -> int | None:
        """The position of the choice to compute it again."""
        return next((i for i, c in enumerate(self.choices) if getattr(c.codec, "how", "") == "recompute"), None)


@dataclass
class Pair:
    """What is added where a value is recomputed, directly or over others, from one with a certain choice.

    Attributes:
        again: The value that is recomputed.
        source: What it is recomputed from.
        through: Values in between, if those are recomputed as well.
        costs: Choice of the source -> what it adds.
        lossy: Whether that is error.
    """

    again: int
    source: int
    through: tuple[int, ...]
    costs: dict[int, float]
    lossy: bool = True


@dataclass
class Problem:
    """What the solver gets.

    Attributes:
        candidates: The values.
        budget: Bytes; negative: as few as possible.
        pairs: What choices cost together.
        apart: Values of which not both are recomputed.
        most: The most that errors, own ones and those of pairs, may add up to; None: any.
        time: What time weighs next to errors.
    """

    candidates: Sequence[Candidate]
    budget: int
    pairs: Sequence[Pair] = ()
    apart: frozenset[tuple[int, int]] = frozenset()
    most: float | None = None
    time: float = 1.0


def bytes_of(candidates: Sequence[Candidate], chosen: Sequence[int]) -> int:
    """Bytes that the values take under their choices."""
    return sum(c.choices[j].nbytes for c, j in zip(candidates, chosen, strict=True))


def solve(problem: Problem, time_limit: float) -> list[int] | None:
    """The choice for each candidate; None if none satisfies the problem.

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
    fewest = problem.budget < 0
    pairs = [] if fewest else [pair for pair in problem.pairs if max(pair.costs.values(), default=0.0) > 1e-9]
    worst = [max(pair.costs.values()) for pair in pairs]
    weight = [problem.time * (1 + EARLY * c.beside) for c in candidates]
    cost = [
        float(x.nbytes) if fewest else x.cost(w) for c, w in zip(candidates, weight, strict=True) for x in c.choices
    ]
    cost += worst
    rows: list[dict[int, float]] = []
    low: list[float] = []
    high: list[float] = []

    def constrain(row: dict[int, float], least: float, most: float) -> None:
        rows.append(row)
        low.append(least)
        high.append(most)

    again = [None if c.recompute is None else first[i] + c.recompute for i, c in enumerate(candidates)]
    index = {c.saved.node: i for i, c in enumerate(candidates)}
    for i, c in enumerate(candidates):
        constrain({first[i] + j: 1.0 for j in range(len(c.choices))}, 1, 1)
        mine = again[i]
        for k in (index[s] for s in c.ancestors if mine is not None and s in index):
            for j, choice in enumerate(candidates[k].choices):
                whole = getattr(choice.codec, "name", "") == "mask"
                exactly = c.saved.needed_exactly and not c.saved.is_statistic
                if mine is not None and (whole or (choice.lossy and exactly)):
                    constrain({mine: 1.0, first[k] + j: 1.0}, -np.inf, 1)
    for i, k in problem.apart:
        both = (again[i], again[k])
        if None not in both:
            constrain(dict.fromkeys(both, 1.0), -np.inf, 1)  # type: ignore[arg-type]
    flat = [(first[i] + j, x) for i, c in enumerate(candidates) for j, x in enumerate(c.choices)]
    if not fewest:
        constrain({place: float(x.nbytes) for place, x in flat}, -np.inf, problem.budget)
    for n, pair in enumerate(pairs):
        # the column of the pair is at least its share of the worst once all of them are recomputed
        recomputed = [again[m] for m in (pair.again, *pair.through)]
        row = {column: 1.0 for column in recomputed if column is not None}
        row |= {first[pair.source] + j: one / worst[n] for j, one in pair.costs.items()}
        constrain({**row, count + n: -1.0}, -np.inf, len(recomputed))
    if problem.most is not None:
        harm = {place: x.harm for place, x in flat if x.harm}
        constrain({**harm, **{count + n: worst[n] for n, p in enumerate(pairs) if p.lossy}}, -np.inf, problem.most)
    data = [v for row in rows for v in row.values()]
    columns = [k for row in rows for k in row]
    starts = np.cumsum([0, *[len(row) for row in rows]])
    result = milp(
        np.array(cost),
        constraints=LinearConstraint(
            csr_array((data, columns, starts), shape=(len(rows), len(cost))), np.array(low), np.array(high)
        ),
        integrality=np.array([1] * count + [0] * len(pairs)),
        bounds=Bounds(0, 1),
        options={"time_limit": time_limit, "mip_rel_gap": 1e-3},
    )
    if result.status == INFEASIBLE:
        return None
    if result.x is None:
        raise GraphRewriteError(f"the solver found no plan: {result.message}", remedy="raise time_limit or the budget")
    return [
        max(range(len(c.choices)), key=lambda j, i=i: result.x[first[i] + j])  # type: ignore[misc]
        for i, c in enumerate(candidates)
    ]
