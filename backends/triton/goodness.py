"""Forward-Forward's goodness and length normalisation in one pass, and their gradient in one.

    s = sum h^2,    o = h / (sqrt(s / n) + eps)
    dh = 2 h g_s + g_o / d - h (g_o . h) / (n r d^2),    r = sqrt(s / n), d = r + eps

over all dimensions but the first. For a row of zeros the derivative of r does not exist; it is taken as 0.
"""

from __future__ import annotations

from typing import Any

import torch
from graphrewrite.backends.triton.support import differentiable, operator, rows_of, unfit
from graphrewrite.passes.compression._packing import work_dtype


def _forward(h: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    flat = h.flatten(1).to(work_dtype(h.dtype))
    squares = flat.square().sum(1)
    divisor = (squares / flat.shape[1]).sqrt() + eps
    return squares, (flat / divisor[:, None]).to(h.dtype).view(h.shape)


def _launch_forward(h: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    from graphrewrite.backends.triton.kernels import goodness

    rows = rows_of(h, h.dim() - 1)
    squares = torch.empty(rows.shape[0], dtype=torch.float32, device=h.device)
    out = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    goodness.forward[(rows.shape[0],)](rows, out, squares, rows.stride(0), rows.shape[1], eps)
    return squares, out


ff_goodness = operator(
    "ff_goodness(Tensor h, float eps) -> (Tensor, Tensor)",
    reference=_forward,
    launch=_launch_forward,
    fake=lambda h, eps: (h.new_empty(h.shape[0], dtype=work_dtype(h.dtype)), h.new_empty(h.shape)),
    why_not=lambda h, eps: unfit(h),
)


def _backward(
    g_squares: torch.Tensor, g_out: torch.Tensor | None, h: torch.Tensor, squares: torch.Tensor, eps: float
) -> torch.Tensor:
    flat = h.flatten(1).to(work_dtype(h.dtype))
    factor = 2 * g_squares.to(flat.dtype)
    if g_out is None:
        return (flat * factor[:, None]).to(h.dtype).view(h.shape)
    g = g_out.reshape(flat.shape).to(flat.dtype)
    r = (squares / flat.shape[1]).sqrt()
    d = r + eps
    inward = (flat * g).sum(1) / (flat.shape[1] * torch.where(r > 0, r, 1.0) * d * d)
    factor = factor - torch.where(r > 0, inward, 0.0)
    return (flat * factor[:, None] + g / d[:, None]).to(h.dtype).view(h.shape)


def _launch_backward(
    g_squares: torch.Tensor, g_out: torch.Tensor | None, h: torch.Tensor, squares: torch.Tensor, eps: float
) -> torch.Tensor:
    from graphrewrite.backends.triton.kernels import goodness

    rows = rows_of(h, h.dim() - 1)
    g_rows = None if g_out is None else rows_of(g_out, g_out.dim() - 1)
    dh = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    goodness.backward[(rows.shape[0],)](
        rows, squares.contiguous(), g_squares.contiguous(), g_rows, dh,
        rows.stride(0), 0 if g_rows is None else g_rows.stride(0), rows.shape[1], eps, NORMALISED=g_out is not None,
    )  # fmt: skip
    return dh


ff_goodness_backward = operator(
    "ff_goodness_backward(Tensor g_squares, Tensor? g_out, Tensor h, Tensor squares, float eps) -> Tensor",
    reference=_backward,
    launch=_launch_backward,
    fake=lambda g_squares, g_out, h, squares, eps: h.new_empty(h.shape),
    why_not=lambda g_squares, g_out, h, squares, eps: unfit(h, g_squares, g_out),
)


def _keep(ctx: Any, inputs: tuple[torch.Tensor, float], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    h, ctx.eps = inputs
    ctx.save_for_backward(h, output[0])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, g_squares: torch.Tensor | None, g_out: torch.Tensor | None) -> tuple[Any, None]:
    h, squares = ctx.saved_tensors
    if g_squares is None:
        g_squares = torch.zeros_like(squares)
    return torch.ops.graphrewrite.ff_goodness_backward(g_squares, g_out, h, squares, ctx.eps), None


differentiable("ff_goodness", _differentiate, _keep)
