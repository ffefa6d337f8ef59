"""Saved bytes, gradient error and step time of compressed training steps, next to what PyTorch itself offers.

The models are a GPT stack and a Llama stack: pre-norm layers without embedding and head, the input requires grad, the
output gets a fixed random cotangent. Bytes are those of the unique storages that are held between forward and backward,
without parameters and inputs, in `d`: elements per token, layer and unit of width, at the size of float32. The error is
|dW - dW64| / |dW64| over all parameters, where dW64 is eager backpropagation in float64.

    python -m benchmarks.compression                # bytes and errors
    python -m benchmarks.compression --time         # step times as well: processor time over torch.compile's

Writes `results/compression.json`. `--part` and `--add` split the run into several.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from graphrewrite.passes.compression._plan_solver import Candidate, Choice, Problem, solve
from graphrewrite.passes.compression.plan_memory import PlanMemory
from torch import fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import graphrewrite as gr
from benchmarks.common import keep_memory, processor_ratios, read, write
from graphrewrite.analysis.liveness import LiveBytes

HEAD = 64


class GPTLayer(nn.Module):
    """Layer norm, one projection to 3d, causal attention; layer norm, 4d GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = (part.view(b, t, d // HEAD, HEAD).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class LlamaLayer(nn.Module):
    """RMS norm, rotary attention; RMS norm, SiLU-gated unit; no biases."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        inner = 8 * width // 3 // 64 * 64
        self.norm, self.norm_2 = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)
        angles = torch.outer(torch.arange(tokens), 10000.0 ** -(torch.arange(0, HEAD, 2) / HEAD)).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, -1)
        return x * self.cos + torch.cat([-right, left], -1) * self.sin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        h = self.norm(x)
        q, k, v = (part(h).view(b, t, d // HEAD, HEAD).transpose(1, 2) for part in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(self._rotate(q), self._rotate(k), v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, d))
        h = self.norm_2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


@dataclass
class Case:
    """A stack, its input and cotangent, and the gradients that everything is held against."""

    name: str
    model: nn.Sequential
    x: torch.Tensor
    cotangent: torch.Tensor
    truth: torch.Tensor

    @property
    def unit(self) -> int:
        """Bytes of one d."""
        return self.x.numel() * len(self.model) * 4

    def gradients(self, run: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """All parameters' gradients of one step."""
        self.model.zero_grad()
        self.step(run)
        return torch.cat([p.grad.double().flatten() for p in self.model.parameters() if p.grad is not None])

    def step(self, run: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Forward and backward; gradients add up, as in accumulation, which is the same work for everyone."""
        run(self.x.detach().requires_grad_()).backward(self.cotangent)

    def error(self, run: Callable[[torch.Tensor], torch.Tensor]) -> float:
        """Relative error of the gradients."""
        return float((self.gradients(run) - self.truth).norm() / self.truth.norm())


def make(name: str, width: int, layers: int, batch: int, tokens: int) -> Case:
    torch.manual_seed(0)
    kind = GPTLayer if name == "gpt" else lambda width: LlamaLayer(width, tokens)
    model = nn.Sequential(*[kind(width) for _ in range(layers)])
    x, cotangent = torch.randn(batch, tokens, width), torch.randn(batch, tokens, width)
    wide = copy.deepcopy(model).double()
    wide(x.double()).backward(cotangent.double())
    truth = torch.cat([p.grad.flatten() for p in wide.parameters()])
    return Case(name, model, x, cotangent, truth)


# --- rivals ----------------------------------------------------------------------------------------------------------


def hooks(bits: int, group: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Saved-tensor hooks as graph modules, which AOTAutograd inlines: integers per row, or per group of a row.

    A tensor that is no float32, that is small, or whose rows are no multiple of the group is left as it is.
    """

    def pack(x: torch.Tensor) -> Any:
        width = x.shape[-1] if x.dim() else 1
        size = group or width
        if x.dtype != torch.float32 or x.dim() < 2 or width < 64 or width % size or x.numel() < 4096:
            return x
        rows = x.reshape(*x.shape[:-1], width // size, size)
        low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
        scale = (high - low).clamp_min(1e-12) / (2**bits - 1)
        codes = ((rows - low) / scale).round().to(torch.uint8).reshape(x.shape)
        if bits == 4:
            codes = codes[..., ::2] | (codes[..., 1::2] << 4)
        return codes, scale.to(torch.bfloat16), low.to(torch.bfloat16)

    def unpack(held: Any) -> torch.Tensor:
        if isinstance(held, torch.Tensor):
            return held
        codes, scale, low = held
        if bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
        size = codes.shape[-1] // scale.shape[-2]
        rows = codes.reshape(*codes.shape[:-1], codes.shape[-1] // size, size)
        return (rows.to(torch.float32) * scale + low).reshape(codes.shape)

    return _as_graph(pack), _as_graph(unpack)


def _as_graph(fn: Callable[[Any], Any]) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.call_function(fn, (graph.placeholder("held"),)))
    return fx.GraphModule(nn.Module(), graph)


@contextmanager
def settings(budget: float, packed: tuple[fx.GraphModule, fx.GraphModule] | None) -> Iterator[None]:
    """What a compiled model is called under."""
    with ExitStack() as stack:
        stack.enter_context(torch._functorch.config.patch(activation_memory_budget=budget))  # noqa: TID251
        if packed is not None:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(*packed))
        yield


def stock(case: Case, budget: float = 1.0, packed: tuple[int, int] | None = None) -> Callable[..., torch.Tensor]:
    """`torch.compile`, its budget, and the hooks."""
    torch.compiler.reset()
    run = torch.compile(copy_of(case.model), dynamic=False)
    # the same pair at every call: another one is another compilation
    pair = hooks(*packed) if packed else None

    def under(x: torch.Tensor) -> torch.Tensor:
        with settings(budget, pair):
            return run(x)

    return run if budget == 1.0 and not packed else under


def copy_of(model: nn.Module) -> nn.Module:
    """Another module with the same parameters: what is compiled for one does not concern the other."""
    shared = {id(p): p for p in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def checkpointed(case: Case) -> Callable[[torch.Tensor], torch.Tensor]:
    def run(x: torch.Tensor) -> torch.Tensor:
        for layer in case.model:
            x = checkpoint(layer, x, use_reentrant=False)
        return x

    return run


# --- bytes -----------------------------------------------------------------------------------------------------------


def held_by_graph(case: Case, run: Callable[[torch.Tensor], torch.Tensor]) -> int:
    """Storages of the tensors that the one autograd function of a compiled call holds."""
    x = case.x.detach().requires_grad_()
    out = run(x)
    known = {t.untyped_storage().data_ptr() for t in (*case.model.parameters(), *case.model.buffers(), x, out)}
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in out.grad_fn.saved_tensors}
    return sum(size for place, size in held.items() if place not in known)


def held_by_eager(case: Case, run: Callable[[torch.Tensor], torch.Tensor]) -> int:
    """Storages that operators have allocated and that are alive behind the forward, but for its result."""
    x = case.x.detach().requires_grad_()
    with LiveBytes([*case.model.parameters(), *case.model.buffers(), x]) as live:
        out = run(x)
    return live.current - out.untyped_storage().nbytes()


def measure(case: Case, row: dict[str, Any], run: Callable[[torch.Tensor], torch.Tensor], *, eager: bool) -> None:
    held = (held_by_eager if eager else held_by_graph)(case, run)
    row["saved_d"] = round(held / case.unit, 4)
    row["error"] = case.error(run)


# --- what is compared ------------------------------------------------------------------------------------------------

OURS: dict[str, dict[str, Any]] = {
    "bp": {},
    "ms_norm": {"compress": "ms_norm"},
    "int8": {"compress": "int8"},
    "compact": {"compress": "compact"},
    "int4": {"compress": "int4"},
    "compact, int4": {"compress": ["ms_norm", "mask", "recompute", "int4"]},
    "compact, lloyd": {"compress": ["ms_norm", "mask", "recompute", "lloyd"]},
    "lloyd": {"compress": "lloyd"},
    "recompute blocks, int8": {"compress": ["ms_norm", "recompute{plan=blocks}", "int8"]},
    "memory_budget=0.5": {"memory_budget": 0.5},
    "memory_budget=0.2": {"memory_budget": 0.2},
    "memory_budget=0.1": {"memory_budget": 0.1},
    "memory_budget=0.05": {"memory_budget": 0.05},
}
BUDGETS = (1.0, 0.5, 0.3, 0.1)
ONLY: list[str] = []
"""Parts of the names of the settings to measure; none: all."""


def wanted(setting: str) -> bool:
    return not ONLY or any(part in setting for part in ONLY)


TIMED = ("bp", "compact", "int8", "memory_budget=0.1")
FP8 = {"activation_quantization_aten_pass": {"quant_type": "torch.float8_e4m3fn", "size_in_mb": 0, "use_scaling": True}}


def stock_rows(case: Case) -> Iterator[tuple[dict[str, Any], Callable[..., torch.Tensor]]]:
    for budget in BUDGETS:
        for bits, packed in ((32, None), (8, (8, 0)), (4, (4, 128))):
            name = f"torch.compile, budget {budget}" + (f", int{bits} hooks" if packed else "")
            if wanted(name):
                yield {"setting": name, "rival": True}, stock(case, budget, packed)


def fp8_row(case: Case) -> dict[str, Any]:
    """The pass takes bfloat16 only, so the model is cast; the error is that of bfloat16 and of the pass together."""
    torch.compiler.reset()
    row: dict[str, Any] = {"setting": "torch.compile, bf16, fp8 pass (e4m3, with scaling)", "rival": True}
    narrow = copy.deepcopy(case.model).bfloat16()
    half = Case(case.name, narrow, case.x.bfloat16(), case.cotangent.bfloat16(), case.truth)
    with torch._inductor.config.patch(post_grad_fusion_options=FP8):  # noqa: TID251
        run = torch.compile(copy_of(narrow), dynamic=False)
        measure(half, row, run, eager=False)
    row["saved_d"] = round(row["saved_d"] * 2, 4)
    row["note"] = "d of two bytes, as everything is bfloat16"
    return row


def rivals(case: Case) -> Iterator[dict[str, Any]]:
    for name, run in (("eager", case.model), ("torch.utils.checkpoint, each layer", checkpointed(case))):
        if not wanted(name):
            continue
        row: dict[str, Any] = {"setting": name, "rival": True}
        measure(case, row, run, eager=True)
        yield row
    for row, run in stock_rows(case):
        measure(case, row, run, eager=False)
        yield row
    if wanted("fp8 pass"):
        yield fp8_row(case)


def matched(case: Case, rows: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Plans that may save and err as much as `torch.compile` with a budget and int8 hooks does in the given rows."""
    for row in rows:
        named = row.get("stack") == case.name and row.get("rival") and "int8 hooks" in row["setting"]
        if named and "budget 1.0" not in row["setting"]:
            plan = PlanMemory(int(row["saved_d"] * case.unit), error=min(0.01, row["error"]))
            yield f"the bytes of {row['setting']}", {"passes": [plan]}


def rows_of(case: Case, part: str, timed: bool, known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    shape = {"stack": case.name, "width": case.x.shape[-1], "layers": len(case.model), "batch": case.x.shape[0]}
    shape["tokens"] = case.x.shape[1]
    if part in ("all", "rivals"):
        made = [{**shape, **row} for row in rivals(case)]
        yield from made
        known = known + made
    for name, options in [*OURS.items(), *matched(case, known)] if part in ("all", "ours") else ():
        row = {**shape, "setting": f"graphrewrite, {name}", "rival": False}
        if not wanted(row["setting"]):
            continue
        started = time.process_time()
        compiled = gr.compile(case.model, dynamic=None, verify="off", **options)
        measure(case, row, compiled, eager=False)
        row["compile_seconds"] = round(time.process_time() - started, 1)
        row["predicted_minus_measured_bytes"] = compiled.report().saved_bytes - held_by_graph(case, compiled)
        if timed and name in TIMED:
            row["time"] = times(case, options)
        yield row


def times(case: Case, options: dict[str, Any]) -> dict[str, float]:
    """Processor time of our step under Inductor over that of `torch.compile` as it comes, and of that over itself."""
    ours = gr.compile(case.model, dynamic=None, verify="off", backend="inductor", **options)
    theirs = stock(case)
    (_, over), same = processor_ratios([lambda: case.step(theirs), lambda: case.step(ours)], rounds=25)
    return {"processor_time_ratio": round(over, 4), "same": round(same, 4), "threads": torch.get_num_threads()}


# --- the solver ------------------------------------------------------------------------------------------------------


def solve_time(count: int) -> dict[str, Any]:
    """Seconds of the integer program for a made-up graph of `count` saved values with four choices each."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.rand(count, 3, generator=generator).tolist()
    candidates = []
    for size, error, work in draw:
        total = int(4e6 * (0.05 + size))
        choices = [
            Choice(None, "keep", total),
            Choice(None, "int8", total // 4, error=2e-3 * error, time=1e-4),
            Choice(None, "int4", total // 8, error=3e-2 * error, time=1e-4),
            Choice(None, "again", 0, time=1e-3 * work),
        ]
        candidates.append(Candidate(_Value(), choices))  # type: ignore[arg-type]
    total = sum(c.choices[0].nbytes for c in candidates)
    started = time.process_time()
    chosen = solve(Problem(candidates, total // 10), 30.0)
    assert chosen is not None
    seconds = time.process_time() - started
    kept = sum(c.choices[j].nbytes for c, j in zip(candidates, chosen, strict=True))
    row = {"setting": f"solver, {count} saved values", "seconds": round(seconds, 3), "of_budget": kept / (total // 10)}
    found = sum(c.choices[j].cost() for c, j in zip(candidates, chosen, strict=True))
    return {**row, "above_lower_bound": found / lower_bound(candidates, total // 10) - 1}


def lower_bound(candidates: list[Candidate], budget: int) -> float:
    """By Lagrange: for any price of a byte, the cheapest choices less the price of the budget."""

    def at(price: float) -> float:
        return sum(min(x.cost() + price * x.nbytes for x in c.choices) for c in candidates) - price * budget

    low, high = 0.0, 1e-3
    for _ in range(100):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (left, high) if at(left) < at(right) else (low, right)
    return at(low)


class _Value:
    """A saved value to the solver: something with an identity."""

    def __init__(self) -> None:
        self.node = object()


def _key(row: dict[str, Any]) -> tuple[Any, Any]:
    return row.get("stack"), row["setting"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stacks", nargs="+", default=["gpt", "llama"])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--part", default="all", choices=["all", "rivals", "ours", "solver"])
    parser.add_argument("--only", nargs="+", default=[], help="parts of names of settings")
    parser.add_argument(
        "--add", action="store_true", help="to the rows that the result file has, in the place of older ones"
    )
    parser.add_argument("--time", action="store_true", help="step times as well")
    parser.add_argument("--name", default="compression", help="name of the result file")
    given = parser.parse_args()
    if given.time:
        torch.set_num_threads(1)
        keep_memory()
    ONLY.extend(given.only)
    rows = read(given.name) if given.add else []
    for name in given.stacks if given.part != "solver" else ():
        case = make(name, given.width, given.layers, given.batch, given.tokens)
        for row in rows_of(case, given.part, given.time, rows):
            rows = [old for old in rows if _key(old) != _key(row)] + [row]
            shown = {k: v for k, v in row.items() if k in ("saved_d", "error", "compile_seconds", "time")}
            print(f"{name:6s} {row['setting']:55s} {shown}", flush=True)
            write(given.name, rows)
    if given.part in ("all", "solver"):
        solved = [solve_time(count) for count in (60, 500, 5000)]
        print(solved)
        rows = [old for old in rows if _key(old) not in map(_key, solved)] + solved
    print("written to", write(given.name, rows))


if __name__ == "__main__":
    main()
