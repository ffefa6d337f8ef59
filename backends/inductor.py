"""The Inductor backend: each stage is compiled once, for symbolic sizes, to fused C++ (CPU) or Triton (CUDA) code.

A stage is traced again with Inductor's decompositions and handed to Inductor as it is: the rewriting, the partition
and the guards are ours, so there is no tracing by Dynamo, no second partition and no recompilation. What Inductor
assumes of sizes becomes a guard of the program like any other. The backward of local losses is part of the forward
stage and is fused with it.

Random operators are not fused: they are called as in eager mode and draw the same numbers in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from graphrewrite.backends import Run, Taken
from torch import fx

from graphrewrite._compat import boxed, cpp_compiler, inductor_code, inductor_decompositions, make_fx, rerun
from graphrewrite.errors import BackendError
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import Tangent, spec_of, value
from graphrewrite.graph.partition import Partition, save_sizes

SETTINGS: dict[str, Any] = {"fallback_random": True, "fx_graph_cache": False}
"""Of `torch._inductor.config`, for every stage; users' own settings of that module hold beside them.

Inductor's cache of whole graphs stores guards over the inputs of one graph, which those of a captured model are not.
Its cache of the generated code on disk is used.
"""

compiled_stages = 0
"""How many stages were compiled in this process."""


def lower(part: Partition) -> tuple[Run, ...]:
    """Every stage as a compiled callable.

    Raises:
        BackendError: Inductor has no C++ compiler, or cannot compile an operator of the graph.
    """
    _require_compiler(part.graph)
    part.coverage = {n: Taken("eager", reason=reason) for n in part.graph.nodes if (reason := _left_alone(n))}
    traced, saved = _trace_forward(part)
    backward_inputs = [*saved[: part.read_by_backward], *_cotangents(part)]
    missing = _unbound_sizes(part.backward, backward_inputs)
    if missing:
        save_sizes(part, missing, "backward")
        traced, saved = _trace_forward(part)
    if part.backward_weight is not None:
        # what the backward hands on is laid out as its trace says; its sizes are all that matters here
        handed = [value(one.node) for one in part.held if one.saved < 0]
        missing = _unbound_sizes(part.backward_weight, [*(saved[h.saved] for h in part.held if h.saved >= 0), *handed])
        if missing:
            save_sizes(part, missing, "weight")
            traced, saved = _trace_forward(part)
    forward = _Stage(part.forward, part.graph, "forward", traced).run
    backward, handed = _backward(part, saved)
    if part.backward_weight is None:
        return forward, backward
    return forward, backward, _weight_stage(part, part.backward_weight, saved, handed)


def _trace_forward(part: Partition) -> tuple[fx.GraphModule, list[Any]]:
    """The traced forward, and the fake values of what it saves."""
    traced = _trace(part.graph, part.forward, [_layout(part.graph, n) for n in _placeholders(part.forward)])
    return traced, [_value(n) for n in _results(traced)][part.result_count :]


def _cotangents(part: Partition) -> list[Any]:
    return [value(n) for n in _placeholders(part.backward)[part.read_by_backward :]]


# --- stages --------------------------------------------------------------------------------------------------------


class _Stage:
    """One compiled stage.

    Its code holds for tensors laid out as in the trace: inputs that come from outside are checked and, if they are
    not, copied.
    """

    def __init__(self, module: fx.GraphModule, graph: JointGraph, name: str, traced: fx.GraphModule) -> None:
        inputs = _placeholders(traced)
        self._orders = [
            (i, _order(_value(traced_in)))
            for i, (traced_in, node) in enumerate(zip(inputs, _placeholders(module), strict=True))
            if _from_outside(node, name) and isinstance(_value(traced_in), torch.Tensor) and _value(traced_in).dim() > 0
        ]
        if not any(n.op == "call_function" for n in traced.graph.nodes):
            self._code: Run = boxed(traced)
            return
        self._code = _compile(graph, traced, name)

    def run(self, values: list[Any]) -> Sequence[Any]:
        for i, order in self._orders:
            held = values[i]
            if order is None:
                if not held.is_contiguous():
                    values[i] = held.contiguous()
            elif not held.permute(order).is_contiguous():
                values[i] = held.permute(order).contiguous().permute(_inverse(order))
        return self._code(values)


def _compile(graph: JointGraph, traced: fx.GraphModule, name: str) -> Run:
    global compiled_stages
    inputs = [_value(n) for n in _placeholders(traced)]
    try:
        code = inductor_code(traced, inputs, SETTINGS, is_backward=name != "forward")
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, KeyError) as error:
        raise BackendError(
            f"Inductor cannot compile the {name} stage: {_first_line(error)}",
            remedy="compile with backend='eager'; TORCH_LOGS=+inductor shows what it was given",
        ) from error
    compiled_stages += 1
    return code


def _backward(part: Partition, saved: Sequence[Any]) -> tuple[Run, list[Any]]:
    """The backward, and the fake values of what it hands to the weight stage.

    Finished gradients that are only scaled are no business of Inductor's: they are scaled in place as they are.
    """
    module, carried = _without_carried(part.backward)
    kept = _placeholders(part.backward)
    layouts = [
        *(_exactly(part.graph, made) for made in saved[: part.read_by_backward]),
        *(_layout(part.graph, tangent) for tangent in kept[part.read_by_backward :]),
    ]
    names = {n.name for n in _placeholders(module)}
    used = [i for i, n in enumerate(kept) if n.name in names]
    traced = _trace(part.graph, module, [layouts[i] for i in used])
    run = _Stage(module, part.graph, "backward", traced).run
    results = [_value(n) for n in _results(traced)]
    handed = results[len(part.backward_outputs) - len(carried) : len(results) - len(carried)]
    if not carried:
        return run, handed

    def scaled(values: list[Any]) -> Sequence[Any]:
        gradients = [values[one.position] for one in carried]
        inputs = [values[i] for i in used]
        values.clear()
        results = list(run(inputs))
        count = len(results) - len(carried)
        factors, results = results[count:], results[:count]
        # in the order of their positions, so that each lands where it belongs
        for one, gradient, factor in zip(carried, gradients, factors, strict=True):
            results.insert(one.result, gradient.mul_(factor))
        return results

    return scaled, handed


def _weight_stage(part: Partition, module: fx.GraphModule, saved: Sequence[Any], handed: Sequence[Any]) -> Run:
    computed = iter(handed)
    inputs = [_exactly(part.graph, saved[h.saved] if h.saved >= 0 else next(computed)) for h in part.held]
    return _Stage(module, part.graph, "backward_weight", _trace(part.graph, module, inputs)).run


@dataclass(frozen=True)
class _Carried:
    """A saved gradient that is scaled and returned: its position among the inputs and among the results."""

    position: int
    result: int


def _without_carried(module: fx.GraphModule) -> tuple[fx.GraphModule, list[_Carried]]:
    """The stage without in-place scalings of its inputs; their factors become results at the end."""
    inputs = _placeholders(module)
    results = _results(module)
    carried = [
        _Carried(inputs.index(n.args[0]), i)  # type: ignore[arg-type]
        for i, n in enumerate(results)
        if n.target is torch.ops.aten.mul_.Tensor and n.args[0] in inputs
    ]
    if not carried:
        return module, []
    gone = {results[one.result]: one for one in carried}
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    positions = {one.position for one in carried}
    for i, node in enumerate(inputs):
        if i not in positions:
            env[node] = new.node_copy(node)
    for node in module.graph.nodes:
        if node.op not in ("placeholder", "output") and node not in gone:
            env[node] = new.node_copy(node, env.__getitem__)
    factors = [results[one.result].args[1] for one in carried]
    new.output(tuple(env[n] for n in [*(r for r in results if r not in gone), *factors]))  # type: ignore[index]
    return fx.GraphModule(module, new), carried


# --- tracing -------------------------------------------------------------------------------------------------------


def _trace(graph: JointGraph, module: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """The stage as a functional graph of decomposed ATen calls."""

    def run(*values: Any) -> Any:
        return rerun(module, values)

    with torch.no_grad(), graph.tracing(keep_new_symbols=True):
        traced = _traced(run, inputs)
        if any(_mutates(n) for n in traced.graph.nodes):
            traced = _traced(torch.func.functionalize(run, remove="mutations"), inputs)
    for node in traced.graph.nodes:
        if node.target is torch.ops.aten.bernoulli.p:
            node.target = torch.ops.graphrewrite.bernoulli.default
    for node, given in zip(_placeholders(traced), inputs, strict=True):
        # a size that is the same for all batches is a number, which tracing does not note
        node.meta.setdefault("val", given)
    traced.graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output") or _mutates(n))
    traced.recompile()
    return traced


@torch.library.custom_op("graphrewrite::bernoulli", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def bernoulli(x: torch.Tensor, p: float) -> torch.Tensor:
    """`aten.bernoulli.p` out of place.

    Inductor would draw in place, and may run what reads the first of several masks before it is drawn.
    """
    return torch.bernoulli(x, p)


@bernoulli.register_fake
def _(x: torch.Tensor, p: float) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _traced(run: Callable[..., Any], inputs: Sequence[Any]) -> fx.GraphModule:
    return make_fx(
        run, decomposition_table=inductor_decompositions(SETTINGS), tracing_mode="real", _allow_non_fake_inputs=True
    )(*inputs)


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def _layout(graph: JointGraph, node: fx.Node) -> Any:
    """A fresh fake value of an input, densely laid out."""
    val = value(node)
    return graph.fresh_fake(val) if isinstance(val, torch.Tensor) else val


def _exactly(graph: JointGraph, val: Any) -> Any:
    """A fresh fake value with the strides of a result of the forward."""
    if not isinstance(val, torch.Tensor):
        return val
    with graph.tracing(), torch.no_grad():
        return torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device=val.device)


def _unbound_sizes(module: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Symbols that a stage's values depend on and that no input of it tells."""
    told = {expr for val in inputs for expr in _sizes(val) if getattr(expr, "is_symbol", False)}
    needed = {
        symbol
        for val in [*inputs, *(n.meta.get("val") for n in module.graph.nodes)]
        for expr in _sizes(val)
        for symbol in getattr(expr, "free_symbols", ())
    }
    return sorted(needed - told, key=str)


def _sizes(val: Any) -> list[Any]:
    """The sizes and strides of a value as expressions, those of one that is a size included."""
    if isinstance(val, (tuple, list)):
        return [expr for v in val for expr in _sizes(v)]
    if isinstance(val, torch.Tensor):
        return [s.node.expr for s in (*val.shape, *val.stride()) if isinstance(s, torch.SymInt)]
    return [val.node.expr] if isinstance(val, torch.SymInt) else []


# --- layouts -------------------------------------------------------------------------------------------------------


def _from_outside(node: fx.Node, name: str) -> bool:
    """Whether the layout of an input is decided outside: all inputs of the forward, cotangents in the backward."""
    return name == "forward" or (name == "backward" and isinstance(spec_of(node), Tangent))


def _order(val: torch.Tensor) -> tuple[int, ...] | None:
    """The dimensions from the slowest to the fastest; None for contiguous tensors."""
    if val.is_contiguous():
        return None
    strides = [int(s) if isinstance(s, int) else s.node.hint for s in val.stride()]
    return tuple(sorted(range(val.dim()), key=lambda d: -strides[d]))


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


# --- small helpers -------------------------------------------------------------------------------------------------


def _require_compiler(graph: JointGraph) -> None:
    if graph.device.type == "cpu" and cpp_compiler() is None:
        raise BackendError(
            "Inductor finds no C++ compiler, which it needs on the CPU",
            remedy="install g++ or clang++, or set CXX; or compile with backend='eager'",
        )


def _left_alone(node: fx.Node) -> str:
    """Why Inductor's code calls an operator instead of containing it; "" where it does."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return ""
    if torch.Tag.nondeterministic_seeded in node.target.tags:
        return "random operators are called, to draw the numbers of eager mode"
    return "" if node.target.namespace in ("aten", "prims") else "Inductor calls operators of libraries as they are"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _placeholders(module: fx.GraphModule) -> list[fx.Node]:
    return [n for n in module.graph.nodes if n.op == "placeholder"]


def _results(module: fx.GraphModule) -> list[fx.Node]:
    return list(module.graph.output_node().args[0])  # type: ignore[arg-type]


def _value(node: Any) -> Any:
    return node.meta["val"] if isinstance(node, fx.Node) else node
