"""The simulator against real processes: the engine runs its schedules on stages that sleep instead of computing.

    python -m benchmarks.pipeline_simulator --processes 4

Every stage has its own times for F, I and W. What the engine itself takes per forward or backward, its messages
included, is one number: that for which the simulator is right about one schedule (LoopedBFS) of two processes, measured
first. Eight schedules are compared then: those of the engine and one made for the costs. GPipe and 1F1B run pairs of
stages as one.

Writes `results/pipeline_simulator_<processes>.json`.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import statistics
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from graphrewrite.backends.distributed import actions_of, optimise, simulate
from graphrewrite.backends.distributed.pipeline import FOLDED, SINGLE
from graphrewrite.backends.distributed.simulate import Action, StageCost
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from benchmarks.common import write
from graphrewrite._compat import custom_schedule

NAMES = ("GPipe", "1F1B", "LoopedBFS", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
CALIBRATION = "LoopedBFS"
SEEDS = {2: 1, 4: 1, 8: 8}
"""Draws whose simulated schedules lie apart from one another."""


class Wait(torch.autograd.Function):
    """Its backward sleeps."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds = seconds
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        time.sleep(ctx.seconds)
        return cotangents[0], None


class Sleeper(nn.Module):
    """A stage of given times."""

    def __init__(self, cost: StageCost) -> None:
        super().__init__()
        self.cost = cost
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.cost.forward)
        return Wait.apply(x + self.bias, self.cost.backward)  # type: ignore[no-any-return]

    def weight_task(self) -> Any:
        return lambda: time.sleep(self.cost.weight)


def stage_costs(processes: int, unit: float) -> list[StageCost]:
    draw = random.Random(SEEDS[processes])
    return [
        StageCost(*(unit * round(x * draw.uniform(0.8, 1.2), 2) for x in (1, 1.3, 0.7))) for _ in range(2 * processes)
    ]


def made(costs: list[StageCost]) -> list[list[Action]]:
    ranks = len(costs) // 2
    return optimise(costs, [*range(ranks), *reversed(range(ranks))], 2 * ranks, width=0).actions


def merged(costs: Sequence[StageCost]) -> list[StageCost]:
    return [
        StageCost(a.forward + b.forward, a.backward + b.backward, a.weight + b.weight)
        for a, b in zip(costs[::2], costs[1::2], strict=True)
    ]


def build(schedule: str | list[list[Action]], costs: Sequence[StageCost], micro_batches: int) -> Any:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if not isinstance(schedule, str):
        indices = sorted({a.stage for a in schedule[rank]})
    elif schedule in FOLDED:
        indices = [rank, 2 * ranks - 1 - rank]
    else:
        indices = list(range(rank, len(costs), ranks))
    outline = torch.empty(1, 4, device="meta")
    stages = []
    for index in indices:
        module = Sleeper(costs[index])
        given = outline.clone().requires_grad_(index > 0)
        stages.append(
            PipelineStage(
                module,
                index,
                len(costs),
                torch.device("cpu"),
                input_args=(given,),
                output_args=(outline.clone().requires_grad_(),),
                dw_builder=module.weight_task,
            )
        )

    def loss(out: torch.Tensor, _: Any) -> torch.Tensor:
        return out.sum()

    if not isinstance(schedule, str):
        listed = [[(a.stage, a.kind, a.micro_batch) for a in own] for own in schedule]
        return custom_schedule(stages, micro_batches, loss, listed)
    kind = get_schedule_class(schedule)
    return kind(stages[0] if schedule in SINGLE else stages, micro_batches, loss_fn=loss, scale_grads=False)


def timed(runner: Any, costs: Sequence[StageCost], micro_batches: int, rounds: int) -> list[float]:
    """The makespan of a step, from the first start to the last end, on the machine's one clock."""
    own = {stage.stage_index for stage in getattr(runner, "_stages", None) or [runner._stage]}
    first, last = 0 in own, len(costs) - 1 in own
    x, y = torch.zeros(micro_batches, 4), torch.zeros(micro_batches)
    found = []
    for i in range(rounds + 1):
        dist.barrier()
        started = time.perf_counter()
        runner.step(*([x] if first else []), **({"target": y, "losses": []} if last else {}), return_outputs=False)
        ends: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ends, (started, time.perf_counter()))
        if i:  # the first step connects the processes
            found.append(max(e for _, e in ends) - min(s for s, _ in ends))
    return found


def with_engine(costs: Sequence[StageCost], extra: float) -> list[StageCost]:
    """What the engine takes, added to forwards and input cotangents: weight gradients send nothing."""
    return [StageCost(c.forward + extra, c.backward + extra, c.weight) for c in costs]


def calibrated(measured: float, costs: Sequence[StageCost], micro_batches: int) -> float:
    """The extra time per action with which the simulator is right."""
    actions = actions_of(CALIBRATION, 2, micro_batches, len(costs))
    low, high = 0.0, max(c.forward for c in costs)
    for _ in range(40):
        middle = (low + high) / 2
        if simulate(actions, with_engine(costs, middle)).makespan < measured:
            low = middle
        else:
            high = middle
    return low


def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def work(rank: int, ranks: int, at: int, given: argparse.Namespace, calibration: bool, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(at))
    dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
    costs = stage_costs(ranks, given.unit / 1e3)
    count = 2 * ranks
    if calibration:
        taken = timed(build(CALIBRATION, costs, count), costs, count, 3)
        if rank == 0:
            results.put(statistics.median(taken))
    else:
        for name in (*NAMES, "made"):
            own = merged(costs) if name in SINGLE else costs
            chosen: Any = name
            if name == "made":
                chosen = made(costs)
            taken = timed(build(chosen, own, count), own, count, given.rounds)
            if rank == 0:
                results.put((name, taken))
    dist.destroy_process_group()


def launch(ranks: int, given: argparse.Namespace, calibration: bool) -> list[Any]:
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(work, (ranks, port(), given, calibration, results), nprocs=ranks)
    found = []
    while not results.empty():
        found.append(results.get())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=4, choices=sorted(SEEDS))
    parser.add_argument("--unit", type=float, default=40.0, help="milliseconds of an average forward")
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    (taken,) = launch(2, given, True)
    extra = calibrated(taken, stage_costs(2, given.unit / 1e3), 4)
    ranks, costs = given.processes, stage_costs(given.processes, given.unit / 1e3)
    rows = []
    for name, taken in launch(ranks, given, False):
        single = name in SINGLE
        actions = made(costs) if name == "made" else actions_of(name, ranks, 2 * ranks, (1 if single else 2) * ranks)
        simulated = simulate(actions, with_engine(merged(costs) if single else costs, extra))
        measured = statistics.median(taken)
        rows.append(
            {
                "schedule": name,
                "processes": ranks,
                "micro_batches": 2 * ranks,
                "unit_ms": given.unit,
                "engine_ms_per_action": round(extra * 1e3, 3),
                "simulated_s": round(simulated.makespan, 4),
                "measured_s": round(measured, 4),
                "runs_s": [round(t, 4) for t in taken],
                "measured_over_simulated": round(measured / simulated.makespan, 4),
                "simulated_bubble": round(simulated.bubble, 4),
            }
        )
        print(*(f"{k} {v}" for k, v in rows[-1].items()), sep="   ", flush=True)
    orders = [[r["schedule"] for r in sorted(rows, key=lambda r: r[key])] for key in ("simulated_s", "measured_s")]
    rows.append({"order_simulated": orders[0], "order_measured": orders[1], "same_order": orders[0] == orders[1]})
    print(rows[-1])
    print("written to", write(f"pipeline_simulator_{ranks}", rows))


if __name__ == "__main__":
    main()
