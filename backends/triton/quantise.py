"""Group-wise integers of 8, 4 or 2 bits: quantise and pack, unpack and dequantise, each in one pass.

The reference is the codecs `int8`, `int4` and `int2` themselves, in their storage layout: a kernel can stand in the
place of either half. Stochastic rounding draws number `i` of its stream of `graphrewrite.random` for element `i`;
nothing is stored but codes, scales and minima.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from graphrewrite.backends.triton.support import next_power_of_two, operator, unfit
from graphrewrite.passes.compression._packing import packed_size, scale_dtype

from graphrewrite import random, registry

WIDTHS = (8, 4, 2)
LONGEST = 4096


def _codec(bits: int, group: int, symmetric: bool, stochastic: bool) -> Any:
    rounding = "stochastic" if stochastic else "nearest"
    return registry.find("codec", f"int{bits}")(group=group, symmetric=symmetric, rounding=rounding)


def levels(bits: int, symmetric: bool) -> int:
    """Steps between the least and the greatest code; half of them if symmetric."""
    return 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1


def _why_not(x: torch.Tensor, bits: int, group: int) -> str:
    if bits not in WIDTHS:
        return f"codes of {bits} bits do not fill a byte"
    if group > LONGEST:
        return f"a group of {group} elements is longer than {LONGEST}"
    return unfit(x)


# --- quantise and pack ---------------------------------------------------------------------------------------------


def _reference(
    x: torch.Tensor, counter: torch.Tensor, stream: int, bits: int, group: int, symmetric: bool, stochastic: bool
) -> list[torch.Tensor]:
    codec = _codec(bits, group, symmetric, stochastic)
    if not stochastic:
        return [t.contiguous() for t in codec.encode(x)]
    return [t.contiguous() for t in codec.encode(x, draw=lambda size: random.uniform(counter, stream, size))]


def _launch(
    x: torch.Tensor, counter: torch.Tensor, stream: int, bits: int, group: int, symmetric: bool, stochastic: bool
) -> list[torch.Tensor]:
    from graphrewrite.backends.triton.kernels import quantise

    flat = x.contiguous().view(-1)
    count = flat.numel()
    rows = -(-count // group)
    size = packed_size(rows * group, bits)
    codes = torch.empty(size, dtype=torch.uint8, device=x.device)
    steps = torch.empty(rows, dtype=torch.bfloat16, device=x.device)
    lows = None if symmetric else torch.empty_like(steps)
    width, top = next_power_of_two(group), levels(bits, symmetric)
    if rows % (8 // bits) == 0:
        per_plane = rows // (8 // bits)
        quantise.encode[lambda meta: (-(-per_plane // meta["GROUPS"]),)](
            flat, counter, codes, steps, lows, count, group, per_plane, stream,
            WIDTH=width, BITS=bits, LEVELS=top, SYMMETRIC=symmetric, STOCHASTIC=stochastic,
            QUARTERS=group % 4 == 0,
        )  # fmt: skip
    else:
        quantise.grids[lambda meta: (-(-rows // meta["GROUPS"]),)](
            flat, steps, lows, count, group, rows, WIDTH=width, LEVELS=top, SYMMETRIC=symmetric
        )
        quantise.encode_with_grids[lambda meta: (-(-size // meta["BLOCK"]),)](
            flat, counter, codes, steps, lows, count, group, rows * group, size, stream,
            BITS=bits, LEVELS=top, SYMMETRIC=symmetric, STOCHASTIC=stochastic,
        )  # fmt: skip
    return [codes, steps] if lows is None else [codes, steps, lows]


def _fake(
    x: torch.Tensor, counter: torch.Tensor, stream: int, bits: int, group: int, symmetric: bool, stochastic: bool
) -> list[torch.Tensor]:
    rows = (x.numel() + group - 1) // group
    codes = x.new_empty(packed_size(rows * group, bits), dtype=torch.uint8)
    return [codes, *(x.new_empty(rows, dtype=scale_dtype(x.dtype)) for _ in range(1 if symmetric else 2))]


quantize_pack = operator(
    "quantize_pack(Tensor x, Tensor counter, int stream, int bits, int group, bool symmetric, bool stochastic)"
    " -> Tensor[]",
    reference=_reference,
    launch=_launch,
    fake=_fake,
    why_not=lambda x, counter, stream, bits, group, symmetric, stochastic: _why_not(x, bits, group),
)


# --- unpack and dequantise -----------------------------------------------------------------------------------------


def _decode(
    residuals: Sequence[torch.Tensor], size: Sequence[Any], dtype: torch.dtype, bits: int, group: int, symmetric: bool
) -> torch.Tensor:
    like = torch.empty((), dtype=dtype, device=residuals[0].device).expand(list(size))
    found: torch.Tensor = _codec(bits, group, symmetric, False).decode(residuals, like)
    return found.contiguous()


def _launch_decode(
    residuals: Sequence[torch.Tensor], size: Sequence[Any], dtype: torch.dtype, bits: int, group: int, symmetric: bool
) -> torch.Tensor:
    from graphrewrite.backends.triton.kernels import quantise

    codes, steps = residuals[0], residuals[1]
    out = torch.empty(list(size), dtype=dtype, device=codes.device)
    lows = None if symmetric else residuals[2]
    quantise.decode[lambda meta: (-(-codes.numel() // meta["BLOCK"]),)](
        codes, steps, lows, out, out.numel(), group, codes.numel(),
        BITS=bits, LEVELS=levels(bits, symmetric), SYMMETRIC=symmetric, CLAMP=dtype == torch.float16,
    )  # fmt: skip
    return out


unpack_dequantize = operator(
    "unpack_dequantize(Tensor[] residuals, SymInt[] size, ScalarType dtype, int bits, int group, bool symmetric)"
    " -> Tensor",
    reference=_decode,
    launch=_launch_decode,
    fake=lambda residuals, size, dtype, bits, group, symmetric: residuals[0].new_empty(size, dtype=dtype),
    why_not=lambda residuals, size, dtype, bits, group, symmetric: _why_not(
        residuals[1].new_empty(1, dtype=dtype), bits, group
    ),
)
