"""Cutting with the bytes of the encoding in mind, against encoding what torch's partitioner has cut.

`post-hoc`: AOTAutograd's minimum cut with Inductor's decompositions, at several `activation_memory_budget`s, chooses
what to save by its bytes as it is; then every saved floating-point tensor of 4,096 elements or more is stored with the
`int8` codec and every boolean one in bits. `aware`: of the plans
of this package, with the same codec, masks and recomputation, the one that saves least with at most the floating-point
operations (products, convolutions, attention) that torch's cut does twice. Bytes and operations of both are counted on
the graphs.

    python -m benchmarks.recomputation

Writes `results/recomputation.json`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from graphrewrite.passes.compression._plan_solver import UNIT, Candidate, Problem, solve
from graphrewrite.passes.compression.compress_saved import stored_size
from graphrewrite.passes.compression.int8 import Int8
from graphrewrite.passes.compression.plan_memory import PlanMemory
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd  # noqa: TID251
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
    """Bytes saved between forward and backward, and floating-point operations done twice."""

    nbytes: int
    again: int


def post_hoc(model: nn.Module, x: torch.Tensor, budget: float) -> Cut:
    """Torch's cut, with every saved value encoded."""
    seen: dict[str, Any] = {"flops": 0}

    def part(joint: fx.GraphModule, inputs: Any, **options: Any) -> Any:
        seen["flops"] -= sum(flops(n) for n in joint.graph.nodes)
        return min_cut_rematerialization_partition(joint, inputs, compiler="inductor", **options)

    def keep(module: fx.GraphModule, _inputs: Any) -> Any:
        seen["flops"] += sum(flops(n) for n in module.graph.nodes)
        seen["last"] = module
        return module

    torch.compiler.reset()
    backend = aot_autograd(
        fw_compiler=keep,
        bw_compiler=keep,
        partition_fn=part,
        decompositions=select_decomp_table(),
        keep_inference_input_mutations=True,
    )
    with torch._functorch.config.patch(activation_memory_budget=budget):  # noqa: TID251
        out = torch.compile(model, backend=backend, dynamic=False)(x)
        out.backward(torch.ones_like(out))
    saved = [
        n.meta["val"]
        for n in seen["last"].graph.find_nodes(op="placeholder")
        if not n.name.startswith(("tangents", "primals")) and isinstance(n.meta["val"], torch.Tensor)
    ]
    return Cut(sum(map(encoded, saved)), seen["flops"])


def encoded(val: torch.Tensor) -> int:
    """Bytes under the codec, if it stores less; small tensors, statistics among them, stay as with `hooks`."""
    if val.dtype is torch.bool:
        return -(-val.numel() // 8)
    taken = val.is_floating_point() and val.numel() >= 4096
    return min(nbytes(val), stored_size(Int8(), val)) if taken else nbytes(val)


@dataclass(frozen=True)
class FewestBytes(PlanMemory):
    """The plan that saves least with at most so many floating-point operations done twice."""

    again: int = 0

    name = "fewest_bytes"

    def choose(self, graph: JointGraph, candidates: list[Candidate], budget: int) -> list[int]:
        """Bisection over the budget of bytes."""
        for one in candidates:
            for j, choice in enumerate(one.choices):
                work = sum(map(flops, one.chain)) if j == one.recompute else 0
                choice.error, choice.time = 0.0, work * UNIT / 1e6 + 1e-6 * UNIT * (j > 0)
        low, high = 0, sum(one.saved.nbytes for one in candidates)
        best = [0] * len(candidates)
        while high - low > high // 500:
            middle = (low + high) // 2
            chosen = solve(Problem(candidates, middle), self.time_limit)
            taken = zip(candidates, chosen or [], strict=False)
            spent = sum(sum(map(flops, c.chain)) for c, j in taken if j == c.recompute)
            if chosen is None or spent > self.again:
                low = middle
            else:
                high, best = middle, chosen
        return best


def aware(model: nn.Module, x: torch.Tensor, again: int) -> Cut:
    """The plan of ours that does no more twice."""
    plain, planned = (
        gr.compile(model, example_inputs=(x,), dynamic=None, verify="off", **options).program("forward").partition
        for options in ({}, {"passes": [FewestBytes(1.0, CODECS, again=again)]})
    )
    return Cut(planned.saved_bytes, count(planned.graph).total - count(plain.graph).total)


def rows(width: int) -> Iterator[dict[str, Any]]:
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model, x = make(width)
        x.requires_grad_()
        for budget in (1.0, 0.5, 0.3, 0.1):
            theirs = post_hoc(model, x, budget)
            best = aware(model, x, theirs.again)
            yield {
                "model": name,
                "activation_memory_budget": budget,
                "flops_again": theirs.again,
                "post_hoc_bytes": theirs.nbytes,
                "aware_flops_again": best.again,
                "aware_bytes": best.nbytes,
                "fewer": round(1 - best.nbytes / theirs.nbytes, 4),
            }


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
