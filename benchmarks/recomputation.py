"""Cutting with the bytes of the encoding in mind, against encoding what torch's partitioner has cut.

`post_hoc`: AOTAutograd's minimum cut with Inductor's decompositions, at several `activation_memory_budget`s, chooses
what to save by its bytes as it is; then every saved floating-point tensor of 4,096 elements or more is stored with the
`int8` codec and every boolean one in bits. `aware`: of the plans of this package, with the same codec, masks and
recomputation, the one that saves least with at most the floating-point operations (products, convolutions, attention)
that torch's cut does twice. `any_codec`: the same with shorter codes as well, and a gradient error of at most 1 %.
Bytes and operations are counted on the graphs; errors are those of all parameters' gradients together, relative to
backpropagation in float64, for a random cotangent of the output.

    python -m benchmarks.recomputation

Writes `results/recomputation.json`.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from graphrewrite.passes.compression._plan_solver import UNIT, Candidate, Problem, solve
from graphrewrite.passes.compression.compress_saved import stored_size
from graphrewrite.passes.compression.int8 import Int8
from graphrewrite.passes.compression.plan_memory import PlanMemory, _Errors
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd  # noqa: TID251
from torch._functorch.aot_autograd import make_boxed_func  # noqa: TID251
from torch._functorch.partitioners import min_cut_rematerialization_partition  # noqa: TID251
from torch._inductor.decomposition import select_decomp_table  # noqa: TID251

import graphrewrite as gr
from benchmarks.common import write
from benchmarks.compression import GPTLayer, LlamaLayer
from benchmarks.convergence import Block, resnet
from graphrewrite.analysis.cost import count, flops
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import nbytes

CODECS = ("mask", "recompute", "int8")
MORE = (*CODECS, "lloyd", "int4", "int2")


class Images(nn.Module):
    """A vision transformer without a class token."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 8, 8)
        self.blocks = nn.Sequential(*[Block(width, 4, causal=False) for _ in range(layers)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.patch(x).flatten(2).transpose(1, 2))


MODELS: dict[str, Callable[[int], tuple[nn.Module, torch.Tensor]]] = {
    "gpt": lambda w: (nn.Sequential(GPTLayer(w), GPTLayer(w)), torch.randn(2, 128, w)),
    "llama": lambda w: (nn.Sequential(LlamaLayer(w, 128), LlamaLayer(w, 128)), torch.randn(2, 128, w)),
    "vit": lambda w: (Images(w, 2), torch.randn(2, 3, 64, 64)),
    "convnet": lambda w: (resnet(), torch.randn(8, 3, 32, 32)),
}


@dataclass
class Cut:
    """Bytes saved between forward and backward, floating-point operations done twice, and the gradient's error."""

    nbytes: int
    again: int
    error: float


@dataclass
class Case:
    """A model, its input, a cotangent of its output, and the gradients in float64."""

    model: nn.Module
    x: torch.Tensor
    cotangent: torch.Tensor
    truth: torch.Tensor

    def error(self, run: Callable[[torch.Tensor], torch.Tensor]) -> float:
        """Relative error of the gradients of one step."""
        self.model.zero_grad()
        run(self.x).backward(self.cotangent)
        found = gradients(self.model)
        return float((found - self.truth).norm() / self.truth.norm())


def gradients(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def make(name: str, width: int) -> Case:
    torch.manual_seed(0)
    model, x = MODELS[name](width)
    wide = copy.deepcopy(model).double()
    out = wide(x.double())
    cotangent = torch.randn_like(out)
    out.backward(cotangent)
    return Case(model, x.requires_grad_(), cotangent.float(), gradients(wide))


def post_hoc(case: Case, budget: float) -> Cut:
    """Torch's cut, with every saved value encoded."""
    seen: dict[str, Any] = {"flops": 0}

    def part(joint: fx.GraphModule, inputs: Any, **options: Any) -> Any:
        seen["flops"] -= sum(flops(n) for n in joint.graph.nodes)
        return min_cut_rematerialization_partition(joint, inputs, compiler="inductor", **options)

    def forward(module: fx.GraphModule, _inputs: Any) -> Any:
        seen["flops"] += sum(flops(n) for n in module.graph.nodes)
        return make_boxed_func(module)

    def backward(module: fx.GraphModule, _inputs: Any) -> Any:
        seen["flops"] += sum(flops(n) for n in module.graph.nodes)
        fed = module.graph.find_nodes(op="placeholder")
        saved = [not n.name.startswith(("tangents", "primals")) for n in fed]
        seen["bytes"] = sum(encoded(n.meta["val"]) for n, is_saved in zip(fed, saved, strict=True) if is_saved)

        def run(*values: Any) -> Any:
            return module(*[round_trip(v) if is_saved else v for v, is_saved in zip(values, saved, strict=True)])

        return make_boxed_func(run)

    torch.compiler.reset()
    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=backward,
        partition_fn=part,
        decompositions=select_decomp_table(),
        keep_inference_input_mutations=True,
    )
    with torch._functorch.config.patch(activation_memory_budget=budget):  # noqa: TID251
        error = case.error(torch.compile(case.model, backend=backend, dynamic=False))
    return Cut(seen["bytes"], seen["flops"], error)


def is_coded(val: Any) -> bool:
    """Whether `int8` takes it and stores less; small tensors, statistics among them, stay as with `hooks`."""
    taken = isinstance(val, torch.Tensor) and val.is_floating_point() and val.numel() >= 4096
    return taken and stored_size(Int8(), val) < nbytes(val)


def encoded(val: Any) -> int:
    """Bytes of a saved value."""
    if not isinstance(val, torch.Tensor):
        return 0
    if val.dtype is torch.bool:
        return -(-val.numel() // 8)
    return stored_size(Int8(), val) if is_coded(val) else nbytes(val)


def round_trip(val: Any) -> Any:
    """A saved value as it comes back."""
    if not is_coded(val):
        return val
    return torch.empty_like(val).copy_(Int8().decode(Int8().encode(val), val))


@dataclass(frozen=True)
class FewestBytes(PlanMemory):
    """The plan that saves least with at most so many floating-point operations done twice, and so much error."""

    again: int = 0
    peak: bool = False

    name = "fewest_bytes"

    def choose(self, graph: JointGraph, candidates: list[Candidate], budget: int) -> list[int]:
        """Bisection over the budget of bytes."""
        errors = _Errors(graph, candidates) if self.error < 1 else None
        for one in candidates:
            for j, choice in enumerate(one.choices):
                work = sum(map(flops, one.chain)) if j == one.recompute else 0
                choice.time = work * UNIT / 1e6 + 1e-6 * UNIT * (j > 0)
        low, high = 0, sum(one.saved.nbytes for one in candidates)
        best = [0] * len(candidates)
        while high - low > high // 500:
            middle = (low + high) // 2
            chosen = self._within(Problem(candidates, middle), errors)
            taken = zip(candidates, chosen or [], strict=False)
            spent = sum(sum(map(flops, c.chain)) for c, j in taken if j == c.recompute)
            if chosen is None or spent > self.again:
                low = middle
            else:
                high, best = middle, chosen
        return best

    def _within(self, problem: Problem, errors: _Errors | None) -> list[int] | None:
        if errors is None:
            return solve(problem, self.time_limit)
        found = [
            plan for plan in self._with_errors(replace(problem, pairs=errors.pairs), errors) if plan[0] <= self.error
        ]
        return found[-1][1] if found else None


def aware(case: Case, plan: FewestBytes) -> Cut:
    """A plan of ours."""
    plain, planned = (
        gr.compile(case.model, example_inputs=(case.x,), dynamic=None, verify="off", **options)
        for options in ({}, {"passes": [plan]})
    )
    part = planned.program("forward").partition
    again = count(part.graph).total - count(plain.program("forward").partition.graph).total
    return Cut(part.saved_bytes, again, case.error(planned))


def rows(width: int) -> Iterator[dict[str, Any]]:
    for name in MODELS:
        case = make(name, width)
        for budget in (1.0, 0.5, 0.3, 0.1):
            theirs = post_hoc(case, budget)
            row = {"model": name, "activation_memory_budget": budget, "flops_again": theirs.again}
            row |= {"post_hoc_bytes": theirs.nbytes, "post_hoc_error": round(theirs.error, 6)}
            plans = {
                "aware": FewestBytes(1.0, CODECS, error=1.0, again=theirs.again),
                "any_codec": FewestBytes(1.0, MORE, error=0.01, again=theirs.again),
            }
            for label, plan in plans.items():
                ours = aware(case, plan)
                row |= {f"{label}_bytes": ours.nbytes, f"{label}_flops_again": ours.again}
                row |= {
                    f"{label}_error": round(ours.error, 6),
                    f"{label}_fewer": round(1 - ours.nbytes / theirs.nbytes, 4),
                }
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--name", default="recomputation", help="name of the result file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for row in rows(given.width):
        found.append(row)
        print(row, flush=True)
        write(given.name, found)


if __name__ == "__main__":
    main()
