"""Products with a random matrix that never exists in memory: `x @ B`, B a function of (seed, step, rank, stream).

It is the projection of direct feedback alignment, and with `x` transposed the sketch `S^T X` of the randomised linear
weight gradient. B has the dtype of x; sums are taken in float32. Element (i, j) of B is number `i * features + j` of
its stream of `graphrewrite.random` (`transposed`: number `j * inner + i`), so that every device, and the reference, use
the same matrix:

* `"uniform"`: scale * U[-1, 1);
* `"signs"`: -scale or scale;
* `"normal"`: scale * N(0, 1).
"""

from __future__ import annotations

from typing import Any

import torch
from graphrewrite.backends.triton.support import interpreting, next_power_of_two, operator, unfit
from graphrewrite.passes.compression._packing import work_dtype

from graphrewrite import random
from graphrewrite.errors import RuleError

DISTRIBUTIONS = ("uniform", "signs", "normal")


def matrix(
    counter: torch.Tensor,
    stream: int,
    inner: Any,
    features: Any,
    distribution: str,
    scale: float,
    transposed: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The matrix itself, for those who want to look at it."""
    size = [features, inner] if transposed else [inner, features]
    work = work_dtype(dtype)
    if distribution == "uniform":
        drawn = 2 * random.uniform(counter, stream, size, work) - 1
    elif distribution == "signs":
        drawn = random.signs(counter, stream, size, work)
    elif distribution == "normal":
        drawn = random.normal(counter, stream, size, work)
    else:
        raise RuleError(f"distribution={distribution!r} is unknown", remedy=f"use one of {', '.join(DISTRIBUTIONS)}")
    found = (drawn * scale).to(dtype)
    return found.t() if transposed else found


def _reference(
    x: torch.Tensor,
    counter: torch.Tensor,
    stream: int,
    features: Any,
    distribution: str,
    scale: float,
    transposed: bool,
) -> torch.Tensor:
    found = matrix(counter, stream, x.shape[-1], features, distribution, scale, transposed, x.dtype)
    return (x @ found).contiguous()


def _launch(
    x: torch.Tensor,
    counter: torch.Tensor,
    stream: int,
    features: Any,
    distribution: str,
    scale: float,
    transposed: bool,
) -> torch.Tensor:
    from graphrewrite.backends.triton.kernels import projection

    rows = x.reshape(-1, x.shape[-1])
    count, inner = rows.shape
    out = torch.empty(*x.shape[:-1], features, dtype=x.dtype, device=x.device)
    projection.project[lambda meta: (-(-count // meta["ROWS"]), -(-features // meta["COLUMNS"]))](
        rows, counter, out, rows.stride(0), rows.stride(1), count, inner, features, inner * features, stream, scale,
        next_power_of_two(count * features),
        LIMIT=_size_class(inner), DISTRIBUTION=distribution, TRANSPOSED=transposed,
        ALIGNED=(inner if transposed else features) % 4 == 0,
        WIDE=interpreting(),
    )  # fmt: skip
    return out


def _size_class(inner: int) -> int:
    """Up to the next of eight steps between powers of two: few kernels serve all sizes, at most an eighth is idle."""
    step = max(next_power_of_two(inner) // 16, 16)
    return -(-inner // step) * step


def _why_not(
    x: torch.Tensor,
    counter: torch.Tensor,
    stream: int,
    features: Any,
    distribution: str,
    scale: float,
    transposed: bool,
) -> str:
    if distribution not in DISTRIBUTIONS:
        return f"distribution {distribution!r} is not one of {', '.join(DISTRIBUTIONS)}"
    if isinstance(features, int) and features == 0:
        return "the result is empty"
    return unfit(x)


random_projection = operator(
    "random_projection(Tensor x, Tensor counter, int stream, SymInt features, str distribution, float scale, "
    "bool transposed) -> Tensor",
    reference=_reference,
    launch=_launch,
    fake=lambda x, counter, stream, features, distribution, scale, transposed: x.new_empty([*x.shape[:-1], features]),
    why_not=_why_not,
)
