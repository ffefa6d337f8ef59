"""Forward mode: the Jacobian-vector product of every operator, emitted beside the forward.

`push_forward` walks the forward in order. Products and linear operators are applied to the tangents, one factor at a
time; of every other operator torch's forward-mode derivative (that of `torch.func.jvp`) is traced. Where there is
none, the operator's VJP is differentiated by the cotangent (the VJP is linear in it, so its transpose is the JVP);
where it has no usable VJP either, it is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from graphrewrite.errors import GraphRewriteError, RuleError
from graphrewrite.graph.aliasing import is_view
from graphrewrite.graph.nodes import NodeInfo, Role, flat_inputs, info, is_float, outputs_of, producer, value
from graphrewrite.graph.ops import ATTENTIONS, NORMALISATIONS, call_operator, is_random

if TYPE_CHECKING:
    from graphrewrite.graph.joint import JointGraph

aten = torch.ops.aten


def push_forward(graph: JointGraph, tangents: Mapping[fx.Node, fx.Node], *, copy: str = "") -> dict[fx.Node, fx.Node]:
    """Tangents of everything that depends differentiably on the given ones. See `JointGraph.push_forward`."""
    table = graph.table
    arrived = {node: tangent for node, tangent in tangents.items() if node.op == "placeholder"}
    for op in graph.forward_nodes():
        if info(op).copy != copy or producer(op) is not op or not table.requires_grad(op):
            continue
        outputs = outputs_of(op)
        positions = [p for p, node in enumerate(flat_inputs(op)) if node in arrived]
        found = _jvp(graph, op, positions, arrived) if positions else {}
        for index, node in outputs.items():
            made = found.get(index)
            given = tangents.get(node)
            if made is not None and given is not None:
                made = graph.emit(aten.add.Tensor, (made, given), like=_like(op), val=value(given))
            if made is not None or given is not None:
                arrived[node] = made if made is not None else given  # type: ignore[assignment]
    graph.sort()
    return arrived


def _like(op: fx.Node) -> NodeInfo:
    return info(op).but(role=Role.TANGENT, mirrors=None, cotangent_of=None)


def _jvp(
    graph: JointGraph, op: fx.Node, positions: Sequence[int], arrived: Mapping[fx.Node, fx.Node]
) -> dict[int, fx.Node]:
    """The tangents of an operator's results, by position."""
    if is_random(op) and op.target not in ATTENTIONS:
        raise _refused(op, "it draws random numbers as a function of the value it reads")
    inputs = flat_inputs(op)
    if positions == [0] and is_view(op) and isinstance(value(op), torch.Tensor):
        args, kwargs = fx.map_arg((op.args, op.kwargs), lambda n: arrived[inputs[0]] if n is inputs[0] else n)
        # a tangent need not have the strides of its value
        target: Any = aten.reshape.default if op.target in (aten.view.default, aten._unsafe_view.default) else op.target
        return {0: graph.emit(target, args, kwargs, like=_like(op))}
    tape = graph.table.tape(op)
    assert tape is not None
    wanted = [i for i, n in outputs_of(op).items() if i in tape.requires_grad() and is_float(n)]
    product = _product(op, positions)
    if product is not None:
        return {
            0: graph.splice(product, [*inputs, *(arrived[inputs[p]] for p in positions)], like=_like(op), whole=False)
        }
    call = _call(op, wanted)
    resting = [
        p
        for p, n in enumerate(inputs)
        if p not in positions and is_float(n) and any(isinstance(size, torch.SymInt) for size in value(n).shape)
    ]
    given = [*inputs, *(arrived[inputs[p]] for p in positions)]
    rules = [_forward_mode(call, len(inputs), positions, resting), _double_vjp(call, len(inputs), positions)]
    if op.target in NORMALISATIONS:
        rules.reverse()  # their forward mode would fix the sizes of the input
    if getattr(op.target, "namespace", "") != "aten":
        rules = rules[1:]  # custom operators and functions have a backward at most; forward mode would say zero
    reasons: list[str] = []
    for rule in rules:
        last = graph.output_node.prev
        try:
            made = graph.splice(rule, given, like=_like(op), whole=False)
        except (RuntimeError, NotImplementedError, GraphRewriteError) as error:
            reasons.append(str(error).splitlines()[0])
            _erase_unread(graph, last, ())
            continue
        _erase_unread(graph, last, made)
        return dict(zip(wanted, made, strict=True))
    raise _refused(op, "; ".join(dict.fromkeys(reasons)))


def _refused(op: fx.Node, reason: str) -> RuleError:
    return RuleError(
        f"operator {op.target} has no JVP: {reason}",
        node=op.name,
        module=info(op).module,
        source=info(op).source,
        remedy="detach its input, give it a derivative that can be differentiated again, or use likelihood_ratio, "
        "which needs none",
    )


def _call(op: fx.Node, wanted: Sequence[int]) -> Callable[[Sequence[Any]], tuple[torch.Tensor, ...]]:
    """The operator as a function of its tensor inputs that returns its results at `wanted`."""
    leaves, spec = pytree.tree_flatten((op.args, op.kwargs))
    single = not isinstance(value(op), (tuple, list))

    def call(values: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        given = iter(values)
        args, kwargs = pytree.tree_unflatten([next(given) if isinstance(n, fx.Node) else n for n in leaves], spec)
        if op.target in ATTENTIONS:
            # neither forward mode nor a second derivative is there for the fused kernels
            return (_attention(*args, **kwargs),)
        out = call_operator(op.target, args, kwargs)  # type: ignore[arg-type]
        return (out,) if single else tuple(out[i] for i in wanted)

    return call


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    val: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if dropout_p:
        raise RuleError("attention with dropout inside draws other numbers when it is computed again")
    made: torch.Tensor = aten._scaled_dot_product_attention_math.default(
        query, key, val, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]
    return made


_PRODUCTS = {
    aten.linear.default,
    aten.mm.default,
    aten.bmm.default,
    aten.matmul.default,
    aten.mul.Tensor,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
}
"""Linear in the first input and in the second one; a third one is added to the second one's products."""


def _product(op: fx.Node, positions: Sequence[int]) -> Callable[..., torch.Tensor] | None:
    """The tangent of a product: one product for each factor that moves."""
    target: Any = op.target
    leaves = list(op.args)
    factors = [n for n in leaves[:3] if isinstance(n, fx.Node)]
    plain = all(isinstance(n, fx.Node) for n in leaves[:2]) and flat_inputs(op)[: len(factors)] == factors
    if target not in _PRODUCTS or not plain or (2 in positions and 1 not in positions):
        return None
    count, biased = len(flat_inputs(op)), len(factors) == 3

    def tangent(*given: Any) -> torch.Tensor:
        moved = dict(zip(positions, given[count:], strict=True))
        sizes = iter(given[len(factors) : count])
        rest = fx.map_arg(tuple(leaves[len(factors) :]), lambda _: next(sizes))
        total: torch.Tensor | None = None
        for position in (0, 1):
            if position not in moved:
                continue
            one = [moved.get(p, given[p]) if p == position else given[p] for p in (0, 1)]
            bias = [moved.get(2) if position == 1 else None] if biased else []
            part: torch.Tensor = target(*one, *bias, *rest, **op.kwargs)
            total = part if total is None else total + part
        assert total is not None
        return total

    return tangent


def _forward_mode(
    call: Callable[[Sequence[Any]], tuple[torch.Tensor, ...]],
    count: int,
    positions: Sequence[int],
    resting: Sequence[int],
) -> Callable[..., Any]:
    """Torch's own rule. Inputs that do not move get a tangent of zeros: torch would make one of a fixed size."""

    def jvp(*given: Any) -> tuple[torch.Tensor, ...]:
        values, tangents = list(given[:count]), given[count:]
        with forward_ad.dual_level():
            for position, tangent in zip(positions, tangents, strict=True):
                values[position] = forward_ad.make_dual(values[position], tangent)
            for position in resting:
                values[position] = forward_ad.make_dual(values[position], torch.zeros_like(values[position]))
            outs = call(values)
            made = [forward_ad.unpack_dual(out) for out in outs]
            return tuple(torch.zeros_like(m.primal) if m.tangent is None else m.tangent for m in made)

    return jvp


def _double_vjp(
    call: Callable[[Sequence[Any]], tuple[torch.Tensor, ...]], count: int, positions: Sequence[int]
) -> Callable[..., Any]:
    """J t = d/du <u^T J, t>."""

    def jvp(*given: Any) -> tuple[torch.Tensor, ...]:
        values, tangents = list(given[:count]), given[count:]
        with torch.enable_grad():
            primals = [values[p].detach().requires_grad_() for p in positions]
            for position, held in zip(positions, primals, strict=True):
                values[position] = held
            outs = call(values)
            cotangents = [torch.zeros_like(o).requires_grad_() for o in outs]
            pulled = torch.autograd.grad(outs, primals, cotangents, create_graph=True, allow_unused=True)
            pairs = [(g, t) for g, t in zip(pulled, tangents, strict=True) if g is not None]
            if not all(g.requires_grad for g, _ in pairs):
                raise RuntimeError("its VJP is not differentiable by the cotangent")
            made = torch.autograd.grad(
                [g for g, _ in pairs], cotangents, [t for _, t in pairs], allow_unused=True, materialize_grads=True
            )
        return tuple(m.detach() for m in made)

    return jvp


def _erase_unread(graph: JointGraph, last: fx.Node, kept: Sequence[Any]) -> None:
    """Erase what was traced behind `last` and nothing reads: the operator's own value is there already."""
    node = graph.output_node.prev
    while node is not last:
        before = node.prev
        if not node.users and node not in kept:
            graph.graph.erase_node(node)
        node = before
