"""Shared by the tests: joint graphs of small models, and values to run them with."""

from __future__ import annotations

import pathlib
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import graphrewrite as gr
from graphrewrite import testing
from graphrewrite.analysis.blocks import assign_blocks
from graphrewrite.capture import capture
from graphrewrite.compiler import CLEANUP
from graphrewrite.graph.differentiate import differentiate
from graphrewrite.graph.expand import expand
from graphrewrite.graph.interpret import interpret
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import (
    LOSS_BLOCK,
    Buffer,
    Constant,
    Counter,
    Grad,
    Param,
    Role,
    State,
    Tangent,
    Target,
    UserInput,
    info,
    is_backward,
    value,
)
from graphrewrite.inputs import as_inputs
from graphrewrite.pipeline import PassManager, build_pass
from graphrewrite.rule import RuleMap


def forward_graph(model: nn.Module, x: Any, y: Any = None, *, loss: Any = None, blocks: Any = "layers", dynamic="auto"):
    """The captured forward graph, with blocks assigned; with targets, the loss is part of it."""
    loss = None if y is None else loss or gr.default_loss
    graph = capture(model, as_inputs(x), loss=loss, targets=y, dynamic=dynamic).graph
    assign_blocks(graph, model, blocks)
    RuleMap.of("bp").assign(graph)
    return graph


def joint_graph(model: nn.Module, x: Any, y: Any = None, **options: Any):
    """The operator-level joint graph of backpropagation, ready for edit verbs."""
    graph = differentiate(forward_graph(model, x, y, **options))
    graph.current_pass = "test"
    return graph


def aten_graph(model: nn.Module, x: Any, y: Any = None, **options: Any):
    """The same, expanded to ATen calls; `clean_graph`: and cleaned up, as passes at the ATen level see it."""
    graph = expand(joint_graph(model, x, y, **options))
    graph.current_pass = "test"
    return graph


def clean_graph(model: nn.Module, x: Any, y: Any = None, **options: Any):
    graph = PassManager([build_pass(name) for name in CLEANUP]).run(aten_graph(model, x, y, **options))
    graph.current_pass = "test"
    return graph


def values(graph, model: nn.Module, x: Any, y: Any = None, *, state: Any = None, tangent: Any = None) -> list[Any]:
    """Values for the placeholders of a graph, in order; cotangents are ones unless given."""
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    inputs = as_inputs(x)
    leaves, targets = pytree.tree_leaves((inputs.args, inputs.kwargs)), pytree.tree_leaves(y)

    def of(spec: Any, node: Any) -> Any:
        if isinstance(spec, (Param, Buffer)):
            return held[spec.name].detach()
        if isinstance(spec, UserInput):
            return leaves[spec.index].detach()
        if isinstance(spec, Target):
            return targets[spec.index]
        if isinstance(spec, State):
            return state[spec.name]
        if isinstance(spec, Constant):
            return graph.constants[spec.name]
        if isinstance(spec, Counter):
            return torch.tensor([0, 0, 0])
        assert isinstance(spec, Tangent)
        return torch.ones((), dtype=value(node).dtype) if tangent is None else tangent

    return [of(spec, node) for spec, node in graph.inputs.items()]


def run(graph, model: nn.Module, x: Any, y: Any = None, **options: Any) -> dict[Any, Any]:
    """Results of a graph by specification."""
    return dict(zip(graph.outputs, interpret(graph, values(graph, model, x, y, **options)), strict=True))


def grads_of(results: dict[Any, Any]) -> dict[str, torch.Tensor]:
    """The gradients among the results, by parameter or state name."""
    return {spec.of.name: held for spec, held in results.items() if isinstance(spec, Grad)}


def eager_grads(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients by autograd; parameters without one are left out."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, found, strict=True) if g is not None}


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Same names, bitwise same tensors."""
    assert set(left) == set(right)
    for name, held in left.items():
        assert torch.equal(held, right[name]), f"{name} differs by {(held - right[name]).abs().max():.3g}"


def assert_close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], rtol: float = 1e-9) -> None:
    """Same names, tensors equal up to rounding (relative to the largest entry)."""
    assert set(left) == set(right)
    for name, held in left.items():
        gap, scale = (held - right[name]).abs().max(), right[name].abs().max()
        assert gap <= rtol * max(scale, 1e-6), f"{name} differs by {gap:.3g}, largest entry {scale:.3g}"


def find(graph, operator: str, *, block: str | None = None):
    """The forward operators of a kind (`"linear"`), in order."""
    from graphrewrite.graph.text import operator_name

    return [
        n for n in graph.forward_nodes() if operator_name(n) == operator and (block is None or info(n).block == block)
    ]


def assert_golden(graph: JointGraph, name: str) -> None:
    """A graph, printed, as a reviewer saw it last."""
    testing.assert_golden(graph, pathlib.Path(__file__).parent / "golden" / f"{name}.txt")


class Cube(torch.autograd.Function):
    """x^3, with a derivative written by hand."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, cotangent):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * cotangent


def train_step(compiled: gr.CompiledModule, x: Any, y: Any) -> dict[str, torch.Tensor]:
    """The gradients of one `compiled.loss`, by parameter; those without one are left out."""
    compiled.zero_grad()
    compiled.loss(x, y).backward()
    return {n: p.grad.clone() for n, p in compiled.module.named_parameters() if p.grad is not None}


def cotangents_of_other_blocks(graph) -> list[str]:
    """Per block that learns: cotangent nodes of other blocks (the loss apart) that its gradients depend on."""
    found = []
    for spec, node in graph.outputs.items():
        if not isinstance(spec, Grad):
            continue
        for term in _terms(node):
            seen, stack = {term}, [term]
            while stack:
                for source in stack.pop().all_input_nodes:
                    if source not in seen and is_backward(source):
                        seen.add(source)
                        stack.append(source)
            own = info(term).block
            found += [
                f"{spec} <- {n.name}"
                for n in seen
                if info(n).block not in (own, LOSS_BLOCK, "") and info(n).role is not Role.SIGNAL
            ]
    return found


def _terms(node) -> list[Any]:
    """The summands of a gradient; that of a tied parameter has one per use."""
    if info(node).role is Role.ACCUMULATE:
        return [t for source in node.all_input_nodes for t in _terms(source)]
    return [node]
