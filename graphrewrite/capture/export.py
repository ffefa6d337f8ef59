"""`torch.export` with everything that it would silently lose kept or refused."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from graphrewrite._compat import (
    annotate,
    composites_of,
    eager_branches,
    keep_random,
    keyword_attributes,
    native_kernels,
    patched_checkpoint,
    patched_custom_functions,
    preserve_annotations,
    quiet_export,
    recurrent_decompositions,
    set_grad_wrapper,
    symbolic_forms,
)
from graphrewrite.capture.convert import REGION, to_forward_graph
from graphrewrite.capture.diagnose import explain_failure
from graphrewrite.capture.refusals import check_modules, long_sequence, recurrent_modules, watching_hooks
from graphrewrite.capture.structure import Structure, take_apart
from graphrewrite.errors import CaptureError
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.ops import custom_operator, reads_strides
from graphrewrite.inputs import Inputs

LossFn = Callable[[Any, Any], torch.Tensor]


@dataclass(frozen=True)
class Captured:
    """What capture returns.

    Attributes:
        graph: The forward graph.
        structure: The model's outputs without their tensors.
        values: For each tensor of the structure `(True, index of its UserOutput)`, or `(False, constant)`.
    """

    graph: JointGraph
    structure: Structure
    values: list[tuple[bool, Any]]

    def rebuild(self, results: Sequence[Any]) -> Any:
        """The model's output around the values of its `UserOutput`s."""
        return self.structure.rebuild([results[v] if known else v for known, v in self.values])


class _Seen:
    """Where the structure of the outputs is left; export puts the module's own containers back as they were."""

    structure: Structure


class _Traced(nn.Module):
    """The model, and behind it the loss, as a function of pytrees to a flat list of tensors."""

    def __init__(self, model: nn.Module, loss: LossFn | None) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.seen = _Seen()

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], targets: Any = None) -> list[Any]:
        outputs = self.model(*args, **kwargs)
        tensors, self.seen.structure = take_apart(outputs)
        return tensors if self.loss is None else [*tensors, self.loss(outputs, targets)]


def capture(
    model: nn.Module,
    inputs: Inputs,
    *,
    loss: LossFn | None = None,
    targets: Any = None,
    dynamic: Any = "auto",
) -> Captured:
    """Capture a model, and its loss if one is given, as a functional forward graph.

    The model is run on fake tensors only; neither it nor torch's random generators are changed.

    Args:
        model: Any exportable module, in the mode (`train`/`eval`, autocast) it is to be captured in.
        inputs: Example inputs.
        loss: `loss(outputs, targets) -> scalar`; captured together with the model.
        targets: Example targets for `loss`.
        dynamic: `"auto"`: every dimension of every tensor may change; None: all are fixed; otherwise the
            `dynamic_shapes` of `torch.export.export` for the model's own arguments.

    Raises:
        CaptureError: With the module path and the user's line.
    """
    check_modules(model)
    wrapper = _Traced(model, loss)
    args: tuple[Any, ...] = (inputs.args, inputs.kwargs) if loss is None else (inputs.args, inputs.kwargs, targets)
    shapes = _dynamic_shapes(model, args, dynamic)
    _warn_long_sequences(model, inputs)
    note = ""
    try:
        with eager_branches():
            program = _export(wrapper, args, shapes)
    except Exception as first:  # noqa: BLE001 - whatever torch raises becomes an error with the user's line
        # some models have a branch for export because their eager one cannot be traced
        try:
            program = _export(wrapper, args, shapes)
        except Exception:  # noqa: BLE001
            raise explain_failure(first, model) from first
        note = f"captured along the model's branch for export: the eager one failed with {type(first).__name__}"
    captured = _converted(program, wrapper, inputs, targets)
    if note:
        captured.graph.log.add("capture", "", note)
    return captured


def _export(wrapper: _Traced, args: tuple[Any, ...], shapes: Any) -> ExportedProgram:
    args = pytree.tree_map(_each_once(_without_gradient), args)
    packed = pytree.tree_map(_each_once(_packed), args)
    program = _export_as_is(wrapper, packed, shapes)
    moved = any(a is not b for a, b in zip(pytree.tree_leaves(packed), pytree.tree_leaves(args), strict=True))
    return _export_as_is(wrapper, args, shapes) if moved and reads_strides(program.graph.nodes) else program


def _export_as_is(wrapper: _Traced, args: tuple[Any, ...], shapes: Any) -> ExportedProgram:
    devices = sorted({t.device.index or 0 for t in pytree.tree_leaves(args) if _on_cuda(t)})
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), _faithful_export():
        program = torch.export.export(wrapper, args, dynamic_shapes=shapes, strict=False)
        _detach_no_grad_regions(program.graph_module)
        # inside the caller's autocast: outside of it the casts would be lost
        table = recurrent_decompositions()
        with composites_of(program, table):
            decomposed: ExportedProgram = program.run_decompositions(table)
        return decomposed


def _converted(program: ExportedProgram, traced: _Traced, inputs: Inputs, targets: Any) -> Captured:
    model, loss = traced.model, traced.loss
    graph, values = to_forward_graph(
        program,
        model,
        input_names=_leaf_names(model, inputs),
        target_names=_target_names(targets) if loss is not None else [],
        loss=loss,
    )
    graph.context.training = model.training
    captured = Captured(graph, traced.seen.structure, values)
    graph.context.outputs = captured.rebuild
    if loss is not None:
        graph.context.loss = loss
        graph.context.targets = _rebuilder(targets)
    return captured


def _rebuilder(structure: Any) -> Callable[[Sequence[Any]], Any]:
    """Puts other values in the place of a structure's tensors, in order."""
    leaves, spec = pytree.tree_flatten(structure)
    # the tensors themselves are not kept: they are the user's batch
    rest = [(isinstance(x, torch.Tensor), None if isinstance(x, torch.Tensor) else x) for x in leaves]
    del leaves

    def rebuild(values: Sequence[Any]) -> Any:
        given = iter(values)
        return pytree.tree_unflatten([next(given) if known else x for known, x in rest], spec)

    return rebuild


def _on_cuda(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_cuda


@contextlib.contextmanager
def _faithful_export() -> Iterator[None]:
    regions = iter(range(1 << 30))
    with (
        quiet_export(),
        native_kernels(),
        symbolic_forms(),
        keep_random(),
        keyword_attributes(),
        preserve_annotations(),
        watching_hooks(),
        patched_custom_functions(custom_operator),
        patched_checkpoint(lambda: annotate({REGION: str(next(regions))})),
    ):
        yield


def _dynamic_shapes(model: nn.Module, args: tuple[Any, ...], dynamic: Any) -> Any:
    if dynamic is None:
        return None

    def auto(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return None
        # sizes 0 and 1 are specialised by torch; a call with such a size has a signature of its own
        return {i: Dim.AUTO for i, size in enumerate(leaf.shape) if size > 1}

    if isinstance(dynamic, str):
        if dynamic != "auto":
            raise CaptureError(
                f"dynamic={dynamic!r} is unknown", remedy="use 'auto', None or the dynamic_shapes of torch.export"
            )
        return pytree.tree_map(auto, args)
    rest = tuple(pytree.tree_map(auto, a) for a in args[2:])
    if isinstance(dynamic, (tuple, list)):
        return (tuple(dynamic), dict.fromkeys(args[1]), *rest)
    names = list(inspect.signature(model.forward).parameters)[: len(args[0])]
    return (
        tuple(dynamic.get(name) for name in names),
        {k: dynamic.get(k) for k in args[1]},
        *rest,
    )


def _is_dense(tensor: torch.Tensor) -> bool:
    return bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


def _each_once(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], Any]:
    """Changes the tensors among the leaves of inputs; the same tensor stays the same."""
    changed: dict[int, torch.Tensor] = {}

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) not in changed:
            changed[id(leaf)] = change(leaf)
        return changed[id(leaf)]

    return of


def _without_gradient(leaf: torch.Tensor) -> torch.Tensor:
    """An input without what an earlier backward left in `.grad`: torch would guard on its sizes, and not find it."""
    if not leaf.is_leaf or leaf.grad is None:
        return leaf
    return leaf.detach().requires_grad_(leaf.requires_grad)


def _packed(leaf: torch.Tensor) -> torch.Tensor:
    """A tensor with gaps or overlaps in memory (a slice, an expanded one) as one without, dimensions in order.

    Of a stride that is no product of sizes torch makes a symbol that no input tells, and then fails or not as the order
    of a set of symbols has it. What a graph computes does not depend on gaps.
    """
    if leaf.layout is not torch.strided or _is_dense(leaf):
        return leaf
    return torch.empty_like(leaf).copy_(leaf.detach()).requires_grad_(leaf.requires_grad)


def _warn_long_sequences(model: nn.Module, inputs: Inputs) -> None:
    recurrent = recurrent_modules(model)
    if not recurrent:
        return
    longest = max((max(t.shape[:2]) for t in pytree.tree_leaves(inputs.args) if _is_sequence(t)), default=0)
    if long_sequence(longest):
        warnings.warn(
            f"recurrent modules ({', '.join(recurrent)}) are unrolled over time: {longest} steps make a large graph",
            stacklevel=4,
        )


def _is_sequence(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() >= 2


def _detach_no_grad_regions(module: fx.GraphModule) -> None:
    """Make `torch.no_grad()` regions survive decomposition, which inlines them and forgets that they were."""
    wrapper = set_grad_wrapper()
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target is not wrapper:
            continue
        enabled, region = node.args[0], node.args[1]
        inner = getattr(module, region.target)
        _detach_no_grad_regions(inner)
        if not enabled:
            _detach_values(inner)


def _detach_values(module: fx.GraphModule) -> None:
    wrapper = set_grad_wrapper()
    for node in list(module.graph.nodes):
        val = node.meta.get("val")
        if node.op != "call_function" or not isinstance(val, torch.Tensor) or not val.is_floating_point():
            continue
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and source.target is wrapper and source.args[0]:
            continue  # the result of an enable_grad region inside keeps its gradient
        with module.graph.inserting_after(node):
            detached = module.graph.call_function(torch.ops.aten.detach.default, (node,))
        detached.meta = dict(node.meta)
        node.replace_all_uses_with(detached, delete_user_cb=lambda user, own=detached: user is not own)
    module.recompile()


def _leaf_names(model: nn.Module, inputs: Inputs) -> list[str]:
    """Readable names of the leaves of `(args, kwargs)`: the forward's own parameter names."""
    try:
        bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs)
        positional = _positional_names(bound.signature, len(inputs.args))
    except (TypeError, ValueError):
        positional = [f"arg{i}" for i in range(len(inputs.args))]
    paths, _ = pytree.tree_flatten_with_path((inputs.args, inputs.kwargs))
    names = []
    for path, _leaf in paths:
        first, second, *rest = cast("tuple[Any, ...]", path)
        root = positional[second.idx] if first.idx == 0 else str(second.key)
        names.append(root + pytree.keystr(tuple(rest)))
    return names


def _positional_names(signature: inspect.Signature, count: int) -> list[str]:
    names: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}{i}" for i in range(count - len(names))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    return names[:count]


def _target_names(targets: Any) -> list[str]:
    paths, _ = pytree.tree_flatten_with_path(targets)
    return ["y" + pytree.keystr(path) for path, _leaf in paths]
