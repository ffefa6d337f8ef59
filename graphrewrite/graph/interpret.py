"""The reference interpreter: it executes a joint graph directly and *is* the meaning of the representation.

At a forward operator that a VJP node mirrors it runs the operator on detached leaves and keeps the local tape; at
the VJP node it differentiates that tape. The expansion to ATen calls is this interpreter, traced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from graphrewrite.graph.nodes import flat_inputs, is_backward, unobserved, value
from graphrewrite.graph.ops import VjpCall, call_operator, is_vjp
from graphrewrite.graph.tape import Tape
from graphrewrite.graph.verify import has_random

if TYPE_CHECKING:
    from graphrewrite.graph.joint import JointGraph


def interpret(
    graph: JointGraph,
    inputs: Sequence[Any],
    *,
    after: Callable[[fx.Node], None] | None = None,
) -> list[Any]:
    """Run a joint graph of any level.

    Args:
        graph: The graph.
        inputs: Values of the placeholders, in order.
        after: Called after each node (the expansion uses it to learn which ATen calls came from which node).

    Returns:
        The values of `graph.outputs`, in order; no gradient flows through them.
    """
    env: dict[fx.Node, Any] = {}
    tapes: dict[fx.Node, Tape] = {}
    mirrored: dict[fx.Node, set[int]] = {}
    last_use: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for source in node.all_input_nodes:
            last_use[source] = node
        if not is_vjp(node):
            continue
        call = VjpCall.of(node)
        if call.replaced:
            # taken at other primals, so on a tape of its own, from the operator's inputs
            last_use.update(dict.fromkeys(flat_inputs(call.mirror), node))
        else:
            mirrored.setdefault(call.mirror, set()).update(call.wrt)
    dying: dict[fx.Node, list[fx.Node]] = {}
    for source, user in last_use.items():
        dying.setdefault(user, []).append(source)

    given = iter(inputs)
    results: list[Any] = []
    with torch.no_grad():
        for node in graph.nodes:
            if node.op == "placeholder":
                env[node] = next(given)
            elif node.op == "get_attr":
                env[node] = getattr(graph.module, str(node.target))
            elif node.op == "output":
                results = [env[n] for n in graph.outputs.values()]
            elif is_vjp(node):
                env[node] = _run_vjp(node, env, tapes)
            elif node in mirrored:
                tapes[node] = Tape(node, env.__getitem__, sorted(mirrored[node]))
                env[node] = tapes[node].result
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
                env[node] = call_operator(node.target, args, kwargs)  # type: ignore[arg-type]
            if after is not None:
                after(node)
            for dead in dying.get(node, ()):
                env.pop(dead, None)
                tapes.pop(dead, None)
    return results


def observe_sizes(graph: JointGraph, probe: Callable[[JointGraph], Sequence[Any]]) -> None:
    """Let sizes that depend on data (the edges that a mask leaves) be known at those of an example, as other sizes are.

    What computes them is run once, where there is any.

    Args:
        graph: ATen level.
        probe: Gives example values of the placeholders, in order.
    """
    stack = [node for node in graph.nodes if unobserved(node.meta.get("val")) and not is_backward(node)]
    if not stack:
        return
    needed: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += node.all_input_nodes
    given = iter(probe(graph))
    env: dict[fx.Node, Any] = {}
    with torch.random.fork_rng(enabled=has_random(graph)), torch.no_grad():
        for node in graph.nodes:
            if node.op == "placeholder":
                env[node] = next(given)
            elif node not in needed:
                continue
            elif node.op == "get_attr":
                env[node] = getattr(graph.module, str(node.target))
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
                env[node] = call_operator(node.target, args, kwargs)  # type: ignore[arg-type]
            if isinstance(env[node], torch.Tensor):
                for fake, real in zip(value(node).shape, env[node].shape, strict=True):
                    if isinstance(fake, torch.SymInt) and fake.node.hint is None and fake.node.expr.is_symbol:
                        fake.node.shape_env.var_to_hint_override[fake.node.expr] = real


def _run_vjp(node: fx.Node, env: dict[fx.Node, Any], tapes: dict[fx.Node, Tape]) -> Any:
    call = VjpCall.of(node)
    tape = tapes.get(call.mirror)
    if call.replaced:
        tape = Tape(call.mirror, env.__getitem__, call.wrt, {p: env[by] for p, by in call.replaced.items()})
    assert tape is not None
    grads = tape.vjp([None if c is None else env[c] for c in call.cotangents], call.wrt)
    return grads[0] if len(grads) == 1 else tuple(grads)
