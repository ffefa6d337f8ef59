"""What a schedule would take, without running it: its timeline, its bubble and its memory.

The actions are those of the engine's own schedules, in the order in which each process runs them; costs are given per
stage. A process runs one action at a time and waits for what the action reads; what is sent arrives after the time of
the communication, which overlaps with computation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from graphrewrite._compat import pipeline_actions
from graphrewrite.errors import RuleError

Kind = Literal["F", "I", "W", "B"]
"""Forward; input cotangents; weight gradients; both at once."""


@dataclass(frozen=True)
class Action:
    """One thing that a process does.

    Attributes:
        kind: What.
        stage: Of which stage.
        micro_batch: For which micro-batch.
        joined: Whether the engine runs it and the next one as one: what it sends leaves when both are over.
    """

    kind: Kind
    stage: int
    micro_batch: int
    joined: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


@dataclass(frozen=True)
class StageCost:
    """What one micro-batch costs at a stage.

    Attributes:
        forward: Time of the forward.
        backward: Time of the input cotangents.
        weight: Time of the weight gradients.
        saved: Bytes held from the forward to the backward.
        held: Bytes held from the backward to the weight gradients.
    """

    forward: float = 1.0
    backward: float = 1.0
    weight: float = 1.0
    saved: float = 1.0
    held: float = 0.0

    @property
    def total(self) -> float:
        """Time of a micro-batch, all in all."""
        return self.forward + self.backward + self.weight

    def time(self, kind: Kind) -> float:
        """Of an action."""
        parts = {"F": self.forward, "I": self.backward, "W": self.weight, "B": self.backward + self.weight}
        return parts[kind]


@dataclass(frozen=True)
class Span:
    """An action with its place in time."""

    action: Action
    rank: int
    start: float
    end: float


@dataclass
class Timeline:
    """A simulated step.

    Attributes:
        spans: All actions, by process in order.
        peak: The most bytes that each process holds at once.
        messages: Activations and cotangents sent between processes.
    """

    spans: list[list[Span]]
    peak: list[float]
    messages: dict[str, int] = field(default_factory=dict)

    @property
    def makespan(self) -> float:
        """From the first action to the end of the last one."""
        return max((span.end for rank in self.spans for span in rank), default=0.0)

    @property
    def busy(self) -> float:
        """Time that processes compute, added up."""
        return sum(span.end - span.start for rank in self.spans for span in rank)

    @property
    def bubble(self) -> float:
        """The share of the processes' time in which they wait."""
        whole = self.makespan * len(self.spans)
        return 1 - self.busy / whole if whole else 0.0


def ranks_of(schedule: str, stages: int) -> int:
    """How many processes a schedule spreads stages over: one each, or two on each where it runs several."""
    if schedule in ("GPipe", "1F1B", "ForwardOnly"):
        return stages
    if stages % 2:
        raise RuleError(f"{schedule} runs two stages per process: their number is even, not {stages}")
    return stages // 2


def actions_of(schedule: str, ranks: int, micro_batches: int, stages: int | None = None) -> list[list[Action]]:
    """The actions of one of the engine's schedules, per process.

    Args:
        schedule: `"GPipe"`, `"1F1B"`, `"Interleaved1F1B"`, `"InterleavedZeroBubble"`, `"ZBVZeroBubble"`, ...; or
            `"ForwardOnly"`: what a pipeline of local rules runs, where each stage learns right behind its forward.
        ranks: Number of processes.
        micro_batches: Number of micro-batches.
        stages: Number of stages; default: what the schedule runs at least.
    """
    if ranks < 1 or micro_batches < 1:
        raise RuleError(f"{ranks} processes and {micro_batches} micro-batches: there must be at least one of each")
    if schedule == "ForwardOnly":
        return [[Action(kind, rank, i) for i in range(micro_batches) for kind in ("F", "B")] for rank in range(ranks)]
    per_rank = None if stages is None else stages // ranks
    if stages is not None and (per_rank == 0 or stages % ranks):
        raise RuleError(f"{stages} stages cannot be spread evenly over {ranks} processes")
    try:
        found = pipeline_actions(schedule, ranks, micro_batches, per_rank)
    except (ValueError, AssertionError, KeyError) as error:
        raise RuleError(
            f"{schedule} with {micro_batches} micro-batches and {stages or 'its'} stages on {ranks} processes: {error}",
            remedy="GPipe and 1F1B run one stage per process, ZBVZeroBubble and DualPipeV two, the others two or more",
        ) from error
    return [[Action(kind, stage, mb, joined) for stage, kind, mb, joined in rank] for rank in found]  # type: ignore[arg-type]


def simulate(
    actions: Sequence[Sequence[Action]],
    costs: Sequence[StageCost] | Mapping[int, StageCost],
    *,
    communication: float = 0.0,
    local: bool = False,
) -> Timeline:
    """Run actions in simulated time.

    Args:
        actions: Per process, in order.
        costs: Per stage.
        communication: Time until what one process sends has arrived at another.
        local: Whether each stage learns by itself: a backward waits for no cotangent.

    Raises:
        RuleError: An action waits for something that never happens.
    """
    place = {action.stage: rank for rank, own in enumerate(actions) for action in own}
    last = max(place, default=0)
    done: dict[Action, float] = {}
    sent: dict[Action, float] = {}
    clock = [0.0] * len(actions)
    queues = [list(own) for own in actions]
    spans: list[list[Span]] = [[] for _ in actions]
    messages = {"activations": 0, "cotangents": 0}

    def ready(action: Action) -> float | None:
        """When an action's inputs are there; None: not known yet."""
        times = []
        for group in _inputs(action, last, local):
            near = [done[a] for a in group if place[a.stage] == place[action.stage] and a in done]
            far = [sent[a] + communication for a in group if place[a.stage] != place[action.stage] and a in sent]
            at = near + far
            if not at:
                return None
            times += at
        return max(times, default=0.0)

    while any(queues):
        moved = False
        for rank, queue in enumerate(queues):
            while queue and (at := ready(queue[0])) is not None:
                action = queue.pop(0)
                start = max(clock[rank], at)
                done[action] = clock[rank] = start + costs[action.stage].time(action.kind)
                spans[rank].append(Span(action, rank, start, clock[rank]))
                if not action.joined:
                    for one in reversed(spans[rank]):
                        if one.action in sent:
                            break
                        sent[one.action] = clock[rank]
                moved = True
                for group in _inputs(action, last, local):
                    source = next(a for a in group if a in done)
                    if place[source.stage] != rank:
                        messages["activations" if source.kind == "F" else "cotangents"] += 1
        if not moved:
            waiting = ", ".join(f"process {r}: {queue[0]}" for r, queue in enumerate(queues) if queue)
            raise RuleError(f"the schedule does not go on: each process waits ({waiting})")
    return Timeline(spans, [_peak(own, costs) for own in spans], messages)


def _inputs(action: Action, last: int, local: bool) -> list[tuple[Action, ...]]:
    """What an action reads: of each group, the one that happens."""
    kind, stage, mb = action.kind, action.stage, action.micro_batch
    if kind == "F":
        return [(Action("F", stage - 1, mb),)] if stage else []
    if kind == "W":
        return [(Action("I", stage, mb),)]
    own: list[tuple[Action, ...]] = [(Action("F", stage, mb),)]
    if stage < last and not local:
        own.append((Action("I", stage + 1, mb), Action("B", stage + 1, mb)))
    return own


def _peak(spans: Sequence[Span], costs: Sequence[StageCost] | Mapping[int, StageCost]) -> float:
    live = peak = 0.0
    for span in spans:
        cost = costs[span.action.stage]
        if span.action.kind == "F":
            live += cost.saved
        peak = max(peak, live)
        if span.action.kind == "I":
            live += cost.held - cost.saved
        elif span.action.kind == "B":
            live -= cost.saved
        elif span.action.kind == "W":
            live -= cost.held
    return peak
