"""How far made schedules are from a lower bound, and from the engine's own schedules.

    python -m benchmarks.schedule_optimiser [--seconds 60]

Costs are in units of a stage's forward; two stages per process, folded back; nothing is measured here but the time
that the optimiser takes. A stage saves one unit per micro-batch: a cap of 2 p units is what 1F1B takes with stages of
twice the size.

* No cap, a cap of p micro-batches, of p / 2, and of the (p + 2) // 2 that V-Half takes, with V-Half's own makespan, for
  p processes, m micro-batches and four ratios of I to W. V-Half is rebuilt from what its paper says of its block, in
  whichever of its forms is the shortest, its weight gradients where they fit best.
* Small pipelines with costs that differ from stage to stage, where an integer program proves the optimum.

Writes `results/schedule_optimiser.json`; with `--processes` its parts, `results/schedule_optimiser_8.json`.
"""

from __future__ import annotations

import argparse
import random
import time
from typing import Any

from graphrewrite.backends.distributed import actions_of, optimise, simulate
from graphrewrite.backends.distributed.optimise import greedy
from graphrewrite.backends.distributed.repeated import orders
from graphrewrite.backends.distributed.simulate import StageCost

from benchmarks.common import write

RATIOS = ((1.3, 0.7), (1.17, 0.83), (1.0, 1.0), (0.8, 1.2))


def row(costs: list[StageCost], ranks: int, micro_batches: int, cap: float | None, seconds: float) -> dict[str, Any]:
    place = [*range(ranks), *reversed(range(ranks))]
    started = time.process_time()
    made = optimise(costs, place, micro_batches, cap=cap, solve_seconds=seconds)
    taken = time.process_time() - started
    plain = optimise(costs, place, micro_batches, cap=cap, width=0)
    fixed = simulate(actions_of("ZBVZeroBubble", ranks, micro_batches), costs)
    return {
        "processes": ranks,
        "micro_batches": micro_batches,
        "cap": cap,
        "makespan": round(made.timeline.makespan, 4),
        "lower_bound": round(made.bound, 4),
        "over_bound": round(made.gap, 5),
        "proved": made.proved,
        "greedy_over_bound": round(plain.timeline.makespan / made.bound - 1, 5),
        "bubble": round(made.timeline.bubble, 4),
        "peak": max(made.timeline.peak),
        "ZBV_over_bound": round(fixed.makespan / made.bound - 1, 5),
        "ZBV_peak": max(fixed.peak),
        "seconds": round(taken, 2),
    }


def v_half(costs: list[StageCost], ranks: int, micro_batches: int) -> dict[str, float]:
    place = [*range(ranks), *reversed(range(ranks))]
    runs = [
        simulate(made, costs)
        for order in orders(place, micro_batches, [3])
        for deep in (True, False)
        if (made := greedy(costs, place, micro_batches, given=order, deep=deep)) is not None
    ]
    best = min(runs, key=lambda timeline: timeline.makespan)
    return {"makespan": round(best.makespan, 4), "bubble": round(best.bubble, 4), "peak": max(best.peak)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="limit of the integer program; 0: without")
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 4, 8])
    given = parser.parse_args()
    rows = []
    for ranks in given.processes:
        for micro_batches in (2 * ranks, 4 * ranks):
            for backward, weight in RATIOS:
                half = 2 * ((ranks + 2) // 2)
                for cap in (None, *sorted({2 * ranks, half, ranks}, reverse=True)):
                    costs = [StageCost(1, backward, weight)] * 2 * ranks
                    found = {"I": backward, "W": weight, **row(costs, ranks, micro_batches, cap, 0.0)}
                    if cap == half:
                        found["V_Half"] = v_half(costs, ranks, micro_batches)
                    rows.append(found)
                    print(found, flush=True)
    draw = random.Random(0)
    for ranks, micro_batches in ((2, 4), (2, 6), (3, 4)) if given.seconds else ():
        for cap in (None, ranks):
            costs = [
                StageCost(*(round(draw.uniform(0.5, 1.5), 2) for _ in range(3)), saved=1.0) for _ in range(2 * ranks)
            ]
            found = {"costs": "drawn", **row(costs, ranks, micro_batches, cap, given.seconds)}
            rows.append(found)
            print(found, flush=True)
    parts = "" if given.processes == [2, 4, 8] else "_" + "_".join(map(str, given.processes))
    print("written to", write(f"schedule_optimiser{parts}", rows))


if __name__ == "__main__":
    main()
