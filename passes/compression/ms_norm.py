"""Memory-sharing normalisation: what the norm and the next linear layers keep is one tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from graphrewrite.passes.compression._approximate import ApproximateBackward
from graphrewrite.passes.compression._linear import Linear, as_rows
from graphrewrite.passes.compression._regions import readers
from torch import fx

from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import Role, flat_inputs, info, is_backward, value
from graphrewrite.graph.ops import NORMALISATIONS

aten = torch.ops.aten

_SHARING = frozenset({aten.layer_norm.default, aten.rms_norm.default})


@dataclass(frozen=True)
class Norm:
    """A layer norm or RMS norm over the last dimension.

    Attributes:
        result: The operator whose value is y.
        x: What is normalised.
        weight: γ, if there is one.
        bias: β, if there is one.
        centred: Whether the mean is subtracted.
        eps: Added to the variance.
        scaled: z in the graph, where the norm is written out.
        inverse: 1/σ in the graph, where the norm is written out.
        operators: All operators of the norm.
    """

    result: fx.Node
    x: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    centred: bool
    eps: float
    operators: tuple[fx.Node, ...]
    scaled: fx.Node | None = None
    inverse: fx.Node | None = None


@dataclass(frozen=True)
class MemorySharingNorm(ApproximateBackward):
    """Keep the normalised z = (x - μ)/σ and 1/σ, and let the next linear layers' weight gradients read z, too.

    Ordinarily the norm keeps x, and every linear layer behind it y = γz + β. The gradients are the same up to
    round-off: ∂x = (q - mean q - z mean(q z))/σ with q = γ g (no mean q for RMS norm), ∂γ = Σ g z, ∂β = Σ g, and for
    a linear layer ∂W = (gᵀ z) diag γ + (Σ g) βᵀ: the affine part is folded into the product. The forward stays
    bitwise as it is.

    Taken are `layer_norm`, `rms_norm` and RMS norms written out in steps, over the last dimension. Where anything but
    a linear layer keeps y, nothing would be spared.
    """

    name = "ms_norm"
    summary = "layer norm and RMS norm keep one tensor together with the linear layers behind them"
    formula = "∂x = (q − mean q − z·mean(qz))/σ, q = γg;  ∂W = (gᵀz)·diag γ + (Σg)βᵀ"
    paper = "Yang et al.: Reducing Fine-Tuning Memory Overhead by Approximate and Memory-Sharing Backpropagation, 2024"

    def rewrite(self, graph: JointGraph, wanted: Callable[[fx.Node], bool]) -> int:
        """Every norm whose output only linear layers keep."""
        norms = self._find(graph)
        reading = {op for norm in norms for op in norm.operators}
        count = 0
        for norm in norms:
            if not wanted(norm.result) or not all(self.untouched(graph, op) for op in norm.operators):
                continue
            others = [op for op in readers(graph, norm.x) if op not in reading]
            if others:
                self.fail(graph, f"%{others[0].name} keeps its input in any case", norm.result)
                continue
            linears = self._behind(graph, norm)
            if linears is not None:
                self._share(graph, norm, linears)
                count += 1
        return count

    def _find(self, graph: JointGraph) -> list[Norm]:
        found = []
        for node in graph.forward_nodes():
            if info(node).role is not Role.FORWARD:
                continue
            if node.target in NORMALISATIONS - _SHARING and graph.table.requires_grad(node):
                self.fail(graph, "only layer norm and RMS norm share what they keep", node)
            if graph.cotangent(node) is None:
                continue
            if node.target in _SHARING:
                norm = _of_operator(node)
                if norm is None:
                    self.fail(graph, "it normalises over more than the last dimension", node)
                elif not graph.table.requires_grad(norm.x):
                    self.fail(graph, "its input has no gradient", node)
                else:
                    found.append(norm)
            elif node.target is aten.mul.Tensor:
                norm = _written_out(graph, node)
                if norm is not None:
                    found.append(norm)
        return found

    def _behind(self, graph: JointGraph, norm: Norm) -> list[Linear] | None:
        """The linear layers that keep the norm's output; None, with the reason noted, if sharing spares nothing."""
        linears = []
        keeping = [op for op in readers(graph, norm.result) if op not in norm.operators]
        if not keeping:
            self.fail(graph, "no linear layer keeps its output", norm.result)
            return None
        if norm.weight is None and norm.bias is None:
            return []  # y is z: whatever reads it shares it
        for op in keeping:
            linear = Linear.of(graph, op)
            row = linear.row(graph) if linear is not None else None
            if linear is None or row is None or value(linear.x).shape[-1] != value(norm.result).shape[-1]:
                self.fail(graph, f"%{op.name}, which is no linear layer, keeps its output", norm.result)
                return None
            if not row.plain:
                self.fail(graph, f"the derivative of %{op.name} was replaced already", norm.result)
                return None
            linears.append(linear)
        return linears

    def _share(self, graph: JointGraph, norm: Norm, linears: list[Linear]) -> None:
        scaled, inverse = norm.scaled, norm.inverse
        if scaled is None or inverse is None:
            scaled, inverse = _normalised(graph, norm)
        affine = [norm.weight, norm.bias]
        present = [node for node in affine if node is not None]
        sources = [norm.x, *present] if norm.scaled is not None else flat_inputs(norm.result)
        if norm.scaled is not None:
            sources = [s for s in sources if s is norm.x or graph.table.requires_grad(s)]
            order = tuple(range(len(sources)))
        else:
            order = graph.table.rows(norm.result)[0].wrt
        weight, bias, centred, x = norm.weight, norm.bias, norm.centred, norm.x
        pull = graph.context.form(pulled_back)

        def unpack(given: tuple[torch.Tensor, ...]) -> list[torch.Tensor | None]:
            held = iter(given)
            return [None if node is None else next(held) for node in affine]

        def bwd(residuals: tuple[torch.Tensor, ...], cotangent: torch.Tensor) -> tuple[torch.Tensor, ...]:
            z, over, *rest = residuals
            work = over.dtype
            g, z = cotangent.to(work), z.to(work)
            gamma, _ = unpack(tuple(rest))
            q = g if gamma is None else g * gamma.to(work)
            made = []
            for position in order:
                source = sources[position]
                if source is x:
                    made.append(pull(q, z, over, centred).to(cotangent.dtype))
                else:
                    total = as_rows(g * z if source is weight else g).sum(0)
                    made.append(total.to(value(source).dtype))
            return tuple(made)

        kept = [scaled, inverse, *present]
        if norm.scaled is not None:
            graph.replace_vjp(norm.result, bwd, residuals=kept, inputs=sources)
        else:
            graph.replace_vjp(norm.result, bwd, residuals=kept)
        for linear in linears if weight is not None or bias is not None else []:
            row = linear.row(graph)
            assert row is not None
            graph.replace_vjp(linear.op, _folded(linear, row, unpack), residuals=[scaled, *present], part="w")


def pulled_back(q: torch.Tensor, z: torch.Tensor, over: torch.Tensor, centred: bool) -> torch.Tensor:
    """The cotangent of x from that of z."""
    centre = q - z * (q * z).mean(-1, keepdim=True)
    if centred:
        centre = centre - q.mean(-1, keepdim=True)
    return over * centre


def _folded(
    linear: Linear, row: Any, unpack: Callable[[tuple[torch.Tensor, ...]], list[torch.Tensor | None]]
) -> Callable[..., Any]:
    def bwd(residuals: tuple[torch.Tensor, ...], cotangent: torch.Tensor) -> Any:
        z, *rest = residuals
        gamma, beta = unpack(tuple(rest))
        rows = as_rows(cotangent)
        product = rows.t() @ as_rows(z)
        if gamma is not None:
            product = product * gamma
        if beta is not None:
            product = product + rows.sum(0)[:, None] * beta
        return linear.gradients(row, rows, product)

    return bwd


def _of_operator(node: fx.Node) -> Norm | None:
    given: list[Any] = [*node.args, *([None] * 6)]
    if len(given[1]) != 1:
        return None
    if node.target is aten.layer_norm.default:
        eps = 1e-5 if len(node.args) < 5 else given[4]
        return Norm(node, given[0], given[2], given[3], True, eps, (node,))
    val = value(given[0])
    eps = given[3]
    if eps is None:
        eps = torch.finfo(_work(val.dtype)).eps
    return Norm(node, given[0], given[2], None, False, eps, (node,))


def _work(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _normalised(graph: JointGraph, norm: Norm) -> tuple[fx.Node, fx.Node]:
    """The normalised z and 1/σ, computed in the forward; z is y where there is no affine part."""
    eps, centred = norm.eps, norm.centred
    inputs, measure = [norm.x, norm.weight, norm.bias], graph.context.form(measured)
    like = info(norm.result).but(mirrors=None)
    scaled, inverse = graph.splice(lambda *given: measure(*given, eps, centred), inputs, like=like, whole=False)
    return (norm.result if norm.weight is None and norm.bias is None else scaled), inverse


def measured(
    x: torch.Tensor, gamma: torch.Tensor | None, beta: torch.Tensor | None, eps: float, centred: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalised z and 1/σ over the last dimension."""
    work = _work(x.dtype)
    if centred and work == x.dtype:
        # the same call as the forward's, with which it is merged
        _, mean, over = torch.native_layer_norm(x, [int(x.shape[-1])], gamma, beta, eps)
        return (x - mean) * over, over
    wide = x.to(work)
    if centred:
        wide = wide - wide.mean(-1, keepdim=True)
    over = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)
    return (wide * over).to(x.dtype), over


def _written_out(graph: JointGraph, node: fx.Node) -> Norm | None:
    """γ · (x · rsqrt(mean(x²) + eps)), with or without casts, if that is what ends in `node`."""
    for weight, scaled in (node.args[:2], node.args[1::-1]):
        if not isinstance(weight, fx.Node) or not isinstance(scaled, fx.Node) or value(weight).dim() != 1:
            continue
        if not graph.table.is_weightlike(weight):
            continue
        product, between = _uncast(scaled), [node, scaled]
        if product.target is not aten.mul.Tensor:
            continue
        between += [product] if product is not scaled else []
        for x, inverse in (product.args[:2], product.args[1::-1]):
            if not isinstance(x, fx.Node) or not isinstance(inverse, fx.Node):
                continue
            steps = _inverse_of(inverse, x)
            if steps is None:
                continue
            operators, source = [*between, *steps[1]], x
            if _only_in(x, operators):
                source = _uncast(x)
                operators += [x] if source is not x else []
            if _closed(graph, node, source, operators):
                return Norm(node, source, weight, None, False, steps[0], tuple(operators), scaled, inverse)
    return None


def _uncast(node: fx.Node) -> fx.Node:
    source = node.args[0] if node.target is aten._to_copy.default else node
    assert isinstance(source, fx.Node)
    return source


def _closed(graph: JointGraph, result: fx.Node, source: fx.Node, operators: list[fx.Node]) -> bool:
    """Whether nothing else reads what lies between, and every cotangent gets through."""
    inner = [op for op in operators if op is not result]
    if any(op in graph.model_outputs or not _only_in(op, operators) for op in inner):
        return False
    if any((read, op) in graph.table.cuts for op in operators for read in flat_inputs(op)):
        return False
    return value(source).dtype == value(result).dtype and graph.table.requires_grad(source)


def _inverse_of(inverse: Any, x: Any) -> tuple[float, list[fx.Node]] | None:
    """The eps and the operators, if `inverse` is rsqrt(mean(x²) + eps)."""
    if not isinstance(inverse, fx.Node) or not isinstance(x, fx.Node) or inverse.target is not aten.rsqrt.default:
        return None
    shifted = inverse.args[0]
    assert isinstance(shifted, fx.Node)
    if shifted.target is not aten.add.Tensor or not isinstance(shifted.args[1], (int, float)) or shifted.kwargs:
        return None
    mean = shifted.args[0]
    if not isinstance(mean, fx.Node) or mean.target is not aten.mean.dim:
        return None
    dims, keep = [*mean.args, None, None][1:3]
    if not keep or dims not in ([-1], [value(x).dim() - 1]):
        return None
    square = mean.args[0]
    assert isinstance(square, fx.Node)
    squared = (square.target is aten.pow.Tensor_Scalar and square.args == (x, 2)) or (
        square.target is aten.mul.Tensor and square.args == (x, x)
    )
    if not squared or not math.isfinite(shifted.args[1]):
        return None
    return float(shifted.args[1]), [inverse, shifted, mean, square]


def _only_in(node: fx.Node, operators: list[fx.Node]) -> bool:
    return all(user in operators for user in node.users if not is_backward(user))
