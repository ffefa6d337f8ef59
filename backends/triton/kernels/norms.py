"""Layer norm and RMS norm, one program per row."""

import triton
import triton.language as tl
from graphrewrite.backends.triton.kernels._tuning import tuned
from graphrewrite.backends.triton.kernels.casting import cast

_CONFIGS = [triton.Config({}, num_warps=warps) for warps in (4, 8, 16, 2)]


@tuned(_CONFIGS, key=["width"])
@triton.jit
def forward(
    x, weight, bias, out, mean, rstd, normalised,
    row_stride, width, eps,
    RMS: tl.constexpr, AFFINE: tl.constexpr, SHIFT: tl.constexpr, MEAN: tl.constexpr, KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The norm of a row; with KEEP also what it is before the affine part."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    h = tl.load(x + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    center = 0.0
    if not RMS:
        center = tl.sum(h, 0) / width
        h = tl.where(inside, h - center, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(h * h, 0) / width + eps)
    z = h * scale
    if KEEP:
        tl.store(normalised + row * width + column, cast(z, normalised.dtype.element_ty), mask=inside)
    if AFFINE:
        z = z * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if SHIFT:
        z = z + tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, cast(z, out.dtype.element_ty), mask=inside)
    tl.store(rstd + row, scale)
    if MEAN:
        tl.store(mean + row, center)


@tuned(_CONFIGS, key=["width"])
@triton.jit
def backward(
    g, saved, weight, mean, rstd, dx,
    g_stride, saved_stride, width,
    RMS: tl.constexpr, AFFINE: tl.constexpr, NORMALISED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Dx = rstd (g - mean g - z mean(g z)); `saved` is z itself, or the input that z is computed from again."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    cotangent = tl.load(g + row * g_stride + column, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(saved + row * saved_stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(rstd + row)
    if not NORMALISED:
        if RMS:
            z = z * scale
        else:
            z = tl.where(inside, (z - tl.load(mean + row)) * scale, 0.0)
    if AFFINE:
        cotangent = cotangent * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    along = tl.sum(cotangent * z, 0) / width
    centred = cotangent - z * along
    if not RMS:
        centred = centred - tl.sum(cotangent, 0) / width
    tl.store(dx + row * width + column, cast(centred * scale, dx.dtype.element_ty), mask=inside)


@tuned([triton.Config({"ROWS": rows, "COLUMNS": 64}, num_warps=4) for rows in (32, 64, 16)], key=["width"])
@triton.jit
def parameters(
    g, x, mean, rstd, dweight, dbias,
    g_stride, x_stride, rows, width, per_program: tl.constexpr,
    SHIFT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Partial sums over `per_program` rows of the gradients of weight and bias, one row of results per program."""
    part = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    weight_sum = tl.zeros((COLUMNS,), tl.float32)
    bias_sum = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, per_program, ROWS):
        own = start + tl.arange(0, ROWS)
        row = part * per_program + own
        here = (own < per_program) & (row < rows)
        mask = here[:, None] & inside[None, :]
        cotangent = tl.load(g + row[:, None] * g_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        h = tl.load(x + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        center = tl.load(mean + row, mask=here, other=0.0)
        scale = tl.load(rstd + row, mask=here, other=0.0)
        z = (h - center[:, None]) * scale[:, None]
        weight_sum += tl.sum(cotangent * z, 0)
        if SHIFT:
            bias_sum += tl.sum(cotangent, 0)
    tl.store(dweight + part * width + column, weight_sum, mask=inside)
    if SHIFT:
        tl.store(dbias + part * width + column, bias_sum, mask=inside)
