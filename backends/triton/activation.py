"""An activation and the few-bit code of its derivative in one pass; the backward looks the code up in a table.

The code of an element is how many borders it reaches (`x >= border`); b bits tell 2^b pieces apart. The backward is
`g * levels[code]`. Codes are stored as `passes/compression/_packing.py` stores them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from graphrewrite.backends.triton.support import operator, unfit
from graphrewrite.passes.compression._packing import pack, packed_size, unpack, work_dtype
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
}


def _forward(x: torch.Tensor, borders: torch.Tensor, kind: str, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    code = (x.unsqueeze(-1) >= borders.to(torch.promote_types(x.dtype, borders.dtype))).sum(-1).to(torch.uint8)
    return ACTIVATIONS[kind](x).contiguous(), pack(code, bits)


def _launch_forward(x: torch.Tensor, borders: torch.Tensor, kind: str, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    from graphrewrite.backends.triton.kernels import activation

    flat = x.contiguous().view(-1)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    codes = torch.empty(packed_size(flat.numel(), bits), dtype=torch.uint8, device=x.device)
    activation.forward[lambda meta: (-(-codes.numel() // meta["BLOCK"]),)](
        flat, borders.to(torch.float32).contiguous(), y, codes, flat.numel(), codes.numel(),
        KIND=kind, BORDERS=borders.numel(), BITS=bits,
    )  # fmt: skip
    return y, codes


def _why_not(x: torch.Tensor, borders: torch.Tensor, kind: str, bits: int) -> str:
    if kind not in ACTIVATIONS:
        return f"activation {kind!r} is not one of {', '.join(ACTIVATIONS)}"
    if bits not in (1, 2, 4, 8):
        return f"codes of {bits} bits do not fill a byte"
    if borders.numel() >= 2**bits:
        return f"{borders.numel()} borders need more than {bits} bits"
    if borders.numel() > 15:
        return "the kernel compares with each border in turn: at most 15"
    return unfit(x)


few_bit_activation = operator(
    "few_bit_activation(Tensor x, Tensor borders, str kind, int bits) -> (Tensor, Tensor)",
    reference=_forward,
    launch=_launch_forward,
    fake=lambda x, borders, kind, bits: (
        x.new_empty(x.shape),
        x.new_empty(packed_size(x.numel(), bits), dtype=torch.uint8),
    ),
    why_not=_why_not,
)


def _backward(g: torch.Tensor, codes: torch.Tensor, levels: torch.Tensor, bits: int) -> torch.Tensor:
    work = work_dtype(g.dtype)
    code = unpack(codes, bits, g.numel()).view(g.shape)
    return (g.to(work) * levels.to(work)[code.to(torch.int64)]).to(g.dtype).contiguous()


def _launch_backward(g: torch.Tensor, codes: torch.Tensor, levels: torch.Tensor, bits: int) -> torch.Tensor:
    from graphrewrite.backends.triton.kernels import activation

    flat = g.contiguous().view(-1)
    dx = torch.empty(g.shape, dtype=g.dtype, device=g.device)
    activation.backward[lambda meta: (-(-codes.numel() // meta["BLOCK"]),)](
        flat, codes, levels.to(torch.float32).contiguous(), dx, flat.numel(), codes.numel(), BITS=bits
    )
    return dx


few_bit_backward = operator(
    "few_bit_backward(Tensor g, Tensor codes, Tensor levels, int bits) -> Tensor",
    reference=_backward,
    launch=_launch_backward,
    fake=lambda g, codes, levels, bits: g.new_empty(g.shape),
    why_not=lambda g, codes, levels, bits: (
        unfit(g) if bits in (1, 2, 4, 8) else f"codes of {bits} bits do not fill a byte"
    ),
)
