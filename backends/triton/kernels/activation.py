"""Activations with a code of a few bits per element, in one pass; and the backward that looks the code up.

Codes of 1, 2, 4 and 8 bits fill bytes in one plane: byte j holds the codes of elements j, j + size, j + 2 size, ...,
the first in the lowest bits. Codes of 3 bits lie in two planes, the lower two bits of all elements in front of the
third ones.
"""

import triton
import triton.language as tl
from graphrewrite.backends.triton.kernels._tuning import tuned
from graphrewrite.backends.triton.kernels.casting import cast

_CONFIGS = [triton.Config({"BLOCK": block}, num_warps=warps) for block, warps in ((256, 4), (512, 4), (1024, 8))]


@triton.jit
def _value(h, KIND: tl.constexpr):
    if KIND == "gelu":
        y = 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        inner = 0.7978845608028654 * (h + 0.044715 * h * h * h)
        y = h * tl.sigmoid(2.0 * inner)
    elif KIND == "silu":
        y = h * tl.sigmoid(h)
    elif KIND == "sigmoid":
        y = tl.sigmoid(h)
    elif KIND == "tanh":
        y = 2.0 * tl.sigmoid(2.0 * h) - 1.0
    else:
        # a NaN stays one
        y = tl.where(h <= 0.0, 0.0, h)
    return y


@triton.jit
def _code(h, borders, changes, FIRST: tl.constexpr, BORDERS: tl.constexpr):
    """The first interval's code, and a step up or down at every border that is reached."""
    code = tl.zeros_like(h).to(tl.int32) + FIRST
    for i in tl.static_range(BORDERS):
        code += tl.where(h >= tl.load(borders + i), tl.load(changes + i), 0)
    return code


@tuned(_CONFIGS, key=["tuned_for"])
@triton.jit(do_not_specialize=["tuned_for"])
def forward(
    x, borders, changes, y, codes,
    count, size, tuned_for,
    KIND: tl.constexpr, FIRST: tl.constexpr, BORDERS: tl.constexpr, WIDTH: tl.constexpr, SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One plane: `WIDTH` bits of each code, from bit `SHIFT` on; and the activation, unless KIND is ""."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    packed = tl.zeros((BLOCK,), tl.int32)
    for part in tl.static_range(8 // WIDTH):
        element = byte + part * tl.cast(size, tl.int64)
        inside = (byte < size) & (element < count)
        h = tl.load(x + element, mask=inside, other=0.0).to(tl.float32)
        code = _code(h, borders, changes, FIRST, BORDERS)
        if KIND != "":
            tl.store(y + element, cast(_value(h, KIND), y.dtype.element_ty), mask=inside)
        # what fills the last bytes up are zeros
        packed = packed | (tl.where(inside, (code >> SHIFT) & (2**WIDTH - 1), 0) << (part * WIDTH))
    tl.store(codes + byte, packed.to(tl.uint8), mask=byte < size)


@tuned(_CONFIGS, key=["tuned_for"])
@triton.jit(do_not_specialize=["tuned_for"])
def forward_three(
    x, borders, changes, y, codes,
    count, size, tuned_for,
    KIND: tl.constexpr, FIRST: tl.constexpr, BORDERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Both planes of 3-bit codes in one pass, for multiples of 8 elements: `size` bytes of third bits."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = byte < size
    even = tl.zeros((BLOCK,), tl.int32)
    odd = tl.zeros((BLOCK,), tl.int32)
    high = tl.zeros((BLOCK,), tl.int32)
    for part in tl.static_range(8):
        element = byte + part * tl.cast(size, tl.int64)
        h = tl.load(x + element, mask=inside, other=0.0).to(tl.float32)
        code = _code(h, borders, changes, FIRST, BORDERS)
        if KIND != "":
            tl.store(y + element, cast(_value(h, KIND), y.dtype.element_ty), mask=inside)
        if part % 2 == 0:
            even = even | ((code & 3) << part)
        else:
            odd = odd | ((code & 3) << (part - 1))
        high = high | (((code >> 2) & 1) << part)
    tl.store(codes + byte, even.to(tl.uint8), mask=inside)
    tl.store(codes + tl.cast(size, tl.int64) + byte, odd.to(tl.uint8), mask=inside)
    tl.store(codes + 2 * tl.cast(size, tl.int64) + byte, high.to(tl.uint8), mask=inside)


@tuned(_CONFIGS, key=["tuned_for"])
@triton.jit(do_not_specialize=["tuned_for"])
def backward(
    g, codes, levels, dx, count, size, tuned_for,
    LAST: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Codes without a level read the last one."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    packed = tl.load(codes + byte, mask=byte < size, other=0).to(tl.int32)
    for part in tl.static_range(8 // BITS):
        element = byte + part * tl.cast(size, tl.int64)
        inside = (byte < size) & (element < count)
        code = (packed >> (part * BITS)) & (2**BITS - 1)
        level = tl.load(levels + tl.minimum(code, LAST)).to(tl.float32)
        v = tl.load(g + element, mask=inside, other=0.0).to(tl.float32) * level
        tl.store(dx + element, cast(v, dx.dtype.element_ty), mask=inside)


@tuned(_CONFIGS, key=["tuned_for"])
@triton.jit(do_not_specialize=["tuned_for"])
def backward_three(g, codes, levels, dx, count, low, high, tuned_for, LAST: tl.constexpr, BLOCK: tl.constexpr):
    """3-bit codes of any number of elements: `low` bytes of lower bits, `high` bytes of third ones."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    thirds = tl.load(codes + tl.cast(low, tl.int64) + byte, mask=byte < high, other=0).to(tl.int32)
    for part in tl.static_range(8):
        element = byte + part * tl.cast(high, tl.int64)
        inside = (byte < high) & (element < count)
        plane = element // low
        pair = tl.load(codes + (element - plane * low), mask=inside, other=0).to(tl.int32) >> (2 * plane).to(tl.int32)
        code = (pair & 3) | (((thirds >> part) & 1) << 2)
        level = tl.load(levels + tl.minimum(code, LAST)).to(tl.float32)
        v = tl.load(g + element, mask=inside, other=0.0).to(tl.float32) * level
        tl.store(dx + element, cast(v, dx.dtype.element_ty), mask=inside)
