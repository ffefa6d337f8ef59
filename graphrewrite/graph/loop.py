"""Inner loops: a body, traced once, that one node of the graph runs again and again.

The node is `repeat(state, inputs, steps, body)`, an operator of torch's library. It is opaque to tracing, so that the
graph is as large for a thousand steps as for one, and runs like any other call in the interpreter, after expansion
and in a backend. `body` is the number of a `Body`, whose graph analyses look into: costs, live bytes and certificates
are those of what the loop computes.

Bodies stay for the life of the process, as operators do.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx

from graphrewrite._compat import boxed, make_fx, traced_graph
from graphrewrite.errors import RuleError
from graphrewrite.graph.aliasing import written_bases
from graphrewrite.graph.nodes import NodeInfo, Role, value

if TYPE_CHECKING:
    from graphrewrite.graph.core import GraphCore

_LIBRARY = torch.library.Library("graphrewrite", "FRAGMENT")
_LIBRARY.define("repeat(Tensor[] state, Tensor[] inputs, int steps, int body) -> Tensor[]")
_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
_BODIES: dict[int, Body] = {}
_COUNT = itertools.count()


@dataclass(frozen=True, eq=False)
class Body:
    """What a loop does in one step.

    Attributes:
        number: What loop nodes call it by.
        graph: Its ATen calls; the placeholders are the state, then the inputs; the result is the next state.
        states: How many placeholders are state.
        run: The same as a function of a list, which it empties.
    """

    number: int
    graph: fx.Graph
    states: int
    run: Callable[[list[Any]], Any]

    @property
    def placeholders(self) -> list[fx.Node]:
        """State, then inputs."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def results(self) -> tuple[fx.Node, ...]:
        """The nodes of the next state."""
        return tuple(self.graph.output_node().args[0])  # type: ignore[arg-type]

    @property
    def nodes(self) -> list[fx.Node]:
        """Its operators, in order."""
        return [node for node in self.graph.nodes if node.op == "call_function"]


@dataclass(frozen=True)
class LoopCall:
    """The arguments of a loop node, typed."""

    state: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    steps: int
    body: Body

    @staticmethod
    def of(node: fx.Node) -> LoopCall:
        """Read a loop node."""
        state, inputs, steps, number = cast("tuple[Any, ...]", node.args)
        return LoopCall(tuple(state), tuple(inputs), int(steps), _BODIES[number])


def is_loop(node: fx.Node) -> bool:
    """Whether a node runs a loop."""
    return node.op == "call_function" and node.target is OPERATOR


def run_loop(
    state: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], steps: int, body: int
) -> list[torch.Tensor]:
    """Run a loop: the meaning of its node."""
    run = _BODIES[body].run
    current = list(state)
    with torch.no_grad():
        for _ in range(steps):
            current = list(run([*current, *inputs]))
        given = {t.untyped_storage()._cdata for t in (*state, *inputs)}
        return [_as(t, like, given) for t, like in zip(current, state, strict=True)]


def _as(result: torch.Tensor, like: torch.Tensor, given: set[int]) -> torch.Tensor:
    """A result in the layout that the graph expects, in memory of its own."""
    if result.stride() != like.stride():
        return torch.empty_like(like).copy_(result)
    if result.untyped_storage()._cdata in given or result._is_view():
        return result.clone()
    return result


def _run_fake(state: Sequence[torch.Tensor], inputs: Any, steps: int, body: int) -> list[torch.Tensor]:
    return [torch.empty_like(t) for t in state]


_LIBRARY.impl("repeat", run_loop, "CompositeExplicitAutograd")
torch.library.register_fake("graphrewrite::repeat", _run_fake, lib=_LIBRARY)
OPERATOR = torch.ops.graphrewrite.repeat.default


@contextlib.contextmanager
def labelled(like: NodeInfo) -> Iterator[None]:
    """Inside of a loop's body: what is computed here is for this, where no inner label says otherwise."""
    traced = traced_graph()
    if traced is None:
        yield
        return
    last = next(iter(reversed(traced.nodes)), None)
    yield
    node = next(iter(traced.nodes)) if last is None else last.next
    while node.op != "root":
        node.meta.setdefault("gr", like)
        node = node.next


def trace_body(
    graph: GraphCore,
    body: Callable[..., Sequence[torch.Tensor]],
    state: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    like: NodeInfo,
) -> Body:
    """Trace one step on fake values.

    Args:
        graph: The graph the loop is for.
        body: `body(*state, *inputs) -> next state`. It may call `torch.autograd.grad`.
        state: Nodes of the initial state.
        inputs: Nodes of what every step reads.
        like: For operators that `labelled` says nothing about.
    """
    fakes = [graph.fresh_fake(value(node)) for node in (*state, *inputs)]

    def step(*tensors: torch.Tensor) -> list[torch.Tensor]:
        return list(body(*tensors))

    with graph.tracing():
        traced = make_fx(step, tracing_mode="real", _allow_non_fake_inputs=True)(*fakes)
    traced.graph.eliminate_dead_code()
    for node in traced.graph.nodes:
        if node.target in _VIEWS:
            # values have other strides at run time than the fake ones they were traced with
            node.target = torch.ops.aten.reshape.default
    traced.recompile()
    found = Body(next(_COUNT), traced.graph, len(state), boxed(traced))
    _check(found, state, like)
    for node in traced.graph.nodes:
        role = Role.INPUT if node.op == "placeholder" else like.role
        node.meta.setdefault("gr", like.but(role=role, made_by=getattr(graph, "current_pass", "")))
    _BODIES[found.number] = found
    return found


def _check(body: Body, state: Sequence[fx.Node], like: NodeInfo) -> None:
    for node in body.graph.nodes:
        if node.op == "get_attr" or any(base.op == "placeholder" for base in written_bases(node)):
            raise RuleError(
                f"the body of a loop holds a tensor made outside, or changes what it is given, by {node.target}",
                module=like.module,
                remedy="hand tensors in as inputs of the loop, and write new ones instead of changing them",
            )
    if len(body.results) != len(state):
        raise RuleError(f"the body of a loop returns {len(body.results)} values for {len(state)} pieces of state")
    for old, new in zip(state, body.results, strict=True):
        want, got = value(old), value(new)
        if tuple(got.shape) != tuple(want.shape) or got.dtype != want.dtype:
            raise RuleError(
                f"the body of a loop makes {got.dtype} {tuple(got.shape)} of a state of {want.dtype} "
                f"{tuple(want.shape)}",
                node=old.name,
                remedy="state keeps its shape and dtype from step to step",
            )
