"""Forward-Forward: goodness and length normalisation of a row, and their gradient, in two sweeps over the row."""

import triton
import triton.language as tl
from graphrewrite.backends.triton.kernels._tuning import tuned
from graphrewrite.backends.triton.kernels.casting import cast

_CONFIGS = [triton.Config({"BLOCK": block}, num_warps=warps) for block, warps in ((1024, 4), (2048, 8), (4096, 8))]


@tuned(_CONFIGS, key=["width"])
@triton.jit
def forward(h, out, squares, row_stride, width, eps, BLOCK: tl.constexpr):
    """Squares = sum h^2; out = h / (sqrt(squares / width) + eps)."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        v = tl.load(h + row * row_stride + column, mask=column < width, other=0.0).to(tl.float32)
        total += v * v
    length = tl.sum(total, 0)
    tl.store(squares + row, length)
    divisor = tl.sqrt(length / width) + eps
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        v = tl.load(h + row * row_stride + column, mask=column < width, other=0.0).to(tl.float32)
        tl.store(out + row * width + column, cast(v / divisor, out.dtype.element_ty), mask=column < width)


@tuned(_CONFIGS, key=["width"])
@triton.jit
def backward(
    h, squares, g_squares, g_out, dh,
    row_stride, g_stride, width, eps,
    NORMALISED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Dh = 2 h g_s + g_o / d - h (g_o . h) / (width r d^2), with r = sqrt(squares / width) and d = r + eps."""
    row = tl.program_id(0).to(tl.int64)
    r = tl.sqrt(tl.load(squares + row) / width)
    d = r + eps
    factor = 2.0 * tl.load(g_squares + row)
    if NORMALISED:
        dot = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            v = tl.load(h + row * row_stride + column, mask=column < width, other=0.0).to(tl.float32)
            g = tl.load(g_out + row * g_stride + column, mask=column < width, other=0.0).to(tl.float32)
            dot += v * g
        # a row of zeros has no direction: only the first term of the derivative is left
        factor = factor - tl.where(r > 0, tl.sum(dot, 0) / (width * tl.where(r > 0, r, 1.0) * d * d), 0.0)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        v = tl.load(h + row * row_stride + column, mask=inside, other=0.0).to(tl.float32) * factor
        if NORMALISED:
            v += tl.load(g_out + row * g_stride + column, mask=inside, other=0.0).to(tl.float32) / d
        tl.store(dh + row * width + column, cast(v, dh.dtype.element_ty), mask=inside)
