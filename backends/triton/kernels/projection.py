"""x @ B with B drawn inside: every tile of B is made from its positions, used and dropped."""

import triton
import triton.language as tl
from graphrewrite.backends.triton.kernels._tuning import tuned
from graphrewrite.backends.triton.kernels.casting import cast
from graphrewrite.backends.triton.kernels.random import bits_at, interleave, to_uniform, words


@triton.jit
def _bits(counter, stream, row, column, features, first, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr):
    """Words at positions first + row * features + column."""
    if ALIGNED:
        quarter = (first + row.to(tl.int64) * features + column) // 4
        a, b, c, d = words(counter, stream, quarter[:, None] + tl.arange(0, COLUMNS // 4)[None, :])
        found = interleave(a, b, c, d)
    else:
        inside = column + tl.arange(0, COLUMNS)
        position = first + row.to(tl.int64)[:, None] * features + inside[None, :]
        found = bits_at(counter, stream, position)
    return found


@triton.jit
def _tile(
    counter, stream, k, start, column, first, inner, features, offset,
    TRANSPOSED: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Words of a tile of B, (INNER, COLUMNS): numbered by rows of B, or of its transpose."""
    if TRANSPOSED:
        found = tl.trans(_bits(counter, stream, column, start, inner, offset, ALIGNED, INNER))
    else:
        found = _bits(counter, stream, k, first, features, offset, ALIGNED, COLUMNS)
    return found


@tuned(
    [
        triton.Config({"ROWS": 64, "COLUMNS": 64, "INNER": 32}, num_warps=4),
        triton.Config({"ROWS": 128, "COLUMNS": 128, "INNER": 32}, num_warps=8),
        triton.Config({"ROWS": 256, "COLUMNS": 64, "INNER": 32}, num_warps=8),
        triton.Config({"ROWS": 16, "COLUMNS": 128, "INNER": 64}, num_warps=4),
    ],
    key=["tuned_for", "TRANSPOSED"],
)
@triton.jit(do_not_specialize=["stream", "inner", "tuned_for"])
def project(
    x, counter, out,
    x_row, x_column, rows, inner, features, elements, stream, scale, tuned_for,
    LIMIT: tl.constexpr, DISTRIBUTION: tl.constexpr, TRANSPOSED: tl.constexpr, ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1).to(tl.int64) * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, LIMIT, INNER):
        k = start + tl.arange(0, INNER)
        mask = (row < rows)[:, None] & (k < inner)[None, :]
        left = tl.load(x + row[:, None] * x_row + k.to(tl.int64)[None, :] * x_column, mask=mask, other=0.0)
        word = _tile(counter, stream, k, start, column, first, inner, features, 0, TRANSPOSED, ALIGNED, COLUMNS, INNER)
        if DISTRIBUTION == "signs":
            right = 1.0 - 2.0 * (word >> 31).to(tl.float32)
        elif DISTRIBUTION == "uniform":
            right = 2.0 * to_uniform(word) - 1.0
        else:
            other = _tile(
                counter, stream, k, start, column, first, inner, features, elements,
                TRANSPOSED, ALIGNED, COLUMNS, INNER,
            )  # fmt: skip
            radius = tl.sqrt(-2.0 * tl.log(1.0 - to_uniform(word)))
            right = radius * tl.cos(6.283185307179586 * to_uniform(other))
        # rows of B beyond the last one meet zeros of x
        right = cast(right * scale, left.dtype)
        if WIDE:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total += tl.dot(left, right, input_precision="ieee")
    mask = (row < rows)[:, None] & (column < features)[None, :]
    tl.store(out + row[:, None] * features + column[None, :], cast(total, out.dtype.element_ty), mask=mask)
