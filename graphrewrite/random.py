"""Counter-based random numbers, as an operator that can be traced.

`torch.Generator` cannot be traced, and global generators make results depend on what ran before. Here every number is
a function of (seed, step, rank), of the stream (one per place in the graph) and of its position: the same on every
device, in eager and compiled code, in the forward and when it is computed again in the backward.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): key = seed,
counter = (position // 4, stream, step, rank), word position % 4. Perturbations of weights and activations, of which a
step needs as many as there are weights or units, are drawn by a cheaper one: see `direction`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF

_LIBRARY = torch.library.Library("graphrewrite", "FRAGMENT")
_LIBRARY.define("philox(Tensor counter, int stream, SymInt[] size) -> Tensor")


def _philox(counter: torch.Tensor, stream: int, size: Sequence[int]) -> torch.Tensor:
    return _words(counter, stream, 0, math.prod(int(s) for s in size)).reshape(tuple(size))


def _words(counter: torch.Tensor, stream: int, start: int, count: int) -> torch.Tensor:
    """The words at positions start .. start + count - 1 of a stream, int32."""
    seed, step, rank = counter.unbind()
    position = torch.arange(start // 4, (start + count + 3) // 4, dtype=torch.int64, device=counter.device)
    c0 = position & _MASK
    c1 = torch.full_like(position, stream & _MASK)
    c2 = torch.zeros_like(position) + (step & _MASK)
    c3 = torch.zeros_like(position) + (rank & _MASK)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # the products of two 32-bit words fit an int64 up to its sign bit, which the shifts and masks undo
        p0, p1 = c0 * _M0, c2 * _M1
        high0, low0 = (p0 >> 32) & _MASK, p0 & _MASK
        high1, low1 = (p1 >> 32) & _MASK, p1 & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    words = torch.stack([c0, c1, c2, c3], dim=-1).flatten()[start % 4 :][:count]
    # 0 .. 2^32-1 as the int32 with the same bits
    return torch.where(words > 0x7FFFFFFF, words - (1 << 32), words).to(torch.int32)


def _philox_fake(counter: torch.Tensor, stream: int, size: Sequence[int]) -> torch.Tensor:
    return counter.new_empty(size, dtype=torch.int32)


_LIBRARY.impl("philox", _philox, "CompositeExplicitAutograd")
torch.library.register_fake("graphrewrite::philox", _philox_fake, lib=_LIBRARY)


def bits(counter: torch.Tensor, stream: int, size: Sequence[int]) -> torch.Tensor:
    """Uniform 32-bit words, int32 of shape `size`.

    Args:
        counter: int64 tensor (seed, step, rank).
        stream: Which of the graph's streams.
        size: Shape.
    """
    return torch.ops.graphrewrite.philox(counter, stream, size)  # type: ignore[no-any-return]


def uniform(
    counter: torch.Tensor, stream: int, size: Sequence[int], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Uniform on [0, 1), in steps of 2^-24."""
    return _unit(bits(counter, stream, size)).to(dtype)


def _unit(words: torch.Tensor) -> torch.Tensor:
    return ((words >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24


@dataclass(frozen=True)
class Uniform:
    """The uniform numbers of one stream, as a function of the shape that is wanted."""

    counter: torch.Tensor
    stream: int

    def __call__(self, size: Sequence[Any]) -> torch.Tensor:
        """Uniform on [0, 1), float32."""
        return uniform(self.counter, self.stream, size)


def normal(counter: torch.Tensor, stream: int, size: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal, by Box and Muller from two uniforms."""
    pair = uniform(counter, stream, [2, *size])
    return _box_muller(pair[0], pair[1]).to(dtype)


def _box_muller(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    radius = torch.sqrt(-2.0 * torch.log1p(-first))
    return radius * torch.cos(2.0 * math.pi * second)


def integers(counter: torch.Tensor, stream: int, size: Sequence[int], high: int) -> torch.Tensor:
    """Uniform on 0 .. high-1, int64; high up to 2^24."""
    return (uniform(counter, stream, size, torch.float64) * high).to(torch.int64)


def signs(counter: torch.Tensor, stream: int, size: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """-1 or 1 with equal probability."""
    return _sign(bits(counter, stream, size)).to(dtype)


def _sign(words: torch.Tensor) -> torch.Tensor:
    return 1 - 2 * ((words >> 31) & 1)


# --- directions ----------------------------------------------------------------------------------------------------

_LIBRARY.define("direction(Tensor counter, int stream, SymInt[] size, Tensor? number, str distribution) -> Tensor")
_CHUNK = 1 << 14
# 64-bit constants as int64: arithmetic modulo 2^64 is that of int64
_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15 - (1 << 64), 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)


def direction(
    counter: torch.Tensor,
    stream: int,
    size: Sequence[int],
    number: torch.Tensor | None,
    distribution: str,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """A random direction as one operator: `normal` or `signs` of a step's draw `number`, made a chunk at a time.

    Where as many numbers are needed as there are weights, Philox is what a step would spend most of its time on. These
    come from SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014): as much a
    function of (seed, step, rank), stream and position, and the same on every device, at about a tenth of the cost.

    Args:
        counter: (seed, step, rank).
        stream: One per tensor that is perturbed.
        size: Shape of the tensor.
        number: int64 scalar: which draw of the step, e.g. the index of a loop; None: the only one.
        distribution: `"normal"` or `"sign"`.
        dtype: The numbers are those of float32.
    """
    drawn: torch.Tensor = torch.ops.graphrewrite.direction(counter, stream, size, number, distribution)
    return drawn.to(dtype)


def in_chunks(
    counter: torch.Tensor,
    stream: int,
    count: int,
    number: torch.Tensor | int | None,
    distribution: str,
    chunk: int = _CHUNK,
) -> Iterator[tuple[int, torch.Tensor]]:
    """The numbers of `direction`, flat, an even `chunk` at a time, as `(start, numbers)`: for where room is short."""
    key = _key(counter, stream, 0 if number is None else number)
    draw = _signs if distribution == "sign" else _normals
    for start in range(0, count, chunk):
        yield start, draw(key, start, min(chunk, count - start))


# in place, for they are called where there is no room: 10 bytes per number at most


def _signs(key: torch.Tensor, start: int, count: int) -> torch.Tensor:
    words = _split_mix(key, start // 2, (count + 1) // 2).view(torch.int32)
    return words.bitwise_right_shift_(31).bitwise_and_(1).mul_(-2).add_(1).to(torch.float32)[:count]


def _normals(key: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """Both numbers that Box and Muller make of two uniform ones."""
    words = _split_mix(key, start // 2, (count + 1) // 2).view(torch.int32)
    words.bitwise_right_shift_(8).bitwise_and_(0xFFFFFF)
    made = words.to(torch.float32).mul_(2.0**-24).view(-1, 2)
    del words
    radius = made[:, 0].neg().log1p_().mul_(-2.0).sqrt_()
    angle = made[:, 1] * (2.0 * math.pi)
    torch.mul(radius, angle.cos(), out=made[:, 0])
    torch.mul(radius, angle.sin_(), out=made[:, 1])
    return made.view(-1)[:count]


def _key(counter: torch.Tensor, stream: int, number: torch.Tensor | int) -> torch.Tensor:
    """Where the sequence of one draw starts: a hash of all that it is a function of."""
    places = torch.arange(1, 4, dtype=torch.int64, device=counter.device) * _GOLDEN
    told = _mix(counter + places).sum()
    for one in (stream, number):
        told = _mix(told + torch.as_tensor(one, dtype=torch.int64, device=told.device) * _GOLDEN)
    return told


def _split_mix(key: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """The words start .. start + count - 1 of the sequence that begins at `key`, int64 with the same bits."""
    position = torch.arange(start + 1, start + 1 + count, dtype=torch.int64, device=key.device)
    return _mix(position.mul_(_GOLDEN).add_(key))


def _mix(words: torch.Tensor) -> torch.Tensor:
    """In place."""
    # masks make the shifts of a signed word those of an unsigned one
    shifted = words >> 30
    words.bitwise_xor_(shifted.bitwise_and_((1 << 34) - 1)).mul_(_MIX1)
    torch.bitwise_right_shift(words, 27, out=shifted)
    words.bitwise_xor_(shifted.bitwise_and_((1 << 37) - 1)).mul_(_MIX2)
    torch.bitwise_right_shift(words, 31, out=shifted)
    return words.bitwise_xor_(shifted.bitwise_and_((1 << 33) - 1))


def _direction(
    counter: torch.Tensor, stream: int, size: Sequence[int], number: torch.Tensor | None, distribution: str
) -> torch.Tensor:
    made = torch.empty(math.prod(size), dtype=torch.float32, device=counter.device)
    for start, numbers in in_chunks(counter, stream, made.numel(), number, distribution):
        made[start : start + numbers.numel()] = numbers
    return made.reshape(tuple(size))


def _direction_fake(
    counter: torch.Tensor, stream: int, size: Sequence[int], number: torch.Tensor | None, distribution: str
) -> torch.Tensor:
    return counter.new_empty(size, dtype=torch.float32)


_LIBRARY.impl("direction", _direction, "CompositeExplicitAutograd")
torch.library.register_fake("graphrewrite::direction", _direction_fake, lib=_LIBRARY)
