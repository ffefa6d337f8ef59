"""From a captured forward graph to a runnable program: the stages in order, with verification between them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from graphrewrite import observe, registry, textform
from graphrewrite.analysis.blocks import Blocks, assign_blocks
from graphrewrite.analysis.sparsity import tap_zeros
from graphrewrite.backends import CODERS, FUSES, STAND_INS, Run, Taken
from graphrewrite.capture import Captured, capture
from graphrewrite.errors import BackendError, VerifyError
from graphrewrite.graph.core import NO_RULE
from graphrewrite.graph.differentiate import differentiate
from graphrewrite.graph.expand import expand
from graphrewrite.graph.interpret import interpret, observe_sizes
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import Grad, ParameterUpdate, StateUpdate, Tap, UserInput, info
from graphrewrite.graph.partition import Partition, partition
from graphrewrite.graph.verify import has_random, verify
from graphrewrite.inputs import Inputs
from graphrewrite.passes.schedule.split_backward import SplitBackward
from graphrewrite.pipeline import Callback, Pass, PassEvent, PassManager, PassRecord
from graphrewrite.rule import RuleMap
from graphrewrite.runtime.program import Program
from graphrewrite.runtime.signature import make_guards

Kind = Literal["forward", "loss", "evaluate", "predict", "feedback", "answers", "sparsity"]
"""`forward`: the model's outputs, with a backward; `loss`: the rule's loss, with a backward; `evaluate`: the same
loss without one; `predict`: the rule's own forward; `feedback`: the phase in which feedback weights learn; `answers`:
what each block answers alone; `sparsity`: the share of zeros in what each block hands on."""

Probe = Callable[[JointGraph], list[Any]]
"""Example values of a graph's placeholders."""

Verification = Literal["off", "structure", "numeric"]

CLEANUP = (
    "fold_views",
    "drop_unread_statistics",
    "merge_convolution_backward",
    "eliminate_common_subexpressions",
    "eliminate_dead_code",
)


@dataclass(frozen=True)
class Options:
    """What `compile` was asked for."""

    rules: RuleMap
    loss: Callable[[Any, Any], torch.Tensor]
    blocks: Blocks = "auto"
    backend: str = "eager"
    fallback: Literal["eager"] | None = None
    passes: tuple[Pass, ...] = ()
    compress: Pass | None = None
    dynamic: Any = "auto"
    verify: Verification = "structure"
    seed: int = 0
    split_backward: SplitBackward | None = None
    chunk: int | None = None
    chunk_loss: Literal["joint", "mean"] = "joint"
    callbacks: tuple[Callback, ...] = field(default=(), compare=False)


def build_program(
    model: nn.Module,
    options: Options,
    kind: Kind,
    inputs: Inputs,
    targets: Any,
    probe: Probe | None = None,
) -> Program:
    """Capture a model for one kind of call and compile it.

    Args:
        model: The user's model, in the mode it is called in.
        options: What to compile to.
        kind: What the program is for.
        inputs: Example inputs.
        targets: Example targets, for the kinds that have a loss.
        probe: Example values of a graph's placeholders, for `verify="numeric"` and for passes that measure.
    """
    pipeline = _Pipeline(options, probe, kind)
    captured = _capture(model, options, kind, inputs, targets)
    graph = captured.graph
    pipeline.stage("capture", graph)
    # what follows works on the captured graph itself
    forward_graph = graph.copy()
    # local rules put passes and losses of their own in the place of the captured ones: the others build on that
    rules = sorted(options.rules.in_use(graph), key=lambda entry: entry[1].objective != "local")
    for leaf, node in graph.inputs.items():
        if _wants_gradient(leaf, inputs):
            graph.leaves[node] = None
    graph.current_pass = "differentiate"
    differentiate(graph, seeded=kind in ("forward", "loss", "evaluate"))
    compress = options.compress if kind in ("forward", "loss") else None
    if getattr(compress, "relative", False) and any(r.name != "bp" for _, r in rules):
        graph.context.bp_bytes = _saved_by_backpropagation(graph, probe)
    pipeline.stage("differentiate", graph)
    operator_passes = [p for p in options.passes if p.level == "operator" and kind != "feedback"]
    graph = pipeline.run([p for p in operator_passes if p.before_rules], graph)
    for key, rule in rules:
        if kind in ("forward", "loss", "evaluate"):
            graph = pipeline.run([rule], graph, rule_key=key)
            continue
        graph.current_rule, graph.current_pass = key, rule.name
        if kind == "feedback":
            rule.rewrite_feedback(graph)
        elif kind == "answers":
            for block, node in rule.block_answers(graph).items():
                graph.tap(node, block)
        else:
            rule.rewrite_forward(graph)
    graph.table.require_derivatives()
    if kind == "feedback":
        kept = (StateUpdate, ParameterUpdate)
        graph.set_outputs({spec: node for spec, node in graph.outputs.items() if isinstance(spec, kept)})
    elif kind in ("answers", "sparsity"):
        if kind == "sparsity":
            graph.prune()
            tap_zeros(graph)
        graph.set_outputs({spec: node for spec, node in graph.outputs.items() if isinstance(spec, Tap)})
        graph.sort()
    graph.prune(impure=kind == "feedback")
    graph = pipeline.run([p for p in operator_passes if not p.before_rules], graph)
    if kind not in ("forward", "loss", "feedback"):
        graph.remove_outputs(Grad, StateUpdate)
        graph.prune()
    operator = graph
    graph = pipeline.expand(graph)
    split = options.split_backward if kind in ("forward", "loss") else None
    # the halves of a convolution's backward run in different stages then
    cleanup = [name for name in CLEANUP if not (split and name == "merge_convolution_backward")]
    graph = pipeline.run([textform.build("pass", name) for name in cleanup], graph)
    if kind == "loss" and any(rule.objective == "local" or rule.early_backward for _, rule in rules):
        graph = pipeline.run([textform.build("pass", "early_local_backward")], graph)
    if any(info(n).region for n in graph.forward_nodes()):
        graph = pipeline.run([textform.build("pass", "recompute_regions")], graph)
    extra = [p for p in options.passes if p.level == "aten" and kind != "feedback"]
    if compress is not None:
        extra.append(compress)
    if extra:
        # only while they run: it holds the batch and the compiled module
        graph.context.example = probe
        graph = pipeline.run([*extra, textform.build("pass", "eliminate_dead_code")], graph)
        graph.context.example = None
    if split:
        graph = pipeline.run(split.passes, graph)
    part = partition(graph)
    forward, backward, *weight = _lower(part, options)
    if part.backward_weight is not None and not weight:
        raise BackendError(
            f"backend {options.backend!r} lowers no weight stage",
            remedy="compile without split_backward, or with backend='eager'",
        )
    text, guards = make_guards(captured.graph if operator is captured.graph else graph)
    captured = dataclasses.replace(captured, graph=forward_graph)
    program = Program(
        captured,
        operator,
        part,
        forward,
        backward,
        pipeline.history,
        text,
        guards,
        weight[0] if weight else None,
        may_cut=options.backend == "eager",
    )
    pipeline.finish(program)
    return program


def _capture(model: nn.Module, options: Options, kind: Kind, inputs: Inputs, targets: Any) -> Captured:
    with_loss = kind in ("loss", "evaluate")
    captured = capture(
        model,
        inputs,
        loss=options.loss if with_loss else None,
        targets=targets if with_loss else None,
        dynamic=options.dynamic,
    )
    captured.graph.context.seed = options.seed
    captured.graph.context.fuses = options.backend in FUSES
    if options.backend in CODERS:
        captured.graph.context.coder = registry.load(CODERS[options.backend])
    if options.backend in STAND_INS:
        captured.graph.context.stand_ins = registry.load(STAND_INS[options.backend])()
    assign_blocks(captured.graph, model, options.blocks)
    options.rules.assign(captured.graph)
    return captured


def _lower(part: Partition, options: Options) -> Sequence[Run]:
    """The stages as callables; by eager, with the reason in the report, where the backend cannot and it is allowed."""
    try:
        return registry.find("backend", options.backend)(part)  # type: ignore[no-any-return]
    except BackendError as error:
        if options.fallback is None:
            raise
        taken = Taken("eager", reason=error.message)
        part.coverage = {node: taken for node in part.graph.nodes if node.op == "call_function"}
        return registry.find("backend", options.fallback)(part)  # type: ignore[no-any-return]


def _expanded(graph: JointGraph, probe: Probe | None) -> JointGraph:
    """The graph at the ATen level, with sizes that depend on data known at those of the example."""
    expanded = expand(graph)
    if probe is not None:
        observe_sizes(expanded, probe)
    return expanded


def _saved_by_backpropagation(graph: JointGraph, probe: Probe | None) -> int:
    """Bytes that the exact backward of a differentiated graph would save: what a relative budget is a fraction of."""
    expanded = _expanded(graph.copy(), probe)
    for name in CLEANUP:
        expanded = textform.build("pass", name).run(expanded).graph
    return partition(expanded).saved_bytes


def _wants_gradient(spec: Any, inputs: Inputs) -> bool:
    if not isinstance(spec, UserInput):
        return False
    leaves = torch.utils._pytree.tree_leaves((inputs.args, inputs.kwargs))
    return isinstance(leaves[spec.index], torch.Tensor) and leaves[spec.index].requires_grad


class _Pipeline:
    """Runs pass managers with the between-pass callbacks of the options, and keeps one history."""

    def __init__(self, options: Options, probe: Probe | None, kind: Kind) -> None:
        self.history: list[PassRecord] = []
        self._probe = probe
        self._observers = observe.active()
        self._callbacks: list[Callback] = []
        if options.verify != "off":
            self._callbacks.append(_Verifier(recompute=options.verify == "numeric"))
        self._numeric = NumericCheck(probe) if options.verify == "numeric" and probe is not None else None
        if self._numeric is not None:
            self._callbacks.append(self._numeric)
        self._callbacks += options.callbacks
        self._verifies = bool(self._callbacks)
        self._callbacks += self._observers
        for observer in self._observers:
            observer.begin(kind)

    def run(self, passes: Sequence[Pass], graph: JointGraph, rule_key: int = NO_RULE) -> JointGraph:
        graph.current_rule = rule_key
        return PassManager(passes, self._callbacks, self.history).run(graph)

    def expand(self, graph: JointGraph) -> JointGraph:
        started = time.perf_counter()
        expanded = _expanded(graph, self._probe)
        self.history.append(
            PassRecord(
                "expand", "aten", time.perf_counter() - started, True, len(graph.graph.nodes), len(expanded.graph.nodes)
            )
        )
        if self._verifies:
            verify(expanded, recompute=False)
        if self._numeric is not None:
            self._numeric.compare(graph, expanded, "expand")
        self.stage("expand", expanded)
        return expanded

    def stage(self, name: str, graph: JointGraph) -> None:
        for observer in self._observers:
            observer.stage(name, graph)

    def finish(self, program: Program) -> None:
        for observer in self._observers:
            observer.finish(program)


@dataclass(frozen=True)
class _Verifier:
    recompute: bool

    def __call__(self, event: PassEvent) -> None:
        # what a pass says of itself is not believed
        verify(event.graph, recompute=self.recompute)


class NumericCheck:
    """A between-pass callback: passes that promise to preserve numerics are held to it, bitwise."""

    wants_before = True

    def __init__(self, probe: Probe) -> None:
        self._probe = probe

    def __call__(self, event: PassEvent) -> None:
        """Compare the graphs before and after a preserving pass."""
        if event.ran.preserves_numerics and event.modified and event.before is not None:
            self.compare(event.before, event.graph, str(event.ran))

    def compare(self, before: JointGraph, after: JointGraph, what: str) -> None:
        """Run both on the same values and compare all results bitwise."""
        left, right = self._results(before), self._results(after)
        for spec, value in left.items():
            if spec not in right:
                raise VerifyError(f"{what} promised to preserve numerics but dropped {spec}")
            if isinstance(value, torch.Tensor) and not _bitwise(value, right[spec]):
                raise VerifyError(f"{what} promised to preserve numerics but changed {spec}")

    def _results(self, graph: JointGraph) -> dict[Any, Any]:
        values = self._probe(graph)
        with torch.random.fork_rng(enabled=has_random(graph)):
            torch.manual_seed(0)
            return dict(zip(graph.outputs, interpret(graph, values), strict=True))


def _bitwise(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
