"""What all benchmarks share: interleaved timing, and result files that say what they were measured on."""

from __future__ import annotations

import ctypes
import json
import math
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Sequence
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


def keep_memory() -> None:
    """From here on glibc keeps freed memory, as a caching allocator does."""
    libc = ctypes.CDLL(None)
    for option, size in ((-1, 2**31 - 1), (-3, 2**30)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        if not libc.mallopt(option, size):
            raise OSError("glibc refused a memory option")


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def write(name: str, rows: Any) -> pathlib.Path:
    """Write `results/<name>.json`."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), "rows": _finite(rows)}, indent=1) + "\n")
    return path


def read(name: str) -> list[Any]:
    """The rows of `results/<name>.json`; none if there is no such file."""
    path = RESULTS / f"{name}.json"
    found: list[Any] = json.loads(path.read_text())["rows"] if path.is_file() else []
    return found


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


def ratio(ours: Callable[[], Any], reference: Callable[[], Any], *, rounds: int = 7, calls: int = 20) -> Ratio:
    """Time `ours` against `reference`: `rounds` rounds of reference, ours, reference, `calls` calls each."""
    for _ in range(3):
        ours()
        reference()
    calls = max(3, min(calls, int(1.0 / max(_time(reference, 2), 1e-6))))
    pairs, same, times = [], [], []
    for _ in range(rounds):
        first, mine, second = _time(reference, calls), _time(ours, calls), _time(reference, calls)
        pairs.append(mine / (0.5 * (first + second)))
        same.append(second / first)
        times += [first, second]
    return Ratio(
        statistics.median(pairs), min(pairs), max(pairs), statistics.median(same), statistics.median(times) * 1e3
    )


def _time(call: Callable[[], Any], calls: int) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / calls


def processor_ratios(calls: Sequence[Callable[[], Any]], *, rounds: int = 30) -> tuple[list[float], float]:
    """Processor time of each call over that of the first one, for a machine that does other things as well.

    Every round makes each call once, the order rotating, and the first one again at the end of its turn.

    Returns:
        Medians over rounds, and that of the first call's second time over its first.
    """
    times: list[list[float]] = [[] for _ in calls]
    same = []
    for number in range(rounds + 3):
        for i in range(len(calls)):
            which = (number + i) % len(calls)
            spent = _processor_time(calls[which])
            if number >= 3:
                times[which].append(spent)
            if which == 0 and number >= 3:
                same.append(_processor_time(calls[0]) / spent)
    first = times[0]
    return [statistics.median(a / b for a, b in zip(one, first, strict=True)) for one in times], statistics.median(same)


def _processor_time(call: Callable[[], Any]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started
