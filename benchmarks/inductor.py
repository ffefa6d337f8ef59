"""The Inductor backend against `torch.compile`: step time of backpropagation, DFA and Mono-Forward; compile time.

    python -m benchmarks.inductor                                  # everything: some minutes
    python -m benchmarks.inductor --cases "wide mlp" --rules bp    # a part; rows of the other parts stay

Ratios are medians against `torch.compile(model)` with backpropagation, interleaved in the same process; that against
itself is printed beside them. Steps are timed in processor time of one thread, so that what else the machine does
counts little. Compile times are processor seconds, those of the C++ compiler included, from the call to the end of
the first step, with empty caches on disk, after a first compilation in the process that is not counted. Saved bytes are
those of the values that live between forward and backward, parameters and inputs excluded, by saved-tensor hooks for
both.

Writes `results/inductor.json`, anew after each case.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

# in this process, so that its time is counted
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch
from torch import nn

import graphrewrite as gr
from benchmarks.common import RESULTS, processor_ratios, write
from benchmarks.overhead import Layer, mlp

FILE = "inductor"


def deep_conv() -> nn.Module:
    def stage(a: int, b: int, stride: int = 1) -> nn.Module:
        return nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.BatchNorm2d(b), nn.ReLU())

    stages = [stage(3, 64), *(stage(64, 64) for _ in range(3)), stage(64, 128, 2), *(stage(128, 128) for _ in range(3))]
    return nn.Sequential(*stages, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)))


def cases() -> dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]]:
    return {
        "wide mlp": (lambda: mlp(1024, 8), lambda: (torch.randn(256, 1024), torch.randint(0, 10, (256,)))),
        "transformer": (
            lambda: nn.Sequential(*[Layer(192, 4) for _ in range(3)], nn.Linear(192, 10)),
            lambda: (torch.randn(4, 128, 192), torch.randint(0, 10, (4, 128))),
        ),
        "deep conv": (deep_conv, lambda: (torch.randn(16, 3, 16, 16), torch.randint(0, 10, (16,)))),
        "small mlp": (lambda: mlp(64, 4), lambda: (torch.randn(32, 64), torch.randint(0, 10, (32,)))),
    }


WHAT = {
    "wide mlp": "8 layers of 1024, batch 256",
    "transformer": "3 layers of 192, 4 x 128 tokens",
    "deep conv": "8 convolutions of 64 and 128 channels, 16 images of 16 x 16",
    "small mlp": "4 layers of 64, batch 32: fixed costs of a step",
}
RULES = {"bp": "auto", "dfa": "layers", "mono_forward": "auto"}
"""Rules, with the blocks they are measured on."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(WHAT), choices=list(WHAT))
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES))
    parser.add_argument("--rounds", type=int, default=40)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with empty_cache():
        warm = nn.Linear(2, 2)
        torch.compile(warm)(torch.randn(3, 2)).sum().backward()
    rows = {(row["case"], row["rule"]): row for row in recorded()}
    for name in given.cases:
        make, batch = cases()[name]
        torch.manual_seed(0)
        reference, (x, y) = make(), batch()
        compiled = torch.compile(copy.deepcopy(reference))
        rival = stepper(compiled, lambda x, y, c=compiled: gr.default_loss(c(x), y), x, y)
        with empty_cache():
            rival_seconds = timed(rival)
        rival_bytes = saved_bytes(compiled, lambda c=compiled, x=x, y=y: gr.default_loss(c(x), y), x)
        steps, found = [rival], []
        for rule in given.rules:
            ours = gr.compile(copy.deepcopy(reference), rule, blocks=RULES[rule], backend="inductor")
            step = stepper(ours, ours.loss, x, y)
            with empty_cache():
                seconds = timed(lambda o=ours, x=x, y=y: o.materialize(x, y)) + timed(step)
            steps.append(step)
            found.append((rule, seconds, saved_bytes(ours, lambda o=ours, x=x, y=y: o.loss(x, y), x)))
        (_, *ratios), same = processor_ratios(steps, rounds=given.rounds)
        milliseconds = 1e3 * statistics.median(step_time(rival) for _ in range(9))
        for (rule, seconds, kept), against in zip(found, ratios, strict=True):
            rows[name, rule] = {
                "case": name,
                "what": WHAT[name],
                "rule": rule,
                "blocks": RULES[rule],
                "ratio": round(against, 4),
                "torch_compile_against_itself": round(same, 4),
                "torch_compile_ms": round(milliseconds, 3),
                "compile_seconds": round(seconds, 1),
                "torch_compile_compile_seconds": round(rival_seconds, 1),
                "saved_bytes": kept,
                "torch_compile_saved_bytes": rival_bytes,
            }
            print(
                f"{name:<12} {rule:<14} torch.compile {milliseconds:8.3f} ms  ratio {against:.3f} (itself {same:.3f})  "
                f"compiled in {seconds:.1f} s ({rival_seconds:.1f} s)   saved {kept} ({rival_bytes}) bytes",
                flush=True,
            )
        write(FILE, [rows[key] for key in ((c, r) for c in WHAT for r in RULES) if key in rows])


def recorded() -> list[dict[str, Any]]:
    path = RESULTS / f"{FILE}.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


@contextlib.contextmanager
def empty_cache() -> Iterator[None]:
    """Inductor finds nothing on disk."""
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["TORCHINDUCTOR_CACHE_DIR"]
            else:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


def saved_bytes(module: nn.Module, forward: Callable[[], torch.Tensor], x: torch.Tensor) -> int:
    """Bytes of the storages that autograd keeps for the backward, those of parameters, buffers and inputs excluded."""
    known = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers(), x)}
    held: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
    found = sum(t.untyped_storage().nbytes() for key, t in held.items() if key not in known)
    loss.backward()
    return found


def stepper(module: nn.Module, loss: Callable[[Any, Any], torch.Tensor], x: Any, y: Any) -> Callable[[], None]:
    def step() -> None:
        module.zero_grad()
        loss(x, y).backward()

    return step


def step_time(step: Callable[[], None]) -> float:
    started = time.process_time()
    step()
    return time.process_time() - started


def timed(step: Callable[[], None]) -> float:
    """Processor seconds, those of finished child processes included."""
    before = os.times()
    step()
    after = os.times()
    return sum(after[:4]) - sum(before[:4])


if __name__ == "__main__":
    main()
