"""An activation and the few-bit code of its derivative in one pass; the backward looks the code up in a table.

Borders cut the line into intervals, each of which has a code; an interval holds its left border. The backward is
`g * levels[code]`. Codes are stored as `passes/compression/_packing.py` stores them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import torch
from graphrewrite.backends.triton.support import next_power_of_two, operator, unfit
from graphrewrite.passes.compression._packing import pack, packed_size, unpack
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
}
WIDTHS = (1, 2, 3, 4, 8)
MOST_BORDERS = 63


@functools.lru_cache(maxsize=256)
def _table(
    borders: tuple[float, ...], codes: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Borders as the dtype of the elements has them, and the step of the code at each."""
    edges = torch.tensor(borders, dtype=dtype).to(torch.float32)
    steps = torch.tensor([after - before for before, after in itertools.pairwise(codes)], dtype=torch.int32)
    return edges.to(device), steps.to(device)


def _codes(x: torch.Tensor, borders: Sequence[float], codes: Sequence[int], bits: int) -> torch.Tensor:
    interval = torch.zeros_like(x, dtype=torch.int64)
    for border in borders:
        interval = interval + (x >= border)
    return pack(torch.tensor(list(codes), dtype=torch.uint8, device=x.device)[interval], bits)


def _launch_codes(x: torch.Tensor, borders: Sequence[float], codes: Sequence[int], bits: int) -> torch.Tensor:
    return _launch(x, borders, codes, "", bits)[1]


def _why_not_codes(x: torch.Tensor, borders: Sequence[float], codes: Sequence[int], bits: int) -> str:
    if bits not in WIDTHS:
        return f"the kernel packs no codes of {bits} bits"
    if len(codes) != len(borders) + 1:
        return f"{len(borders)} borders part {len(borders) + 1} intervals, and there are codes for {len(codes)}"
    if not all(0 <= code < 2**bits for code in codes):
        return f"the codes of {len(codes)} intervals need more than {bits} bits"
    if len(borders) > MOST_BORDERS:
        return f"the kernel compares with each border in turn: at most {MOST_BORDERS}"
    return unfit(x)


few_bit_codes = operator(
    "few_bit_codes(Tensor x, float[] borders, int[] codes, int bits) -> Tensor",
    reference=_codes,
    launch=_launch_codes,
    fake=lambda x, borders, codes, bits: x.new_empty(packed_size(x.numel(), bits), dtype=torch.uint8),
    why_not=_why_not_codes,
)


def _forward(
    x: torch.Tensor, borders: Sequence[float], codes: Sequence[int], kind: str, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return ACTIVATIONS[kind](x).contiguous(), _codes(x, borders, codes, bits)


def _launch(
    x: torch.Tensor, borders: Sequence[float], codes: Sequence[int], kind: str, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    from graphrewrite.backends.triton.kernels import activation

    flat = x.contiguous().view(-1)
    count = flat.numel()
    y = torch.empty(x.shape if kind else 0, dtype=x.dtype, device=x.device)
    packed = torch.empty(packed_size(count, bits), dtype=torch.uint8, device=x.device)
    edges, steps = _table(tuple(borders), tuple(codes), x.dtype, x.device)
    constants = {"FIRST": codes[0], "BORDERS": len(borders)}
    if bits == 3 and count % 8 == 0:
        size = count // 8
        activation.forward_three[lambda meta: (-(-size // meta["BLOCK"]),)](
            flat, edges, steps, y, packed, count, size, next_power_of_two(count), KIND=kind, **constants
        )
        return y, packed
    start = 0
    for width, shift in ((2, 0), (1, 2)) if bits == 3 else ((bits, 0),):
        size = packed_size(count, width)
        activation.forward[lambda meta, size=size: (-(-size // meta["BLOCK"]),)](
            flat, edges, steps, y, packed[start:], count, size, next_power_of_two(count),
            KIND="" if start else kind, WIDTH=width, SHIFT=shift, **constants,
        )  # fmt: skip
        start += size
    return y, packed


def _why_not(x: torch.Tensor, borders: Sequence[float], codes: Sequence[int], kind: str, bits: int) -> str:
    if kind not in ACTIVATIONS:
        return f"activation {kind!r} is not one of {', '.join(ACTIVATIONS)}"
    return _why_not_codes(x, borders, codes, bits)


few_bit_activation = operator(
    "few_bit_activation(Tensor x, float[] borders, int[] codes, str kind, int bits) -> (Tensor, Tensor)",
    reference=_forward,
    launch=_launch,
    fake=lambda x, borders, codes, kind, bits: (
        x.new_empty(x.shape),
        x.new_empty(packed_size(x.numel(), bits), dtype=torch.uint8),
    ),
    why_not=_why_not,
)


def _backward(g: torch.Tensor, codes: torch.Tensor, levels: torch.Tensor, bits: int) -> torch.Tensor:
    work = torch.promote_types(g.dtype, levels.dtype)
    code = unpack(codes, bits, g.numel()).view(g.shape)
    return (g.to(work) * levels.to(work)[code.to(torch.int64)]).to(g.dtype).contiguous()


def _launch_backward(g: torch.Tensor, codes: torch.Tensor, levels: torch.Tensor, bits: int) -> torch.Tensor:
    from graphrewrite.backends.triton.kernels import activation

    flat, count = g.contiguous().view(-1), g.numel()
    dx = torch.empty(g.shape, dtype=g.dtype, device=g.device)
    if bits == 3:
        low, high = packed_size(count, 2), packed_size(count, 1)
        activation.backward_three[lambda meta: (-(-high // meta["BLOCK"]),)](
            flat, codes, levels.contiguous(), dx, count, low, high, next_power_of_two(count), LAST=levels.numel() - 1
        )
        return dx
    activation.backward[lambda meta: (-(-codes.numel() // meta["BLOCK"]),)](
        flat,
        codes,
        levels.contiguous(),
        dx,
        count,
        codes.numel(),
        next_power_of_two(count),
        LAST=levels.numel() - 1,
        BITS=bits,
    )
    return dx


few_bit_backward = operator(
    "few_bit_backward(Tensor g, Tensor codes, Tensor levels, int bits) -> Tensor",
    reference=_backward,
    launch=_launch_backward,
    fake=lambda g, codes, levels, bits: g.new_empty(g.shape),
    why_not=lambda g, codes, levels, bits: (
        unfit(g, levels) if bits in WIDTHS else f"the kernel reads no codes of {bits} bits"
    ),
)
