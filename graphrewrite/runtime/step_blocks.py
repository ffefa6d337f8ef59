"""Update-unlocked training: every block is updated as soon as its own gradient exists.

The graph that trains is cut once more, into one segment per block: the block's forward, its local loss, its backward.
Segments run in order; behind each, the parameters that no later segment reads get their gradient, their optimizer
steps, and the gradient is dropped. So the gradient of one block at a time is alive, and nothing of a block outlives it
but what the next ones read.

A parameter that several blocks use is updated behind the last of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from graphrewrite._compat import boxed
from graphrewrite.analysis.certificates import certify
from graphrewrite.errors import RuleError
from graphrewrite.graph.aliasing import base_of, is_view
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import (
    BufferUpdate,
    Grad,
    InputSpec,
    Loss,
    LossTerm,
    OutputSpec,
    Param,
    StateUpdate,
    Tangent,
    UserInput,
    info,
    spec_of,
    value,
)
from graphrewrite.graph.ops import is_impure
from graphrewrite.graph.partition import extract
from graphrewrite.inputs import as_inputs, as_targets

if TYPE_CHECKING:
    from graphrewrite.runtime.module import CompiledModule
    from graphrewrite.runtime.program import Program

Optimizer = torch.optim.Optimizer
Factory = Callable[[list[nn.Parameter]], Optimizer]
Optimizers = Optimizer | Mapping[str, Optimizer] | Iterable[Optimizer] | Factory
BeforeUpdate = Callable[[str, list[nn.Parameter]], None]


@dataclass(frozen=True)
class Segment:
    """What runs for one block.

    Attributes:
        block: Its name.
        run: The segment's operators.
        inputs: What is fed in: inputs of the graph by specification, values of earlier segments by node.
        kept: Results that later segments or the caller need.
        due: Gradients that are used up behind this segment, with their position among the results.
        copied: Positions of gradients that share memory with something that lives on.
        dying: Values that no later segment reads.
    """

    block: str
    run: Callable[[list[Any]], Sequence[Any]]
    inputs: tuple[InputSpec | fx.Node, ...]
    kept: tuple[fx.Node, ...]
    due: dict[InputSpec, int]
    copied: frozenset[int]
    dying: frozenset[fx.Node]


def step_blocks(
    compiled: CompiledModule,
    x: Any,
    y: Any,
    optimizers: Optimizers,
    greedy: str | None,
    before_update: BeforeUpdate | None,
) -> torch.Tensor:
    """`CompiledModule.step_blocks`."""
    if not compiled._records_gradient():
        raise RuleError("step_blocks trains", remedy="call train(), and leave torch.no_grad()")
    if compiled._options.backend != "eager":
        raise RuleError(
            f"step_blocks runs on the eager backend, not on {compiled._options.backend!r}",
            remedy="compile with backend='eager'",
        )
    inputs, targets = as_inputs(x), as_targets(y)
    compiled._scheduled_feedback(inputs)
    program, call = compiled.program_for("loss", inputs, targets)
    program.check_labels(call.targets)
    plan = program.plans.get(greedy)
    if plan is None:
        plan = program.plans[greedy] = StepPlan(program, greedy)
    fetch = compiled.fetch(program, call)
    holders = holders_of(_made(compiled, optimizers) if callable(optimizers) else optimizers)
    require_held(plan.due(), fetch, holders)
    results = plan.run(program, fetch, holders, before_update)
    if program.uses_counter:
        compiled._step += 1
    compiled._write_back(program, results, call)
    compiled.losses = {s.name: v for s, v in results.items() if isinstance(s, LossTerm)}
    loss: torch.Tensor = results[Loss()] if greedy is None else next(iter(compiled.losses.values()))
    return loss


def _made(compiled: CompiledModule, factory: Factory) -> dict[str, Optimizer]:
    """The optimizers that a function makes, one per block, made once."""
    if compiled._block_optimizers is None:
        made = {group["name"]: factory(list(group["params"])) for group in compiled.param_groups()}
        compiled._block_optimizers = (factory, made)
    made_by, made = compiled._block_optimizers
    if made_by is not factory:
        raise RuleError(
            "step_blocks got another function than the one that made its optimizers",
            remedy="define it once, before the training loop, or pass block_optimizers()",
        )
    return made


class StepPlan:
    """The segments of a program, for all blocks or for the greedy training of one.

    Attributes:
        segments: In order of execution.
        results: What the caller gets of the graph, losses and updates: specification -> node.
    """

    def __init__(self, program: Program, greedy: str | None = None) -> None:
        part = program.partition
        graph = part.graph
        _require_unlocked(program, greedy)
        names = [block.name for block in graph.blocks]
        number = _segments(graph)
        grads = {spec.of: node for spec, node in graph.outputs.items() if isinstance(spec, Grad)}
        owner = {of: max(number[node], _last_reader(graph, of, number)) for of, node in grads.items()}
        self.results: dict[OutputSpec, fx.Node] = {
            spec: node for spec, node in graph.outputs.items() if not isinstance(spec, Grad)
        }
        last = len(names) - 1
        if greedy is not None:
            last = names.index(greedy)
            grads = {of: node for of, node in grads.items() if owner[of] == last}
            if not grads:
                raise RuleError(f"block {greedy} has no parameter of its own to train", module=greedy)
            self.results = {s: n for s, n in self.results.items() if _wanted_alone(s, number.get(n, 0), greedy, last)}
        order = [n for n in graph.nodes if n.op in ("call_function", "get_attr") and number[n] <= last]
        order = _needed(order, [*grads.values(), *self.results.values()], keep_random=greedy is None)
        self.segments = self._build(graph, names, order, number, grads, owner)

    def _build(
        self,
        graph: JointGraph,
        names: Sequence[str],
        order: Sequence[fx.Node],
        number: Mapping[fx.Node, int],
        grads: Mapping[Any, fx.Node],
        owner: Mapping[Any, int],
    ) -> list[Segment]:
        wanted = set(self.results.values())
        last_use = {source: number[node] for node in order for source in node.all_input_nodes}
        for node in order:
            for source in node.all_input_nodes:
                last_use[source] = max(last_use[source], number[node])
        for of, node in grads.items():
            last_use[node] = max(last_use.get(node, 0), owner[of])
        segments = []
        for i, name in enumerate(names):
            nodes = [n for n in order if number[n] == i]
            due = {of: node for of, node in grads.items() if owner[of] == i}
            if not nodes and not due:
                continue
            outside = dict.fromkeys(s for n in nodes for s in n.all_input_nodes if number.get(s, -1) != i)
            early = [n for n in due.values() if number.get(n) != i]
            outside.update(dict.fromkeys(early))
            kept = [n for n in nodes if last_use.get(n, -1) > i or n in wanted]
            results = list(dict.fromkeys([*kept, *due.values()]))
            retarget = {n: torch.ops.aten.mul_.Tensor for n in nodes if _scales_in_place(n)}
            module = extract(graph, list(outside), nodes, results, retarget)
            alive = {base_of(n) for n in kept}
            bases = [base_of(n) for n in due.values()]
            segments.append(
                Segment(
                    name,
                    boxed(module),
                    tuple(spec_of(n) or n for n in outside),
                    tuple(kept),
                    {of: results.index(node) for of, node in due.items()},
                    frozenset(
                        results.index(n)
                        for n, base in zip(due.values(), bases, strict=True)
                        if base in alive or bases.count(base) > 1 or base.op == "placeholder"
                    ),
                    frozenset(n for n in outside if n.op != "placeholder" and last_use[n] <= i and n not in wanted),
                )
            )
        return segments

    def due(self) -> dict[str, list[InputSpec]]:
        """What is updated behind each block."""
        return {segment.block: list(segment.due) for segment in self.segments if segment.due}

    def run(
        self,
        program: Program,
        fetch: Callable[[InputSpec], Any],
        holders: Mapping[int, Optimizer],
        before_update: BeforeUpdate | None,
    ) -> dict[OutputSpec, Any]:
        """One step.

        Args:
            program: The program that the plan was made of.
            fetch: Value of an input.
            holders: `id` of a parameter -> its optimizer.
            before_update: Called with the block and its parameters, which hold their gradients, before they change.

        Returns:
            Losses and updates by specification.
        """
        alive: dict[fx.Node, Any] = {}
        with torch.no_grad():
            for segment in self.segments:
                values = [alive[i] if isinstance(i, fx.Node) else _feed(fetch, i, program) for i in segment.inputs]
                for node in segment.dying:
                    del alive[node]
                found = list(program.execute(segment.run, values))
                alive.update(zip(segment.kept, found, strict=False))
                parameters = []
                for spec, at in segment.due.items():
                    parameter = fetch(spec)
                    parameter.grad = found[at].clone() if at in segment.copied else found[at]
                    parameters.append(parameter)
                del found, values
                if parameters:
                    _update(segment.block, parameters, holders, before_update)
        return {spec: alive[node] for spec, node in self.results.items() if node in alive}


def _update(
    block: str, parameters: list[nn.Parameter], holders: Mapping[int, Optimizer], before: BeforeUpdate | None
) -> None:
    if before is not None:
        before(block, parameters)
    for optimizer in dict.fromkeys(holders[id(p)] for p in parameters):
        with torch.enable_grad():
            optimizer.step()
    for parameter in parameters:
        parameter.grad = None


def _feed(fetch: Callable[[InputSpec], Any], spec: InputSpec, program: Program) -> Any:
    """The cotangent of the loss is 1."""
    if isinstance(spec, Tangent):
        val = value(program.partition.graph.input(spec))
        return torch.ones((), dtype=val.dtype, device=val.device)
    return fetch(spec)


def _require_unlocked(program: Program, greedy: str | None) -> None:
    graph = program.partition.graph
    blocks = {block.name for block in graph.blocks}
    if greedy is not None and greedy not in blocks:
        raise RuleError(f"no block is named {greedy!r}", remedy=f"blocks: {', '.join(b.name for b in graph.blocks)}")
    for one in certify(program.partition).blocks:
        if one.update_locked:
            raise RuleError(
                f"step_blocks: the update of block {one.block}, which learns by {one.rule}, waits for what is behind: "
                + " <- ".join(one.update_locked.path),
                module=one.block,
                remedy="train with compiled.loss(x, y).backward(), or by a rule with local objectives",
            )
    for spec in graph.outputs:
        if isinstance(spec, Grad) and isinstance(spec.of, UserInput):
            raise RuleError(
                f"step_blocks: {spec.of} requires grad, but gradients are used up block by block",
                remedy="detach the input, or train with compiled.loss(x, y).backward()",
            )


def _segments(graph: JointGraph) -> dict[fx.Node, int]:
    """The number of the block behind which each operator can run: its own, or a later one that it reads from."""
    rank = {block.name: block.index for block in graph.blocks}
    number: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op in ("call_function", "get_attr"):
            # a size belongs to no block: all may need it
            own = 0 if isinstance(value(node), torch.SymInt) else rank.get(info(node).block, 0)
            number[node] = max([own, *(number.get(s, 0) for s in node.all_input_nodes)])
    return number


def _last_reader(graph: JointGraph, of: InputSpec, number: Mapping[fx.Node, int]) -> int:
    """The last segment that reads a parameter, itself or through a view of it."""
    parameter = graph.input(of)
    return max(
        (number[n] for n in number if any(base_of(source) is parameter for source in n.all_input_nodes)), default=0
    )


def _wanted_alone(spec: OutputSpec, number: int, greedy: str, last: int) -> bool:
    """Results of a greedy step: the block's loss, its state, and the statistics of what runs before it."""
    if isinstance(spec, BufferUpdate):
        return number <= last
    if isinstance(spec, StateUpdate):
        return number == last
    return isinstance(spec, LossTerm) and number <= last and spec.name in (greedy, "task")


def _needed(order: Sequence[fx.Node], results: Iterable[fx.Node], *, keep_random: bool) -> list[fx.Node]:
    wanted = set(results)
    found = []
    for node in reversed(order):
        if node in wanted or (keep_random and is_impure(node)):
            found.append(node)
            wanted.update(node.all_input_nodes)
    return found[::-1]


def _scales_in_place(node: fx.Node) -> bool:
    """A finished gradient that is multiplied by the loss's cotangent is given away: no copy is needed."""
    source = node.args[0] if node.args else None
    return (
        info(node).scales
        and isinstance(source, fx.Node)
        and source.op == "call_function"
        and len(source.users) == 1
        and not is_view(source)
    )


# --- optimizers ----------------------------------------------------------------------------------------------------


def holders_of(optimizers: Optimizer | Mapping[str, Optimizer] | Iterable[Optimizer]) -> dict[int, Optimizer]:
    """`id` of a parameter -> the optimizer that holds it.

    Raises:
        RuleError: Two optimizers hold one parameter, or what was given is no optimizer.
    """
    given: Iterable[Any]
    if isinstance(optimizers, Optimizer):
        given = [optimizers]
    else:
        given = optimizers.values() if isinstance(optimizers, Mapping) else optimizers
    holders: dict[int, Optimizer] = {}
    for optimizer in given:
        if not isinstance(optimizer, Optimizer):
            raise RuleError(
                f"{type(optimizer).__name__} is no optimizer",
                remedy="pass {block: optimizer}, a list, one optimizer, or a function from parameters to an optimizer",
            )
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if holders.setdefault(id(parameter), optimizer) is not optimizer:
                    raise RuleError("a parameter is held by two of the optimizers", remedy="give each to one of them")
    return holders


def require_held(
    due: Mapping[str, Sequence[InputSpec]], fetch: Callable[[InputSpec], Any], holders: Mapping[int, Optimizer]
) -> None:
    """Every parameter that gets a gradient has an optimizer, and none holds an old gradient.

    Raises:
        RuleError: It has none, or there is an old gradient, which the step would mix in or lose.
    """
    for block, specs in due.items():
        for spec in specs:
            parameter = fetch(spec)
            name = spec.name if isinstance(spec, Param) else str(spec)
            if id(parameter) not in holders:
                raise RuleError(
                    f"no optimizer holds {name} of block {block}",
                    module=block,
                    remedy="build them from compiled.param_groups(), or freeze the parameter",
                )
            if parameter.grad is not None:
                raise RuleError(
                    f"{name} of block {block} holds a gradient already",
                    module=block,
                    remedy="call zero_grad() before step_blocks",
                )
