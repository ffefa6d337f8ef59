"""The Triton backend: hand-written kernels where their checker accepts, eager elsewhere.

Every operator here is registered with `torch.library`: a reference in plain PyTorch on the CPU, the kernel on CUDA
(and on the CPU under `TRITON_INTERPRET=1`), and a fake for tracing, so that eager mode, Inductor and export see one
operator. Importing this package imports neither triton nor any kernel.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from graphrewrite.backends import Run, Taken
from graphrewrite.backends.triton import activation, goodness, hadamard, norms, projection, quantise
from graphrewrite.backends.triton.pairs import Pair, pairs
from graphrewrite.backends.triton.support import KERNELS, Kernel, runs_on, unavailable
from torch import fx

from graphrewrite._compat import boxed
from graphrewrite.errors import BackendError
from graphrewrite.graph.nodes import value
from graphrewrite.graph.partition import Partition

__all__ = [
    "KERNELS",
    "Kernel",
    "activation",
    "goodness",
    "hadamard",
    "lower",
    "norms",
    "projection",
    "quantise",
    "unavailable",
]

aten = torch.ops.aten


def require(device: torch.device) -> None:
    """Raise if no kernel can run on this device in this process.

    Raises:
        BackendError: triton is missing, there is neither a CUDA device nor the interpreter, or the model is not there.
    """
    reason = unavailable() or runs_on(device)
    if reason:
        raise BackendError(
            f"backend 'triton' cannot run here: {reason}",
            remedy="pip install triton and use a CUDA device, set TRITON_INTERPRET=1 before triton is imported, or "
            "compile with fallback='eager'",
        )


def lower(part: Partition) -> tuple[Run, ...]:
    """Every stage as a callable that runs our kernels where they apply.

    Raises:
        BackendError: See `require`.
    """
    require(part.graph.device)
    return tuple(boxed(with_kernels(module, part)) for module in part.modules)


def with_kernels(module: fx.GraphModule, part: Partition) -> fx.GraphModule:
    """A copy of a stage that calls kernels; `part.coverage` says of each node what took it, and why no kernel did."""
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    joined = {member: one for one in pairs(module.graph) for member in (one.first, one.second)}
    # blocks compute equal things apart from each other; what runs them need not
    launched: dict[tuple[Any, str], fx.Node] = {}
    for node in module.graph.nodes:
        if node in joined:
            if node not in env:
                _call_joined(new, env, joined[node], part)
            continue
        if node.target in _OWN:
            same = launched.setdefault((node.target, str(node.args)), node)
            if same is not node:
                env[node] = env[same]
                part.coverage[node.meta["aten"]] = part.coverage[same.meta["aten"]]
                continue
        env[node] = new.node_copy(node, env.__getitem__)
        if node.op != "call_function":
            continue
        found = choose(node)
        part.coverage[node.meta["aten"]] = found.taken
        if found.launch is not None:
            env[node].target = found.launch
            env[node].args = found.arguments(env[node].args)
            env[node].kwargs = {}
    return fx.GraphModule(module, new)


def _call_joined(new: fx.Graph, env: dict[fx.Node, fx.Node], one: Pair, part: Partition) -> None:
    """One call in the place of two nodes, where the first of them stood."""
    args = fx.map_arg(one.args, env.__getitem__)
    call = new.call_function(one.launch, args)
    for position, node in enumerate((one.first, one.second)):
        env[node] = new.call_function(operator.getitem, (call, position))
        env[node].meta = dict(node.meta)
        part.coverage[node.meta["aten"]] = Taken("triton", one.kernel.name)


@dataclass(frozen=True)
class Choice:
    """What runs a node.

    Attributes:
        taken: For the report.
        launch: The kernel; None: the node stays what it is.
        arguments: From the node's arguments to the kernel's.
    """

    taken: Taken
    launch: Callable[..., Any] | None = None
    arguments: Callable[[tuple[Any, ...]], tuple[Any, ...]] = tuple


def choose(node: fx.Node) -> Choice:
    """The kernel for a node, or why there is none."""
    own = _OWN.get(node.target)
    if own is not None:
        return _checked(own, node.args, tuple)
    stands = _STANDS_FOR.get(node.target)
    if stands is None:
        return Choice(Taken("eager", reason="no kernel for this operator"))
    kernel, arguments, refuse = stands
    reason = refuse(node)
    if reason:
        return Choice(Taken("eager", kernel.name, reason))
    return _checked(kernel, node.args, arguments)


def _checked(kernel: Kernel, args: tuple[Any, ...], arguments: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> Choice:
    fakes = arguments(fx.map_arg(args, value))
    reason = kernel.why_not(*fakes)
    if reason:
        return Choice(Taken("eager", kernel.name, reason))
    return Choice(Taken("triton", kernel.name), kernel.launch, arguments)


def _never(_node: fx.Node) -> str:
    return ""


def _partial_backward(node: fx.Node) -> str:
    wanted = node.args[7]
    given = [True, node.args[5] is not None, node.args[6] is not None]
    if wanted == given:
        return ""
    return "the kernel computes all gradients of a layer norm, this node wants some of them"


_OWN: dict[Any, Kernel] = {kernel.op: kernel for kernel in KERNELS.values()}
_STANDS_FOR: dict[Any, tuple[Kernel, Callable[[tuple[Any, ...]], tuple[Any, ...]], Callable[[fx.Node], str]]] = {
    aten.native_layer_norm.default: (norms.layer_norm, tuple, _never),
    aten.native_layer_norm_backward.default: (norms.layer_norm_backward, lambda args: args[:7], _partial_backward),
}
"""Operators of ATen that a kernel computes as well: its arguments, and what is refused before they are looked at."""
