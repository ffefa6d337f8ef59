"""Differentiation: the operator-level backward, built and rebuilt from one table.

`Backward` holds, for every forward operator, its *pullbacks*: how the cotangents of its outputs become cotangents of
its inputs. By default these are VJP nodes that mirror the operator. Verbs change rows of the table (another pullback,
a cut edge, a new seed) and call `propagate`, which walks the forward graph in reverse and brings the nodes in line:
unchanged rows keep their nodes, rows that no cotangent reaches any more lose theirs.

Cotangents that meet at a fan-out are added in the order in which autograd's engine would add them (reverse order of
the consumers), so that sums are bitwise those of eager mode.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx

from graphrewrite.errors import GraphRewriteError, RuleError
from graphrewrite.graph.nodes import (
    Buffer,
    Constant,
    Grad,
    Loss,
    NodeInfo,
    OutputSpec,
    Param,
    Role,
    State,
    Tangent,
    UserOutput,
    flat_inputs,
    info,
    is_backward,
    is_float,
    outputs_of,
    producer,
    spec_of,
    value,
)
from graphrewrite.graph.ops import SEPARABLE, is_random, vjp
from graphrewrite.graph.tape import Tape

if TYPE_CHECKING:
    from graphrewrite.graph.joint import JointGraph

Part = Literal["d", "w", "vjp"]
"""Input cotangent, weight gradient, or both in one node."""

Bwd = Callable[..., Any]


@dataclass(eq=False)
class Pullback:
    """One row of the backward table.

    Attributes:
        op: The forward operator.
        part: `"d"`: cotangents of activations; `"w"`: gradients of parameters; `"vjp"`: both at once.
        wrt: Positions in `sources` that get a cotangent.
        replaced: Positions of primals that the derivative reads in another form -> the node it reads instead.
        bwd: A PyTorch function in the place of the derivative: `bwd(residuals, *cotangents) -> cotangents of wrt`.
        residuals: Nodes handed to `bwd` as a tuple.
        inputs: Where `bwd` is the derivative of several operators, of which `op` is the last: their inputs.
    """

    op: fx.Node
    part: Part
    wrt: tuple[int, ...]
    replaced: dict[int, fx.Node] = field(default_factory=dict)
    bwd: Bwd | None = None
    residuals: tuple[fx.Node, ...] = ()
    role: Role | None = None
    inputs: tuple[fx.Node, ...] = ()
    # what the row is made of at present
    cotangents: tuple[fx.Node | None, ...] | None = None
    active: tuple[int, ...] = ()
    results: dict[int, fx.Node] = field(default_factory=dict)

    @property
    def plain(self) -> bool:
        """Whether the row is the operator's own derivative."""
        return self.bwd is None and not self.replaced

    @property
    def sources(self) -> Sequence[fx.Node]:
        """The values that the row's cotangents go back to."""
        return self.inputs or flat_inputs(self.op)

    def reset(self) -> None:
        """Forget the nodes, so that the next propagation makes new ones."""
        self.cotangents = None


@dataclass(eq=False)
class _Sum:
    terms: tuple[fx.Node, ...]
    total: fx.Node


@dataclass(eq=False)
class MappedGradient:
    """The gradient of a leaf as a function of the gradient of a leaf.

    Attributes:
        of: The leaf whose gradient is read.
        fn: `fn(gradient, *inputs)`; None: the gradient as it is.
        inputs: Further arguments.
    """

    of: fx.Node
    fn: Callable[..., Any] | None = None
    inputs: tuple[fx.Node, ...] = ()
    # what it is made of at present
    source: fx.Node | None = None
    result: fx.Node | None = None


class Backward:
    """The backward table of an operator-level graph."""

    def __init__(self, graph: JointGraph) -> None:
        self.graph = graph
        self.pullbacks: dict[fx.Node, list[Pullback]] = {}
        self.seeds: dict[fx.Node, list[fx.Node]] = {}
        """Cotangents that come from outside the table: tangents, teaching signals, seeds of local losses."""
        self.cuts: set[tuple[fx.Node, fx.Node]] = set()
        """Edges (value, consumer) through which no cotangent returns."""
        self.mapped: dict[fx.Node, MappedGradient] = {}
        """Leaves whose gradient is another one than their cotangent."""
        self.refused: dict[fx.Node, GraphRewriteError] = {}
        """Operators that a cotangent reaches and that have no derivative: rules may still take it away."""
        self.deferred = 0
        self.seeded = True
        """Whether cotangents enter at the outputs."""
        self._sums: dict[fx.Node, _Sum] = {}
        self._live: set[fx.Node] = set()
        self._gone: set[fx.Node] = set()
        self._own: set[fx.Node] = set()
        self._tapes: dict[fx.Node, Tape | None] = {}
        self._requires: dict[fx.Node, bool] = {}
        self._weightlike: dict[fx.Node, bool] = {}

    # --- facts about the forward -----------------------------------------------------------------------------------

    def requires_grad(self, node: fx.Node) -> bool:
        """Whether a forward value depends differentiably on a leaf."""
        known = self._requires.get(node)
        if known is None:
            self._analyse([node])
            known = self._requires[node]
        return known

    def _analyse(self, wanted: Sequence[fx.Node]) -> None:
        """Run operators on fake values, in order, until `wanted` is known. Fake autograd decides, not a list."""
        stack = list(wanted)
        while stack:
            node = stack[-1]
            if node in self._requires:
                stack.pop()
                continue
            missing = [n for n in node.all_input_nodes if n not in self._requires]
            if missing and not is_backward(node):
                stack.extend(missing)
                continue
            stack.pop()
            self._requires[node] = self._decide(node)

    def _decide(self, node: fx.Node) -> bool:
        if node.op == "placeholder":
            return node in self.graph.leaves
        if node.op != "call_function" or is_backward(node):
            return False
        op = producer(node)
        if op is not node:
            tape = self._tapes.get(op)
            return tape is not None and node.args[1] in tape.requires_grad()
        if not any(self._requires[n] for n in flat_inputs(node)):
            self._tapes[node] = None
            return False
        tape = self.tape(node)
        return tape is not None and bool(tape.requires_grad())

    def tape(self, op: fx.Node) -> Tape | None:
        """The operator's tape on fake values; None if no input requires grad."""
        if op not in self._tapes:
            wrt = [i for i, n in enumerate(flat_inputs(op)) if self.requires_grad(n)]
            if not wrt:
                self._tapes[op] = None
            else:
                with self.graph.tracing():
                    try:
                        self._tapes[op] = Tape(op, value, wrt)
                    except (RuntimeError, NotImplementedError) as error:
                        raise _undifferentiable(op, error) from error
        return self._tapes[op]

    def is_weightlike(self, node: fx.Node) -> bool:
        """Whether a value is computed from parameters (one at least), buffers, constants and sizes alone.

        A normalised or cast weight, a position bias: it has no samples in it, so it is no activation.
        """
        return self._params_only(node) and self._reads_param(node)

    def _params_only(self, node: fx.Node) -> bool:
        known = self._weightlike.get(node)
        if known is None:
            if node.op == "placeholder":
                known = isinstance(spec_of(node), (Param, Buffer, Constant, State))
            elif node.op == "get_attr" or isinstance(value(node), torch.SymInt):
                known = True
            else:
                known = (
                    not is_random(node)
                    and not is_backward(node)
                    and all(self._params_only(n) for n in node.all_input_nodes)
                )
            self._weightlike[node] = known
        return known

    def _reads_param(self, node: fx.Node) -> bool:
        stack, seen = [node], {node}
        while stack:
            current = stack.pop()
            if current.op == "placeholder" and isinstance(spec_of(current), (Param, State)):
                return True
            for source in current.all_input_nodes:
                if source not in seen:
                    seen.add(source)
                    stack.append(source)
        return False

    # --- the table -------------------------------------------------------------------------------------------------

    def rows(self, op: fx.Node) -> list[Pullback]:
        """The pullbacks of an operator, the default ones at first."""
        rows = self.pullbacks.get(op)
        if rows is None:
            rows = self.pullbacks[op] = self._default_rows(op)
        return rows

    def _default_rows(self, op: fx.Node) -> list[Pullback]:
        inputs = flat_inputs(op)
        wrt = [i for i, n in enumerate(inputs) if self.requires_grad(n) and is_float(n)]
        if op.target not in SEPARABLE:
            return [Pullback(op, "vjp", tuple(wrt))] if wrt else []
        weights = [i for i in wrt if self.is_weightlike(inputs[i])]
        others = [i for i in wrt if i not in weights]
        rows: list[Pullback] = []
        if others:
            rows.append(Pullback(op, "d", tuple(others)))
        if weights:
            rows.append(Pullback(op, "w", tuple(weights)))
        return rows

    def total(self, node: fx.Node) -> fx.Node | None:
        """The cotangent of a forward value: None if none reaches it."""
        known = self._sums.get(node)
        return known.total if known else None

    def seed(self, node: fx.Node, cotangent: fx.Node) -> None:
        """Let a cotangent enter at a forward value; call `propagate` afterwards."""
        self.seeds.setdefault(node, []).append(cotangent)

    def invalidate(self, changed: fx.Node) -> None:
        """The forward downstream of `changed` reads something else now: find its facts and derivatives out again."""
        stack, seen = [changed], {changed}
        while stack:
            node = stack.pop()
            for known in (self._tapes, self._requires, self._weightlike):
                known.pop(node, None)
            rows = self.pullbacks.get(node, ())
            if all(row.plain for row in rows):
                # which inputs need a cotangent may differ now
                self.pullbacks.pop(node, None)
            for user in node.users:
                if user not in seen and not is_backward(user):
                    seen.add(user)
                    stack.append(user)

    def forget(self, node: fx.Node) -> None:
        """A node is about to be erased from the graph: drop what the table knows of it."""
        for known in (self.pullbacks, self.seeds, self._sums, self._tapes, self._requires, self._weightlike):
            known.pop(node, None)
        if self.cuts:
            self.cuts = {edge for edge in self.cuts if node not in edge}
        self._own.discard(node)
        if is_backward(node):
            self._gone.add(node)

    def _drop_gone(self) -> None:
        """Rows and sums whose nodes were erased are made anew if they are still wanted."""
        if not self._gone:
            return
        for rows in self.pullbacks.values():
            for row in rows:
                if any(node in self._gone for node in row.results.values()):
                    row.reset()
                    row.results = {}
        for mapped in self.mapped.values():
            if mapped.source in self._gone or mapped.result in self._gone:
                mapped.source = mapped.result = None
        self._sums = {
            v: s for v, s in self._sums.items() if s.total not in self._gone and not self._gone.intersection(s.terms)
        }
        self._gone.clear()

    # --- bringing the nodes in line --------------------------------------------------------------------------------

    def propagate(self) -> None:
        """Walk the forward in reverse and make the backward nodes match the table."""
        if self.deferred:
            return
        graph = self.graph
        self.refused.clear()
        self._drop_gone()
        forward = graph.forward_nodes()
        self._analyse(forward)
        self._live = self._reaching_leaves(forward)
        terms: dict[fx.Node, list[fx.Node]] = {v: list(seeds) for v, seeds in self.seeds.items() if seeds}
        for node in reversed(forward):
            if producer(node) is not node:
                self._sum(node, terms)
                continue
            outputs = outputs_of(node)
            if outputs.get(0) is node:
                self._sum(node, terms)
            self._pull(node, outputs, terms)
        for leaf in graph.leaves:
            self._sum(leaf, terms)
        self._set_gradients()
        graph.sort()
        graph.forward_first()
        graph.prune(backward_only=True)

    def require_derivatives(self) -> None:
        """Raise if a cotangent reaches an operator that has no derivative."""
        for error in self.refused.values():
            raise error

    def _reaching_leaves(self, forward: Sequence[fx.Node]) -> set[fx.Node]:
        """Values whose cotangent would reach a leaf through edges that are not cut."""
        live = set(self.graph.leaves)
        for node in forward:
            if self._requires[node] and any(
                source in live and (source, node) not in self.cuts for source in node.all_input_nodes
            ):
                live.add(node)
        return live

    def _sum(self, node: fx.Node, terms: dict[fx.Node, list[fx.Node]]) -> None:
        """Accumulate the cotangents that arrived at a value."""
        arrived = tuple(terms.get(node, ()))
        known = self._sums.get(node)
        if known and known.terms == arrived:
            return
        old = known.total if known else None
        if not arrived:
            self._sums.pop(node, None)
            return
        total = arrived[0]
        with self._owning():
            for term in arrived[1:]:
                like = info(total).but(
                    role=Role.ACCUMULATE, block=self.block_of(node), cotangent_of=node, mirrors=producer(node)
                )
                total = self.graph.emit(
                    torch.ops.aten.add.Tensor, (total, term), like=like, name=f"acc_{node.name}", val=self._like(node)
                )
        self._sums[node] = _Sum(arrived, total)
        if old is not None and old is not total:
            self._hand_over(old, total)

    def _hand_over(self, old: fx.Node, new: fx.Node) -> None:
        """Let what rules made of a cotangent (a signal, a tap) read its successor.

        Not the table's own nodes: each of them reads what its row says, and one node may be the cotangent of two
        values.
        """
        own = self._own
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in own)

    @contextlib.contextmanager
    def _owning(self) -> Iterator[None]:
        """What is added to the graph in here is the table's own."""
        last = self.graph.output_node.prev
        yield
        node = last.next
        while node is not self.graph.output_node:
            self._own.add(node)
            node = node.next

    def block_of(self, node: fx.Node) -> str:
        """A leaf belongs to no block; its gradient is computed where it is first used."""
        if node.op != "placeholder":
            return info(node).block
        return next((info(user).block for user in node.users if not is_backward(user)), "")

    def _like(self, node: fx.Node) -> Any:
        return self.graph.fresh_fake(value(node))

    def _pull(self, op: fx.Node, outputs: dict[int, fx.Node], terms: dict[fx.Node, list[fx.Node]]) -> None:
        """Make an operator's pullbacks match the cotangents of its outputs and hand their results on."""
        if not self._requires[op]:
            return
        tape = self.tape(op)
        assert tape is not None
        differentiable = tape.requires_grad()
        cotangents = tuple(
            self.total(outputs[i]) if i in outputs and i in differentiable else None for i in range(len(tape.outputs))
        )
        inputs = flat_inputs(op)
        reached = any(c is not None for c in cotangents)
        by_position: dict[int, fx.Node] = {}
        for row in self.rows(op):
            sources = row.sources
            active = tuple(
                p for p in row.wrt if reached and sources[p] in self._live and (sources[p], op) not in self.cuts
            )
            if (row.cotangents, row.active) != (cotangents, active):
                old = row.results
                try:
                    with self._owning():
                        row.results = self._materialise(row, cotangents, active, tape) if active else {}
                except UndifferentiableError as error:
                    self.refused[op] = error
                    row.results = {}
                    row.reset()
                    continue
                row.cotangents, row.active = cotangents, active
                for position, before in old.items():
                    if position in row.results:
                        self._hand_over(before, row.results[position])
            if row.inputs:
                for position, result in row.results.items():
                    terms.setdefault(sources[position], []).append(result)
            else:
                by_position.update(row.results)
        for position in self._arrival(inputs, sorted(by_position), tape):
            terms.setdefault(inputs[position], []).append(by_position[position])

    def _arrival(self, inputs: Sequence[fx.Node], positions: list[int], tape: Tape) -> list[int]:
        """The order in which cotangents are added where one value stands at several positions."""
        if len({inputs[p] for p in positions}) == len(positions):
            return positions
        with self.graph.tracing():
            return tape.arrival(positions)

    def _materialise(
        self, row: Pullback, cotangents: tuple[fx.Node | None, ...], active: tuple[int, ...], tape: Tape
    ) -> dict[int, fx.Node]:
        graph = self.graph
        role = row.role or (Role.GRADIENT if row.part == "w" else Role.COTANGENT)
        like = info(row.op).but(role=role, mirrors=row.op)
        inputs = flat_inputs(row.op)
        if row.bwd is not None:
            return self._materialise_custom(row, cotangents, active, like)
        fakes = [None if c is None else self._like(c) for c in cotangents]
        with graph.tracing():
            try:
                if row.replaced:
                    tape = Tape(row.op, value, active, {p: value(n) for p, n in row.replaced.items()})
                vals = tape.vjp(fakes, active)
            except (RuntimeError, NotImplementedError) as error:
                raise _undifferentiable(row.op, error) from error
        found = {p: v for p, v in zip(active, vals, strict=True) if v is not None}
        if not found:
            return {}
        args: tuple[Any, ...] = (row.op, cotangents, tuple(found))
        if row.replaced:
            args += (tuple(row.replaced), tuple(row.replaced.values()))
        prefix = row.part if row.part != "vjp" else "d"

        def describe(position: int) -> NodeInfo:
            # a parameter's gradient inside a joint VJP node is still a parameter's gradient
            own = Role.GRADIENT if row.part == "vjp" and self.is_weightlike(inputs[position]) else role
            return like.but(role=own, cotangent_of=inputs[position])

        if len(found) == 1:
            ((position, val),) = found.items()
            name = f"{prefix}_{row.op.name}"
            return {position: graph.emit(vjp, args, like=describe(position), name=name, val=val)}
        node = graph.emit(vjp, args, like=like, name=f"{prefix}_{row.op.name}", val=tuple(found.values()))
        return {
            position: graph.emit(operator.getitem, (node, k), like=describe(position), name=f"{node.name}_{k}", val=val)
            for k, (position, val) in enumerate(found.items())
        }

    def _materialise_custom(
        self, row: Pullback, cotangents: tuple[fx.Node | None, ...], active: tuple[int, ...], like: NodeInfo
    ) -> dict[int, fx.Node]:
        bwd, count = row.bwd, len(row.residuals)
        assert bwd is not None

        def call(*values: Any) -> tuple[Any, ...]:
            out = bwd(values[:count], *values[count:])
            return out if isinstance(out, tuple) else (out,)

        made = self.graph.splice(call, [*row.residuals, *cotangents], like=like, whole=False)
        if len(made) != len(row.wrt):
            raise RuleError(
                f"the backward given to replace_vjp returned {len(made)} cotangents, {len(row.wrt)} are due",
                node=row.op.name,
                module=info(row.op).module,
                remedy="return one per differentiable input of the part, None for none",
            )
        inputs = row.sources
        results: dict[int, fx.Node] = {}
        for result, position in zip(made, row.wrt, strict=True):
            if result is None or position not in active:
                continue
            want, got = value(inputs[position]), value(result)
            if tuple(got.shape) != tuple(want.shape) or got.dtype != want.dtype:
                raise RuleError(
                    f"the backward given to replace_vjp returned {got.dtype} {tuple(got.shape)} as the cotangent of "
                    f"{inputs[position].name}, which is {want.dtype} {tuple(want.shape)}",
                    node=row.op.name,
                    module=info(row.op).module,
                    remedy="return a cotangent with the shape and dtype of the input",
                )
            if info(result).mirrors is row.op and info(result).cotangent_of is None:
                result.meta["gr"] = info(result).but(cotangent_of=inputs[position])
            results[position] = result
        return results

    def apply(
        self, op: fx.Node, cotangents: Mapping[fx.Node, fx.Node], wanted: Collection[fx.Node] | None
    ) -> dict[fx.Node, list[fx.Node]]:
        """Nodes of an operator's pullbacks on given cotangents, without a place in the table."""
        tape, outputs = self.tape(op), outputs_of(op)
        found: dict[fx.Node, list[fx.Node]] = {}
        if tape is None:
            return found
        given = tuple(cotangents.get(outputs[i]) if i in outputs else None for i in range(len(tape.outputs)))
        for row in self.rows(op):
            inputs = row.sources
            active = tuple(
                p for p in row.wrt if not self.is_weightlike(inputs[p]) and (wanted is None or inputs[p] in wanted)
            )
            made = self._materialise(row, given, active, tape) if active else {}
            for position, held in made.items():
                found.setdefault(inputs[position], []).append(held)
        return found

    def _set_gradients(self) -> None:
        graph = self.graph
        graph.remove_outputs(Grad)
        outputs = graph.outputs
        for leaf in graph.leaves:
            mapped = self.mapped.get(leaf)
            total = self.total(leaf) if mapped is None else self._map(leaf, mapped)
            if total is not None:
                outputs[Grad(spec_of(leaf))] = total  # type: ignore[arg-type]
        graph.set_outputs(outputs)

    def _map(self, leaf: fx.Node, mapped: MappedGradient) -> fx.Node | None:
        source = self.total(mapped.of)
        if source is None or mapped.fn is None:
            return source
        if source is mapped.source:
            return mapped.result
        like = info(source).but(role=Role.GRADIENT, mirrors=None, cotangent_of=leaf)
        result: fx.Node = self.graph.splice(mapped.fn, [source, *mapped.inputs], like=like, whole=False)
        want, got = value(leaf), value(result)
        if tuple(got.shape) != tuple(want.shape) or got.dtype != want.dtype:
            raise RuleError(
                f"map_gradient made a gradient of {got.dtype} {tuple(got.shape)} for {leaf.name}, which is "
                f"{want.dtype} {tuple(want.shape)}",
                node=leaf.name,
            )
        mapped.source, mapped.result = source, result
        return result

    # --- copying ---------------------------------------------------------------------------------------------------

    def copy(self, graph: JointGraph, env: dict[fx.Node, fx.Node]) -> Backward:
        """The same table over a copied graph."""

        def moved(nodes: Sequence[fx.Node | None]) -> tuple[fx.Node | None, ...]:
            return tuple(None if n is None else env[n] for n in nodes)

        other = Backward(graph)
        other.seeded = self.seeded
        other.seeds = {env[v]: [env[s] for s in seeds] for v, seeds in self.seeds.items()}
        other.cuts = {(env[v], env[c]) for v, c in self.cuts}
        other._sums = {env[v]: _Sum(moved(s.terms), env[s.total]) for v, s in self._sums.items()}  # type: ignore[arg-type]
        other._own = {env[n] for n in self._own}
        other.mapped = {
            env[leaf]: MappedGradient(
                env[m.of],
                m.fn,
                moved(m.inputs),  # type: ignore[arg-type]
                None if m.source is None else env.get(m.source),
                None if m.result is None else env.get(m.result),
            )
            for leaf, m in self.mapped.items()
        }
        other._requires = {env[n]: known for n, known in self._requires.items() if n in env}
        for op, rows in self.pullbacks.items():
            other.pullbacks[env[op]] = [
                Pullback(
                    env[op],
                    row.part,
                    row.wrt,
                    {p: env[n] for p, n in row.replaced.items()},
                    row.bwd,
                    moved(row.residuals),  # type: ignore[arg-type]
                    row.role,
                    moved(row.inputs),  # type: ignore[arg-type]
                    None if row.cotangents is None else moved(row.cotangents),
                    row.active,
                    {p: env[n] for p, n in row.results.items()},
                )
                for row in rows
            ]
        return other


class UndifferentiableError(RuleError):
    """A cotangent reaches an operator without a derivative."""


def _undifferentiable(op: fx.Node, error: Exception) -> UndifferentiableError:
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UndifferentiableError(
        f"operator {op.target} cannot be differentiated: {first}",
        node=op.name,
        module=info(op).module,
        source=info(op).source,
        remedy="detach its input, give it a derivative with torch.library.register_autograd, or use likelihood_ratio",
    )


def differentiate(graph: JointGraph, *, seeded: bool = True) -> JointGraph:
    """Append the backward to a forward graph, in place: forward level -> operator level.

    The cotangents enter at the loss, if the graph holds one, else at every differentiable output of the model.

    Args:
        graph: At the forward level.
        seeded: Whether any cotangent enters; without, there is a backward table but no backward.
    """
    graph.level = "operator"
    graph.backward = Backward(graph)
    graph.backward.seeded = seeded
    seed_outputs(graph)
    return graph


def seed_outputs(graph: JointGraph) -> None:
    """Let cotangents enter at the outputs that require grad and have none, unless the graph is not to have any.

    A pass that gives a derivative to what had none calls it: an output may require grad now.
    """
    backward = graph.backward
    if backward is None or not backward.seeded:
        return
    outputs = graph.outputs
    starts: dict[OutputSpec, fx.Node] = {spec: n for spec, n in outputs.items() if isinstance(spec, Loss)}
    starts = starts or {spec: n for spec, n in outputs.items() if isinstance(spec, UserOutput)}
    seen: set[fx.Node] = {node for node in starts.values() if backward.seeds.get(node)}
    for spec, node in starts.items():
        if node in seen or not is_float(node) or not backward.requires_grad(node):
            continue
        seen.add(node)
        name = "loss" if isinstance(spec, Loss) else node.name
        tangent = graph.placeholder(Tangent(spec), graph.fresh_fake(value(node)), f"tangent_{name}")
        backward.seed(node, tangent)
    backward.propagate()
