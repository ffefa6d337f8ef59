"""What the backends and kernels do on a CUDA device; in a reduced form, on the CPU.

    python -m benchmarks.gpu                      # at most --minutes, writes results/gpu.json
    python -m benchmarks.gpu --reduced            # small sizes, few rounds; what runs without a CUDA device

Models: step time and peak memory of eager mode, `torch.compile` and graphrewrite (bp, dfa, ff, mono_forward; with and
without compressed saved tensors) on a GPT-2-small-sized transformer, a ViT-B-sized one and a ResNet-50-sized net.
Kernels: bytes that must cross memory, the time that takes at the bandwidth of a device-to-device copy measured in the
same run (the roofline), and the achieved share of it. Every row is written as soon as it is measured; rows that do not
fit into the time are listed as skipped, rows that fail with their error.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

# compilers run in this process, one after the other, and count towards its time
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch
from graphrewrite.backends.triton import KERNELS, support
from torch import nn
from torch.nn import functional as F

import graphrewrite as gr
from benchmarks.common import RESULTS, environment


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    layers: int
    width: int
    heads: int
    tokens: int
    words: int
    batch: int
    image: int
    stages: tuple[int, ...]
    channels: int
    kernel_elements: int
    rounds: int


FULL = Sizes(12, 768, 12, 1024, 50257, 8, 224, (3, 4, 6, 3), 64, 2**27, 20)
REDUCED = Sizes(1, 32, 2, 16, 64, 2, 32, (1,), 8, 2**14, 2)


# --- models --------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(h.transpose(1, 2).reshape(b, t, d))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Of the size of GPT-2 small."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.word = nn.Embedding(sizes.words, sizes.width)
        self.position = nn.Embedding(sizes.tokens, sizes.width)
        self.layers = nn.Sequential(*[Layer(sizes.width, sizes.heads, True) for _ in range(sizes.layers)])
        self.norm = nn.LayerNorm(sizes.width)
        self.head = nn.Linear(sizes.width, sizes.words, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        place = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.layers(self.word(tokens) + self.position(place))))


class ViT(nn.Module):
    """Of the size of ViT-B/16."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, sizes.width, 16, 16)
        self.position = nn.Parameter(0.02 * torch.randn((sizes.image // 16) ** 2, sizes.width))
        self.layers = nn.Sequential(*[Layer(sizes.width, sizes.heads, False) for _ in range(sizes.layers)])
        self.head = nn.Linear(sizes.width, 1000)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2) + self.position
        return self.head(self.layers(x).mean(1))


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width),
        )  # fmt: skip
        same = inputs == 4 * width and stride == 1
        self.skip = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.skip(x))


def resnet(sizes: Sizes) -> nn.Module:
    """Of the size of ResNet-50."""
    channels = sizes.channels
    stem = (nn.Conv2d(3, channels, 7, 2, 3, bias=False), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    blocks: list[nn.Module] = [nn.Sequential(*stem)]
    inputs = channels
    for i, depth in enumerate(sizes.stages):
        for j in range(depth):
            width = channels * 2**i
            blocks.append(Bottleneck(inputs, width, 2 if i and not j else 1))
            inputs = 4 * width
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))
    return nn.Sequential(*blocks, head)


def models(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Callable[[], nn.Module], Any, Any]]:
    def images(batch: int) -> torch.Tensor:
        return torch.randn(batch, 3, sizes.image, sizes.image, device=device)

    tokens = torch.randint(0, sizes.words, (sizes.batch, sizes.tokens), device=device)
    labels = torch.randint(0, 1000, (8 * sizes.batch,), device=device)
    yield "gpt2-small-sized", lambda: GPT(sizes), tokens, tokens
    yield "vit-b-sized", lambda: ViT(sizes), images(8 * sizes.batch), labels
    yield "resnet-50-sized", lambda: resnet(sizes), images(8 * sizes.batch), labels


MODELS = ("gpt2-small-sized", "vit-b-sized", "resnet-50-sized")


@dataclass(frozen=True)
class Variant:
    """One way to train a model."""

    name: str
    rule: str = ""
    backend: str = "eager"
    compress: str | None = None


VARIANTS = (
    Variant("eager"),
    Variant("torch.compile"),
    Variant("bp", "bp"),
    Variant("bp, inductor", "bp", "inductor"),
    Variant("bp, triton", "bp", "triton"),
    Variant("bp, int8, inductor", "bp", "inductor", "int8"),
    Variant("bp, int4, inductor", "bp", "inductor", "int4"),
    Variant("dfa, inductor", "dfa", "inductor"),
    Variant("mono_forward, inductor", "mono_forward", "inductor"),
    Variant("ff, inductor", "ff", "inductor"),
)


def stepper(variant: Variant, model: nn.Module, x: Any, y: Any) -> Callable[[], None]:
    if not variant.rule:
        call: Any = torch.compile(model) if variant.name == "torch.compile" else model

        def loss() -> torch.Tensor:
            return gr.default_loss(call(x), y)

        owner: nn.Module = model
    else:
        options: dict[str, Any] = {"compress": variant.compress} if variant.compress else {}
        if variant.backend == "triton" and x.device.type == "cpu":
            options["fallback"] = "eager"  # the reduced form measures nothing of kernels
        compiled = gr.compile(model, variant.rule, backend=variant.backend, **options)
        compiled.materialize(x, y)

        def loss() -> torch.Tensor:
            return compiled.loss(x, y)

        owner = compiled

    def step() -> None:
        owner.zero_grad()
        loss().backward()

    return step


def measure_model(variant: Variant, make: Callable[[], nn.Module], x: Any, y: Any, sizes: Sizes) -> dict[str, Any]:
    torch.manual_seed(0)
    model = make().to(x.device)
    started = time.perf_counter()
    step = stepper(variant, model, x, y)
    step()
    synchronize(x.device)
    compile_seconds = time.perf_counter() - started
    for _ in range(2):
        step()
    if x.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [timed(step, x.device) for _ in range(sizes.rounds)]
    row: dict[str, Any] = {
        "ms": round(1e3 * sorted(times)[len(times) // 2], 4),
        "ms_low": round(1e3 * min(times), 4),
        "ms_high": round(1e3 * max(times), 4),
        "first_step_seconds": round(compile_seconds, 2),
    }
    if x.device.type == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    return row


# --- kernels -------------------------------------------------------------------------------------------------------


def kernel_cases(elements: int, device: torch.device) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """`(operator, what, arguments)`; activations of `elements` elements."""
    width = 4096 if elements >= 2**20 else 64
    counter = torch.tensor([1, 2, 0], dtype=torch.int64, device=device)
    for dtype in (torch.bfloat16, torch.float32):
        label = str(dtype).removeprefix("torch.")
        x = torch.randn(elements // width, width, device=device).to(dtype)
        ones = torch.ones(width, dtype=dtype, device=device)
        for bits in (8, 4, 2):
            for stochastic in (False, True):
                args = (x, counter, 1, bits, min(128, width), False, stochastic, False)
                yield "quantize_pack", f"{label}, {bits} bits{', stochastic' if stochastic else ''}", args
            args = (x, counter, 1, bits, min(128, width), False, False, True)
            yield "quantize_pack", f"{label}, {bits} bits, rotated", args
            stored = KERNELS["quantize_pack"](x, counter, 1, bits, min(128, width), False, False, False)
            for rotated in (False, True):
                args = (stored, list(x.shape), dtype, bits, min(128, width), False, rotated)
                yield "unpack_dequantize", f"{label}, {bits} bits{', rotated' if rotated else ''}", args
        for bits in (2, 3):
            borders = torch.linspace(-2.0, 2.0, 2**bits - 1).tolist()
            numbers, levels = list(range(2**bits)), torch.linspace(0.0, 1.0, 2**bits, device=device).to(dtype)
            for kind in ("gelu", "silu"):
                yield "few_bit_activation", f"{label}, {kind}, {bits} bits", (x, borders, numbers, kind, bits)
            yield "few_bit_codes", f"{label}, {bits} bits", (x, borders, numbers, bits)
            codes = KERNELS["few_bit_codes"](x, borders, numbers, bits)
            yield "few_bit_backward", f"{label}, {bits} bits", (x, codes, levels, bits)
        out, mean, rstd = KERNELS["layer_norm"](x, [width], ones, ones, 1e-5)
        yield "layer_norm", label, (x, [width], ones, ones, 1e-5)
        yield "layer_norm_backward", label, (out, x, [width], mean, rstd, ones, ones)
        yield "ms_norm_affine", label, (x, ones, ones, 1, 1e-5, False)
        for rms in (False, True):
            z, scale = KERNELS["ms_norm"](x, 1, 1e-5, rms)
            yield "ms_norm", f"{label}{', rms' if rms else ''}", (x, 1, 1e-5, rms)
            yield "ms_norm_backward", f"{label}{', rms' if rms else ''}", (x, z, scale, 1, rms)
        squares, _ = KERNELS["ff_goodness"](x, 1e-8)
        yield "ff_goodness", label, (x, 1e-8)
        yield "ff_goodness_backward", label, (squares, x, x, squares, 1e-8)
        group = min(128, width)
        yield "hadamard_transform", f"{label}, {group}", (x, group)
        yield "hadamard_quantize", f"{label}, {group}, 8 bits", (x, counter, 1, group, 8, False)
        rows = x[: max(1, min(x.shape[0], 4096)), : min(width, 1024)].contiguous()
        yield (
            "random_projection",
            f"{label}, {tuple(rows.shape)} -> {width}",
            (rows, counter, 1, width, "uniform", 1.0, False),
        )


def measure_kernel(name: str, args: tuple[Any, ...], bandwidth: float, sizes: Sizes) -> dict[str, Any]:
    kernel = KERNELS[name]
    tensors = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
    results = [t for t in torch.utils._pytree.tree_leaves(kernel(*args)) if isinstance(t, torch.Tensor)]
    crossing = support.traffic(*tensors, *results)
    row: dict[str, Any] = {
        "expected_bytes": crossing,
        "roofline_us": round(1e6 * crossing / bandwidth, 3),
        "runs": kernel.why_not(*args) or "kernel",
    }
    device = tensors[0].device
    if device.type == "cuda" and row["runs"] == "kernel":
        for _ in range(3):
            kernel(*args)
        times = sorted(timed(lambda: kernel(*args), device) for _ in range(sizes.rounds))
        seconds = times[len(times) // 2]
        row |= {
            "us": round(1e6 * seconds, 3),
            "bytes_per_second": round(crossing / seconds),
            "of_copy_bandwidth": round(crossing / seconds / bandwidth, 4),
        }
    if name == "random_projection":
        rows, inner = args[0].shape
        row["flops"] = 2 * rows * inner * args[3]
        row["bytes_of_the_matrix_saved"] = inner * args[3] * args[0].element_size()
    return row


def copy_bandwidth(elements: int, device: torch.device, rounds: int) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    times = sorted(timed(lambda: target.copy_(source), device) for _ in range(max(rounds, 5)))
    return 2 * elements * 4 / times[len(times) // 2]


# --- timing --------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def processor_time() -> float:
    """Of this process and of compilers that it ran."""
    return sum(os.times()[:4])


def timed(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) * 1e-3
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def driver() -> dict[str, Any]:
    found: dict[str, Any] = {"triton": _version("triton")}
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.mem", "--format=csv,noheader"]
        try:
            found["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError) as error:
            found["driver"] = f"unknown: {error}"
    return found


def _version(package: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- the run -------------------------------------------------------------------------------------------------------


class Record:
    """The result file, written after every row; what a run of a part does not measure stays."""

    def __init__(self, name: str, header: dict[str, Any], *, fresh: bool) -> None:
        self.path = RESULTS / f"{name}.json"
        before = json.loads(self.path.read_text()) if self.path.is_file() and not fresh else {}
        self.found: dict[str, Any] = {
            "environment": {**environment(), **driver()},
            **header,
            "kernels": before.get("kernels", []),
            "models": before.get("models", []),
        }

    def add(self, table: str, row: dict[str, Any]) -> None:
        def of(one: dict[str, Any]) -> tuple[Any, ...]:
            return tuple(one.get(key) for key in ("kernel", "what", "model", "variant"))

        held = self.found[table]
        places = [i for i, one in enumerate(held) if of(one) == of(row)]
        if places:
            held[places[0]] = row
        else:
            held.append(row)
        print(row, flush=True)
        RESULTS.mkdir(exist_ok=True)
        self.path.write_text(json.dumps(self.found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reduced", action="store_true", help="small sizes; always so without a CUDA device")
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="no measurement starts later; of the processor without a device"
    )
    parser.add_argument("--only", choices=["kernels", "models"])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reduced = options.reduced or device.type == "cpu"
    sizes = REDUCED if reduced else FULL
    clock = time.monotonic if device.type == "cuda" else processor_time
    deadline = clock() + 60 * options.minutes
    bandwidth = copy_bandwidth(sizes.kernel_elements, device, sizes.rounds)
    record = Record(
        f"gpu_{'reduced_' if reduced else ''}{device.type}",
        {"reduced": reduced, "sizes": vars(sizes), "copy_bytes_per_second": round(bandwidth)},
        fresh=options.only is None and len(options.models) == len(MODELS),
    )
    if options.only != "models":
        for name, what, args in kernel_cases(sizes.kernel_elements, device):
            if clock() > deadline:
                record.add("kernels", {"kernel": name, "what": what, "skipped": "out of time"})
                continue
            record.add("kernels", {"kernel": name, "what": what, **measure_kernel(name, args, bandwidth, sizes)})
    if options.only == "kernels":
        return
    for name, make, x, y in models(sizes, device):
        if name not in options.models:
            continue
        for variant in VARIANTS:
            row = {"model": name, "variant": variant.name}
            if clock() > deadline:
                record.add("models", {**row, "skipped": "out of time"})
                continue
            try:
                record.add("models", {**row, **measure_model(variant, make, x, y, sizes)})
            except (gr.GraphRewriteError, RuntimeError) as error:
                record.add("models", {**row, "failed": str(error).splitlines()[0]})
            gc.collect()
            torch.compiler.reset()
    print("written to", record.path)


if __name__ == "__main__":
    main()
