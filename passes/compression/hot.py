"""HOT: Hadamard transforms before quantisation, for both products of a linear layer's backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from graphrewrite.passes.compression._approximate import ApproximateBackward, shared_constant
from graphrewrite.passes.compression._linear import Linear, as_rows
from graphrewrite.passes.compression._packing import lengthened, pack, unpack
from graphrewrite.passes.compression._sketch import work_dtype
from graphrewrite.passes.compression.randomized_linear import by_input
from torch import fx

from graphrewrite.errors import RuleError
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import flat_inputs, info


@dataclass(frozen=True)
class HadamardTraining(ApproximateBackward):
    """Quantise the backward of linear layers behind a Hadamard transform, and keep a compressed input.

    Input cotangent: g and W are transformed along the dimension that is summed over (blocks of `block`) and rounded to
    `input_bits`; since H Hᵀ = I the product is that of g and W, with the outliers spread out before rounding.

    Weight gradient: x and g are transformed along the tokens, in blocks; the `rank` lowest frequencies of each block
    stay, rounded to `weight_bits`. Of x, that is what the forward keeps: packed codes and one scale for each row,
    rank/block · weight_bits per element.

    Products run in floating point on rounded numbers: what is spared here is memory.

    Args:
        input_bits: 2 to 8, for g and W in the input cotangent; None: it stays exact.
        weight_bits: 2 to 8, for x and g in the weight gradient; None: they are not rounded.
        rank: Frequencies that stay of each block of tokens.
        block: Size of a Hadamard block, a power of two.
        always: Compress inputs that are kept for something else, too.
    """

    input_bits: int | None = 4
    weight_bits: int | None = 8
    rank: int = 8
    block: int = 16
    always: bool = False

    name = "hot"
    summary = "Hadamard-quantised backward of linear layers; low-rank, quantised inputs are kept"
    formula = "∂x = Q(g H) Q(Hᵀ W),  ∂W = Q(H_r g)ᵀ Q(H_r x)"
    paper = "Kim et al.: HOT: Hadamard-based Optimized Training, 2025"

    def requires(self, graph: JointGraph) -> None:
        """Sizes that fit."""
        for option, bits in (("input_bits", self.input_bits), ("weight_bits", self.weight_bits)):
            if bits is not None and (isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8):
                raise RuleError(f"hot{{{option}={bits}}} is out of range", remedy="use 2 to 8 bits, or null")
        if self.block < 1 or self.block & (self.block - 1):
            raise RuleError(f"hot{{block={self.block}}} is no power of two", remedy="use 2, 4, 8, 16, 32, ...")
        if not 1 <= self.rank <= self.block:
            raise RuleError(f"hot{{rank={self.rank}}} is out of range", remedy=f"use 1 to block={self.block}")

    def rewrite(self, graph: JointGraph, wanted: Callable[[fx.Node], bool]) -> int:
        """The linear layers, those with the same input together."""
        count = 0
        for linears in by_input(self, graph, wanted, always=self.always):
            matrix = _matrix(graph, linears[0].x, self.block)
            self._keep(graph, linears, matrix)
            for linear in linears:
                self._round_cotangent(graph, linear, matrix)
            count += len(linears)
        return count

    def _keep(self, graph: JointGraph, linears: list[Linear], matrix: fx.Node) -> None:
        rank, bits = self.rank, self.weight_bits

        def store(x: torch.Tensor, held: torch.Tensor) -> tuple[torch.Tensor, ...]:
            low = low_frequencies(as_rows(x), held, rank)
            if bits is None:
                return (low,)
            numbers, scale = round_rows(low, bits)
            half = 2 ** (bits - 1)
            return pack((numbers + half).to(torch.uint8), bits), scale

        kept = list(
            graph.splice(store, [linears[0].x, matrix], like=info(linears[0].op).but(mirrors=None), whole=False)
        )
        for linear in linears:
            graph.replace_vjp(linear.op, self._weight(graph, linear), residuals=[matrix, *kept], part="w")

    def _weight(self, graph: JointGraph, linear: Linear) -> Callable[..., Any]:
        rank, bits, row = self.rank, self.weight_bits, linear.row(graph)
        assert row is not None

        def bwd(residuals: tuple[torch.Tensor, ...], cotangent: torch.Tensor) -> Any:
            held, *kept = residuals
            rows = as_rows(cotangent)
            low = low_frequencies(rows, held, rank)
            if bits is None:
                stored = kept[0]
            else:
                packed, scale = kept
                width = linear_width(linear)
                codes = unpack(packed, bits, scale.shape[0] * width).view(scale.shape[0], width)
                stored = (codes.to(scale.dtype) - 2 ** (bits - 1)) * scale
                numbers, spread = round_rows(low, bits)
                low = numbers * spread
            return linear.gradients(row, rows, (low.t() @ stored).to(cotangent.dtype))

        return bwd

    def _round_cotangent(self, graph: JointGraph, linear: Linear, matrix: fx.Node) -> None:
        bits = self.input_bits
        rows = [row for row in graph.table.rows(linear.op) if row.part == "d" and row.active]
        if bits is None or not rows:
            return
        if not rows[0].plain:
            self.fail(graph, "its input cotangent was replaced already", linear.op)
            return
        rows_first = linear.rows_first

        def bwd(residuals: tuple[torch.Tensor, ...], cotangent: torch.Tensor) -> torch.Tensor:
            weight, held = residuals
            facing = weight if rows_first else weight.t()
            left = round_all(transform_last(as_rows(cotangent), held), bits)
            right = round_all(transform_last(facing.t(), held), bits)
            product = (left @ right.t()).to(cotangent.dtype)
            return product.view(*cotangent.shape[:-1], product.shape[-1])

        graph.replace_vjp(linear.op, bwd, residuals=[flat_inputs(linear.op)[linear.weight], matrix], part="d")


def linear_width(linear: Linear) -> int:
    """How many features a linear layer reads."""
    return int(linear.x.meta["val"].shape[-1])


def hadamard(size: int) -> torch.Tensor:
    """The orthonormal Walsh-Hadamard matrix, float64, rows from the lowest to the highest number of sign changes."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    changes = (matrix[:, 1:] != matrix[:, :-1]).sum(1)
    ordered: torch.Tensor = matrix[changes.argsort()] / size**0.5
    return ordered


def _matrix(graph: JointGraph, x: fx.Node, block: int) -> fx.Node:
    val = x.meta["val"]
    held = hadamard(block).to(device=val.device, dtype=work_dtype(val.dtype))
    return shared_constant(graph, held, "hadamard")


def low_frequencies(rows: torch.Tensor, matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """The first `rank` coefficients of each block of rows: (blocks · rank, n). The last block is filled with zeros."""
    block = matrix.shape[0]
    count, width = rows.shape
    blocks = (count + block - 1) // block
    filled = lengthened(rows.to(matrix.dtype), blocks * block)
    low = torch.matmul(matrix[:rank], filled.view(blocks, block, width))
    return low.reshape(blocks * rank, width)


def transform_last(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Every block of the last dimension times H; the dimension is filled up with zeros to whole blocks."""
    block = matrix.shape[0]
    count, width = rows.shape
    blocks = (width + block - 1) // block
    wide = rows.to(matrix.dtype)
    if blocks * block != width:
        wide = torch.nn.functional.pad(wide, (0, blocks * block - width))
    return (wide.reshape(count * blocks, block) @ matrix.t()).reshape(count, blocks * block)


def round_rows(rows: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric rounding with a scale for each row: whole numbers and the scale, in the dtype of the rows."""
    top = 2 ** (bits - 1) - 1
    largest = rows.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest / top, torch.ones_like(largest))
    return (rows / scale).round().clamp(-top, top), scale


def round_all(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """The numbers rounded symmetrically, with a scale for each row."""
    numbers, scale = round_rows(rows, bits)
    return numbers * scale
