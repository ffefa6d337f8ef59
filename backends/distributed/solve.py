"""The shortest schedule by integer programming, for small pipelines: SciPy's solver (HiGHS) proves it.

A start time for each action; for each pair of actions of a process that no data orders, a binary variable that says
which goes first; the bytes that a process holds in front of an action are linear in those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import networkx as nx
from graphrewrite.backends.distributed.simulate import Action, StageCost

from graphrewrite.errors import RuleError

LARGEST = 160
"""Actions of a pipeline that the solver is asked about."""


def solve(
    costs: Sequence[StageCost],
    place: Sequence[int],
    micro_batches: int,
    communication: float,
    cap: float | None,
    *,
    bound: float,
    below: float,
    seconds: float,
) -> tuple[list[list[Action]] | None, float]:
    """Find a schedule that takes no longer than `below`, or prove a bound.

    Args:
        costs: Per stage.
        place: The process of each stage.
        micro_batches: How many per step; at each stage they run in order, which loses nothing: they cost the same.
        communication: Time until what one process sends has arrived at another.
        cap: The most bytes that a process may hold.
        bound: What no schedule can be shorter than.
        below: What the best schedule known takes.
        seconds: When to give up.

    Returns:
        The schedule, None if the solver found none that is not longer; and the bound that it has proved.

    Raises:
        RuleError: SciPy is not installed, or the pipeline is too large.
    """
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_matrix
    except ImportError as error:
        raise RuleError("the solver needs SciPy", remedy="pip install scipy, or solve_seconds=0") from error
    order = _precedence(costs, place, micro_batches, communication)
    actions = list(order)
    if len(actions) > LARGEST:
        raise RuleError(
            f"{len(actions)} actions are too many for the solver",
            remedy=f"it takes {LARGEST} at most; without solve_seconds= a search finds good schedules of larger ones",
        )
    number = {action: i for i, action in enumerate(actions)}
    time = {a: costs[a.stage].time(a.kind) for a in actions}
    before = nx.transitive_closure_dag(order)
    pairs = [
        (a, b)
        for i, a in enumerate(actions)
        for b in actions[i + 1 :]
        if place[a.stage] == place[b.stage] and not before.has_edge(a, b) and not before.has_edge(b, a)
    ]
    first = {pair: len(actions) + 1 + i for i, pair in enumerate(pairs)}
    """Variables: start times, the makespan, then whether the first of a pair goes first."""
    makespan, size = len(actions), len(actions) + 1 + len(pairs)
    rows: list[tuple[dict[int, float], float]] = []  # sum of coefficients times variables <= limit
    for a, b, data in order.edges(data=True):
        rows.append(({number[a]: 1.0, number[b]: -1.0}, -time[a] - data["delay"]))
    rows += [({number[a]: 1.0, makespan: -1.0}, -time[a]) for a in actions]
    for (a, b), y in first.items():
        rows.append(({number[a]: 1.0, number[b]: -1.0, y: below}, below - time[a]))
        rows.append(({number[b]: 1.0, number[a]: -1.0, y: -below}, -time[b]))
    if cap is not None:
        for action in actions:
            if action.kind != "W":
                rows.append(_memory(action, actions, costs, place, before, first, cap))
    entries = [(i, j, c) for i, (row, _) in enumerate(rows) for j, c in row.items()]
    at_row, at_column, held = (np.array(column) for column in zip(*entries, strict=True))
    matrix = coo_matrix((held, (at_row, at_column)), shape=(len(rows), size)).tocsr()
    low, high = np.zeros(size), np.ones(size)
    low[:makespan] = _earliest(order, time)
    high[: makespan + 1] = below
    low[makespan] = bound
    objective = np.zeros(size)
    objective[makespan] = 1.0
    found = milp(
        objective,
        constraints=LinearConstraint(matrix, -np.inf, np.array([limit for _, limit in rows])),
        integrality=np.array([0] * (makespan + 1) + [1] * len(pairs)),
        bounds=Bounds(low, high),
        options={"time_limit": seconds},
    )
    proved = below if found.status == 2 else max(bound, getattr(found, "mip_dual_bound", None) or bound)
    if found.x is None:
        return None, proved
    starts = {a: float(found.x[number[a]]) for a in actions}
    made: list[list[Action]] = [[] for _ in range(max(place) + 1)]
    for action in sorted(actions, key=starts.__getitem__):
        made[place[action.stage]].append(action)
    return made, proved


def _precedence(costs: Sequence[StageCost], place: Sequence[int], micro_batches: int, communication: float) -> Any:
    """What must be over before what starts, with the time in between."""
    order = nx.DiGraph()
    last = len(costs) - 1
    for mb in range(micro_batches):
        for s in range(len(costs)):
            f, i, w = (Action(kind, s, mb) for kind in ("F", "I", "W"))
            order.add_edge(f, i, delay=0.0)
            order.add_edge(i, w, delay=0.0)
            if s < last:
                delay = communication if place[s] != place[s + 1] else 0.0
                order.add_edge(f, Action("F", s + 1, mb), delay=delay)
                order.add_edge(Action("I", s + 1, mb), i, delay=delay)
            if mb:
                for one in (f, i, w):
                    order.add_edge(Action(one.kind, s, mb - 1), one, delay=0.0)
    return order


def _earliest(order: Any, time: dict[Action, float]) -> list[float]:
    start: dict[Action, float] = {}
    for action in nx.topological_sort(order):
        start[action] = max(
            (start[b] + time[b] + order.edges[b, action]["delay"] for b in order.predecessors(action)), default=0.0
        )
    return [start[a] for a in order]


def _memory(
    action: Action,
    actions: Sequence[Action],
    costs: Sequence[StageCost],
    place: Sequence[int],
    before: Any,
    first: dict[tuple[Action, Action], int],
    cap: float,
) -> tuple[dict[int, float], float]:
    """What a process holds once an action has run, over the cap."""
    row: dict[int, float] = {}
    limit = cap
    for other in actions:
        if place[other.stage] != place[action.stage]:
            continue
        cost = costs[other.stage]
        change = {"F": cost.saved, "I": cost.held - cost.saved, "W": -cost.held}[other.kind]
        if other is action or before.has_edge(other, action):
            limit -= change
        elif (y := first.get((other, action))) is not None:
            row[y] = change
        elif (y := first.get((action, other))) is not None:
            row[y] = -change
            limit -= change
    return row, limit
