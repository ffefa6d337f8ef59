"""Group-wise integers of 8, 4 or 2 bits: quantise and pack, unpack and dequantise, each in one pass.

With `rotated`, groups are Hadamard-rotated before they are quantised and after they are decoded.

The reference is the codecs `int8`, `int4`, `int2` and `hadamard` themselves, in their storage layout: a kernel can
stand in the place of either half. Stochastic rounding draws number `i` of its stream of `graphrewrite.random` for
element `i`; nothing is stored but codes, scales and minima.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from graphrewrite.backends.triton.support import next_power_of_two, operator, unavailable, unfit
from graphrewrite.passes.compression._integers import GroupedInteger
from graphrewrite.passes.compression._packing import from_groups, packed_size, scale_dtype, to_groups
from graphrewrite.passes.compression.hadamard import Hadamard

from graphrewrite import registry
from graphrewrite.random import Uniform

WIDTHS = (8, 4, 2)
LONGEST, LONGEST_ROTATED = 4096, 2048


def _codec(bits: int, group: int, symmetric: bool, stochastic: bool, rotated: bool) -> Any:
    rounding = "stochastic" if stochastic else "nearest"
    if rotated:
        return registry.find("codec", "hadamard")(bits, group, symmetric, rounding)
    return registry.find("codec", f"int{bits}")(group=group, symmetric=symmetric, rounding=rounding)


def levels(bits: int, symmetric: bool) -> int:
    """Steps between the least and the greatest code; half of them if symmetric."""
    return (1 << (bits - 1)) - 1 if symmetric else (1 << bits) - 1


def rotation(group: int) -> dict[str, Any]:
    """What kernels want to know of the Hadamard transform of groups of this size."""
    return {"SIZE": group, "LOG": group.bit_length() - 1, "SCALE": 1.0 / math.sqrt(group)}


def _why_not(x: torch.Tensor, bits: int, group: int, rotated: bool) -> str:
    if bits not in WIDTHS:
        return f"codes of {bits} bits do not fill a byte"
    if group > (LONGEST_ROTATED if rotated else LONGEST):
        return f"a group of {group} elements is longer than {LONGEST_ROTATED if rotated else LONGEST}"
    if rotated and (group < 4 or group & (group - 1)):
        return f"a group of {group} elements is no power of two of at least 4"
    return unfit(x)


def hadamard_rows(rows: torch.Tensor) -> torch.Tensor:
    """Every row rotated, by a kernel of its own."""
    from graphrewrite.backends.triton.kernels import hadamard

    out = torch.empty_like(rows)
    count, group = rows.shape
    hadamard.transform[lambda meta: (-(-count // meta["GROUPS"]),)](
        rows.contiguous(), out, count, next_power_of_two(count), **rotation(group)
    )
    return out


# --- quantise and pack ---------------------------------------------------------------------------------------------


def _reference(
    x: torch.Tensor,
    counter: torch.Tensor | None,
    stream: int,
    bits: int,
    group: int,
    symmetric: bool,
    stochastic: bool,
    rotated: bool,
) -> list[torch.Tensor]:
    codec = _codec(bits, group, symmetric, stochastic, rotated)
    if not stochastic:
        return [t.contiguous() for t in codec.encode(x)]
    assert counter is not None
    return [t.contiguous() for t in codec.encode(x, draw=Uniform(counter, stream))]


def _launch(
    x: torch.Tensor,
    counter: torch.Tensor | None,
    stream: int,
    bits: int,
    group: int,
    symmetric: bool,
    stochastic: bool,
    rotated: bool,
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
    turned = rotation(group) if rotated else {"LOG": 0, "SCALE": 1.0}
    if rotated and rows % (8 // bits):
        # groups lie across planes: they are rotated by a kernel of their own
        flat, count = hadamard_rows(to_groups(flat, group).to(torch.float32)).view(-1), rows * group
    if rows % (8 // bits) == 0:
        per_plane = rows // (8 // bits)
        quantise.encode[lambda meta: (-(-per_plane // meta["GROUPS"]),)](
            flat, counter, codes, steps, lows, count, group, per_plane, stream, next_power_of_two(rows),
            WIDTH=width, BITS=bits, LEVELS=top, SYMMETRIC=symmetric, STOCHASTIC=stochastic,
            QUARTERS=group % 4 == 0, LOG=turned["LOG"], SCALE=turned["SCALE"],
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
    x: torch.Tensor,
    counter: torch.Tensor | None,
    stream: int,
    bits: int,
    group: int,
    symmetric: bool,
    stochastic: bool,
    rotated: bool,
) -> list[torch.Tensor]:
    rows = (x.numel() + group - 1) // group
    codes = x.new_empty(packed_size(rows * group, bits), dtype=torch.uint8)
    return [codes, *(x.new_empty(rows, dtype=scale_dtype(x.dtype)) for _ in range(1 if symmetric else 2))]


quantize_pack = operator(
    "quantize_pack(Tensor x, Tensor? counter, int stream, int bits, int group, bool symmetric, bool stochastic, "
    "bool rotated) -> Tensor[]",
    reference=_reference,
    launch=_launch,
    fake=_fake,
    why_not=lambda x, counter, stream, bits, group, symmetric, stochastic, rotated: _why_not(x, bits, group, rotated),
)


# --- unpack and dequantise -----------------------------------------------------------------------------------------


def _decode(
    residuals: Sequence[torch.Tensor],
    size: Sequence[Any],
    dtype: torch.dtype,
    bits: int,
    group: int,
    symmetric: bool,
    rotated: bool,
) -> torch.Tensor:
    like = torch.empty((), dtype=dtype, device=residuals[0].device).expand(list(size))
    found: torch.Tensor = _codec(bits, group, symmetric, False, rotated).decode(residuals, like)
    return found.contiguous()


def _launch_decode(
    residuals: Sequence[torch.Tensor],
    size: Sequence[Any],
    dtype: torch.dtype,
    bits: int,
    group: int,
    symmetric: bool,
    rotated: bool,
) -> torch.Tensor:
    from graphrewrite.backends.triton.kernels import quantise

    codes, steps = residuals[0], residuals[1]
    out = torch.empty(list(size), dtype=dtype, device=codes.device)
    lows = None if symmetric else residuals[2]
    if rotated:
        rows = steps.numel()
        if rows % (8 // bits) == 0:
            per_plane = rows // (8 // bits)
            quantise.decode_rotated[lambda meta: (-(-per_plane // meta["GROUPS"]),)](
                codes, steps, lows, out, out.numel(), per_plane, next_power_of_two(rows),
                BITS=bits, LEVELS=levels(bits, symmetric), SYMMETRIC=symmetric, **rotation(group),
            )  # fmt: skip
            return out
        plain = _launch_decode(residuals, [rows, group], torch.float32, bits, group, symmetric, False)
        return from_groups(hadamard_rows(plain), out).contiguous()
    quantise.decode[lambda meta: (-(-codes.numel() // meta["BLOCK"]),)](
        codes, steps, lows, out, out.numel(), group, codes.numel(),
        BITS=bits, LEVELS=levels(bits, symmetric), SYMMETRIC=symmetric, CLAMP=dtype == torch.float16,
    )  # fmt: skip
    return out


unpack_dequantize = operator(
    "unpack_dequantize(Tensor[] residuals, SymInt[] size, ScalarType dtype, int bits, int group, bool symmetric, "
    "bool rotated) -> Tensor",
    reference=_decode,
    launch=_launch_decode,
    fake=lambda residuals, size, dtype, bits, group, symmetric, rotated: residuals[0].new_empty(size, dtype=dtype),
    why_not=lambda residuals, size, dtype, bits, group, symmetric, rotated: _why_not(
        residuals[1].new_empty(1, dtype=dtype), bits, group, rotated
    ),
)


# --- in the place of a codec ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coder:
    """`int8`, `int4`, `int2` and `hadamard` by these operators: the same bits, two nodes of the graph."""

    bits: int
    group: int
    symmetric: bool
    rotated: bool

    def encode(self, tensor: torch.Tensor, *, draw: Uniform | None = None) -> list[torch.Tensor]:
        """Codes, scales and minima."""
        counter, stream = (None, 0) if draw is None else (draw.counter, draw.stream)
        found: list[torch.Tensor] = torch.ops.graphrewrite.quantize_pack(
            tensor, counter, stream, self.bits, self.group, self.symmetric, draw is not None, self.rotated
        )
        return found

    def decode(self, residuals: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """A tensor of the shape and dtype of `like`."""
        found: torch.Tensor = torch.ops.graphrewrite.unpack_dequantize(
            list(residuals), list(like.shape), like.dtype, self.bits, self.group, self.symmetric, self.rotated
        )
        return found


def coder(codec: Any) -> Any:
    """What encodes and decodes in the place of a codec of the graph; the codec itself where no kernel does."""
    if unavailable():
        return codec
    if isinstance(codec, Hadamard) and 4 <= codec.group <= LONGEST_ROTATED:
        return Coder(codec.bits, codec.group, codec.symmetric, True)
    if isinstance(codec, GroupedInteger) and codec.width in WIDTHS and codec.group <= LONGEST:
        return Coder(codec.width, codec.group, codec.symmetric, False)
    return codec
