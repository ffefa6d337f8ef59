"""The Hadamard rotation of a tile's rows, in registers."""

import triton
import triton.language as tl


@triton.jit
def rotate(v, SIZE: tl.constexpr, LOG: tl.constexpr, ROWS: tl.constexpr, SCALE: tl.constexpr):
    """SCALE times H v of each row: sums of neighbours to the front, differences to the back, LOG times."""
    for _ in tl.static_range(LOG):
        a, b = tl.split(v.reshape(ROWS, SIZE // 2, 2))
        v = tl.join(a + b, a - b).permute(0, 2, 1).reshape(ROWS, SIZE)
    return v * SCALE
