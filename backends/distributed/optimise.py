"""Schedules made for measured costs: fixed ones are only near the best where F, I and W take equally long.

A greedy scheduler runs the pipeline in simulated time. A process that is free takes what is ready, in an order of
preference, and never holds more than its cap. Several preferences and warm-ups are tried; the shortest schedule wins.
Where it does not reach the lower bound, orders that repeat a block are tried, which hold little, a beam search goes on,
and for small pipelines, on request, an integer program.
`Pipeline` hands the schedule to the engine's own runtime.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from graphrewrite.backends.distributed.repeated import orders
from graphrewrite.backends.distributed.search import beam
from graphrewrite.backends.distributed.simulate import Action, Kind, StageCost, Timeline, simulate
from graphrewrite.backends.distributed.solve import solve

from graphrewrite.errors import RuleError

_CLOSE = 1e-9


@dataclass(frozen=True)
class Optimised:
    """A schedule made for given costs.

    Attributes:
        actions: Per process, in order.
        timeline: As simulated.
        bound: No schedule of these stages on these processes, under the cap, is shorter.
    """

    actions: list[list[Action]]
    timeline: Timeline
    bound: float

    @property
    def gap(self) -> float:
        """How much longer than the bound it takes, as a share of it."""
        return self.timeline.makespan / self.bound - 1

    @property
    def proved(self) -> bool:
        """Whether no schedule is shorter."""
        return self.gap <= _CLOSE


def lower_bound(
    costs: Sequence[StageCost],
    place: Sequence[int],
    micro_batches: int,
    communication: float,
    cap: float | None = None,
) -> float:
    """What no schedule can be shorter than.

    A process cannot start before the first micro-batch is there, and then does all of its work. Under a cap it waits,
    too: until its first input cotangents are there, it can run no more forwards than the cap holds.
    """
    count = len(costs)
    hop = [communication if s and place[s] != place[s - 1] else 0.0 for s in range(count)]
    before = [0.0] * count
    for s in range(1, count):
        before[s] = before[s - 1] + costs[s - 1].forward + hop[s]
    through = before[-1] + costs[-1].forward
    after = [through] * count
    """When the input cotangents of a stage can start."""
    for s in reversed(range(count - 1)):
        after[s] = after[s + 1] + costs[s + 1].backward + hop[s + 1]
    bounds = [after[0] + costs[0].backward + costs[0].weight]
    for rank in set(place):
        own = [s for s in range(count) if place[s] == rank]
        start = min(before[s] for s in own)
        waits = 0.0
        if cap is not None:
            forwards = _forwards([costs[s] for s in own], micro_batches, cap)
            waits = max(0.0, min(after[s] for s in own) - start - forwards)
        bounds.append(start + waits + micro_batches * sum(costs[s].total for s in own))
    return max(bounds)


def _forwards(costs: Sequence[StageCost], micro_batches: int, cap: float) -> float:
    """The most time that forwards can take whose saved bytes are within a cap."""
    room, time = cap, 0.0
    equal = len({cost.saved for cost in costs}) == 1
    for cost in sorted(costs, key=lambda c: c.forward / c.saved if c.saved else float("inf"), reverse=True):
        fits = room / cost.saved + _CLOSE if cost.saved else float("inf")
        # of equal sizes a whole number fits; else a part of one is let in, which only weakens the bound
        number = min(float(micro_batches), float(int(fits)) if equal and cost.saved else fits)
        time += number * cost.forward
        room -= number * cost.saved
    return time


def optimise(
    costs: Sequence[StageCost],
    place: Sequence[int],
    micro_batches: int,
    *,
    communication: float = 0.0,
    cap: float | None = None,
    width: int = 24,
    solve_seconds: float = 0.0,
) -> Optimised:
    """The shortest schedule found.

    Args:
        costs: Per stage, as measured or counted.
        place: The process of each stage.
        micro_batches: How many per step.
        communication: Time until what one process sends has arrived at another.
        cap: The most bytes that a process may hold; None: no cap.
        width: How many partial schedules the beam search keeps, where the greedy one does not reach the bound; 0: it
            does not run.
        solve_seconds: How long SciPy's integer-program solver may try what the search left open: small pipelines only.

    Raises:
        RuleError: The cap does not hold one micro-batch.
    """
    if len(costs) != len(place):
        raise RuleError(f"{len(costs)} costs for {len(place)} stages")
    ranks = max(place) + 1
    need = max(sum(costs[s].saved for s in range(len(costs)) if place[s] == r) for r in range(ranks))
    if cap is not None and cap < need:
        raise RuleError(f"one micro-batch takes {need:g} bytes in one process, the cap is {cap:g}")
    bound = lower_bound(costs, place, micro_batches, communication, cap)
    limit = math.inf if cap is None else cap

    def better(best: Optimised | None, tried: Iterable[list[list[Action]] | None]) -> Optimised | None:
        """The shortest within the cap; of equally long ones that which holds least."""
        for actions in tried:
            if actions is None:
                continue
            timeline = simulate(actions, costs, communication=communication)
            if max(timeline.peak) <= limit * (1 + _CLOSE) and (best is None or _key(timeline) < _key(best.timeline)):
                best = Optimised(actions, timeline, bound)
        return best

    def length(best: Optimised | None) -> float:
        return math.inf if best is None else best.timeline.makespan

    # without a cap, several depths of warm-up
    rooms = [cap] if cap is not None else [need * n for n in range(ranks, 3 * ranks + 1, max(1, ranks // 2))]
    free = (
        greedy(costs, place, micro_batches, communication, room, order, eager=eager, deep=deep)
        for order, eager, deep in itertools.product(("IFW", "FIW", "IWF"), (True, False), (True, False))
        for room in rooms
    )
    best = better(None, free)
    if length(best) > bound + _CLOSE:
        repeated = (
            greedy(costs, place, micro_batches, communication, limit, deep=deep, given=given)
            for given, deep in itertools.product(orders(place, micro_batches), (True, False))
        )
        best = better(best, repeated)
    if width and length(best) > bound + _CLOSE:
        below = length(best)
        found = beam(costs, place, micro_batches, communication, limit, width=width, below=below, bound=bound)
        best = better(best, [found])
    if best is None:
        raise RuleError("no schedule keeps the cap", remedy="raise the cap, or cut the model into more stages")
    if solve_seconds and length(best) > bound + _CLOSE:
        below = length(best)
        solved, bound = solve(
            costs, place, micro_batches, communication, cap, bound=bound, below=below, seconds=solve_seconds
        )
        best = better(best, [solved])
        assert best is not None
    return replace(best, bound=bound)


def _key(timeline: Timeline) -> tuple[float, float]:
    return round(timeline.makespan, 9), max(timeline.peak)


def greedy(
    costs: Sequence[StageCost],
    place: Sequence[int],
    micro_batches: int,
    communication: float = 0.0,
    limit: float = math.inf,
    order: str = "IFW",
    *,
    eager: bool = False,
    deep: bool = False,
    given: Sequence[Sequence[Action]] | None = None,
) -> list[list[Action]] | None:
    """One run: whenever a process is free, the best of what is ready; None if it stops.

    `limit` is the number of bytes that a process may hold, `order` the kinds by preference. `eager`: of
    forwards, those of later stages go first. `deep`: weight gradients wait if something else could start before they
    are half over. `given`: the order that all but weight gradients keep.
    """
    last, ranks = len(costs) - 1, max(place) + 1
    waiting: list[dict[Action, float]] = [{} for _ in range(ranks)]
    waiting[place[0]] = {Action("F", 0, mb): 0.0 for mb in range(micro_batches)}
    live = [0.0] * ranks
    clock = [0.0] * ranks
    made: list[list[Action]] = [[] for _ in range(ranks)]
    total = 3 * len(costs) * micro_batches
    events = [(0.0, rank) for rank in range(ranks)]
    heapq.heapify(events)

    def rank_of(action: Action) -> tuple[int, int, int]:
        stage = -action.stage if (eager or action.kind == "I") else action.stage
        return order.index(action.kind), action.micro_batch if action.kind != "F" or not eager else 0, stage

    def fits(action: Action) -> bool:
        if action.kind != "F":
            held = costs[action.stage].held - costs[action.stage].saved if action.kind == "I" else 0.0
            return live[place[action.stage]] + held <= limit
        rank = place[action.stage]
        # the way back of what is on its way must stay free: first stages leave room for their later ones
        later = sum(costs[s].saved for s in range(action.stage + 1, last + 1) if place[s] == rank)
        then = live[rank] + costs[action.stage].saved
        return then + later <= limit or (action.stage > 0 and then <= limit)

    def next_in_turn(action: Action) -> bool:
        rank = place[action.stage]
        return given is None or action.kind == "W" or action == given[rank][turn[rank]]

    idle, turn = 0, [0] * ranks
    while sum(map(len, made)) < total and events:
        now, rank = heapq.heappop(events)
        if now < clock[rank]:
            continue
        ready = waiting[rank]
        own = [a for a in ready if next_in_turn(a) and fits(a)]
        there = [a for a in own if ready[a] <= now]
        chosen = min(there, key=lambda a: (*rank_of(a), a.stage), default=None)
        if chosen is not None and chosen.kind == "W" and deep:
            # something better may come before it is over
            soon = [a for a in own if a.kind != "W" and now < ready[a] < now + 0.5 * costs[chosen.stage].weight]
            if soon:
                heapq.heappush(events, (min(ready[a] for a in soon), rank))
                continue
        if chosen is None:
            times = [at for at in ready.values() if at > now]
            if times:
                heapq.heappush(events, (min(times), rank))
            idle += 1
            if idle > 50 * total:
                return None
            continue
        del ready[chosen]
        stage, mb, kind = chosen.stage, chosen.micro_batch, chosen.kind
        end = clock[rank] = now + costs[stage].time(kind)
        made[rank].append(chosen)
        turn[rank] += kind != "W"
        following: list[tuple[Kind, int]] = []
        if kind == "F":
            live[rank] += costs[stage].saved
            following = [("F", stage + 1)] if stage < last else [("I", stage)]
        elif kind == "I":
            live[rank] += costs[stage].held - costs[stage].saved
            following = [("W", stage)]
            if stage:
                following.append(("I", stage - 1))
        else:
            live[rank] -= costs[stage].held
        for what, target in following:
            at = end + (communication if place[target] != rank else 0.0)
            waiting[place[target]][Action(what, target, mb)] = at
            if place[target] != rank:
                heapq.heappush(events, (max(at, clock[place[target]]), place[target]))
        heapq.heappush(events, (end, rank))
    return made if sum(map(len, made)) == total else None
