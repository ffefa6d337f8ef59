"""A beam search over schedules: of the pipelines that ran equally many actions, the most promising go on.

A partial schedule is a state of all processes. The process that is free first either runs the next micro-batch of an
action that is ready, or waits for something to arrive; micro-batches cost the same, so that each stage takes them in
order. States that can no longer beat the best schedule known are dropped: by the work that is left to each process, and
by the way that is left to the last micro-batch.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from graphrewrite.backends.distributed.simulate import Action, Kind, StageCost

_CLOSE = 1e-9


@dataclass(frozen=True)
class _State:
    """Per process: time, bytes held and work that is left. Per stage: micro-batches run, by kind, and what arrived."""

    clock: tuple[float, ...]
    live: tuple[float, ...]
    left: tuple[float, ...]
    count: dict[Kind, tuple[int, ...]]
    arrived: dict[Kind, tuple[tuple[float, ...], ...]]
    trace: Any = None
    idle: float = 0.0


def beam(
    costs: Sequence[StageCost],
    place: Sequence[int],
    micro_batches: int,
    communication: float,
    cap: float,
    *,
    width: int,
    below: float,
    bound: float,
) -> list[list[Action]] | None:
    """A schedule that takes less than `below`; None if none was found.

    Args:
        costs: Per stage.
        place: The process of each stage.
        micro_batches: How many per step.
        communication: Time until what one process sends has arrived at another.
        cap: The most bytes that a process may hold.
        width: How many states go on.
        below: What the best schedule known takes.
        bound: What no schedule can be shorter than: the search ends there.
    """
    return _Search(costs, place, micro_batches, communication, cap).run(width, below, bound)


class _Search:
    def __init__(
        self, costs: Sequence[StageCost], place: Sequence[int], micro_batches: int, communication: float, cap: float
    ) -> None:
        self.costs, self.place, self.count, self.cap = costs, place, micro_batches, cap
        self.ranks, self.last = max(place) + 1, len(costs) - 1
        self.own = [[s for s in range(len(costs)) if place[s] == r] for r in range(self.ranks)]
        self.delay = [
            communication if s < self.last and place[s] != place[s + 1] else 0.0 for s in range(len(costs))
        ]  # to the next stage, and back
        self.tail = [costs[0].weight]
        """What must follow the last input cotangents of a stage."""
        for s in range(self.last):
            self.tail.append(self.tail[-1] + costs[s].backward + self.delay[s])
        self.shortest = min(min(c.forward, c.backward) for c in costs) + min((d for d in self.delay if d), default=0.0)

    def run(self, width: int, below: float, bound: float) -> list[list[Action]] | None:
        stages, count = len(self.costs), self.count
        left = tuple(count * sum(self.costs[s].total for s in own) for own in self.own)
        none: tuple[tuple[float, ...], ...] = ((),) * stages
        zero = (0.0,) * self.ranks
        level = [
            _State(
                zero,
                zero,
                left,
                dict.fromkeys(("F", "I", "W"), (0,) * stages),
                {"F": ((0.0,) * count, *none[1:]), "I": none},
            )
        ]
        best = None
        while level:
            following: dict[Any, tuple[Any, _State]] = {}
            for state in level:
                rank = min((r for r in range(self.ranks) if state.left[r] > _CLOSE), key=lambda r: state.clock[r])
                for new in self._expand(state, rank):
                    least = self._least(new)
                    if least >= below - _CLOSE:
                        continue
                    if all(work <= _CLOSE for work in new.left):
                        best, below = new.trace, least
                        if below <= bound + _CLOSE:
                            return self._actions(best)
                        continue
                    now = state.clock[rank]
                    key = (*new.count.values(), tuple(round(c - now, 6) for c in new.clock))
                    score = (round(least, 6), self._critical(new), new.idle)
                    if key not in following or score < following[key][0]:
                        following[key] = (score, new)
            level = [new for _, new in heapq.nsmallest(width, following.values(), key=lambda one: one[0])]
        return None if best is None else self._actions(best)

    def _expand(self, state: _State, rank: int) -> list[_State]:
        now = state.clock[rank]
        made, wakes = [], []
        for stage in self.own[rank]:
            cost = self.costs[stage]
            done = {kind: held[stage] for kind, held in state.count.items()}
            if done["W"] < done["I"]:
                made.append(self._after(state, rank, "W", stage))
            for kind in ("F", "I"):
                arrived = state.arrived[kind][stage]
                if done[kind] >= len(arrived) or (kind == "I" and done["I"] >= done["F"]):
                    continue
                if kind == "F" and state.live[rank] + cost.saved > self.cap + _CLOSE:
                    continue
                if kind == "I" and state.live[rank] + cost.held - cost.saved > self.cap + _CLOSE:
                    continue
                at = arrived[done[kind]]
                if at <= now + _CLOSE:
                    made.append(self._after(state, rank, kind, stage))
                else:
                    wakes.append(at)
        others = [state.clock[r] for r in range(self.ranks) if r != rank and state.left[r] > _CLOSE]
        if others:
            wakes.append(min(others) + self.shortest)  # nothing unknown arrives before
        if wakes and (wake := min(wakes)) > now + _CLOSE:
            clock = (*state.clock[:rank], wake, *state.clock[rank + 1 :])
            made.append(replace(state, clock=clock, idle=state.idle + wake - now))
        return made

    def _after(self, state: _State, rank: int, kind: Kind, stage: int) -> _State:
        cost = self.costs[stage]
        took = cost.time(kind)
        end = state.clock[rank] + took
        change = {"F": cost.saved, "I": cost.held - cost.saved, "W": -cost.held}[kind]
        arrived = state.arrived
        if kind == "F" and stage < self.last:
            arrived = {**arrived, "F": _appended(arrived["F"], stage + 1, end + self.delay[stage])}
        elif kind == "F":
            arrived = {**arrived, "I": _appended(arrived["I"], stage, end)}
        elif kind == "I" and stage:
            arrived = {**arrived, "I": _appended(arrived["I"], stage - 1, end + self.delay[stage - 1])}
        done = state.count[kind]
        return _State(
            (*state.clock[:rank], end, *state.clock[rank + 1 :]),
            _added(state.live, rank, change),
            _added(state.left, rank, -took),
            {**state.count, kind: (*done[:stage], done[stage] + 1, *done[stage + 1 :])},
            arrived,
            (Action(kind, stage, done[stage]), state.trace),
            state.idle,
        )

    def _least(self, state: _State) -> float:
        """No schedule that goes on from here is shorter."""
        least = max(clock + left for clock, left in zip(state.clock, state.left, strict=True))
        for stage, cost in enumerate(self.costs):
            forward, backward = self.count - state.count["F"][stage], self.count - state.count["I"][stage]
            if backward:
                work = forward * cost.forward + backward * cost.backward
                least = max(least, state.clock[self.place[stage]] + work + self.tail[stage])
        return least

    def _critical(self, state: _State) -> float:
        """Work that others may wait for: weight gradients fill what is idle later."""
        return sum(
            (self.count - f) * c.forward + (self.count - i) * c.backward
            for c, f, i in zip(self.costs, state.count["F"], state.count["I"], strict=True)
        )

    def _actions(self, trace: Any) -> list[list[Action]]:
        found: list[list[Action]] = [[] for _ in range(self.ranks)]
        while trace is not None:
            action, trace = trace
            found[self.place[action.stage]].append(action)
        return [own[::-1] for own in found]


def _appended(held: tuple[tuple[float, ...], ...], at: int, new: float) -> tuple[tuple[float, ...], ...]:
    return (*held[:at], (*held[at], new), *held[at + 1 :])


def _added(held: tuple[float, ...], at: int, change: float) -> tuple[float, ...]:
    return (*held[:at], held[at] + change, *held[at + 1 :])
