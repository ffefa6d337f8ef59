"""Small integers in bytes, and tensors in groups: what all codecs share.

Packing is planar: of `n` codes of `b` bits, `k = 8 / b` to a byte, byte `i` holds codes `i`, `i + m`, `i + 2m`, ...
where `m = ceil(n / k)`. Whole slices are shifted and joined, so that packing is a few element-wise operators.
"""

from __future__ import annotations

from typing import Any

import torch

from graphrewrite._compat import statically_known_true


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
    size = packed_size(flat.shape[0], bits)
    rows = lengthened(flat, size * per_byte).view(per_byte, size)
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


def lengthened(rows: torch.Tensor, size: Any) -> torch.Tensor:
    """Codes or rows with zeros behind them: `size` in the first dimension.

    Written so that no size that may change is compared with another: whether there are zeros to add is no guard.
    """
    if isinstance(size, int) and size == rows.shape[0]:
        return rows
    return torch.slice_scatter(rows.new_zeros(size, *rows.shape[1:]), rows, 0, 0, rows.shape[0])


def pad_end(flat: torch.Tensor, multiple: int, *, zeros: bool = False) -> torch.Tensor:
    """One-dimensional, lengthened by copies of its last element or zeros to a multiple of a number."""
    count = flat.shape[0]
    size: Any = (count + multiple - 1) // multiple * multiple
    if statically_known_true(size == count):
        return flat
    filling = flat.new_zeros(1) if zeros else flat.narrow(0, count - 1, 1)
    return torch.slice_scatter(filling.expand(size), flat, 0, 0, count)


def to_groups(tensor: torch.Tensor, group: int, *, zeros: bool = False) -> torch.Tensor:
    """Rows of `group` elements in row-major order; the last one is filled up with copies of its last element, or zeros.

    Copies leave the range of a group as it is, zeros are never among its largest.
    """
    flat = tensor.reshape(-1)
    count = flat.shape[0]
    rows = (count + group - 1) // group
    return pad_end(flat, group, zeros=zeros).view(rows, group)


def from_groups(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_groups`, in the shape and dtype of `like`."""
    flat = rows.reshape(-1)
    count = like.numel()
    if not (isinstance(count, int) and isinstance(flat.shape[0], int) and count == flat.shape[0]):
        flat = flat[:count]
    return flat.view(like.shape).to(like.dtype)


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a group's scale and minimum are stored in: 16 bits with the range of float32; 32 bits for float64."""
    return torch.float32 if dtype == torch.float64 else torch.bfloat16


def round_up(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In a narrower dtype, never smaller.

    To bfloat16 by its bits: compilers take a cast there and back for nothing, and would read the numbers as they were.
    """
    if numbers.dtype == torch.float32 and dtype == torch.bfloat16:
        bits = numbers.view(torch.int32)
        up = torch.where(bits < 0, bits, bits + 0xFFFF) & -0x10000
        return torch.where(numbers == numbers, up.view(torch.float32), numbers).to(dtype)
    near = numbers.to(dtype)
    slack = 2 * torch.finfo(dtype).eps
    above = (numbers + numbers.abs() * slack).to(dtype)
    return torch.where(near.to(numbers.dtype) >= numbers, near, above)


def round_down(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In a narrower dtype, never larger."""
    return -round_up(-numbers, dtype)
