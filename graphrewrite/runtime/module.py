"""`CompiledModule`: the user's model, trained by another rule."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphrewrite.capture.structure import take_apart
from graphrewrite.compiler import Kind, Options, build_program
from graphrewrite.errors import GraphRewriteError, RuleError
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import (
    Buffer,
    BufferUpdate,
    Constant,
    Counter,
    InputSpec,
    InputUpdate,
    Loss,
    LossTerm,
    Param,
    ParameterUpdate,
    State,
    StateUpdate,
    Tangent,
    Target,
    UserInput,
    UserOutput,
    hint,
    value,
)
from graphrewrite.inputs import Inputs, as_inputs, as_targets
from graphrewrite.runtime.chunked import run_joint, run_mean
from graphrewrite.runtime.predictor import Predictor
from graphrewrite.runtime.program import Program
from graphrewrite.runtime.signature import Call, ModelWatch, flatten_call
from graphrewrite.runtime.state import RuleState
from graphrewrite.runtime.stateful import StatefulModule
from graphrewrite.runtime.step_blocks import BeforeUpdate, Factory, Optimizer, Optimizers, step_blocks
from graphrewrite.runtime.two_stage import WeightQueue
from graphrewrite.runtime.unoptimized import UntrainedStateWatch
from graphrewrite.runtime.views import LossModule, NoBackward
from graphrewrite.runtime.zeroth_order import zo_step

if TYPE_CHECKING:
    from graphrewrite.report.summary import Report
    from graphrewrite.runtime.alignment import Alignment

MAX_CAPTURES = 16

_CAPTURING = threading.RLock()
"""Capture replaces functions of torch while it runs: in one thread at a time, whichever model it is of."""


class CompiledModule(StatefulModule):
    """What `graphrewrite.compile` returns. Trains with any `torch.optim` optimizer.

    Calling it is calling the user's model: same outputs, in every mode. `loss(x, y)` works for every rule.

    Attributes:
        module: The user's model, never modified by compilation.
        losses: Detached `{block: value}` of the last training step, and `"task"`.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__()
        self.module = model
        self.training = model.training
        self._graphrewrite = RuleState(model.training)
        self._options = options
        self._step = 0
        self._calls = 0
        self._rank: int | None = None
        self.losses: dict[str, torch.Tensor] = {}
        self._warned: set[str] = set()
        learns = any(rule.learns_state for rule in options.rules.rules)
        self._untrained = UntrainedStateWatch() if learns else None
        self._block_optimizers: tuple[Factory, dict[str, Optimizer]] | None = None
        self._reset()
        self.name_entries_as_the_model_does()

    def _reset(self) -> None:
        """Drop what is derived from the model: programs and name look-ups."""
        self._programs: dict[Any, list[Program]] = {}
        self._watch = ModelWatch(self.module)
        self._latest: dict[str, Program] = {}
        self._captures: dict[str, int] = {}
        self._hooks: dict[str, int] = {}
        self._example: Inputs | None = None
        self._settled: dict[str, int] = {}
        self._weights = WeightQueue() if self._options.split_backward else None

    # --- calling ---------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own outputs. In training, their backward is the rule's."""
        self._warn_about_forward()
        if not self._records_gradient():
            self.settle()
            return self.module(*args, **kwargs)
        blocked = [rule for rule in self._options.rules.rules[: self._rule_count()] if rule.needs_loss]
        if blocked:
            return self._forward_without_backward(blocked[0].name, args, kwargs)
        inputs = Inputs(*args, **kwargs)
        self._scheduled_feedback(inputs)
        if self._options.chunk is not None:
            self._before_training()
            return run_joint(self, inputs, self._options.chunk)
        program, call = self.program_for("forward", inputs, None)
        results = self._run(program, call)
        values = {s.index: v for s, v in results.items() if isinstance(s, UserOutput)}
        self._write_back(program, results, call)
        return program.captured.rebuild([values[i] for i in range(len(values))])

    def loss(self, x: Any, y: Any) -> torch.Tensor:
        """The rule's loss on inputs `x` and targets `y`; its `.backward()` leaves the rule's gradients in `.grad`.

        For rules with a global objective this is the task loss, for rules with local objectives the sum over blocks
        of their losses. In `eval()` or under `no_grad` the same number, without a gradient.

        Args:
            x: A tensor, a tuple (`model(*x)`), a dict (`model(**x)`) or `Inputs`.
            y: Whatever the loss takes as targets.
        """
        inputs, targets = as_inputs(x), as_targets(y)
        trains = self._records_gradient()
        if not trains:
            self.settle()
        if not trains and not self._has_local_objective() and not self._changes_forward():
            with torch.no_grad():
                loss = self.task_loss(self.module(*inputs.args, **inputs.kwargs), targets)
            self.losses = {"task": loss}
            return loss
        if trains and self._options.chunk is not None:
            return self._loss_in_chunks(inputs, targets, self._options.chunk)
        if trains:
            self._scheduled_feedback(inputs)
        program, call = self.program_for("loss" if trains else "evaluate", inputs, targets)
        program.check_labels(call.targets)
        results = self._run(program, call) if trains else self._run_forward(program, call)
        self._write_back(program, results, call)
        self.losses = {s.name: v.detach() for s, v in results.items() if isinstance(s, LossTerm)}
        return results[Loss()]  # type: ignore[no-any-return]

    def _loss_in_chunks(self, inputs: Inputs, targets: Any, count: int) -> torch.Tensor:
        if self._options.chunk_loss == "mean":
            self._scheduled_feedback(inputs)
            self._before_training()
            loss, terms = run_mean(self, inputs, targets, count)
            self.losses = terms
            return loss
        loss = self.task_loss(self(*inputs.args, **inputs.kwargs), targets)
        self.losses = {"task": loss.detach()}
        return loss

    def loss_without_backward(self, inputs: Inputs, targets: Any) -> torch.Tensor:
        """The rule's loss in training mode; no gradient is recorded and no state advances."""
        program, call = self.program_for("loss", inputs, targets)
        return self._run_forward(program, call)[Loss()]  # type: ignore[no-any-return]

    def step_blocks(
        self,
        x: Any,
        y: Any,
        optimizers: Optimizers,
        *,
        greedy: str | None = None,
        before_update: BeforeUpdate | None = None,
    ) -> torch.Tensor:
        """One update-unlocked training step: every block is updated as soon as its own gradient exists.

        The gradient of one block at a time is alive. The parameters end up as after `loss(x, y).backward()` and an
        optimizer step, for every rule whose certificate says that no update is locked; hooks on gradients do not run.

        Args:
            x: As for `loss`.
            y: As for `loss`.
            optimizers: `{block: optimizer}`, a list or one optimizer; every parameter is updated by the one that holds
                it. Or a function from a list of parameters to an optimizer: one is made per block, at the first call
                with this function, and kept (`block_optimizers()`).
            greedy: Train this block only: what lies behind it does not run, what lies before it runs forward.
            before_update: Called with a block's name and parameters when they hold their gradients: for clipping.

        Returns:
            The loss, detached; with `greedy`, that of the block.

        Raises:
            RuleError: A block's update waits for blocks behind it.
        """
        self._refuse_chunks("step_blocks")
        return step_blocks(self, x, y, optimizers, greedy, before_update)

    def zo_step(self, x: Any, y: Any, lr: float, weight_decay: float = 0.0) -> torch.Tensor:
        """One step of `zeroth_order` that updates the parameters in place, at the memory of inference.

        The update is that of `loss(x, y).backward()` and SGD with this learning rate, up to rounding: the same
        directions, but no gradient is ever held. Biases and normalisation weights do not decay. In a distributed run
        each rank draws directions of its own, ranks exchange the differences of losses, and all move along all
        directions: weights that are equal at the start stay equal. With `shared=true` there are the same directions on
        all ranks, and the mean of their losses.

        Args:
            x: As for `loss`.
            y: As for `loss`.
            lr: Learning rate.
            weight_decay: Multiplies the weights with two dimensions or more, as in SGD.

        Returns:
            The mean of the losses that were compared.
        """
        self._refuse_chunks("zo_step")
        return zo_step(self, x, y, lr, weight_decay)

    def block_optimizers(self) -> dict[str, Optimizer]:
        """The optimizers that `step_blocks` made of a function, by block: for schedulers and checkpoints."""
        return dict(self._block_optimizers[1]) if self._block_optimizers else {}

    def predict(self, x: Any) -> Any:
        """What the trained network computes: the rule's own forward and read-out; the model's outputs otherwise.

        No gradient is recorded. As everywhere in torch, call `eval()` first if dropout is to be off.
        """
        self.settle()
        inputs = as_inputs(x)
        with torch.no_grad():
            if not self._changes_forward():
                return self.module(*inputs.args, **inputs.kwargs)
            program, call = self.program_for("predict", inputs, None)
            results = self._run_forward(program, call)
        values = {s.index: v for s, v in results.items() if isinstance(s, UserOutput)}
        return program.captured.rebuild([values[i] for i in range(len(values))])

    def predictor(self) -> nn.Module:
        """A plain, exportable module that computes `predict`, on the same parameters.

        For rules that leave the model's forward alone this is the user's model itself.

        Raises:
            RuleError: The rule has a forward of its own and nothing was captured yet.
        """
        if not self._changes_forward():
            return self.module
        if self._example is None:
            raise RuleError(
                "the predictor of a rule with a forward of its own needs a captured input",
                remedy="call predict(x), loss(x, y) or materialize(x, y) first",
            )
        inputs = Inputs(*self._example.args, **self._example.kwargs)
        with torch.no_grad():
            program, call = self.program_for("predict", inputs, None)
        return Predictor(program, self.fetch(program, call))

    def loss_module(self) -> nn.Module:
        """A view whose `forward(x, y)` is `loss(x, y)`: what DDP, `fully_shard` and Lightning wrap."""
        return LossModule(self)

    def materialize(self, x: Any, y: Any = None) -> CompiledModule:
        """Capture for these inputs now, and create the rule's state; what `example_inputs` does at compile time."""
        kind: Kind = "forward" if y is None else "loss"
        if y is None and any(rule.needs_loss for rule in self._options.rules.rules[: self._rule_count()]):
            raise RuleError(
                f"rule {self._options.rules} needs targets to be materialised", remedy="give example_targets as well"
            )
        with torch.enable_grad():
            self.program_for(kind, as_inputs(x), as_targets(y))
        return self

    def feedback_phase(self, x: Any = None, times: int = 1) -> None:
        """Let the rule's feedback weights learn, apart from the model: the mirror phase of `weight_mirror`.

        Torch's random generators are not touched, and the model is not, but by `foton`, which orthonormalises its
        weights in the phase. Rules with a schedule run it by themselves at the start of a training call; this runs it
        at once.

        Args:
            x: Inputs as for `loss`; None: the sizes of the inputs that were captured last.
            times: How often.
        """
        if not any(rule.trains_feedback for rule in self._options.rules.rules):
            raise RuleError(
                f"rule {self._options.rules} has no feedback phase",
                remedy="weight_mirror and foton have one; other feedback weights are fixed or learn in the step",
            )
        if x is None and self._example is None:
            raise RuleError("nothing is captured yet", remedy="give feedback_phase the inputs of a batch")
        inputs = _filled(self._example) if x is None else as_inputs(x)
        with torch.no_grad():
            for _ in range(times):
                program, call = self.program_for("feedback", inputs, None)
                results = self._run_forward(program, call)
                self._step += 1
                for spec, result in results.items():
                    if isinstance(spec, ParameterUpdate):
                        held, name = self._watch.slot(spec.name)
                        held[name].copy_(result)
                        self._settled[spec.name] = held[name]._version
                    else:
                        # steps that are waiting for their backward keep the feedback weights they were started with
                        self._graphrewrite.rebind(spec.name, result)

    def _scheduled_feedback(self, inputs: Inputs) -> None:
        intervals = [rule.feedback_interval for rule in self._options.rules.rules if rule.feedback_interval]
        if intervals and self._calls % min(intervals) == 0 and not self._is_settled():
            self.feedback_phase(inputs)
        self._calls += 1

    def _is_settled(self) -> bool:
        """Whether a phase has written parameters, and nobody has changed one of them since."""
        return bool(self._settled) and all(
            held[name]._version == version
            for held, name, version in ((*self._watch.slot(n), v) for n, v in self._settled.items())
        )

    def settle(self) -> None:
        """What a rule does to parameters after the optimizer step, if there was one since the last call."""
        if self._settled and not self._is_settled():
            self.feedback_phase()

    # --- the second stage of a split backward ------------------------------------------------------------------------

    def backward_weight(self, n: int | None = None, concat: bool = False) -> None:
        """Compute the weight gradients of the oldest pending micro-batches and add them into `.grad`.

        Each `.backward()` of a module compiled with `split_backward=True` leaves one micro-batch. Call this before
        gradients are clipped or unscaled, and before the optimizer steps.

        Args:
            n: How many micro-batches; None: all.
            concat: Compute them as one: the weight gradient of a linear map is one larger product over the samples of
                all of them, which changes the order of sums. The micro-batches reach `.grad` as one gradient.

        Raises:
            RuleError: Fewer are pending, or something that they read was changed in the meantime.
        """
        self._second_stage("backward_weight").run_oldest(n, concat)

    def weight_task(self) -> Callable[[], None]:
        """A function that computes the weight gradients of the newest pending micro-batch.

        This is what `torch.distributed.pipelining.PipelineStage` takes as `dw_builder`.
        """
        queue = self._second_stage("weight_task")
        if not queue.pending and not any(p.requires_grad for p in self.module.parameters()):
            return lambda: None
        return queue.take_newest()

    def discard_pending(self) -> None:
        """Give up the weight gradients of all pending micro-batches."""
        self._second_stage("discard_pending").discard()

    def gradients_of(
        self, loss: torch.Tensor, parameters: Mapping[str, nn.Parameter]
    ) -> dict[str, torch.Tensor | None]:
        """Gradients of a loss by name, like `torch.autograd.grad`, through both stages of a split backward."""
        wanted = list(parameters.values())
        if self._weights is None:
            found = torch.autograd.grad(loss, wanted, allow_unused=True)
            return dict(zip(parameters, found, strict=True))
        before = [p.grad for p in wanted]
        for p in wanted:
            p.grad = None
        try:
            torch.autograd.backward(loss, inputs=[*wanted, self._weights.anchor])
            self._weights.take_newest()()
            return {name: p.grad for name, p in parameters.items()}
        finally:
            for p, grad in zip(wanted, before, strict=True):
                p.grad = grad

    @property
    def pending(self) -> int:
        """How many micro-batches wait for `backward_weight()`."""
        return 0 if self._weights is None else len(self._weights.pending)

    def _second_stage(self, what: str) -> WeightQueue:
        if self._weights is None:
            raise RuleError(f"{what}() belongs to a backward in two stages", remedy="compile with split_backward=True")
        return self._weights

    # --- programs --------------------------------------------------------------------------------------------------

    def _records_gradient(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def _rule_count(self) -> int:
        """How many rules can be in use: the implicit bp at the end of a map counts only behind others."""
        return len(self._options.rules.rules)

    def _has_local_objective(self) -> bool:
        return any(rule.objective == "local" for rule in self._options.rules.rules)

    def _changes_forward(self) -> bool:
        return any(rule.changes_forward for rule in self._options.rules.rules)

    def program_for(self, kind: Kind, inputs: Inputs, targets: Any) -> tuple[Program, Call]:
        """The program that fits a call, captured if there is none yet, and the call's flat inputs."""
        call = flatten_call(kind, inputs, targets, self._options.dynamic, self._watch.key())
        program = self._known_program(kind, call)
        if program is not None:
            return program, call
        with _CAPTURING:
            # another thread may have captured it while this one waited
            program = self._known_program(kind, call)
            if program is not None:
                return program, call
            self._warn_about_hooks()
            known = self._programs.setdefault(call.key, [])
            program = build_program(
                self.module, self._options, kind, inputs, targets, lambda graph: self._probe(graph, call)
            )
            self._create_state(program.operator)
            self._note_capture(kind, known, program)
            known.insert(0, program)
            del known[MAX_CAPTURES:]
            self._latest[kind] = program
            self._example = _outline(inputs)
            self._watch.refresh()
        return program, call

    def _known_program(self, kind: Kind, call: Call) -> Program | None:
        for program in self._programs.get(call.key, ()):
            if program.guards(call.leaves, call.targets):
                self._latest[kind] = program
                return program
        return None

    def _warn_about_hooks(self) -> None:
        hooks = self._watch.hooks()
        added = [path or "(root)" for path, n in hooks.items() if n > self._hooks.get(path, 0)]
        if added and self._programs:
            warnings.warn(
                f"hooks were added after capture to: {', '.join(added)}. The model is captured again with what they "
                "compute; what they do beside (printing, storing) happens during capture only",
                stacklevel=6,
            )
        self._hooks = hooks

    def _note_capture(self, kind: str, known: list[Program], program: Program) -> None:
        count = self._captures[kind] = self._captures.get(kind, 0) + 1
        if count != MAX_CAPTURES + 1:
            return
        common = set(program.guard_text).intersection(*(p.guard_text for p in known))
        changing = sorted(set(program.guard_text) - common)
        warnings.warn(
            f"graphrewrite captured this model {count} times; what keeps changing: "
            f"{'; '.join(changing) or 'the input signature (dtypes, sizes 0 and 1, training flags)'}",
            stacklevel=5,
        )

    def _create_state(self, graph: JointGraph) -> None:
        self._graphrewrite.create(graph.state_inits, self._options.seed)

    def fetch(self, program: Program, call: Call | None) -> Callable[[InputSpec], Any]:
        """Values of a program's inputs; without a call, of those that are no inputs of the model."""
        constants = program.partition.graph.constants

        def fetch(spec: InputSpec) -> Any:
            if isinstance(spec, (Param, Buffer)):
                held, name = self._watch.slot(spec.name)
                return held[name]
            if isinstance(spec, UserInput) and call is not None:
                return call.leaves[spec.index]
            if isinstance(spec, Target) and call is not None:
                return call.targets[spec.index]
            if isinstance(spec, Constant):
                return constants[spec.name]
            if isinstance(spec, State):
                found = self._graphrewrite.find(spec.name)
                assert found is not None, spec
                return found
            if isinstance(spec, Counter):
                return self._counter()
            raise GraphRewriteError(f"nothing can be fed to {spec}")

        return fetch

    def _counter(self) -> torch.Tensor:
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        return torch.tensor([self._options.seed, self._step, self._rank_or_zero()], dtype=torch.int64, device=device)

    def next_counter(self, program: Program) -> torch.Tensor:
        """Seed, step and rank of the next training call's random numbers."""
        found = self._counter()
        if program.uses_counter:
            self._step += 1
        return found

    def _rank_or_zero(self) -> int:
        if self._rank is not None:
            return self._rank
        distributed = torch.distributed
        return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0

    def _run(self, program: Program, call: Call) -> dict[Any, Any]:
        self._before_training()
        owner = weakref.ref(self)

        def on_backward(spec: Any, result: Any) -> None:
            compiled = owner()
            if compiled is not None and isinstance(spec, StateUpdate):
                compiled._update_state(spec.name, result)

        values = program(self.fetch(program, call), on_backward, self._weights)
        if program.uses_counter:
            self._step += 1
        return {spec: values[i] for spec, i in program.partition.forward_outputs.items()}

    def _before_training(self) -> None:
        if self._untrained is not None:
            self._untrained.before_training(self.module, self._graphrewrite, str(self._options.rules))

    def _refuse_chunks(self, what: str) -> None:
        if self._options.chunk is not None:
            raise RuleError(f"{what} runs the whole batch, not chunk={self._options.chunk} parts", remedy="use loss()")

    def _run_forward(self, program: Program, call: Call) -> dict[Any, Any]:
        fetch = self.fetch(program, call)
        values = program.run_forward([fetch(spec) for spec in program.partition.forward_inputs])
        return {spec: values[i] for spec, i in program.partition.forward_outputs.items()}

    def _write_back(self, program: Program, results: dict[Any, Any], call: Call) -> None:
        with torch.no_grad():
            for spec, result in results.items():
                if isinstance(spec, BufferUpdate):
                    held, name = self._watch.slot(spec.name)
                    held[name].copy_(result)
                elif isinstance(spec, InputUpdate):
                    call.leaves[spec.index].copy_(result)
                elif isinstance(spec, StateUpdate):
                    self._update_state(spec.name, result)

    def _update_state(self, name: str, result: torch.Tensor) -> None:
        state = self._graphrewrite.find(name)
        assert state is not None, name
        with torch.no_grad():
            state.copy_(result)

    def _probe(self, graph: JointGraph, call: Call) -> list[Any]:
        """Example values of a graph's inputs, for numeric verification and passes that measure.

        The rule state is not created by it. Cotangents of outputs are drawn: equal ones would hide what cancels.
        """
        draw = torch.Generator().manual_seed(0)
        scratch = RuleState()
        scratch.create(graph.state_inits, self._options.seed)
        values: list[Any] = []
        for spec, node in graph.inputs.items():
            if isinstance(spec, Tangent):
                like = value(node)
                sizes = [hint(size) for size in like.shape]
                drawn = torch.randn(sizes, generator=draw) if sizes else torch.ones(())
                values.append(drawn.to(like.device, like.dtype))
            elif isinstance(spec, State):
                values.append(scratch.find(spec.name))
            elif isinstance(spec, Constant):
                values.append(graph.constants[spec.name])
            elif isinstance(spec, (UserInput, Target)):
                values.append((call.leaves if isinstance(spec, UserInput) else call.targets)[spec.index])
            elif isinstance(spec, Counter):
                values.append(self._counter())
            else:
                held, name = self._watch.slot(spec.name)
                values.append(held[name])
        return [v.detach().clone() if isinstance(v, torch.Tensor) else v for v in values]

    def run_forward(self, kind: Kind, inputs: Inputs) -> dict[Any, Any]:
        """Run a program without targets and without a backward; its results by output specification."""
        program, call = self.program_for(kind, inputs, None)
        return self._run_forward(program, call)

    @property
    def rules(self) -> str:
        """Text form of the rule, or of the map of rules."""
        return str(self._options.rules)

    # --- training through compiled(x) where the rule cannot ----------------------------------------------------------

    def _forward_without_backward(self, rule: str, args: Any, kwargs: Any) -> Any:
        with torch.no_grad():
            outputs = self.module(*args, **kwargs)
        tensors, structure = take_apart(outputs)
        anchor = next((p for p in self.module.parameters() if p.requires_grad), None)
        if anchor is None:
            return outputs
        blocked: Callable[..., torch.Tensor] = NoBackward.apply
        return structure.rebuild(
            [blocked(rule, anchor, t) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in tensors]
        )

    def _warn_about_forward(self) -> None:
        if not self.training and self._step > 0 and self._changes_forward() and "forward" not in self._warned:
            self._warned.add("forward")
            warnings.warn(
                f"{self._options.rules} trains another forward than the model's own: compiled(x) is not what was "
                "trained, compiled.predict(x) is",
                stacklevel=3,
            )

    # --- looking at it ---------------------------------------------------------------------------------------------

    def graph(self, level: str = "operator") -> JointGraph:
        """The graph of the most recent program.

        Args:
            level: `"forward"`: as captured; `"operator"`: after the rule; `"aten"`: after all passes; `"backward"` and
                `"backward_weight"`: a stage of the latter, as a graph of its own.
        """
        program = self.program()
        if level == "forward":
            return program.captured.graph
        if level == "operator":
            return program.operator
        if level == "aten":
            return program.partition.graph
        if level in ("backward", "backward_weight"):
            from graphrewrite.graph.stages import stage_graph

            return stage_graph(program.partition, level)
        raise GraphRewriteError(
            f"level {level!r} is unknown", remedy="use 'forward', 'operator', 'aten', 'backward' or 'backward_weight'"
        )

    def report(self) -> Report:
        """Passes, saved values, certificates and backend coverage of the most recent program; prints well."""
        from graphrewrite.report.summary import summarise

        return summarise(self.program(), str(self._options.rules), self._options.backend)

    def alignment(self, x: Any, y: Any) -> Alignment:
        """Per-parameter cosine and norm ratio of the rule's gradient to backpropagation's, on one batch.

        Nothing is changed by the measurement: not `.grad`, buffers, rule state nor random generators.
        """
        from graphrewrite.runtime.alignment import measure

        return measure(self, x, y)

    def task_loss(self, outputs: Any, targets: Any) -> torch.Tensor:
        """The user's loss on outputs of the model."""
        return self._options.loss(outputs, targets)

    # --- copying ---------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        derived_names = ("_programs", "_watch", "_latest", "_captures", "_hooks", "_example")
        for derived in (*derived_names, "_settled", "_weights"):
            state.pop(derived, None)
        state["losses"] = dict(self.losses)
        state["_block_optimizers"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._reset()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name.startswith("_") or "module" not in self.__dict__.get("_modules", {}):
                raise
            raise AttributeError(
                f"{type(self).__name__} has no attribute {name!r}; the user's model is `compiled.module`"
            ) from error

    def _repr_html_(self) -> str:
        """The interactive page of the most recent program's graphs, for notebooks; text before there is one."""
        from graphrewrite.report.explorer import compiled_frame

        return compiled_frame(self)

    def extra_repr(self) -> str:
        """The rule and the backend."""
        return f"rule={self._options.rules}, backend={self._options.backend}"


def _outline(inputs: Inputs) -> Inputs:
    """Zeros of the same shapes, dtypes and devices, taking no memory: enough to capture for them again."""

    def empty(leaf: Any) -> Any:
        return leaf.detach().new_zeros(()).expand(leaf.shape) if isinstance(leaf, torch.Tensor) else leaf

    args, kwargs = pytree.tree_map(empty, (inputs.args, inputs.kwargs))
    return Inputs(*args, **kwargs)


def _filled(outline: Inputs | None) -> Inputs:
    """Zeros with memory of their own: strides are part of the signature."""
    assert outline is not None
    return Inputs(*pytree.tree_map(_contiguous, outline.args), **pytree.tree_map(_contiguous, outline.kwargs))


def _contiguous(leaf: Any) -> Any:
    return leaf.contiguous() if isinstance(leaf, torch.Tensor) else leaf
