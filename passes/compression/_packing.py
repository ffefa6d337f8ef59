"""Small integers in bytes.

Packing is planar: of `n` codes of `b` bits, with `k = 8 / b` to a byte, byte `i` holds codes `i`, `i + m`, `i + 2m`, ...
where `m = ceil(n / k)`. Whole slices are shifted and joined, so that packing is a few element-wise operators.
"""

from __future__ import annotations

from typing import Any

import torch


def packed_size(count: Any, bits: int) -> Any:
    """Bytes that `count` codes of `bits` bits take."""
    if 8 % bits == 0:
        per_byte = 8 // bits
        return (count + per_byte - 1) // per_byte
    return sum(packed_size(count, width) for width, _ in _planes(bits))


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes 0 .. 2^bits - 1 as bytes.

    Args:
        codes: uint8 or bool, any shape; read in row-major order.
        bits: 1 to 8. 3, 5, 6 and 7 bits are split into parts that divide a byte (5 = 4 + 1).

    Returns:
        uint8, one dimension, `packed_size(codes.numel(), bits)` long.
    """
    flat = codes.reshape(-1)
    if flat.dtype != torch.uint8:
        flat = flat.to(torch.uint8)
    if 8 % bits:
        parts = [pack((flat >> shift) & (2**width - 1), width) for width, shift in _planes(bits)]
        return torch.cat(parts)
    per_byte = 8 // bits
    if per_byte == 1:
        return flat
    rows = pad_end(flat, per_byte).view(per_byte, packed_size(flat.shape[0], bits))
    packed = rows[0]
    for i in range(1, per_byte):
        packed = packed | (rows[i] << (i * bits))
    return packed


def unpack(packed: torch.Tensor, bits: int, count: Any) -> torch.Tensor:
    """The first `count` codes that `pack` stored, uint8, one dimension."""
    if 8 % bits:
        found: torch.Tensor | None = None
        start: Any = 0
        for width, shift in _planes(bits):
            size = packed_size(count, width)
            part = unpack(packed[start : start + size], width, count) << shift
            found = part if found is None else found | part
            start = start + size
        assert found is not None
        return found
    per_byte = 8 // bits
    if per_byte == 1:
        return packed
    mask = 2**bits - 1
    rows = [(packed >> (i * bits)) & mask for i in range(per_byte)]
    return torch.cat(rows)[:count]


def _planes(bits: int) -> list[tuple[int, int]]:
    """Widths that divide a byte and add up to `bits`, with the shift of each."""
    planes, shift = [], 0
    for width in (4, 2, 1):
        if bits & width:
            planes.append((width, shift))
            shift += width
    return planes


def pad_end(flat: torch.Tensor, multiple: int) -> torch.Tensor:
    """One-dimensional, lengthened by copies of its last element to a multiple of a number."""
    count = flat.shape[0]
    pad = (count + multiple - 1) // multiple * multiple - count
    if isinstance(pad, int) and pad == 0:
        return flat
    return torch.cat([flat, flat[-1:].expand(pad)])
