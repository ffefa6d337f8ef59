"""What all benchmarks share: interleaved timing, and result files that say what they were measured on."""

from __future__ import annotations

import json
import math
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

RESULTS = pathlib.Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Versions and device, for result files."""
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    return found


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def write(name: str, rows: Any) -> pathlib.Path:
    """Write `results/<name>.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), "rows": _finite(rows)}, indent=1) + "\n")
    return path


def _finite(held: Any) -> Any:
    """JSON has no nan: null in its place."""
    if isinstance(held, float):
        return held if math.isfinite(held) else None
    if isinstance(held, dict):
        return {key: _finite(one) for key, one in held.items()}
    return [_finite(one) for one in held] if isinstance(held, (list, tuple)) else held


@dataclass(frozen=True)
class Ratio:
    """A time against a reference, measured in interleaved pairs.

    Attributes:
        median: Median of the pair ratios.
        low: Lowest of them.
        high: Highest of them.
        same: The reference against itself in the same run: how far the machine can be trusted.
        reference_ms: Median time of the reference.
    """

    median: float
    low: float
    high: float
    same: float
    reference_ms: float

    def row(self) -> dict[str, float]:
        """Rounded, for result files."""
        return {k: round(v, 4) for k, v in asdict(self).items()}


def ratio(
    ours: Callable[[], Any],
    reference: Callable[[], Any],
    *,
    rounds: int = 7,
    calls: int = 20,
    clock: Callable[[], float] = time.perf_counter,
) -> Ratio:
    """Time `ours` against `reference`: `rounds` rounds of reference, ours, reference, `calls` calls each.

    On a machine that others use, one thread and `clock=time.process_time` measure what is ours.
    """
    for _ in range(3):
        ours()
        reference()
    calls = max(3, min(calls, int(1.0 / max(_time(reference, 2, clock), 1e-6))))
    pairs, same, times = [], [], []
    for _ in range(rounds):
        first, mine, second = _time(reference, calls, clock), _time(ours, calls, clock), _time(reference, calls, clock)
        pairs.append(mine / (0.5 * (first + second)))
        same.append(second / first)
        times += [first, second]
    return Ratio(
        statistics.median(pairs), min(pairs), max(pairs), statistics.median(same), statistics.median(times) * 1e3
    )


def _time(call: Callable[[], Any], calls: int, clock: Callable[[], float]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = clock()
    for _ in range(calls):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (clock() - started) / calls
