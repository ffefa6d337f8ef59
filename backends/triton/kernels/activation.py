"""Activations with a code of a few bits per element, in one pass; and the backward that looks the code up."""

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


@tuned(_CONFIGS, key=["count"])
@triton.jit
def forward(
    x, borders, y, codes,
    count, size,
    KIND: tl.constexpr, BORDERS: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Byte j holds the codes of elements j, j + size, j + 2 size, ..., the first in the lowest bits."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    packed = tl.zeros((BLOCK,), tl.int32)
    for part in tl.static_range(8 // BITS):
        element = byte + part * tl.cast(size, tl.int64)
        inside = (byte < size) & (element < count)
        h = tl.load(x + element, mask=inside, other=0.0).to(tl.float32)
        code = tl.zeros((BLOCK,), tl.int32)
        for i in tl.static_range(BORDERS):
            code += (h >= tl.load(borders + i)).to(tl.int32)
        tl.store(y + element, cast(_value(h, KIND), y.dtype.element_ty), mask=inside)
        # what fills the last bytes up are zeros
        packed = packed | (tl.where(inside, code, 0) << (part * BITS))
    tl.store(codes + byte, packed.to(tl.uint8), mask=byte < size)


@tuned(_CONFIGS, key=["count"])
@triton.jit
def backward(g, codes, levels, dx, count, size, BITS: tl.constexpr, BLOCK: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    packed = tl.load(codes + byte, mask=byte < size, other=0).to(tl.int32)
    for part in tl.static_range(8 // BITS):
        element = byte + part * tl.cast(size, tl.int64)
        inside = (byte < size) & (element < count)
        level = tl.load(levels + ((packed >> (part * BITS)) & (2**BITS - 1)))
        v = tl.load(g + element, mask=inside, other=0.0).to(tl.float32) * level
        tl.store(dx + element, cast(v, dx.dtype.element_ty), mask=inside)
