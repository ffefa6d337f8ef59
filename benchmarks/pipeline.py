"""Two real processes that compute: a step's time over the ideal, for the engine's schedules on both kinds of stages.

    python -m benchmarks.pipeline [--micro-batches 8] [--tokens 512]

Eight GPT blocks, one thread per process, each process on a core of its own where the system lets one say so: the
kernel else puts two processes that talk to each other on one core now and then. The ideal is half of the time that one
process takes for the same batch, micro-batch by micro-batch, in the same run; `both at once`, when each process does
that, tells how far two processes that have nothing to do with each other slow each other down, and its half is the
other ideal. `stock` stages are the eager modules with torch's own split; ours are compiled with `split_backward=True`,
also lowered by Inductor, which the stock schedules with a W refuse, and also under schedules made for the F, I and W
that were measured: with two stages per process, folded back, and with one. Rounds are interleaved over schedules;
medians. The processor time of both processes over that of the one tells the work that a schedule adds from the time
that it waits. glibc keeps freed memory in all of them, so that no schedule pays for pages.

Writes `results/pipeline_<micro-batches>_<tokens of a micro-batch>.json`.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import resource
import socket
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from graphrewrite.backends.distributed import Pipeline, cut, optimise
from graphrewrite.backends.distributed.pipeline import SINGLE, stages_of_rank
from graphrewrite.backends.distributed.simulate import StageCost
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

import graphrewrite as gr
from benchmarks.common import keep_memory, write
from benchmarks.overhead import Layer

WIDTH, HEADS, LAYERS, SEQUENCES = 256, 4, 8, 2
STOCK = ("1F1B", "Interleaved1F1B", "ZBVZeroBubble", "DualPipeV")
HELD = 3
"""Micro-batches that a process may hold under a schedule that is made; ZBVZeroBubble holds two."""
OURS = tuple(itertools.product(("ZBVZeroBubble", "made", "made, one stage each"), ("eager", "inductor")))


def mean_square(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs - targets).square().mean()


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Layer(WIDTH, HEADS) for _ in range(LAYERS)])


def stock(schedule: str, micro_batches: int, outline: torch.Tensor) -> Callable[[Any, Any], Any]:
    rank = dist.get_rank()
    count = 2 if schedule in SINGLE else 4
    size, layers = LAYERS // count, model()
    stages = []
    for index in stages_of_rank(schedule, rank, 2, count):
        part = nn.Sequential(*layers[index * size : (index + 1) * size])
        given = outline.clone().requires_grad_(index > 0)
        out = outline.clone().requires_grad_()
        stages.append(PipelineStage(part, index, count, torch.device("cpu"), input_args=(given,), output_args=(out,)))
    runner = get_schedule_class(schedule)(
        stages[0] if schedule in SINGLE else stages, micro_batches, loss_fn=mean_square, scale_grads=False
    )
    own = {stage.stage_index for stage in stages}
    parameters = [p for stage in stages for p in stage.submod.parameters()]

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        for p in parameters:
            p.grad = None
        named = {"target": y, "losses": []} if count - 1 in own else {}
        runner.step(*([x] if 0 in own else []), return_outputs=False, **named)

    return step


def measured_costs(micro_batch: torch.Tensor, stages: int, backend: str) -> list[StageCost]:
    """F, I and W of a stage, in both processes at once, and what it holds."""
    two = gr.compile(model()[: LAYERS // stages], split_backward=True, dynamic=None, backend=backend)
    rows = []
    for _ in range(5):
        x = micro_batch.clone().requires_grad_()
        times = [time.perf_counter()]
        out = two(x)
        times.append(time.perf_counter())
        out.backward(torch.ones_like(out))
        times.append(time.perf_counter())
        two.backward_weight()
        times.append(time.perf_counter())
        rows.append([b - a for a, b in itertools.pairwise(times)])
    found = torch.tensor([statistics.median(column) for column in zip(*rows[1:], strict=True)], dtype=torch.float64)
    dist.broadcast(found, 0)
    report = two.report()
    return [StageCost(*found.tolist(), saved=float(report.saved_bytes), held=float(report.held_bytes))] * stages


def ours(schedule: str, backend: str, micro_batches: int, micro_batch: torch.Tensor) -> Callable[[Any, Any], Any]:
    place = [0, 1] if "one" in schedule else [0, 1, 1, 0]
    made = cut(model(), micro_batch, len(place), blocks=[str(i) for i in range(LAYERS)])
    chosen: Any = schedule
    if schedule not in STOCK:
        costs = measured_costs(micro_batch, len(place), backend)
        cap = HELD * max(costs[0].saved, costs[0].held) * len(place) / 2
        chosen = optimise(costs, place, micro_batches, cap=cap).actions
    pipeline = Pipeline(made, chosen, micro_batches, loss=mean_square, backend=backend)

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        for p in pipeline.parameters():
            p.grad = None
        pipeline.step(x, y)

    return step


def work(rank: int, port: int, given: argparse.Namespace, results: Any) -> None:
    torch.set_num_threads(1)
    keep_memory()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=200))
    count = given.micro_batches
    x, y = torch.randn(2, SEQUENCES * count, given.tokens // SEQUENCES, WIDTH)
    micro_batch = x[:SEQUENCES]
    outline = micro_batch.to("meta")
    whole = copy.deepcopy(model())

    def whole_batch(x: torch.Tensor, y: torch.Tensor) -> None:
        for p in whole.parameters():
            p.grad = None
        for part, target in zip(x.split(SEQUENCES), y.split(SEQUENCES), strict=True):
            (mean_square(whole(part), target) / count).backward()

    def alone(x: torch.Tensor, y: torch.Tensor) -> None:
        if rank == 0:
            whole_batch(x, y)

    steps: dict[str, Callable[[Any, Any], Any]] = {
        "one process": alone,
        "one process again": alone,
        "both at once": whole_batch,
    }
    steps |= {f"stock {name}": stock(name, count, outline) for name in STOCK}
    for name, backend in OURS:
        steps[f"ours {name}, {backend}"] = ours(name, backend, count, micro_batch)
    found: dict[str, list[list[float]]] = {name: [] for name in steps}
    for i in range(given.rounds + 1):
        for name, step in steps.items():
            dist.barrier()
            started, worked, faults = time.perf_counter(), time.process_time(), page_faults()
            step(x, y)
            mine = [time.process_time() - worked, page_faults() - faults]
            dist.barrier()
            if i:
                found[name].append([time.perf_counter() - started, *mine])
    both: list[Any] = [None, None]
    dist.all_gather_object(both, found)
    if rank == 0:
        results.put(both)
    dist.destroy_process_group()


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def median(found: dict[str, list[list[float]]], name: str, column: int) -> float:
    return statistics.median(one[column] for one in found[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="of a micro-batch of two sequences")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(work, (port, given, results), nprocs=2)
    both = results.get()
    pooled = {"alone": both[0]["one process"] + both[0]["one process again"]}
    alone = [median(pooled, "alone", column) for column in range(2)]
    apart = median(both[0], "both at once", 0)
    rows = [
        {
            "schedule": name,
            "micro_batches": given.micro_batches,
            "tokens_of_a_micro_batch": given.tokens,
            "step_ms": round(median(both[0], name, 0) * 1e3, 2),
            "low_ms": round(min(one[0] for one in found) * 1e3, 2),
            "high_ms": round(max(one[0] for one in found) * 1e3, 2),
            "over_ideal": round(2 * median(both[0], name, 0) / alone[0], 4),
            "over_half_of_both_at_once": round(2 * median(both[0], name, 0) / apart, 4),
            "processor_time_over_one_process": round(sum(median(own, name, 1) for own in both) / alone[1], 4),
            "page_faults": [round(median(own, name, 2)) for own in both],
        }
        for name, found in both[0].items()
    ]
    for row in rows:
        print(*(f"{k} {v}" for k, v in row.items()), sep="   ")
    print("written to", write(f"pipeline_{given.micro_batches}_{given.tokens}", rows))


if __name__ == "__main__":
    main()
