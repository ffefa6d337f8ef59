"""`torch.compile(model, backend="graphrewrite", options={"rule": "dfa"})`.

Dynamo traces the model and hands over its graph; we rewrite its backward. This works for rules that need nothing but
the cotangent of the model's output. Dynamo's graphs have no module paths, so that a block is one operator with
parameters and what follows it (`blocks="layers"`).

An installed graphrewrite is known to torch by an entry point; importing this module does the same by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from graphrewrite import api
from graphrewrite._compat import register_dynamo_backend
from graphrewrite.errors import BackendError
from graphrewrite.rule import RuleMap
from graphrewrite.runtime.module import CompiledModule

OPTIONS = ("rule", "backend", "fallback", "compress", "passes", "verify", "seed", "on_compile")


def compile_graph(
    module: fx.GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """What `torch.compile` calls.

    Args:
        module: Dynamo's graph; its parameters are inputs.
        example_inputs: One per input.
        options: As for `graphrewrite.compile`: rule, backend, fallback, compress, passes, verify, seed; and
            `on_compile`, which is called with the `CompiledModule`: for its report and graphs.

    Raises:
        BackendError: The rule needs more than the output's cotangent, has learned state, or Dynamo broke the graph.
    """
    given = dict(options or {})
    unknown = sorted(set(given) - set(OPTIONS))
    if unknown:
        raise BackendError(f"options {', '.join(unknown)} are unknown", remedy=f"known: {', '.join(OPTIONS)}")
    on_compile = given.pop("on_compile", None)
    rules = RuleMap.of(given.pop("rule", "bp"))
    _require_output_rule(rules)
    _require_whole_graph(module)
    holder = _Holder(module, example_inputs)
    rule = rules.rules[0] if len(rules.entries) == 1 else dict(rules.entries[:-1])
    compiled = api.compile(holder, rule, blocks="layers", **given)
    if on_compile is not None:
        on_compile(compiled)
    return holder.runner(compiled)


def _require_output_rule(rules: RuleMap) -> None:
    for rule in rules.rules:
        remedy = f"use graphrewrite.compile(model, {str(rule)!r}) instead of torch.compile"
        if rule.needs_loss:
            raise BackendError(
                f"rule {rule} needs the targets, and torch.compile sees only the model's outputs", remedy=remedy
            )
        if rule.learns_state or rule.trains_feedback or rule.feedback_interval:
            raise BackendError(
                f"rule {rule} learns state of its own, which an optimizer cannot reach through torch.compile",
                remedy=remedy,
            )


def _require_whole_graph(module: fx.GraphModule) -> None:
    reason = getattr(module, "compile_subgraph_reason", None)
    if reason is not None and getattr(reason, "graph_break", False):
        raise BackendError(
            f"Dynamo broke the model's graph in pieces ({str(reason.reason).strip().splitlines()[0]}): the rule needs "
            "the whole of it",
            remedy="torch.compile(..., fullgraph=True) names the place; or use graphrewrite.compile",
        )


class _Holder(nn.Module):
    """Dynamo's graph as a module that owns the parameters which are inputs of the graph."""

    def __init__(self, graph: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        super().__init__()
        inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
        self._names: dict[int, str] = {}
        self._run = graph.forward
        for i, (node, example) in enumerate(zip(inputs, example_inputs, strict=True)):
            if isinstance(example, nn.Parameter):
                name = _parameter_name(str(node.target), set(self._names.values()))
                self._names[i] = name
                self._parameters[name] = example
        self._sizes = {
            i: _where(node, inputs) for i, node in enumerate(inputs) if isinstance(_example(node), torch.SymInt)
        }
        self._fed = [i for i in range(len(inputs)) if i not in self._names and i not in self._sizes]
        self._count = len(inputs)

    def forward(self, *fed: Any) -> Any:
        """The graph on its inputs that are no parameters."""
        values: list[Any] = [None] * self._count
        for i, given in zip(self._fed, fed, strict=True):
            values[i] = given
        for i, name in self._names.items():
            values[i] = self._parameters[name]
        for i, (source, dim) in self._sizes.items():
            values[i] = values[source].shape[dim]
        return self._run(*values)

    def runner(self, compiled: CompiledModule) -> Callable[..., Any]:
        """What Dynamo calls with all inputs of the graph."""

        def run(*values: Any) -> Any:
            for i, name in self._names.items():
                self._parameters[name] = values[i]
            return compiled(*[values[i] for i in self._fed])

        return run


def _parameter_name(target: str, taken: set[str]) -> str:
    """`0_weight` for `L_self_modules_0_parameters_weight_`: Dynamo's name without what is around the model's own."""
    inner = re.sub(r"^L_\w*?_(?=modules_|parameters_)", "", target)
    name = re.sub(r"__+", "_", re.sub(r"(?:^|_)(?:modules|parameters)_", "_", inner)).strip("_") or "parameter"
    return name if name not in taken else f"{name}_{len(taken)}"


def _example(node: fx.Node) -> Any:
    return node.meta.get("example_value")


def _where(size: fx.Node, inputs: Sequence[fx.Node]) -> tuple[int, int]:
    """The tensor input and dimension that tell a size."""
    wanted = _example(size).node.expr
    for i, node in enumerate(inputs):
        for dim, found in enumerate(getattr(_example(node), "shape", ())):
            if isinstance(found, torch.SymInt) and found.node.expr == wanted:
                return i, dim
    raise BackendError(
        f"Dynamo made the number {size.target} an input of the graph, and it is no dimension of a tensor",
        remedy="pass numbers that change as tensors, or use graphrewrite.compile",
    )


register_dynamo_backend("graphrewrite", compile_graph)
