"""What a node knows about itself, and the typed signature of a graph's inputs and outputs.

Every node of a `JointGraph` carries two things in `node.meta`:

* `"val"`: its fake value (a `FakeTensor`, a `SymInt`, or a tuple of them), i.e. shape, dtype and device;
* `"gr"`: its `NodeInfo`: what the node is for, where in the user's model it comes from, who made it.

Nothing is ever found by node name.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, cast

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphrewrite._compat import FakeTensor, free_unbacked_symbols, known_sizes


class Role(StrEnum):
    """What a node is for."""

    INPUT = "input"
    FORWARD = "forward"
    LOSS = "loss"
    """Forward computation of the task loss or of a local loss."""
    COTANGENT = "cotangent"
    """Backward computation that carries the cotangent of an activation (`d_*`)."""
    GRADIENT = "gradient"
    """Backward computation of a parameter's gradient only (`w_*`)."""
    ACCUMULATE = "accumulate"
    """Sum of the cotangents that meet at a fan-out."""
    SIGNAL = "signal"
    """Computation of a teaching signal that a rule put in the place of a cotangent."""
    TANGENT = "tangent"
    """Forward-mode computation: the tangent of an activation, beside the forward."""
    STATE = "state"
    """Update of rule state."""

    def __str__(self) -> str:
        return self.value


LOSS_BLOCK = "loss"
"""The pseudo-block of the task loss. It is no block of the model: nothing in it learns."""

BACKWARD_ROLES = frozenset({Role.COTANGENT, Role.GRADIENT, Role.ACCUMULATE, Role.SIGNAL})


# --- signature: inputs -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Param:
    """A parameter of the user's model, by its (first) name."""

    name: str

    def __str__(self) -> str:
        return f"parameter {self.name}"


@dataclass(frozen=True)
class Buffer:
    """A buffer of the user's model."""

    name: str

    def __str__(self) -> str:
        return f"buffer {self.name}"


@dataclass(frozen=True)
class Constant:
    """A tensor that the model's code creates or closes over; its value is stored with the graph."""

    name: str

    def __str__(self) -> str:
        return f"constant {self.name}"


@dataclass(frozen=True)
class UserInput:
    """A leaf of the model's `(args, kwargs)`."""

    index: int
    path: str

    def __str__(self) -> str:
        return f"input {self.path}"


@dataclass(frozen=True)
class Target:
    """A leaf of the loss's targets."""

    index: int
    path: str

    def __str__(self) -> str:
        return f"target {self.path}"


@dataclass(frozen=True)
class State:
    """Rule state: feedback weights, heads, statistics. `trainable` state is an `nn.Parameter`."""

    name: str
    trainable: bool = False

    def __str__(self) -> str:
        return f"{'learned ' if self.trainable else ''}state {self.name}"


@dataclass(frozen=True)
class Counter:
    """The int64 triple (seed, step, rank) that counter-based random operators read."""

    def __str__(self) -> str:
        return "counter (seed, step, rank)"


@dataclass(frozen=True)
class Tangent:
    """The cotangent that autograd hands us for one output."""

    output: OutputSpec

    def __str__(self) -> str:
        return f"cotangent of {self.output}"


@dataclass(frozen=True)
class Stored:
    """A value that an earlier stage saved; the input of a stage that is looked at alone."""

    name: str

    def __str__(self) -> str:
        return f"saved {self.name}"


InputSpec = Param | Buffer | Constant | UserInput | Target | State | Counter | Tangent | Stored


# --- signature: outputs ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UserOutput:
    """A tensor leaf of what the model returns."""

    index: int
    path: str = ""

    def __str__(self) -> str:
        return f"output {self.path or self.index}"


@dataclass(frozen=True)
class Loss:
    """The scalar that `compiled.loss` returns."""

    def __str__(self) -> str:
        return "loss"


@dataclass(frozen=True)
class LossTerm:
    """A value reported in `compiled.losses`: a block's name, or "task"."""

    name: str

    def __str__(self) -> str:
        return f"loss term {self.name}"


@dataclass(frozen=True)
class BufferUpdate:
    """The new value of a buffer, copied into it after the forward."""

    name: str

    def __str__(self) -> str:
        return f"update of buffer {self.name}"


@dataclass(frozen=True)
class InputUpdate:
    """The new value of an input that the model mutates in place."""

    index: int

    def __str__(self) -> str:
        return f"update of input {self.index}"


@dataclass(frozen=True)
class StateUpdate:
    """The new value of rule state."""

    name: str

    def __str__(self) -> str:
        return f"update of state {self.name}"


@dataclass(frozen=True)
class ParameterUpdate:
    """The new value of a parameter that a phase between steps writes."""

    name: str

    def __str__(self) -> str:
        return f"update of parameter {self.name}"


@dataclass(frozen=True)
class Grad:
    """The gradient of a parameter, of a learned state or of a user input."""

    of: Param | State | UserInput

    def __str__(self) -> str:
        return f"gradient of {self.of}"


@dataclass(frozen=True)
class Tap:
    """A value that a pass exposes."""

    name: str

    def __str__(self) -> str:
        return f"tap {self.name}"


OutputSpec = UserOutput | Loss | LossTerm | BufferUpdate | InputUpdate | StateUpdate | ParameterUpdate | Grad | Tap


# --- node information --------------------------------------------------------------------------------------------


REPLAY = "replay"


@dataclass(frozen=True)
class NodeInfo:
    """What a node is for and where it comes from. Immutable: passes write a new one.

    Attributes:
        role: What the node is for.
        block: Name of the block it belongs to; "" for inputs, which belong to none.
        module: Path of the user's submodule that computed it, or whose backward it is.
        mirrors: For backward nodes, the forward node whose derivative this is part of.
        cotangent_of: For cotangents, the forward value whose cotangent this is.
        source: `file:line` of the user's code.
        made_by: The pass that made the node; "capture" for the user's own operators.
        spec: For placeholders, what is fed in.
        region: Identifier of the `torch.utils.checkpoint` region, "" outside; `REPLAY` for what a rule has the backward
            run again.
        copy: Label of the forward pass the node belongs to; "" for the first one (`clone_forward`).
        stage: The stage a schedule pass moved the node to; "" where its role decides.
        scales: Whether the node does nothing but multiply a finished gradient by the loss's cotangent.
        codec: For nodes that store a saved value in another form, the text form of the codec.
        encodes: For the same nodes, the value.
    """

    role: Role = Role.FORWARD
    block: str = ""
    module: str = ""
    mirrors: fx.Node | None = None
    cotangent_of: fx.Node | None = None
    source: str = ""
    made_by: str = "capture"
    spec: InputSpec | None = None
    region: str = ""
    copy: str = ""
    stage: str = ""
    scales: bool = False
    codec: str = ""
    encodes: fx.Node | None = None

    def but(self, **changes: Any) -> NodeInfo:
        """The same information with some fields changed."""
        return dataclasses.replace(self, **changes)


def info(node: fx.Node) -> NodeInfo:
    """The `NodeInfo` of a node."""
    return node.meta["gr"]  # type: ignore[no-any-return]


def spec_of(node: fx.Node) -> InputSpec | None:
    """What a placeholder is fed with; None for other nodes."""
    return info(node).spec if node.op == "placeholder" else None


def value(node: fx.Node) -> Any:
    """The fake value of a node."""
    return node.meta["val"]


def is_backward(node: fx.Node) -> bool:
    """Whether a node belongs to the backward part of the graph."""
    return node.op == "call_function" and info(node).role in BACKWARD_ROLES


def runs_later(node: fx.Node) -> bool:
    """Whether a node belongs to the backward and was not moved to the forward by a schedule pass."""
    return is_backward(node) and info(node).stage != "forward"


def runs_last(node: fx.Node) -> bool:
    """Whether a schedule pass moved a node to the weight stage of a split backward."""
    return node.op == "call_function" and info(node).stage == "weight"


def is_float(node: fx.Node) -> bool:
    """Whether a node is one tensor of a differentiable dtype."""
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and (val.is_floating_point() or val.is_complex())


def flat_inputs(node: fx.Node) -> list[fx.Node]:
    """The node's inputs in the order of its flattened arguments; one used twice is listed twice."""
    leaves = pytree.tree_leaves((node.args, node.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, fx.Node)]


def is_getitem(node: fx.Node) -> bool:
    """Whether a node takes one element of an operator's tuple."""
    return node.op == "call_function" and node.target is operator.getitem


def producer(node: fx.Node) -> fx.Node:
    """The operator that computes a value: the node itself, or the one behind a `getitem`."""
    while is_getitem(node):
        source = node.args[0]
        if not isinstance(source, fx.Node):
            break
        node = source
    return node


def outputs_of(node: fx.Node) -> dict[int, fx.Node]:
    """The values of an operator by position: itself, or its `getitem` users."""
    if isinstance(value(node), (tuple, list)):
        return {cast("int", user.args[1]): user for user in node.users if is_getitem(user)}
    return {0: node}


def ancestors(nodes: Iterable[fx.Node], inside: set[fx.Node] | None = None) -> set[fx.Node]:
    """What values are computed from, themselves included; with `inside`, along nodes of this set only."""
    stack = [node for node in nodes if inside is None or node in inside]
    found = set(stack)
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in found and (inside is None or source in inside):
                found.add(source)
                stack.append(source)
    return found


def nbytes(val: Any) -> int:
    """Bytes of a (fake) tensor's elements at the sizes it was captured with; 0 for what is no tensor."""
    if isinstance(val, (tuple, list)):
        return sum(nbytes(v) for v in val)
    if not isinstance(val, torch.Tensor):
        return 0
    return hint(val.numel()) * val.element_size()


def hint(size: Any) -> int:
    """The example's size behind a symbolic one; 1 for one that depends on data and was not observed."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    if size.node.hint is not None:
        return int(size.node.hint)
    known = size.node.expr.xreplace(known_sizes(size.node.shape_env))
    return 1 if getattr(known, "free_symbols", ()) else int(known)


def same_size(one: Any, other: Any) -> bool:
    """Whether two sizes are equal for every input: compared as formulas, for comparing symbolic ones would fix them."""
    return str(one) == str(other)


def same_shape(one: Iterable[Any], other: Iterable[Any]) -> bool:
    """Whether two shapes, or parts of shapes, are equal for every input."""
    sizes, others = tuple(one), tuple(other)
    return len(sizes) == len(others) and all(map(same_size, sizes, others))


def unobserved(val: Any) -> set[Any]:
    """Symbols of a tensor's sizes that depend on data and that no example has told yet."""
    sizes: Iterable[Any] = val.shape if isinstance(val, torch.Tensor) else ()
    found: set[Any] = set()
    for one in (s.node for s in sizes if isinstance(s, torch.SymInt) and s.node.hint is None):
        found |= free_unbacked_symbols(one.expr) - one.shape_env.var_to_hint_override.keys()
    return found


def fix(size: Any) -> int:
    """A size as a number. A symbolic one is specialised to the example's: a guard holds the graph to it."""
    return int(size)


def fixed(size: Any) -> int | None:
    """A size that is a number, or that was specialised to one; None for those that may change."""
    if isinstance(size, int):
        return size
    expr = size.node.expr
    return int(expr) if expr.is_number else None


def dense_order(val: torch.Tensor) -> tuple[int, ...] | None:
    """The dimensions from the slowest to the fastest in memory; None if the elements leave gaps or overlap.

    Dimensions of one element stay where they are: their strides mean nothing.
    """
    sizes, strides = [hint(s) for s in val.shape], [hint(s) for s in val.stride()]
    if 0 in sizes:
        return tuple(range(val.ndim))
    long = sorted((d for d in range(val.ndim) if sizes[d] != 1), key=lambda d: -strides[d])
    expected = 1
    for dim in reversed(long):
        if strides[dim] != expected:
            return None
        expected *= sizes[dim]
    given = iter(long)
    return tuple(next(given) if sizes[d] != 1 else d for d in range(val.ndim))


def is_fake(val: Any) -> bool:
    """Whether a value is a `FakeTensor`."""
    return isinstance(val, FakeTensor)
