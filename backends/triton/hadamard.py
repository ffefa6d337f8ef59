"""The fast Walsh-Hadamard transform of groups of the last dimension, and the same with quantisation behind it.

H is symmetric and H H = n, so with the factor 1 / sqrt(n) the transform is its own inverse. `hadamard_quantize` gives
int8 codes between -(2^(b-1) - 1) and 2^(b-1) - 1, and a bfloat16 scale for each group: what a product of integers
wants to read (HOT, Kim et al., 2025; Training Transformers with 4-bit Integers, Xi et al., 2023). Its rounding is that
of the symmetric codecs.
"""

from __future__ import annotations

import math

import torch
from graphrewrite.backends.triton.quantise import hadamard_rows, levels, rotation
from graphrewrite.backends.triton.support import next_power_of_two, operator, unfit
from graphrewrite.passes.compression._packing import round_up, work_dtype

from graphrewrite import random

LONGEST = 2048


def _reference(x: torch.Tensor, group: int) -> torch.Tensor:
    work = x.to(work_dtype(x.dtype))
    return _transform(work, group).to(x.dtype)


def _transform(work: torch.Tensor, group: int) -> torch.Tensor:
    v = work.reshape(-1, group)
    for _ in range(group.bit_length() - 1):
        a, b = v[:, 0::2], v[:, 1::2]
        v = torch.cat([a + b, a - b], 1)
    return (v * (1.0 / math.sqrt(group))).view(work.shape)


def _launch(x: torch.Tensor, group: int) -> torch.Tensor:
    return hadamard_rows(x.reshape(-1, group)).view(x.shape)


def _why_not(x: torch.Tensor, group: int) -> str:
    if group < 4 or group & (group - 1):
        return f"a group of {group} elements is no power of two of at least 4"
    if group > LONGEST:
        return f"a group of {group} elements is longer than {LONGEST}"
    width = x.shape[-1] if x.dim() else 1
    if isinstance(width, int) and width % group:
        return f"rows of {width} elements are not made of groups of {group}"
    return unfit(x)


hadamard_transform = operator(
    "hadamard_transform(Tensor x, int group) -> Tensor",
    reference=_reference,
    launch=_launch,
    fake=lambda x, group: x.new_empty(x.shape),
    why_not=_why_not,
)


def _reference_codes(
    x: torch.Tensor, counter: torch.Tensor, stream: int, group: int, bits: int, stochastic: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    top = levels(bits, True)
    rows = _transform(x.to(work_dtype(x.dtype)), group).view(-1, group)
    high = rows.abs().amax(1)
    step = round_up(high / top + high * 0, torch.bfloat16)
    codes = rows / torch.where(step == 0, 1.0, step).to(rows.dtype)[:, None]
    codes = (codes + random.uniform(counter, stream, list(rows.shape))).floor() if stochastic else codes.round()
    return codes.clamp(-top, top).nan_to_num(0.0).to(torch.int8).view(x.shape), step


def _launch_codes(
    x: torch.Tensor, counter: torch.Tensor, stream: int, group: int, bits: int, stochastic: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    from graphrewrite.backends.triton.kernels import hadamard

    rows = x.numel() // group
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    steps = torch.empty(rows, dtype=torch.bfloat16, device=x.device)
    hadamard.encode[lambda meta: (-(-rows // meta["GROUPS"]),)](
        x.contiguous(), counter, codes, steps, rows, stream, next_power_of_two(rows),
        LEVELS=levels(bits, True), STOCHASTIC=stochastic, **rotation(group),
    )  # fmt: skip
    return codes, steps


hadamard_quantize = operator(
    "hadamard_quantize(Tensor x, Tensor counter, int stream, int group, int bits, bool stochastic) -> (Tensor, Tensor)",
    reference=_reference_codes,
    launch=_launch_codes,
    fake=lambda x, counter, stream, group, bits, stochastic: (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(x.numel() // group, dtype=torch.bfloat16),
    ),
    why_not=lambda x, counter, stream, group, bits, stochastic: (
        f"symmetric codes of {bits} bits are not int8" if not 2 <= bits <= 8 else _why_not(x, group)
    ),
)
