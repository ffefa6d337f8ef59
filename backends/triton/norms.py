"""Layer norm and RMS norm.

`layer_norm` and its backward compute what `aten.native_layer_norm` does. `ms_norm` is the memory-sharing form
(Yang et al., 2024): its output z, without the affine part, is what the backward reads, so that a linear map behind it
and the norm share one saved tensor (`ms_norm_affine` computes z and the affine output at once):

    dx = rstd (g - mean g - z mean(g z)),    for RMS norm without mean g.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from graphrewrite.backends.triton.support import next_power_of_two, operator, rows_of, unfit
from graphrewrite.passes.compression._packing import work_dtype

LONGEST = 16384
"""Elements of the longest row that one program holds."""


def _why_not(*tensors: torch.Tensor | None, width: Any) -> str:
    reason = unfit(*tensors)
    if not reason and isinstance(width, int) and width > LONGEST:
        reason = f"a row of {width} elements is longer than {LONGEST}"
    return reason


# --- layer norm ----------------------------------------------------------------------------------------------------


def _layer_norm(
    x: torch.Tensor, shape: Sequence[int], weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.ops.aten.native_layer_norm.default(x, shape, weight, bias, eps)  # type: ignore[no-any-return]


def _launch_layer_norm(
    x: torch.Tensor, shape: Sequence[int], weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from graphrewrite.backends.triton.kernels import norms

    rows, dims = rows_of(x, len(shape)), len(shape)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    kept = [*x.shape[: x.dim() - dims], *[1] * dims]
    mean = torch.empty(kept, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    norms.forward[(rows.shape[0],)](
        rows, weight, bias, out, mean, rstd, None, rows.stride(0), rows.shape[1], eps,
        RMS=False, AFFINE=weight is not None, SHIFT=bias is not None, MEAN=True, KEEP=False,
        BLOCK=next_power_of_two(rows.shape[1]),
    )  # fmt: skip
    return out, mean, rstd


def _fake_layer_norm(
    x: torch.Tensor, shape: Sequence[int], weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kept = x.new_empty([*x.shape[: x.dim() - len(shape)], *[1] * len(shape)], dtype=work_dtype(x.dtype))
    return x.new_empty(x.shape), kept, torch.empty_like(kept)


layer_norm = operator(
    "layer_norm(Tensor x, SymInt[] shape, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    reference=_layer_norm,
    launch=_launch_layer_norm,
    fake=_fake_layer_norm,
    why_not=lambda x, shape, weight, bias, eps: _why_not(x, weight, bias, width=math.prod(shape)),
)


def _layer_norm_backward(
    g: torch.Tensor,
    x: torch.Tensor,
    shape: Sequence[int],
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mask = [True, weight is not None, bias is not None]
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward.default(g, x, shape, mean, rstd, weight, bias, mask)
    empty = x.new_empty(0)
    return dx, empty if dweight is None else dweight, empty.clone() if dbias is None else dbias


def _launch_layer_norm_backward(
    g: torch.Tensor,
    x: torch.Tensor,
    shape: Sequence[int],
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from graphrewrite.backends.triton.kernels import norms

    g_rows, x_rows = rows_of(g, len(shape)), rows_of(x, len(shape))
    count, width = x_rows.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    norms.backward[(count,)](
        g_rows, x_rows, weight, mean, rstd, dx, g_rows.stride(0), x_rows.stride(0), width,
        RMS=False, AFFINE=weight is not None, NORMALISED=False, BLOCK=next_power_of_two(width),
    )  # fmt: skip
    if weight is None:
        return dx, x.new_empty(0), x.new_empty(0)
    # a power of two, so that few kernels serve all batch sizes
    per_program = max(32, next_power_of_two((count + 255) // 256))
    programs = (count + per_program - 1) // per_program
    dweight = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    dbias = torch.empty_like(dweight) if bias is not None else None
    norms.parameters[lambda meta: (programs, (width + meta["COLUMNS"] - 1) // meta["COLUMNS"])](
        g_rows, x_rows, mean, rstd, dweight, dbias, g_rows.stride(0), x_rows.stride(0), count, width,
        per_program, SHIFT=bias is not None,
    )  # fmt: skip
    summed = dweight.sum(0).to(weight.dtype).view(weight.shape)
    return dx, summed, x.new_empty(0) if dbias is None else dbias.sum(0).to(weight.dtype).view(weight.shape)


def _fake_layer_norm_backward(
    g: torch.Tensor,
    x: torch.Tensor,
    shape: Sequence[int],
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    empty = x.new_empty(0)
    dweight = empty if weight is None else weight.new_empty(weight.shape)
    return x.new_empty(x.shape), dweight, empty.clone() if bias is None else bias.new_empty(bias.shape)


layer_norm_backward = operator(
    "layer_norm_backward(Tensor g, Tensor x, SymInt[] shape, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias)"
    " -> (Tensor, Tensor, Tensor)",
    reference=_layer_norm_backward,
    launch=_launch_layer_norm_backward,
    fake=_fake_layer_norm_backward,
    why_not=lambda g, x, shape, mean, rstd, weight, bias: _why_not(g, x, weight, bias, width=math.prod(shape)),
)


# --- the memory-sharing form ---------------------------------------------------------------------------------------


def _ms_norm(x: torch.Tensor, dims: int, eps: float, rms: bool) -> tuple[torch.Tensor, torch.Tensor]:
    over = tuple(range(-dims, 0))
    h = x.to(work_dtype(x.dtype))
    if not rms:
        h = h - h.mean(over, keepdim=True)
    rstd = torch.rsqrt(h.square().mean(over, keepdim=True) + eps)
    return (h * rstd).to(x.dtype).contiguous(), rstd


def _launch_ms_norm(x: torch.Tensor, dims: int, eps: float, rms: bool) -> tuple[torch.Tensor, torch.Tensor]:
    from graphrewrite.backends.triton.kernels import norms

    rows = rows_of(x, dims)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty([*x.shape[: x.dim() - dims], *[1] * dims], dtype=torch.float32, device=x.device)
    norms.forward[(rows.shape[0],)](
        rows, None, None, out, None, rstd, None, rows.stride(0), rows.shape[1], eps,
        RMS=rms, AFFINE=False, SHIFT=False, MEAN=False, KEEP=False, BLOCK=next_power_of_two(rows.shape[1]),
    )  # fmt: skip
    return out, rstd


def _fake_ms_norm(x: torch.Tensor, dims: int, eps: float, rms: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty([*x.shape[: x.dim() - dims], *[1] * dims], dtype=work_dtype(x.dtype))


ms_norm = operator(
    "ms_norm(Tensor x, int dims, float eps, bool rms) -> (Tensor, Tensor)",
    reference=_ms_norm,
    launch=_launch_ms_norm,
    fake=_fake_ms_norm,
    why_not=lambda x, dims, eps, rms: _why_not(x, width=math.prod(x.shape[x.dim() - dims :])),
)


def _ms_norm_affine(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dims: int, eps: float, rms: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    z, rstd = _ms_norm(x.to(work_dtype(x.dtype)), dims, eps, rms)
    y = z * weight.to(z.dtype)
    if bias is not None:
        y = y + bias.to(z.dtype)
    return y.to(x.dtype), z.to(x.dtype), rstd


def _launch_ms_norm_affine(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dims: int, eps: float, rms: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from graphrewrite.backends.triton.kernels import norms

    rows = rows_of(x, dims)
    y, z = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    rstd = torch.empty([*x.shape[: x.dim() - dims], *[1] * dims], dtype=torch.float32, device=x.device)
    norms.forward[(rows.shape[0],)](
        rows, weight, bias, y, None, rstd, z, rows.stride(0), rows.shape[1], eps,
        RMS=rms, AFFINE=True, SHIFT=bias is not None, MEAN=False, KEEP=True, BLOCK=next_power_of_two(rows.shape[1]),
    )  # fmt: skip
    return y, z, rstd


ms_norm_affine = operator(
    "ms_norm_affine(Tensor x, Tensor weight, Tensor? bias, int dims, float eps, bool rms) -> (Tensor, Tensor, Tensor)",
    reference=_ms_norm_affine,
    launch=_launch_ms_norm_affine,
    fake=lambda x, weight, bias, dims, eps, rms: (x.new_empty(x.shape), *_fake_ms_norm(x, dims, eps, rms)),
    why_not=lambda x, weight, bias, dims, eps, rms: _why_not(
        x, weight, bias, width=math.prod(x.shape[x.dim() - dims :])
    ),
)


def _ms_norm_backward(g: torch.Tensor, z: torch.Tensor, rstd: torch.Tensor, dims: int, rms: bool) -> torch.Tensor:
    over = tuple(range(-dims, 0))
    cotangent, normalised = g.to(work_dtype(g.dtype)), z.to(work_dtype(g.dtype))
    dx = cotangent - normalised * (cotangent * normalised).mean(over, keepdim=True)
    if not rms:
        dx = dx - cotangent.mean(over, keepdim=True)
    return (dx * rstd).to(g.dtype).contiguous()


def _launch_ms_norm_backward(
    g: torch.Tensor, z: torch.Tensor, rstd: torch.Tensor, dims: int, rms: bool
) -> torch.Tensor:
    from graphrewrite.backends.triton.kernels import norms

    g_rows, z_rows = rows_of(g, dims), rows_of(z, dims)
    dx = torch.empty(g.shape, dtype=g.dtype, device=g.device)
    norms.backward[(g_rows.shape[0],)](
        g_rows, z_rows, None, None, rstd.contiguous(), dx, g_rows.stride(0), z_rows.stride(0), g_rows.shape[1],
        RMS=rms, AFFINE=False, NORMALISED=True, BLOCK=next_power_of_two(g_rows.shape[1]),
    )  # fmt: skip
    return dx


ms_norm_backward = operator(
    "ms_norm_backward(Tensor g, Tensor z, Tensor rstd, int dims, bool rms) -> Tensor",
    reference=_ms_norm_backward,
    launch=_launch_ms_norm_backward,
    fake=lambda g, z, rstd, dims, rms: g.new_empty(g.shape),
    why_not=lambda g, z, rstd, dims, rms: _why_not(g, z, width=math.prod(g.shape[g.dim() - dims :])),
)
