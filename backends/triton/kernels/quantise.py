"""Group-wise integer codes of a few bits, packed in planes: byte i holds codes i, i + size, i + 2 size, ..."""

import triton
import triton.language as tl
from graphrewrite.backends.triton.kernels._tuning import tuned
from graphrewrite.backends.triton.kernels.casting import cast
from graphrewrite.backends.triton.kernels.random import bits_at, interleave, to_uniform, words
from graphrewrite.backends.triton.kernels.rotation import rotate

_CONFIGS = [triton.Config({"BLOCK": block}, num_warps=warps) for block, warps in ((512, 4), (1024, 4), (2048, 8))]


@triton.jit
def _up(number):
    """Rounded to bfloat16, never smaller."""
    bits = number.to(tl.int32, bitcast=True)
    up = (tl.where(bits < 0, bits, bits + 0xFFFF) & -0x10000).to(tl.float32, bitcast=True)
    return tl.where(number == number, up, number)


@triton.jit
def _grid(v, inside, LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Scale and minimum of each row, as they are stored; a row that is not finite has neither."""
    wrong = tl.sum(tl.where(inside, v * 0.0, 0.0), 1)
    if SYMMETRIC:
        low = wrong
        step = _up(tl.div_rn(tl.max(tl.where(inside, tl.abs(v), 0.0), 1), LEVELS * 1.0) + wrong)
    else:
        low = -_up(-(tl.min(tl.where(inside, v, float("inf")), 1) + wrong))
        high = tl.max(tl.where(inside, v, float("-inf")), 1)
        step = _up(tl.div_rn(high - low, LEVELS * 1.0) + wrong)
    return step, low


@triton.jit
def _codes(v, step, low, draw, LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr, STOCHASTIC: tl.constexpr):
    divisor = tl.where(step == 0.0, 1.0, step)
    c = tl.div_rn(v, divisor)
    if not SYMMETRIC:
        c = c - tl.div_rn(low, divisor)
    if STOCHASTIC:
        c = tl.floor(c + draw)
    else:
        # to the nearest, ties to even; exact below 2^22
        c = (c + 12582912.0) - 12582912.0
    if SYMMETRIC:
        c = tl.minimum(tl.maximum(c, -LEVELS * 1.0), LEVELS * 1.0) + LEVELS
    else:
        c = tl.minimum(tl.maximum(c, 0.0), LEVELS * 1.0)
    return tl.where(c == c, c, 0.0).to(tl.int32)


@tuned(
    [triton.Config({"GROUPS": groups}, num_warps=warps) for groups, warps in ((8, 4), (16, 4), (4, 4), (32, 8))],
    key=["group", "tuned_for"],
)
@triton.jit(do_not_specialize=["stream", "tuned_for"])
def encode(
    x, counter, codes, steps, lows,
    count, group, per_plane, stream, tuned_for,
    WIDTH: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr,
    SYMMETRIC: tl.constexpr, STOCHASTIC: tl.constexpr, QUARTERS: tl.constexpr,
    LOG: tl.constexpr, SCALE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Everything in one pass, where each plane holds whole groups: `per_plane` of them.

    With LOG > 0 groups have WIDTH = 2^LOG elements and are rotated first.
    """
    own = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    column = tl.arange(0, WIDTH)
    mask = (own < per_plane)[:, None] & (column < group)[None, :]
    packed = tl.zeros((GROUPS, WIDTH), tl.int32)
    for part in tl.static_range(8 // BITS):
        row = own + part * tl.cast(per_plane, tl.int64)
        element = row[:, None] * group + column[None, :]
        # what fills the last group up are copies of the last element
        read = tl.minimum(element, tl.cast(count, tl.int64) - 1)
        v = tl.load(x + read, mask=mask, other=0.0).to(tl.float32)
        if LOG > 0:
            v = rotate(v, WIDTH, LOG, GROUPS, SCALE)
        step, low = _grid(v, mask, LEVELS, SYMMETRIC)
        draw = 0.0
        if STOCHASTIC:
            if QUARTERS:
                a, b, c, d = words(counter, stream, row[:, None] * (group // 4) + tl.arange(0, WIDTH // 4)[None, :])
                draw = to_uniform(interleave(a, b, c, d))
            else:
                draw = to_uniform(bits_at(counter, stream, element))
        code = _codes(v, step[:, None], low[:, None], draw, LEVELS, SYMMETRIC, STOCHASTIC)
        packed = packed | (code << (part * BITS))
        tl.store(steps + row, step.to(tl.bfloat16), mask=own < per_plane)
        if not SYMMETRIC:
            tl.store(lows + row, low.to(tl.bfloat16), mask=own < per_plane)
    tl.store(codes + own[:, None] * group + column[None, :], packed.to(tl.uint8), mask=mask)


@tuned([triton.Config({"GROUPS": 8}, num_warps=4), triton.Config({"GROUPS": 32}, num_warps=8)], key=["group"])
@triton.jit
def grids(
    x, steps, lows, count, group, rows,
    WIDTH: tl.constexpr, LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Scale and minimum of every group."""
    row = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    column = tl.arange(0, WIDTH)
    mask = (row < rows)[:, None] & (column < group)[None, :]
    read = tl.minimum(row[:, None] * group + column[None, :], tl.cast(count, tl.int64) - 1)
    v = tl.load(x + read, mask=mask, other=0.0).to(tl.float32)
    step, low = _grid(v, mask, LEVELS, SYMMETRIC)
    tl.store(steps + row, step.to(tl.bfloat16), mask=row < rows)
    if not SYMMETRIC:
        tl.store(lows + row, low.to(tl.bfloat16), mask=row < rows)


@tuned(_CONFIGS, key=["group"])
@triton.jit(do_not_specialize=["stream"])
def encode_with_grids(
    x, counter, codes, steps, lows, count, group, padded, size, stream,
    BITS: tl.constexpr, LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The codes, where groups lie across planes; scale and minimum are known."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = byte < size
    packed = tl.zeros((BLOCK,), tl.int32)
    for part in tl.static_range(8 // BITS):
        element = byte + part * tl.cast(size, tl.int64)
        # the last group is filled up with copies of the last element, the last bytes with zeros
        here = inside & (element < padded)
        v = tl.load(x + tl.minimum(element, tl.cast(count, tl.int64) - 1), mask=here, other=0.0).to(tl.float32)
        step = tl.load(steps + element // group, mask=here, other=0.0).to(tl.float32)
        low = tl.zeros((BLOCK,), tl.float32)
        if not SYMMETRIC:
            low = tl.load(lows + element // group, mask=here, other=0.0).to(tl.float32)
        draw = 0.0
        if STOCHASTIC:
            draw = to_uniform(bits_at(counter, stream, element))
        code = _codes(v, step, low, draw, LEVELS, SYMMETRIC, STOCHASTIC)
        packed = packed | (tl.where(here, code, 0) << (part * BITS))
    tl.store(codes + byte, packed.to(tl.uint8), mask=inside)


@tuned(_CONFIGS, key=["group"])
@triton.jit
def decode(
    codes, steps, lows, out, count, group, size,
    BITS: tl.constexpr, LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr, CLAMP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    packed = tl.load(codes + byte, mask=byte < size, other=0).to(tl.int32)
    for part in tl.static_range(8 // BITS):
        element = byte + part * tl.cast(size, tl.int64)
        inside = (byte < size) & (element < count)
        code = ((packed >> (part * BITS)) & (2**BITS - 1)).to(tl.float32)
        step = tl.load(steps + element // group, mask=inside, other=0.0).to(tl.float32)
        if SYMMETRIC:
            v = (code - LEVELS) * step
        else:
            v = code * step + tl.load(lows + element // group, mask=inside, other=0.0).to(tl.float32)
        if CLAMP:
            # the outermost numbers of float16; a NaN stays one
            v = tl.where(v > 65504.0, 65504.0, tl.where(v < -65504.0, -65504.0, v))
        tl.store(out + element, cast(v, out.dtype.element_ty), mask=inside)


@tuned(
    [triton.Config({"GROUPS": groups}, num_warps=warps) for groups, warps in ((8, 4), (16, 4), (4, 4), (32, 8))],
    key=["tuned_for"],
)
@triton.jit(do_not_specialize=["tuned_for"])
def decode_rotated(
    codes, steps, lows, out, count, per_plane, tuned_for,
    BITS: tl.constexpr, LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr,
    SIZE: tl.constexpr, LOG: tl.constexpr, SCALE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Groups of SIZE = 2^LOG elements, rotated back, where each plane holds whole groups: `per_plane` of them."""
    own = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    column = tl.arange(0, SIZE)
    mask = (own < per_plane)[:, None] & (column < SIZE)[None, :]
    packed = tl.load(codes + own[:, None] * SIZE + column[None, :], mask=mask, other=0).to(tl.int32)
    for part in tl.static_range(8 // BITS):
        row = own + part * tl.cast(per_plane, tl.int64)
        code = ((packed >> (part * BITS)) & (2**BITS - 1)).to(tl.float32)
        step = tl.load(steps + row, mask=own < per_plane, other=0.0).to(tl.float32)[:, None]
        if SYMMETRIC:
            v = (code - LEVELS) * step
        else:
            v = code * step + tl.load(lows + row, mask=own < per_plane, other=0.0).to(tl.float32)[:, None]
        v = rotate(v, SIZE, LOG, GROUPS, SCALE)
        element = row[:, None] * SIZE + column[None, :]
        tl.store(out + element, cast(v, out.dtype.element_ty), mask=mask & (element < count))
