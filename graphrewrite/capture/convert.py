"""Exported program -> forward-level `JointGraph`: typed signature, module paths, roles, tied parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from graphrewrite._compat import FakeTensor, FakeTensorMode
from graphrewrite.capture.diagnose import user_line
from graphrewrite.errors import CaptureError
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import (
    LOSS_BLOCK,
    Buffer,
    BufferUpdate,
    Constant,
    InputSpec,
    InputUpdate,
    Loss,
    LossTerm,
    NodeInfo,
    OutputSpec,
    Param,
    Role,
    Target,
    UserInput,
    UserOutput,
    ancestors,
    dense_order,
    info,
    is_float,
    is_getitem,
    value,
)

REGION = "graphrewrite_checkpoint"
"""Key of `node.meta["custom"]` that names a `torch.utils.checkpoint` region."""
_DROPPED = {torch.ops.aten._assert_tensor_metadata.default}


def to_forward_graph(
    program: ExportedProgram,
    model: nn.Module,
    *,
    input_names: list[str],
    target_names: list[str],
    loss: Callable[..., Any] | None,
) -> tuple[JointGraph, list[tuple[bool, Any]]]:
    """Convert an exported program.

    Returns:
        The graph, and for each leaf of the model's outputs `(True, index of UserOutput)` or `(False, constant)`.
    """
    converter = _Converter(program, model, input_names, target_names)
    graph = converter.run(loss)
    return graph, converter.out_leaves


class _Converter:
    def __init__(
        self, program: ExportedProgram, model: nn.Module, input_names: list[str], target_names: list[str]
    ) -> None:
        self.program = program
        self.model = model
        self.input_names = input_names
        self.target_names = target_names
        self.out_leaves: list[tuple[bool, Any]] = []
        self.first_name = _first_names(model)
        self.graph = JointGraph(
            fx.GraphModule(program.graph_module, fx.Graph()), level="forward", fake_mode=_fake_mode(program)
        )
        self.graph.graph.output((), type_expr=None)
        self.graph.output_node.meta["specs"] = ()
        self.env: dict[fx.Node, Any] = {}

    def run(self, loss: Callable[..., Any] | None) -> JointGraph:
        self._inputs()
        for node in self.program.graph.nodes:
            if node.op in ("call_function", "get_attr"):
                self._operator(node)
        self._outputs(loss)
        _merge_casts(self.graph)
        self.graph.prune()
        return self.graph

    # --- inputs ----------------------------------------------------------------------------------------------------

    def _inputs(self) -> None:
        nodes = {n.name: n for n in self.program.graph.nodes if n.op == "placeholder"}
        known: dict[InputSpec, fx.Node] = {}
        position = 0
        for spec in self.program.graph_signature.input_specs:
            node = nodes[spec.arg.name]
            val = node.meta.get("val")
            if spec.kind is InputKind.USER_INPUT:
                ours, position = self._user_spec(position), position + 1
                if not isinstance(val, (torch.Tensor, torch.SymInt)):
                    self.env[node] = val
                    continue
            else:
                ours = self._held_spec(spec.kind, spec.target or spec.arg.name)
            if ours in known:
                self.env[node] = known[ours]
                continue
            fake = self.graph.fresh_fake(val) if isinstance(val, torch.Tensor) else val
            known[ours] = self.env[node] = self.graph.placeholder(ours, fake, _tidy(str(ours)))
            if isinstance(ours, Constant):
                self.graph.constants[ours.name] = self._constant(spec.target or "")
        self._mark_leaves()

    def _user_spec(self, position: int) -> InputSpec:
        if position < len(self.input_names):
            return UserInput(position, self.input_names[position])
        index = position - len(self.input_names)
        return Target(index, self.target_names[index])

    def _held_spec(self, kind: InputKind, target: str) -> InputSpec:
        name = target.removeprefix("model.")
        if kind is InputKind.PARAMETER:
            if target.startswith("loss."):
                raise CaptureError(
                    f"the loss has a parameter of its own ({target})",
                    remedy="put it into the model, so that the optimizer and the rule see it",
                )
            first = self.first_name.get(name, name)
            if first != name:
                self.graph.aliases[name] = first
            return Param(first)
        if kind is InputKind.BUFFER:
            return Buffer(self.first_name.get(name, name)) if target.startswith("model.") else Constant(target)
        if kind is InputKind.CONSTANT_TENSOR:
            return Constant(target)
        raise CaptureError(
            f"the model needs an input of kind {kind.name} ({target})",
            remedy="use tensors, parameters and buffers only",
        )

    def _constant(self, target: str) -> torch.Tensor:
        held = self.program.constants.get(target)
        if held is None:
            held = self.program.state_dict.get(target)
        assert isinstance(held, torch.Tensor), target
        return held.detach()

    def _mark_leaves(self) -> None:
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for spec, node in self.graph.inputs.items():
            if isinstance(spec, Param) and parameters[spec.name].requires_grad:
                self.graph.leaves[node] = None

    # --- operators -------------------------------------------------------------------------------------------------

    def _operator(self, node: fx.Node) -> None:
        if node.target in _DROPPED:
            return
        if node.op == "get_attr":
            held = getattr(self.program.graph_module, str(node.target))
            setattr(self.graph.module, str(node.target), held)
            new = self.graph._new_node("get_attr", node.target, (), {}, self._info(node), node.name)
            new.meta["val"] = None
            self.env[node] = new
            return
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.env.__getitem__)
        target: Any = node.target
        if target is torch.ops.aten.copy.default:
            # what functionalisation makes of `x[...] = y`: it has no derivative, but it only means y in x's form
            self.env[node] = self.graph.splice(
                _in_form_of, [cast("fx.Node", a) for a in args[:2]], like=self._info(node)
            )
            return
        if target is torch.ops.aten.bernoulli.p and (order := _memory_order(cast("fx.Node", args[0]))):
            self.env[node] = self._drawn_in_memory_order(node, args, order)
            return
        self.env[node] = self.graph.emit(
            target, args, kwargs, like=self._info(node), name=node.name, val=node.meta.get("val")
        )

    def _drawn_in_memory_order(self, node: fx.Node, args: Any, order: tuple[int, ...]) -> fx.Node:
        """A mask for what is transposed: dropout fills it in place, along memory; `bernoulli` goes along the shape."""
        like, permute = self._info(node), torch.ops.aten.permute.default
        empty = args[0]
        turned = self.graph.emit(permute, (empty.args[0], list(order)), like=like)
        turned = self.graph.emit(empty.target, (turned,), empty.kwargs, like=like)
        drawn = self.graph.emit(torch.ops.aten.bernoulli.p, (turned, *args[1:]), node.kwargs, like=like, name=node.name)
        return self.graph.emit(permute, (drawn, [order.index(d) for d in range(len(order))]), like=like)

    @staticmethod
    def _info(node: fx.Node) -> NodeInfo:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = ""
        if stack and isinstance(stack[-1][0], str):
            parts = [part.partition("@")[0] for part in stack[-1][0].split(".")]
            path = ".".join(parts)
            path = "" if path == "model" else path.removeprefix("model.")
            if path.startswith("_empty_nn_module_stack"):
                path = ""
        region = (node.meta.get("custom") or {}).get(REGION, "")
        return NodeInfo(module=path, source=user_line(node.meta.get("stack_trace")), region=region)

    # --- outputs ---------------------------------------------------------------------------------------------------

    def _outputs(self, loss: Callable[..., Any] | None) -> None:
        results = list(self.program.graph.output_node().args[0])
        outputs: dict[OutputSpec, fx.Node] = {}
        leaves: list[tuple[bool, Any]] = []
        seen: dict[fx.Node, int] = {}
        for spec, result in zip(self.program.graph_signature.output_specs, results, strict=True):
            if spec.kind is OutputKind.USER_OUTPUT:
                ours = self.env[result] if isinstance(result, fx.Node) else result
                if not isinstance(ours, fx.Node):
                    leaves.append((False, ours))
                    continue
                index = seen.setdefault(ours, len(seen))
                leaves.append((True, index))
                outputs[UserOutput(index)] = ours
            elif spec.kind is OutputKind.BUFFER_MUTATION:
                name = str(spec.target).removeprefix("model.")
                outputs[BufferUpdate(self.first_name.get(name, name))] = self.env[result]
            elif spec.kind is OutputKind.USER_INPUT_MUTATION:
                outputs[InputUpdate(self._input_index(str(spec.target)))] = self.env[result]
            else:
                raise CaptureError(
                    f"the forward changes {spec.target} in place ({spec.kind.name})",
                    remedy="parameters must not be written in the forward; use a buffer",
                )
        if loss is not None:
            outputs, leaves, values = self._split_loss(loss, outputs, leaves)
        else:
            values = [n for s, n in outputs.items() if isinstance(s, UserOutput)]
        self.out_leaves = leaves
        self.graph.set_outputs(outputs)
        self.graph.model_outputs = [n for n in values if is_float(n)]

    def _split_loss(
        self, loss_fn: Callable[..., Any], outputs: dict[OutputSpec, fx.Node], leaves: list[tuple[bool, Any]]
    ) -> tuple[dict[OutputSpec, fx.Node], list[tuple[bool, Any]], list[fx.Node]]:
        """The last output is the loss; the model's own outputs become the boundary in front of it."""
        is_node, index = leaves[-1]
        loss = outputs.get(UserOutput(index)) if is_node else None
        if loss is None or not isinstance(loss.meta["val"], torch.Tensor) or loss.meta["val"].dim() != 0:
            found = (
                "no tensor" if loss is None else f"a tensor of shape ({', '.join(map(str, loss.meta['val'].shape))})"
            )
            raise CaptureError(
                f"the loss {_name_of(loss_fn)} does not return a scalar tensor but {found}",
                remedy="loss(outputs, targets) must return one number: take the mean or the sum of what it returns",
            )
        leaves = leaves[:-1]
        values = list(dict.fromkeys(outputs[UserOutput(i)] for is_node, i in leaves if is_node))
        inside = ancestors(values)
        inside |= ancestors([n for s, n in outputs.items() if isinstance(s, (BufferUpdate, InputUpdate))])
        for node in self.graph.forward_nodes():
            if node not in inside:
                node.meta["gr"] = info(node).but(role=Role.LOSS, block=LOSS_BLOCK)
        kept: dict[OutputSpec, fx.Node] = {s: n for s, n in outputs.items() if not isinstance(s, UserOutput)}
        kept[Loss()] = loss
        kept[LossTerm("task")] = loss
        return kept, leaves, values

    def _input_index(self, name: str) -> int:
        for i, spec in enumerate(s for s in self.program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT):
            if spec.arg.name == name:
                return i
        raise CaptureError(f"the forward mutates {name}, which is no input")


def _name_of(loss: Callable[..., Any]) -> str:
    inner = getattr(loss, "func", loss)  # of a functools.partial
    return str(getattr(inner, "__qualname__", type(inner).__name__))


def _in_form_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return y.to(x.dtype).expand_as(x)


def _fake_mode(program: ExportedProgram) -> FakeTensorMode:
    for node in program.graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, FakeTensor):
            return val.fake_mode
    raise CaptureError("the model has neither parameters nor tensor inputs", remedy="give it at least one tensor")


def _tidy(text: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in text.split(" ", 1)[-1]).strip("_") or "x"


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every parameter and buffer name -> the first name of the same tensor."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        names[name] = first.setdefault(id(tensor), name)
    return names


def _merge_casts(graph: JointGraph) -> None:
    """One cast of a parameter per dtype, as autocast's weight cache has it: else sums of gradients differ.

    Also one `getitem` per element, so that a value is one node.
    """
    known: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if is_getitem(node):
            key: Any = ("getitem", node.args)
        elif node.target is torch.ops.aten._to_copy.default and _is_parameter(node.args[0]):
            key = ("cast", node.args, tuple(sorted(node.kwargs.items())))
        else:
            continue
        first = known.setdefault(key, node)
        if first is not node:
            graph.substitute(node, first)


def _memory_order(empty: fx.Node) -> tuple[int, ...] | None:
    """The dimensions of an `empty_like` from the slowest in memory to the fastest; None if they are listed so."""
    if empty.target is not torch.ops.aten.empty_like.default:
        return None
    order = dense_order(value(empty))
    return None if order == tuple(range(value(empty).ndim)) else order


def _is_parameter(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "placeholder" and isinstance(info(node).spec, Param)
