"""Group-wise integers of 8, 4 or 2 bits: quantise and pack, unpack and dequantise, each in one pass.

The reference is the codecs `int8`, `int4` and `int2` themselves, in their storage layout: a kernel can stand in the
place of either half. Stochastic rounding draws number `i` of its stream of `graphrewrite.random` for element `i`;
nothing is stored but codes, scales and minima.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from graphrewrite.backends.triton.support import next_power_of_two, operator, unavailable, unfit
from graphrewrite.passes.compression._integers import GroupedInteger
from graphrewrite.passes.compression._packing import packed_size, scale_dtype

from graphrewrite import registry
from graphrewrite.random import Uniform

WIDTHS = (8, 4, 2)
LONGEST = 4096


def _codec(bits: int, group: int, symmetric: bool, stochastic: bool) -> Any:
    rounding = "stochastic" if stochastic else "nearest"
    return registry.find("codec", f"int{bits}")(group=group, symmetric=symmetric, rounding=rounding)


def levels(bits: int, symmetric: bool) -> int:
    """Steps between the least and the greatest code; half of them if symmetric."""
    return (1 << (bits - 1)) - 1 if symmetric else (1 << bits) - 1


def _why_not(x: torch.Tensor, bits: int, group: int) -> str:
    if bits not in WIDTHS:
        return f"codes of {bits} bits do not fill a byte"
    if group > LONGEST:
        return f"a group of {group} elements is longer than {LONGEST}"
    return unfit(x)


# --- quantise and pack ---------------------------------------------------------------------------------------------


def _reference(
    x: torch.Tensor, counter: torch.Tensor | None, stream: int, bits: int, group: int, symmetric: bool, stochastic: bool
) -> list[torch.Tensor]:
    codec = _codec(bits, group, symmetric, stochastic)
    if not stochastic:
        return [t.contiguous() for t in codec.encode(x)]
    assert counter is not None
    return [t.contiguous() for t in codec.encode(x, draw=Uniform(counter, stream))]


def _launch(
    x: torch.Tensor, counter: torch.Tensor | None, stream: int, bits: int, group: int, symmetric: bool, stochastic: bool
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
    x: torch.Tensor, counter: torch.Tensor | None, stream: int, bits: int, group: int, symmetric: bool, stochastic: bool
) -> list[torch.Tensor]:
    rows = (x.numel() + group - 1) // group
    codes = x.new_empty(packed_size(rows * group, bits), dtype=torch.uint8)
    return [codes, *(x.new_empty(rows, dtype=scale_dtype(x.dtype)) for _ in range(1 if symmetric else 2))]


quantize_pack = operator(
    "quantize_pack(Tensor x, Tensor? counter, int stream, int bits, int group, bool symmetric, bool stochastic)"
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


# --- in the place of a codec ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coder:
    """`int8`, `int4` and `int2` by these operators: the same bits, two nodes of the graph."""

    bits: int
    group: int
    symmetric: bool

    def encode(self, tensor: torch.Tensor, *, draw: Uniform | None = None) -> list[torch.Tensor]:
        """Codes, scales and minima."""
        counter, stream = (None, 0) if draw is None else (draw.counter, draw.stream)
        found: list[torch.Tensor] = torch.ops.graphrewrite.quantize_pack(
            tensor, counter, stream, self.bits, self.group, self.symmetric, draw is not None
        )
        return found

    def decode(self, residuals: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """A tensor of the shape and dtype of `like`."""
        found: torch.Tensor = torch.ops.graphrewrite.unpack_dequantize(
            list(residuals), list(like.shape), like.dtype, self.bits, self.group, self.symmetric
        )
        return found


def coder(codec: Any) -> Any:
    """What encodes and decodes in the place of a codec of the graph; the codec itself where no kernel does."""
    if unavailable() or not isinstance(codec, GroupedInteger) or codec.width not in WIDTHS or codec.group > LONGEST:
        return codec
    return Coder(codec.width, codec.group, codec.symmetric)
