"""A model in pipeline stages, under the schedules of `torch.distributed.pipelining`.

No scheduler of our own runs the training: the engine's schedules call compiled stages, whose weight gradients wait for
the W actions of the zero-bubble schedules (`PipelineStage(dw_builder=)`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from graphrewrite.backends.distributed.cut import Cut, replicate_tied
from graphrewrite.backends.distributed.failures import naming_lost_processes
from graphrewrite.backends.distributed.simulate import Action
from torch import nn
from torch.distributed import pipelining
from torch.distributed.pipelining import PipelineStage

from graphrewrite._compat import custom_schedule
from graphrewrite.api import compile as compile_model
from graphrewrite.errors import RuleError
from graphrewrite.objective import default_loss
from graphrewrite.rule import RuleSpec
from graphrewrite.runtime.module import CompiledModule

SINGLE = ("GPipe", "1F1B")
"""Schedules with one stage per process."""
LOOPED = ("LoopedBFS", "Interleaved1F1B", "InterleavedZeroBubble")
"""Schedules with several stages per process: stage s runs on process s modulo their number."""
FOLDED = ("ZBVZeroBubble", "DualPipeV")
"""Schedules with two stages per process, the first of which comes back from the last process."""
SCHEDULES = (*SINGLE, *LOOPED, *FOLDED)


def stages_of_rank(schedule: str, rank: int, ranks: int, stages: int) -> list[int]:
    """The stages that a process runs.

    Raises:
        RuleError: The schedule does not run that many stages on that many processes.
    """
    if schedule not in SCHEDULES:
        raise RuleError(f"schedule {schedule!r} is unknown", remedy=f"use one of {', '.join(SCHEDULES)}")
    if schedule in FOLDED:
        if stages != 2 * ranks:
            raise RuleError(f"{schedule} runs two stages per process: {2 * ranks}, not {stages}")
        return [rank, 2 * ranks - 1 - rank]
    if schedule in SINGLE and stages != ranks:
        raise RuleError(f"{schedule} runs one stage per process: {ranks}, not {stages}")
    if stages % ranks or (schedule in LOOPED and stages == ranks and schedule != "InterleavedZeroBubble"):
        raise RuleError(f"{schedule} runs an equal number of stages per process, two or more: {stages} on {ranks}")
    return list(range(rank, stages, ranks))


def _stages_in(
    actions: Sequence[Sequence[Action]], rank: int, ranks: int, stages: int, micro_batches: int
) -> list[int]:
    """The stages of a process in a schedule given by its actions."""
    place = {a.stage for own in actions for a in own}
    counts = {a.micro_batch for own in actions for a in own}
    if len(actions) != ranks or place != set(range(stages)) or counts != set(range(micro_batches)):
        raise RuleError(
            f"the schedule has {len(place)} stages on {len(actions)} processes and {len(counts)} micro-batches, the "
            f"pipeline {stages} on {ranks} and {micro_batches}"
        )
    return sorted({a.stage for a in actions[rank]})


class Pipeline:
    """The stages of this process, compiled, and a schedule of the engine that runs them.

    Attributes:
        stages: This process's compiled stages, by index.
        schedule: The engine's schedule.
    """

    def __init__(
        self,
        made: Cut,
        schedule: str | Sequence[Sequence[Action]] = "ZBVZeroBubble",
        micro_batches: int = 8,
        *,
        loss: Callable[[Any, Any], torch.Tensor] | None = None,
        rule: RuleSpec = "bp",
        device: torch.device | str = "cpu",
        group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        """Compile the stages of this process.

        Args:
            made: The cut model; the same in all processes.
            schedule: One of `SCHEDULES`, or the actions of each process, as `optimise` makes them.
            micro_batches: How many a batch is split into.
            loss: `loss(outputs, targets)`, a mean over samples; default: cross-entropy, as for `compile`.
            rule: For every stage; it must be one that learns from the cotangent of the outputs.
            device: Where this process computes.
            group: The pipeline's process group.
            options: For `compile`.
        """
        rank, ranks, count = dist.get_rank(group), dist.get_world_size(group), len(made)
        if isinstance(schedule, str):
            self._indices = stages_of_rank(schedule, rank, ranks, count)
        else:
            self._indices = _stages_in(schedule, rank, ranks, count, micro_batches)
        self._ranks = ranks
        self._group = group
        self._cut = made
        self._micro_batches = micro_batches
        self._device = torch.device(device)
        replicate_tied(made)
        self.stages: dict[int, CompiledModule] = {}
        built = []
        for index in self._indices:
            part = made.parts[index]
            compiled = compile_model(
                part.module.to(self._device), rule, split_backward=True, dynamic=None, **{"blocks": "layers", **options}
            ).train()
            self.stages[index] = compiled
            built.append(
                PipelineStage(
                    compiled,
                    index,
                    count,
                    self._device,
                    input_args=part.inputs,
                    output_args=part.outputs,
                    group=group,
                    dw_builder=compiled.weight_task,
                )
            )
        self._loss = loss if loss is not None else default_loss
        self.schedule = self._scheduled(schedule, built)

    def _scheduled(self, schedule: str | Sequence[Sequence[Action]], built: list[PipelineStage]) -> Any:
        if not isinstance(schedule, str):
            actions = [[(a.stage, a.kind, a.micro_batch) for a in own] for own in schedule]
            return custom_schedule(built, self._micro_batches, self._share, actions)
        kind = getattr(pipelining, f"Schedule{schedule}", None)
        if kind is None:
            raise RuleError(f"this torch ({torch.__version__}) has no schedule {schedule}")
        # the engine would divide what .grad holds already, too: the loss is divided instead
        return kind(
            built[0] if schedule in SINGLE else built, self._micro_batches, loss_fn=self._share, scale_grads=False
        )

    def _share(self, outputs: Any, targets: Any) -> torch.Tensor:
        """What one micro-batch adds to the mean."""
        return self._loss(outputs, targets) / self._micro_batches

    @property
    def is_first(self) -> bool:
        """Whether this process feeds the inputs."""
        return 0 in self.stages

    @property
    def is_last(self) -> bool:
        """Whether this process computes the loss."""
        return len(self._cut) - 1 in self.stages

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of this process's stages: what its optimizer trains."""
        for compiled in self.stages.values():
            yield from compiled.parameters()

    def step(self, x: Any = None, y: Any = None) -> torch.Tensor | None:
        """Forward and backward of one batch; the gradient of the mean over micro-batches is added into `.grad`.

        Args:
            x: The model's inputs, a tensor or a tuple: needed where `is_first`.
            y: The targets: needed where `is_last`.

        Returns:
            The loss, where `is_last`.

        Raises:
            RuleError: The batch does not split into micro-batches of the size that the model was cut for.
            LostProcessError: Another process ended, or did not answer in time.
        """
        given = x if isinstance(x, tuple) else (x,)
        losses: list[torch.Tensor] = []
        if self.is_first:
            self._check(given)
        if self.is_last and y is None:
            raise RuleError("the process of the last stage needs the targets")
        args = given if self.is_first else ()
        before: dict[str, torch.Tensor | None] = {}
        for name in self._cut.tied:
            for one in self._copies(name):
                before[name], one.grad = one.grad, None
        with naming_lost_processes(self._group):
            self.schedule.step(*args, target=y if self.is_last else None, losses=losses, return_outputs=False)
            self._add_tied(before)
        return torch.stack([loss.detach() for loss in losses]).sum() if self.is_last else None

    def _check(self, given: tuple[Any, ...]) -> None:
        wanted = self._cut.parts[0].inputs
        if len(given) != len(wanted) or not all(isinstance(g, torch.Tensor) for g in given):
            raise RuleError(f"the first stage takes {len(wanted)} tensors, got {len(given)}")
        for one, outline in zip(given, wanted, strict=True):
            size = outline.shape[0]
            if tuple(one.shape) != (size * self._micro_batches, *outline.shape[1:]):
                raise RuleError(
                    f"a batch of {tuple(one.shape)} is not {self._micro_batches} micro-batches of "
                    f"{tuple(outline.shape)}, the size that the model was cut for",
                    remedy="pad or drop the rest of the batch, or cut the model for another micro-batch",
                )

    def _copies(self, name: str) -> list[nn.Parameter]:
        stages = self._cut.tied[name]
        return [self.stages[k].module.get_parameter(name) for k in stages if k in self.stages]

    def _add_tied(self, before: dict[str, torch.Tensor | None]) -> None:
        """Copies of a tied parameter all get the sum of their gradients, and so stay equal."""
        for name, stages in self._cut.tied.items():
            copies = self._copies(name)
            like = self._cut.parts[stages[0]].module.get_parameter(name)
            total = torch.zeros(like.shape, dtype=like.dtype, device=self._device)
            for one in copies:
                if one.grad is not None:
                    total += one.grad
            dist.all_reduce(total, group=self._group)
            for one in copies:
                held = before.get(name)
                one.grad = total.clone() if held is None else held + total
