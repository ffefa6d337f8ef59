"""Philox4x32-10 on the device: the same numbers as `graphrewrite.random`, position by position."""

import triton
import triton.language as tl


@triton.jit
def words(counter, stream, quarter):
    """The four 32-bit words of counter blocks `quarter` (position // 4); `counter` points at (seed, step, rank)."""
    seed = tl.load(counter)
    step = tl.load(counter + 1)
    rank = tl.load(counter + 2)
    zero = quarter.to(tl.int64) * 0
    return tl.philox_impl(
        quarter.to(tl.uint32),
        (zero + stream).to(tl.uint32),
        (zero + step).to(tl.uint32),
        (zero + rank).to(tl.uint32),
        (zero + seed).to(tl.uint32),
        (zero + (seed >> 32)).to(tl.uint32),
    )


@triton.jit
def interleave(a, b, c, d):
    """Four tensors (R, C) as one (R, 4 C), taking turns along the rows."""
    rows: tl.constexpr = a.shape[0]
    columns: tl.constexpr = a.shape[1]
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape(rows, 4 * columns)


@triton.jit
def bits_at(counter, stream, position):
    """The 32-bit words at any positions; four times the work of `words`, for positions that do not come in fours."""
    a, b, c, d = words(counter, stream, position // 4)
    place = position % 4
    return tl.where(place == 0, a, tl.where(place == 1, b, tl.where(place == 2, c, d)))


@triton.jit
def to_uniform(word):
    """Uniform on [0, 1), in steps of 2^-24."""
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08
