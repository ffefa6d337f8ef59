"""Operators of the graph: the VJP node, what is known of ATen operators, and opaque custom functions."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphrewrite.errors import RuleError

aten = torch.ops.aten


def vjp(
    mirrored: Any,
    cotangents: tuple[Any, ...],
    wrt: tuple[int, ...],
    replaced: tuple[int, ...] = (),
    by: tuple[Any, ...] = (),
) -> Any:
    """The vector-Jacobian product of one forward operator; the mirror node of the backward graph.

    As a node, `mirrored` is the forward operator. Only the reference interpreter and the expansion can run it: they
    hold the operator's tape.

    Args:
        mirrored: The forward operator.
        cotangents: One per output of the operator; None where no cotangent arrives.
        wrt: Positions in the operator's flattened tensor inputs whose cotangents are returned; one gives a tensor,
            several a tuple.
        replaced: Positions of inputs that the derivative reads in another form (feedback weights).
        by: What it reads there.
    """
    raise RuleError("a VJP node runs in the interpreter or after expansion only")


def is_vjp(node: fx.Node) -> bool:
    """Whether a node is an unexpanded VJP."""
    return node.op == "call_function" and node.target is vjp


@dataclass(frozen=True)
class VjpCall:
    """The arguments of a VJP node, typed.

    Attributes:
        mirror: The forward operator.
        cotangents: One per output of the operator; None where none arrives.
        wrt: Positions of the inputs whose cotangents it returns.
        replaced: Positions of inputs that it reads in another form -> the node it reads.
    """

    mirror: fx.Node
    cotangents: tuple[fx.Node | None, ...]
    wrt: tuple[int, ...]
    replaced: dict[int, fx.Node]

    @staticmethod
    def of(node: fx.Node) -> VjpCall:
        """Read a VJP node."""
        mirror, cotangents, wrt, *other = cast("tuple[Any, ...]", node.args)
        return VjpCall(mirror, tuple(cotangents), tuple(wrt), dict(zip(*other, strict=True)) if other else {})


MATMULS = frozenset(
    {
        aten.linear.default,
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten.matmul.default,
    }
)
POOLS = frozenset(
    {
        aten.max_pool1d.default,
        aten.max_pool2d.default,
        aten.max_pool3d.default,
        aten.avg_pool1d.default,
        aten.avg_pool2d.default,
        aten.avg_pool3d.default,
        aten.adaptive_avg_pool1d.default,
        aten.adaptive_avg_pool2d.default,
        aten.adaptive_avg_pool3d.default,
    }
)
CONVOLUTIONS = frozenset(
    {
        aten.conv1d.default,
        aten.conv2d.default,
        aten.conv3d.default,
        aten.conv1d.padding,
        aten.conv2d.padding,
        aten.conv3d.padding,
        aten.convolution.default,
        aten.conv_transpose1d.default,
        aten.conv_transpose2d.input,
        aten.conv_transpose3d.input,
    }
)
EMBEDDINGS = frozenset({aten.embedding.default})
SEPARABLE = MATMULS | CONVOLUTIONS | EMBEDDINGS
"""Operators whose parameter gradient is computed apart from the input cotangent. Never the normalisations: their
backward kernel would run twice."""

ATTENTIONS = frozenset(
    {
        aten.scaled_dot_product_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)
NORMALISATIONS = frozenset(
    {
        aten.layer_norm.default,
        aten.native_layer_norm.default,
        aten.rms_norm.default,
        aten.group_norm.default,
        aten.native_group_norm.default,
        aten.instance_norm.default,
        aten.batch_norm.default,
        aten._native_batch_norm_legit_functional.default,
        aten.native_batch_norm.default,
    }
)
ACTIVATIONS = frozenset(
    {
        aten.relu.default,
        aten.relu6.default,
        aten.leaky_relu.default,
        aten.prelu.default,
        aten.elu.default,
        aten.selu.default,
        aten.celu.default,
        aten.gelu.default,
        aten.silu.default,
        aten.mish.default,
        aten.hardswish.default,
        aten.hardsigmoid.default,
        aten.hardtanh.default,
        aten.tanh.default,
        aten.sigmoid.default,
        aten.log_sigmoid.default,
        aten.softplus.default,
    }
)
"""Element-wise non-linearities: one cotangent in, one out."""


def is_pointwise(node: fx.Node) -> bool:
    """Whether an operator works element by element; dropout counts."""
    if node.target in (aten.dropout.default, aten.native_dropout.default, aten.prelu.default):
        return True
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def is_random(node: fx.Node) -> bool:
    """Whether an operator draws from torch's global generator; attention without dropout does not."""
    target: Any = node.target
    if torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ()):
        return False
    for place, argument in enumerate(target._schema.arguments):
        if argument.name == "dropout_p":
            given = node.args[place] if place < len(node.args) else node.kwargs.get("dropout_p", argument.default_value)
            return bool(given != 0.0)
    return True


def is_impure(node: fx.Node) -> bool:
    """Whether an operator must stay although nothing reads it, and must keep its place among its like."""
    if node.op != "call_function":
        return False
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable:
        return True
    return is_random(node) or node.target in (torch.ops.aten._assert_async.msg, aten._assert_scalar.default)


# --- opaque custom functions ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CustomCall:
    """One call form of a user's `torch.autograd.Function`: which arguments are tensors, and the constants between."""

    function: type
    apply: Callable[..., Any]
    spec: Any
    constants: tuple[Any, ...]
    out_spec: list[Any]

    def __call__(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Call the user's function with autograd; returns its tensor results."""
        given = iter(tensors)
        leaves = [next(given) if c is _TENSOR else c for c in self.constants]
        out = self.apply(self.function, *pytree.tree_unflatten(leaves, self.spec))
        flat, spec = pytree.tree_flatten(out)
        self.out_spec[:] = [spec, [f if not isinstance(f, torch.Tensor) else _TENSOR for f in flat]]
        return [f for f in flat if isinstance(f, torch.Tensor)]

    def rebuild(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The function's return structure around its tensor results."""
        spec, leaves = self.out_spec
        given = iter(tensors)
        return pytree.tree_unflatten([next(given) if leaf is _TENSOR else leaf for leaf in leaves], spec)


_TENSOR = object()
_LIBRARY = torch.library.Library("graphrewrite_custom", "FRAGMENT")
_CALLS: dict[Any, CustomCall] = {}
_COUNT = itertools.count()
_LOCK = threading.Lock()


def custom_operator(function: type, apply: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Run a user's `torch.autograd.Function` as one opaque operator of the graph being captured.

    Export would keep only the operators of its forward and lose the user's backward. The opaque operator's meaning
    is the user's own `apply`, forward and backward.
    """
    leaves, spec = pytree.tree_flatten(args)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    constants = tuple(_TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
    target = _operator_for(function, apply, spec, constants)
    return _CALLS[target].rebuild(target(tensors))


def _operator_for(function: type, apply: Callable[..., Any], spec: Any, constants: tuple[Any, ...]) -> Any:
    """The operator of one call form; the same form is registered once, however often it is captured."""
    for target, known in _CALLS.items():
        if known.function is function and known.spec == spec and _same(known.constants, constants):
            return target
    with _LOCK:
        name = f"{function.__name__}_{next(_COUNT)}"
        _LIBRARY.define(f"{name}(Tensor[] tensors) -> Tensor[]")
    call = CustomCall(function, apply, spec, constants, [])

    def forward(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        versions = [t._version for t in tensors]
        with torch.no_grad():
            out = call(tensors)
        if [t._version for t in tensors] != versions:
            raise RuleError(
                f"the custom autograd function {function.__qualname__} mutates its input",
                remedy="write its forward without in-place operators",
            )
        inputs = {id(t) for t in tensors}
        return [o.clone() if id(o) in inputs or o._is_view() else o for o in out]

    _LIBRARY.impl(name, forward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"graphrewrite_custom::{name}", forward, lib=_LIBRARY)
    target = getattr(torch.ops.graphrewrite_custom, name).default
    _CALLS[target] = call
    return target


def _same(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    simple = (bool, int, float, str, type(None))
    return len(left) == len(right) and all(
        a is b or (isinstance(a, simple) and type(a) is type(b) and a == b) for a, b in zip(left, right, strict=True)
    )


def is_custom(target: Any) -> bool:
    """Whether an operator stands for a user's `torch.autograd.Function`."""
    return target in _CALLS


def call_operator(target: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run one operator of a graph; a custom function runs through the user's own `apply`, with autograd.

    A view of what does not lie in memory as it did at the capture is a copy: attention writes its result in another
    order where its mask gets a gradient, and export does not see that.
    """
    if is_custom(target):
        return _CALLS[target](*args, **kwargs)
    if target is torch.ops.aten.view.default:
        return args[0].reshape(args[1])
    return target(*args, **kwargs)


def reads_strides(nodes: Iterable[fx.Node]) -> bool:
    """Whether one of the nodes is a view that names steps in memory: what it shows depends on its input's strides."""
    return any(getattr(node.target, "overloadpacket", None) in _STRIDED for node in nodes)


_STRIDED = {torch.ops.aten.as_strided, torch.ops.aten.as_strided_copy, torch.ops.aten.as_strided_scatter}
