"""How much the gradient changes when a saved value does: measured on the graph, with example values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from graphrewrite.analysis.demands import Demand, SavedValue
from graphrewrite.graph.aliasing import views_of
from graphrewrite.graph.codec import Codec
from graphrewrite.graph.nodes import Grad, dense_order, runs_later, value
from graphrewrite.graph.ops import call_operator
from graphrewrite.graph.verify import has_random
from graphrewrite.random import uniform

if TYPE_CHECKING:
    from graphrewrite.graph.joint import JointGraph


class Sensitivity:
    """Runs the forward once, and the backward again for every change of saved values.

    Torch's global generators are left as they were.

    Args:
        graph: ATen level.
        inputs: Example values of its placeholders.
    """

    def __init__(self, graph: JointGraph, inputs: Sequence[Any]) -> None:
        self._graph = graph
        self._later = [n for n in graph.nodes if runs_later(n)]
        self._last_use = {source: node for node in self._later for source in node.all_input_nodes}
        self._grads = [node for spec, node in graph.outputs.items() if isinstance(spec, Grad)]
        self._held: dict[fx.Node, Any] = {}
        given = iter(inputs)
        with torch.random.fork_rng(enabled=has_random(graph)), torch.no_grad():
            if has_random(graph):
                torch.manual_seed(0)
            for node in graph.nodes:
                if node.op == "placeholder":
                    self._held[node] = next(given)
                elif node.op == "get_attr":
                    self._held[node] = getattr(graph.module, str(node.target))
                elif node.op == "call_function" and not runs_later(node):
                    self._held[node] = self._run(node, {})
        self._exact = self._backward({}, {})
        self._norm = _norm(self._exact)

    def number(self, node: fx.Node) -> Any:
        """The example value of a forward node."""
        return self._held[node]

    def round_trip(self, saved: SavedValue, codec: Codec) -> torch.Tensor:
        """The example value as it comes back from a codec."""
        held: torch.Tensor = self._held[saved.node]
        order = dense_order(value(saved.node))
        if order is None or getattr(codec, "positional", False):
            order = tuple(range(held.ndim))
        laid_out = held.permute(order)
        with torch.no_grad():
            if getattr(codec, "random", False):
                counter = torch.zeros(3, dtype=torch.int64, device=held.device)
                made: Any = codec.encode(laid_out, draw=lambda size: uniform(counter, 1, size))  # type: ignore[call-arg]
            else:
                made = codec.encode(laid_out)
            stored = [made] if isinstance(made, torch.Tensor) else list(made)
            return codec.decode(stored, laid_out).permute([order.index(d) for d in range(len(order))])

    def again(self, chain: Iterable[fx.Node], changed: dict[fx.Node, torch.Tensor]) -> dict[fx.Node, Any]:
        """The operators of `chain`, in order, once more: with changed values, which stay as they are."""
        env = self._with_views(changed)
        with torch.no_grad():
            for node in chain:
                if node not in changed:
                    env[node] = self._run(node, env)
        return env

    def error(self, changed: dict[fx.Node, torch.Tensor], encoded: Iterable[SavedValue] = ()) -> float:
        """Relative error of all gradients together when the backward reads `changed` in the place of saved values.

        Operators that only compare an encoded value read an exact mask beside the code. Of one that is recomputed they
        read the changed numbers.
        """
        spared: dict[fx.Node, set[fx.Node]] = {}
        for saved in encoded:
            for one in saved.readings:
                if one.demand in (Demand.SIGN, Demand.SHAPE):
                    spared.setdefault(one.reader, set()).update((saved.node, *views_of(saved.node)))
        found = self._backward(self._with_views(changed), spared)
        if self._norm == 0:
            return 0.0
        difference = _norm([a - b for a, b in zip(found, self._exact, strict=True)])
        return difference / self._norm

    def _with_views(self, changed: dict[fx.Node, torch.Tensor]) -> dict[fx.Node, Any]:
        env: dict[fx.Node, Any] = dict(changed)
        with torch.no_grad():
            for node in changed:
                for view in views_of(node):
                    env[view] = self._run(view, env)
        return env

    def _backward(self, env: dict[fx.Node, Any], spared: dict[fx.Node, set[fx.Node]]) -> list[torch.Tensor]:
        local = dict(env)
        kept = set(self._grads)
        with torch.no_grad():
            for node in self._later:
                exact = spared.get(node)
                seen = {k: v for k, v in local.items() if k not in exact} if exact else local
                local[node] = self._run(node, seen)
                for source in node.all_input_nodes:
                    if self._last_use[source] is node and source not in kept and source not in env:
                        local.pop(source, None)
        return [(local[n] if n in local else self._held[n]).to(torch.float64) for n in self._grads]

    def _run(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n] if n in env else self._held[n])
        return call_operator(node.target, args, kwargs)  # type: ignore[arg-type]


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in tensors))
