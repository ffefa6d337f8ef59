"""Fast Walsh-Hadamard transform of groups, with or without quantisation behind it, in one pass."""

import triton
import triton.language as tl
from graphrewrite.backends.triton.kernels._tuning import tuned
from graphrewrite.backends.triton.kernels.casting import cast
from graphrewrite.backends.triton.kernels.quantise import _codes, _grid
from graphrewrite.backends.triton.kernels.random import interleave, to_uniform, words
from graphrewrite.backends.triton.kernels.rotation import rotate

_CONFIGS = [triton.Config({"GROUPS": groups}, num_warps=warps) for groups, warps in ((8, 4), (16, 4), (4, 4), (32, 8))]


@tuned(_CONFIGS, key=["tuned_for"])
@triton.jit(do_not_specialize=["tuned_for"])
def transform(
    x, out, rows, tuned_for,
    SIZE: tl.constexpr, LOG: tl.constexpr, SCALE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    place = row[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    mask = (row < rows)[:, None] & (tl.arange(0, SIZE) < SIZE)[None, :]
    v = rotate(tl.load(x + place, mask=mask, other=0.0).to(tl.float32), SIZE, LOG, GROUPS, SCALE)
    tl.store(out + place, cast(v, out.dtype.element_ty), mask=mask)


@tuned(_CONFIGS, key=["tuned_for"])
@triton.jit(do_not_specialize=["stream", "tuned_for"])
def encode(
    x, counter, codes, steps, rows, stream, tuned_for,
    LEVELS: tl.constexpr, STOCHASTIC: tl.constexpr,
    SIZE: tl.constexpr, LOG: tl.constexpr, SCALE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Symmetric int8 codes of the transform, one scale per group."""
    row = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    place = row[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    mask = (row < rows)[:, None] & (tl.arange(0, SIZE) < SIZE)[None, :]
    v = rotate(tl.load(x + place, mask=mask, other=0.0).to(tl.float32), SIZE, LOG, GROUPS, SCALE)
    step, low = _grid(v, mask, LEVELS, True)
    draw = 0.0
    if STOCHASTIC:
        quarter = row[:, None] * (SIZE // 4) + tl.arange(0, SIZE // 4)[None, :]
        a, b, c, d = words(counter, stream, quarter)
        draw = to_uniform(interleave(a, b, c, d))
    code = _codes(v, step[:, None], low[:, None], draw, LEVELS, True, STOCHASTIC) - LEVELS
    tl.store(codes + place, code.to(tl.int8), mask=mask)
    tl.store(steps + row, step.to(tl.bfloat16), mask=row < rows)
