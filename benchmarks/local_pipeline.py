"""Pipelines in which no stage waits for a cotangent: messages that the engine sends back, and the measured bubble.

    python -m benchmarks.local_pipeline --processes 2

Stages sleep in their forward and in their backward instead of computing, for the same times in all of them. The bubble
is the share of the processes' time, from the first start to the last end of a step, in which they do not sleep: what
the engine and the heads take counts as bubble. Beside it stand the simulated bubble and that of 1F1B, which waits for
cotangents. For DFA, whose error is broadcast once per step, and whose stages learn then, it follows from the forward
pipeline: the forwards of p - 1 micro-batches over the whole.

Writes `results/local_pipeline_<processes>.json`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from graphrewrite.backends.distributed import DFAPipeline, LocalPipeline, actions_of, cut, simulate
from graphrewrite.backends.distributed.simulate import StageCost
from torch import nn
from torch.distributed.pipelining import schedules

from benchmarks.common import write
from benchmarks.pipeline_simulator import port

WIDTH, SIZE = 8, 2


@torch.library.custom_op("graphrewrite_benchmarks::wait", mutates_args=())
def wait(x: torch.Tensor, forward: float, backward: float) -> torch.Tensor:
    """Sleeps, and so does its backward."""
    time.sleep(forward)
    return x.clone()


@wait.register_fake
def _(x: torch.Tensor, forward: float, backward: float) -> torch.Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.backward = inputs[2]


def _backward(ctx: Any, cotangent: torch.Tensor) -> Any:
    return wait(cotangent, ctx.backward, 0.0), None, None


wait.register_autograd(_backward, setup_context=_keep)


class Block(nn.Module):
    def __init__(self, cost: StageCost) -> None:
        super().__init__()
        self.cost = cost
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return wait(self.linear(x), self.cost.forward, self.cost.backward + self.cost.weight)  # type: ignore[no-any-return]


def work(rank: int, ranks: int, at: int, given: argparse.Namespace, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(at))
    dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
    sent = {"onward": 0, "back": 0}
    p2p = schedules._batch_p2p

    def counted(operations: list[dist.P2POp], **options: Any) -> Any:
        for one in operations:
            if one.op is dist.isend:
                sent["onward" if one.group_peer > rank else "back"] += 1
        return p2p(operations, **options)

    schedules._batch_p2p = counted
    cost, count = costs(given), given.micro_batches
    x, y = torch.randn(SIZE * count, WIDTH), torch.randint(0, WIDTH, (SIZE * count,))
    for name in ("local", "dfa"):
        torch.manual_seed(0)
        made = cut(nn.Sequential(*[Block(cost) for _ in range(ranks)]), x[:SIZE], ranks)
        head = lambda out: nn.Linear(out.shape[-1], WIDTH)  # noqa: E731
        pipeline = LocalPipeline(made, head, count) if name == "local" else DFAPipeline(made, count)
        taken = []
        for i in range(given.rounds + 1):
            sent.update(onward=0, back=0)
            dist.barrier()
            started = time.perf_counter()
            pipeline.step(x, y)
            ends: list[Any] = [None] * ranks
            dist.all_gather_object(ends, (started, time.perf_counter(), dict(sent)))
            if i:  # the first step captures, and connects the processes
                taken.append(max(e for _, e, _ in ends) - min(s for s, _, _ in ends))
        if rank == 0:
            results.put((name, taken, {way: sum(one[way] for *_, one in ends) for way in sent}))
    dist.destroy_process_group()


def costs(given: argparse.Namespace) -> StageCost:
    unit = given.unit / 1e3
    return StageCost(unit, 1.3 * unit, 0.7 * unit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--unit", type=float, default=80.0, help="milliseconds of a forward")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    ranks, count, cost = given.processes, given.micro_batches, costs(given)
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(work, (ranks, port(), given, results), nprocs=ranks)
    fixed = simulate(actions_of("1F1B", ranks, count), [cost] * ranks).bubble
    rows = []
    for _ in range(2):
        name, taken, sent = results.get()
        whole = statistics.median(taken)
        late, busy = (ranks - 1) * cost.forward, count * cost.total
        onward = simulate(actions_of("ForwardOnly", ranks, count), [cost] * ranks, local=True)
        rows.append(
            {
                "rule": name,
                "processes": ranks,
                "micro_batches": count,
                "unit_ms": given.unit,
                "messages_onward": sent["onward"],
                "messages_back": sent["back"],
                "step_s": round(whole, 4),
                "measured_bubble": round(1 - busy / whole, 4),
                "simulated_bubble": round(onward.bubble if name == "local" else late / (late + busy), 4),
                "simulated_bubble_of_1F1B": round(fixed, 4),
            }
        )
        print(*(f"{k} {v}" for k, v in rows[-1].items()), sep="   ")
    print("written to", write(f"local_pipeline_{ranks}", rows))


if __name__ == "__main__":
    main()
