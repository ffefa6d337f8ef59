"""One compiled input signature: its graphs, its callables, and the autograd function that runs them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from graphrewrite._compat import reduces_gradients, release_saved
from graphrewrite.backends import Run
from graphrewrite.capture import Captured
from graphrewrite.errors import RuleError
from graphrewrite.graph.aliasing import base_of, owns_no_memory
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import (
    Counter,
    Grad,
    InputSpec,
    OutputSpec,
    StateUpdate,
    Tangent,
    info,
)
from graphrewrite.graph.partition import Partition
from graphrewrite.graph.verify import has_random
from graphrewrite.pipeline import PassRecord
from graphrewrite.runtime.concat import ConcatPlan
from graphrewrite.runtime.segments import Chain, Segments, cut
from graphrewrite.runtime.two_stage import MicroBatch, WeightQueue

if TYPE_CHECKING:
    from graphrewrite.runtime.step_blocks import StepPlan

_IGNORED = -100


@dataclass
class Program:
    """A compiled signature.

    Attributes:
        captured: The forward graph and the structure of the outputs.
        operator: The operator-level graph after the rule.
        partition: The stages, with the ATen-level graph behind them.
        forward: Callable for the forward stage.
        backward: Callable for the backward stage.
        history: The passes that ran.
        guard_text: What the program is specialised on.
        guards: Predicate over input and target leaves.
    """

    captured: Captured
    operator: JointGraph
    partition: Partition
    forward: Run
    backward: Run
    history: list[PassRecord]
    guard_text: list[str]
    guards: Callable[[Sequence[Any], Sequence[Any]], bool]
    backward_weight: Run | None = None
    """Callable for the weight stage of a split backward."""
    may_cut: bool = False
    """Whether the backward stage is run as it is, operator by operator, so that it can be cut into segments."""
    differentiable: list[InputSpec] = field(init=False)
    """Inputs that get a gradient, in the order in which the autograd function takes them."""
    positions: dict[InputSpec, int] = field(init=False)
    plans: dict[str | None, StepPlan] = field(init=False, default_factory=dict)
    """How `step_blocks` runs it, by the block that is trained alone; None: all blocks."""
    samples_checked: bool = field(init=False, default=False)
    """Whether a step in chunks has found that samples do not see each other."""
    draws: bool = field(init=False)
    """Whether the forward draws from torch's generators."""

    def __post_init__(self) -> None:
        part = self.partition
        self.draws = has_random(self.captured.graph)
        self.differentiable = [spec.of for spec in part.backward_outputs if isinstance(spec, Grad)]
        self.positions = {spec: i for i, spec in enumerate(part.forward_inputs)}
        self._diff_slots = [self.positions.get(spec, -1) for spec in self.differentiable]
        self._leaf_slots = [
            (s, self.positions.get(s.of, -1)) for s in part.backward_weight_outputs if isinstance(s, Grad)
        ]
        outputs = part.forward_outputs
        self.tangent_slots = [-1] * part.result_count
        for i, tangent in enumerate(part.tangents):
            self.tangent_slots[outputs[tangent.output]] = i
        self.plain_outputs = [i for i, slot in enumerate(self.tangent_slots) if slot < 0]
        kept = [s for s in part.saved if not s.carried]
        self._tensor_saved = [i for i, s in enumerate(part.saved) if not s.carried and _is_tensor(s.node)]
        self._other_saved = [i for i, s in enumerate(part.saved) if s.carried or not _is_tensor(s.node)]
        self._clone = [i for i, s in enumerate(part.saved) if s.copied]
        self.has_carried = len(kept) != len(part.saved)
        self._depends = _tangent_dependence(part, part.backward_outputs)
        specs = part.backward_weight_outputs
        self._weight_depends = dict(zip(specs, _tangent_dependence(part, specs), strict=True))
        self._concat: ConcatPlan | None = None
        self._copied = _sharing_memory(part)
        self.updates_rule_state = any(
            isinstance(s, StateUpdate) for s in (*outputs, *part.backward_outputs, *part.backward_weight_outputs)
        )
        self.uses_counter = Counter() in self.positions

    def __call__(
        self,
        fetch: Callable[[InputSpec], Any],
        on_backward: Callable[[Any, Any], None],
        queue: WeightQueue | None = None,
    ) -> list[Any]:
        """Run the forward stage, recording the backward for autograd.

        Args:
            fetch: Value of an input.
            on_backward: Called in the backward with the specification and value of results that are no gradients.
            queue: Where a split backward leaves its second stage.

        Returns:
            The results of the forward; `partition.forward_outputs` says which is what.
        """
        values = [fetch(spec) for spec in self.partition.forward_inputs]
        leaves = [(s, values[p] if p >= 0 else fetch(s.of)) for s, p in self._leaf_slots]
        if not self.differentiable and not leaves:
            return list(self.run_forward(values))
        tensors = [
            values[p] if p >= 0 else fetch(spec) for p, spec in zip(self._diff_slots, self.differentiable, strict=True)
        ]
        if queue is not None:
            tensors.append(queue.anchor)
        second = None if queue is None else (queue, leaves)
        chain = None
        if reduces_gradients() and self.segments is not None:
            chain = Chain(self, self.segments, tensors[0].device)
            tensors = chain.link(tensors)
        return list(_Apply.apply(self, values, on_backward, second, chain, *tensors))  # type: ignore[no-untyped-call]

    @cached_property
    def segments(self) -> Segments | None:
        """The backward in segments, cut at block boundaries; None if it cannot be cut."""
        return cut(self.partition) if self.may_cut else None

    def is_unused(self, result: int, missing: frozenset[int]) -> bool:
        """Whether all cotangents that a result of the backward depends on are missing: it is None, then."""
        return _unused(missing, self._depends[result])

    def run_weight(self, one: MicroBatch) -> list[tuple[OutputSpec, Any]]:
        """The weight stage of one micro-batch.

        Returns:
            What it computes: gradients, and state that the rule updates with them.
        """
        specs = self.partition.backward_weight_outputs
        if self.backward_weight is None:
            return []
        # what is held dies as the stage goes on, not when it is over
        values, one.values = one.values, []
        with torch.no_grad():
            results = self.execute(self.backward_weight, values)
        return [
            (spec, None if self.unread(spec, one.missing) else result)
            for spec, result in zip(specs, results, strict=True)
        ]

    def unread(self, spec: OutputSpec, missing: frozenset[int]) -> bool:
        """Whether all cotangents that a result of the weight stage depends on are missing: it is None, then."""
        return bool(missing) and _unused(missing, self._weight_depends[spec])

    def concat_plan(self) -> ConcatPlan | None:
        """How the weight stage runs for several micro-batches at once; None if there is no such stage."""
        if self._concat is None and self.backward_weight is not None:
            self._concat = ConcatPlan(self.partition)
        return self._concat

    def check_labels(self, targets: Sequence[Any]) -> None:
        """Class indices that do not exist are an error here where looking costs nothing; a GPU asserts by itself.

        Raises:
            RuleError: A class index is out of range.
        """
        classes = self.captured.graph.context.label_classes
        if classes is None or not targets:
            return
        y = targets[0]
        if not isinstance(y, torch.Tensor) or y.device.type != "cpu" or y.is_floating_point() or not y.numel():
            return
        counted = y[y != _IGNORED]
        if counted.numel() and (counted.min() < 0 or counted.max() >= classes):
            wrong = counted[(counted < 0) | (counted >= classes)][0].item()
            raise RuleError(
                f"the targets hold class {wrong}, the model's output has {classes} classes: 0 to {classes - 1}",
                remedy="number the classes from 0; -100 marks targets that do not count",
            )

    def run_forward(self, values: list[Any]) -> Sequence[Any]:
        """The forward stage alone, without a gradient."""
        with torch.no_grad():
            return self.execute(self.forward, values)[: self.partition.result_count]

    @staticmethod
    def execute(run: Run, values: list[Any]) -> Sequence[Any]:
        """Casts are nodes of the graph: an autocast that is active around the call must not add its own."""
        active = [d for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]
        if not active:
            return run(values)
        for device in active:
            torch.set_autocast_enabled(device, False)
        try:
            return run(values)
        finally:
            for device in active:
                torch.set_autocast_enabled(device, True)


class _Apply(torch.autograd.Function):
    """Glue between a program and autograd: gradients reach `.grad` the way every tool of torch expects."""

    @staticmethod
    def forward(
        ctx: Any,
        program: Program,
        values: list[Any],
        on_backward: Any,
        second: Any,
        chain: Chain | None,
        *tensors: torch.Tensor,
    ) -> Any:
        part = program.partition
        # autograd must see the tensors it was handed, not another reference to the same parameter
        results = program.execute(program.forward, values)
        count = part.result_count
        outputs, saved = list(results[:count]), list(results[count:])
        for i in program._clone:
            saved[i] = saved[i].clone()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*[saved[i] for i in program._tensor_saved])
        ctx.others = [saved[i] for i in program._other_saved]
        ctx.program, ctx.on_backward, ctx.second, ctx.chain = program, on_backward, second, chain
        ctx.shapes = [
            (o.shape, o.dtype, o.device) if program.tangent_slots[i] >= 0 else None for i, o in enumerate(outputs)
        ]
        plain = [outputs[i] for i in program.plain_outputs if isinstance(outputs[i], torch.Tensor)]
        if plain:
            ctx.mark_non_differentiable(*plain)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        program: Program = ctx.program
        if torch.is_grad_enabled():
            raise RuleError(
                "double backward: the rewritten backward is not itself differentiable",
                remedy="do not use create_graph=True; take second derivatives of compiled.module instead",
            )
        if ctx.others is None:
            raise RuleError(
                "a second backward through the same step: gradients that were computed in the forward are given away",
                remedy="call loss() again; retain_graph=True cannot be used with local rules",
            )
        values = _interleave(program, ctx.saved_tensors, ctx.others)
        # what was saved dies as the backward goes on, not when it is over
        release_saved(ctx)
        if program.has_carried:
            ctx.others = None
        tangents: list[Any] = [None] * len(program.partition.tangents)
        missing = set()
        for i, slot in enumerate(program.tangent_slots):
            if slot < 0:
                continue
            given = cotangents[i]
            if given is None:
                shape, dtype, device = ctx.shapes[i]
                given = torch.zeros(shape, dtype=dtype, device=device)
                missing.add(slot)
            tangents[slot] = given
        part, gone = program.partition, frozenset(missing)
        held = [values[h.saved] for h in part.held if h.saved >= 0]
        values = values[: part.read_by_backward] + tangents
        del tangents
        if ctx.chain is not None:
            return (None, None, None, None, None, *ctx.chain.begin(values, gone))
        results = list(program.execute(program.backward, values))
        count = len(part.backward_outputs)
        held += results[count:]
        grads: list[Any] = []
        for i, spec in enumerate(part.backward_outputs):
            if not isinstance(spec, Grad):
                ctx.on_backward(spec, results[i])
            elif program.is_unused(i, gone):
                # what no used output depends on gets None, as in eager mode
                grads.append(None)
            else:
                grads.append(results[i].clone() if i in program._copied else results[i])
        if ctx.second is None:
            return (None, None, None, None, None, *grads)
        queue, leaves = ctx.second
        if queue.trains:
            held = [v.detach() if isinstance(v, torch.Tensor) else v for v in held]
            queue.add(MicroBatch(program, held, leaves, gone, ctx.on_backward))
        return (None, None, None, None, None, *grads, None)


def _unused(missing: Collection[int], depends: frozenset[int]) -> bool:
    """Whether all cotangents that a result depends on are missing."""
    return bool(missing) and bool(depends) and depends.issubset(missing)


def _interleave(program: Program, tensors: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    saved: list[Any] = [None] * len(program.partition.saved)
    for i, held in zip(program._tensor_saved, tensors, strict=True):
        saved[i] = held
    for i, held in zip(program._other_saved, others, strict=True):
        saved[i] = held
    return saved


def _is_tensor(node: Any) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _sharing_memory(part: Partition) -> frozenset[int]:
    """Gradients of the first stage that are views of memory which the weight stage will read.

    Autograd keeps a gradient that it is handed, and adds later ones into it in place.
    """
    held = {base_of(h.node) for h in part.held}
    outputs = part.graph.outputs
    results = [outputs[spec] for spec in part.backward_outputs]
    return frozenset(i for i, node in enumerate(results) if base_of(node) in held and owns_no_memory(node))


def _tangent_dependence(part: Partition, specs: Sequence[OutputSpec]) -> list[frozenset[int]]:
    """For each result: which tangents it depends on."""
    numbers = {tangent: i for i, tangent in enumerate(part.tangents)}
    depends: dict[Any, frozenset[int]] = {}
    for node in part.graph.nodes:
        if node.op == "placeholder":
            spec = info(node).spec
            depends[node] = frozenset([numbers[spec]]) if isinstance(spec, Tangent) else frozenset()
        elif node.op != "output":
            depends[node] = frozenset().union(*(depends[s] for s in node.all_input_nodes))
    results = part.graph.outputs
    return [depends[results[spec]] for spec in specs]
