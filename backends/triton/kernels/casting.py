"""Casts that round to the nearest everywhere: the interpreter's own cast to bfloat16 cuts digits off."""

import triton
import triton.language as tl
from graphrewrite.backends.triton.support import interpreting

_BY_HAND = tl.constexpr(interpreting())


@triton.jit
def to_bfloat16(number):
    """To the nearest bfloat16, ties to even."""
    if _BY_HAND:
        bits = number.to(tl.uint32, bitcast=True)
        near = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        number = tl.where(number == number, near, number)
    return number.to(tl.bfloat16)


@triton.jit
def cast(number, dtype: tl.constexpr):
    """A float32 in another dtype."""
    if dtype == tl.bfloat16:
        number = to_bfloat16(number)
    else:
        number = number.to(dtype)
    return number
