"""Rules without a global backward in a pipeline: stages exchange activations, and no stage waits for a cotangent.

Both pipelines run on the engine: a schedule without a loss sends activations onward and nothing back. A stage that has
a loss of its own learns while the activation that it has sent is on its way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from graphrewrite.backends.distributed.cut import Cut
from graphrewrite.backends.distributed.failures import naming_lost_processes
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from graphrewrite._compat import forward_schedule
from graphrewrite.api import compile as compile_model
from graphrewrite.errors import RuleError
from graphrewrite.objective import default_loss
from graphrewrite.rule import RuleSpec

Loss = Callable[[Any, Any], torch.Tensor]


class _LocalStage(nn.Module):
    """A stage with a head of its own: it hands its detached activation on, then learns."""

    def __init__(self, body: nn.Module, head: nn.Module | None, rule: RuleSpec, loss: Loss, share: float) -> None:
        super().__init__()
        self.body = compile_model(body, rule, blocks="layers", dynamic=None).train()
        self.head = head
        self._loss = loss
        self._share = share
        self._pending: deque[torch.Tensor] = deque()
        self.losses: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The stage's activation."""
        with torch.enable_grad():
            out = self.body(x.detach())
            scores = out if self.head is None else self.head(out)
            self._pending.append(self._loss(scores, targets))
        return out.detach()  # type: ignore[no-any-return]

    def reset(self) -> None:
        """Forget the step before, which may not have ended."""
        self._pending.clear()
        self.losses.clear()

    def learn(self, _micro_batch: int) -> None:
        """The gradients of the oldest micro-batch that was handed on."""
        loss = self._pending.popleft()
        (loss * self._share).backward()
        self.losses.append(loss.detach())


class _ForwardPipeline:
    """What both pipelines share: one stage per process, and the engine's forward schedule."""

    def __init__(
        self, made: Cut, micro_batches: int, device: torch.device | str, group: dist.ProcessGroup | None
    ) -> None:
        self._rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        if len(made) != ranks:
            raise RuleError(f"one stage per process: {ranks}, not {len(made)}", remedy=f"cut the model into {ranks}")
        if made.tied:
            raise RuleError(
                f"parameter {next(iter(made.tied))} is tied across stages that learn apart", remedy="untie it"
            )
        self._made, self._group, self._micro_batches = made, group, micro_batches
        self._device = torch.device(device)
        self.part = made.parts[self._rank]
        self.is_first, self.is_last = self._rank == 0, self._rank == ranks - 1

    def _stage(self, module: nn.Module) -> PipelineStage:
        outlines = [
            tuple(t.detach() for t in outline) for outline in (self.part.inputs, self.part.outputs)
        ]  # nothing that is handed on wants a gradient
        return PipelineStage(
            module,
            self._rank,
            len(self._made),
            self._device,
            input_args=outlines[0],
            output_args=outlines[1],
            group=self._group,
        )

    def _run(self, schedule: Any, x: Any, **others: Any) -> None:
        size = self._made.parts[0].inputs[0].shape[0]
        for given in (*([x] if self.is_first else []), *others.values()):
            if len(given) != size * self._micro_batches:
                raise RuleError(f"a batch of {len(given)} is not {self._micro_batches} micro-batches of {size}")
        with naming_lost_processes(self._group):
            schedule.step(*([x] if self.is_first else []), return_outputs=False, **others)


class LocalPipeline(_ForwardPipeline):
    """Stages that each learn from a head of their own.

    A stage sends the activation of a micro-batch, then computes its gradients; its activations die with it, so that
    memory does not grow with the number of micro-batches. Process k starts k forwards late, and then never waits.

    Attributes:
        module: This process's stage, with `body` and `head`.
    """

    def __init__(
        self,
        made: Cut,
        head: Callable[[Any], nn.Module],
        micro_batches: int = 8,
        *,
        loss: Loss | None = None,
        rule: RuleSpec = "bp",
        device: torch.device | str = "cpu",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Compile this process's stage.

        Args:
            made: The cut model, one stage per process.
            head: Makes the head of a stage from an outline of its activation; the last stage needs none.
            micro_batches: How many a batch is split into.
            loss: As for `compile`; a mean over samples.
            rule: How the layers inside a stage learn from its head.
            device: Where this process computes.
            group: The pipeline's process group.
        """
        super().__init__(made, micro_batches, device, group)
        own = None if self.is_last else head(self.part.outputs[0]).to(self._device)
        self.module = _LocalStage(self.part.module.to(self._device), own, rule, loss or default_loss, 1 / micro_batches)
        self.schedule = forward_schedule(self._stage(self.module), micro_batches, self.module.learn)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of this process's stage and head."""
        return self.module.parameters()

    def step(self, x: Any, y: torch.Tensor) -> torch.Tensor:
        """Forward of one batch; the gradient of the mean over micro-batches is added into `.grad`.

        Args:
            x: The inputs; needed by the first process.
            y: The targets; needed by all.

        Returns:
            The stage's own loss.
        """
        self.module.reset()
        self._run(self.schedule, x, targets=y)
        return torch.stack(self.module.losses).mean()


class _Recorded(nn.Module):
    """A stage that keeps its outputs until the error is there."""

    def __init__(self, body: nn.Module, rule: RuleSpec) -> None:
        super().__init__()
        self.body = compile_model(body, rule, blocks="layers", dynamic=None).train()
        self.outputs: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The stage's activation."""
        with torch.enable_grad():
            out = self.body(x.detach())
        self.outputs.append(out)
        return out.detach()  # type: ignore[no-any-return]


class DFAPipeline(_ForwardPipeline):
    """Direct feedback alignment between stages: the output error is broadcast, then all stages learn at once.

    A stage's activation gets the cotangent e B, where e is the error at the model's output and B a fixed random matrix
    of the stage (Nokland 2016). Nothing is sent back from stage to stage.

    Attributes:
        module: This process's stage.
        feedback: Its B, of classes x activations; None for the last stage, which learns from the error itself.
    """

    def __init__(
        self,
        made: Cut,
        micro_batches: int = 8,
        *,
        loss: Loss | None = None,
        rule: RuleSpec = "bp",
        seed: int = 0,
        device: torch.device | str = "cpu",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Compile this process's stage.

        Args:
            made: The cut model, one stage per process; it returns scores with the samples first, the classes last.
            micro_batches: How many a batch is split into.
            loss: As for `compile`; a mean over samples.
            rule: How the layers inside a stage learn from its activation's cotangent.
            seed: Of the feedback.
            device: Where this process computes.
            group: The pipeline's process group.
        """
        super().__init__(made, micro_batches, device, group)
        self.module = _Recorded(self.part.module.to(self._device), rule)
        self._loss = loss or default_loss
        scores = made.parts[-1].outputs[0]
        self._error = (micro_batches, *scores.shape)
        self._error_dtype = scores.dtype
        self.feedback: torch.Tensor | None = None
        if not self.is_last:
            out = self.part.outputs[0]
            rows, columns = scores.shape[1:].numel(), out.shape[1:].numel()
            generator = torch.Generator().manual_seed(seed + self._rank)
            drawn = torch.randn(rows, columns, generator=generator, dtype=out.dtype) / rows**0.5
            self.feedback = drawn.to(self._device)
        self.schedule = ScheduleGPipe(self._stage(self.module), micro_batches, scale_grads=False)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of this process's stage."""
        return self.module.parameters()

    def step(self, x: Any = None, y: torch.Tensor | None = None) -> torch.Tensor | None:
        """Forward, broadcast of the error, backward of all stages; gradients are added into `.grad`.

        Args:
            x: The inputs; needed by the first process.
            y: The targets; needed by the last one.

        Returns:
            The loss, in the last process.
        """
        outputs = self.module.outputs
        outputs.clear()
        self._run(self.schedule, x)
        loss = None
        errors = torch.empty(self._error, dtype=self._error_dtype, device=self._device)
        if self.is_last:
            if y is None:
                raise RuleError("the process of the last stage needs the targets")
            leaves = [out.detach().requires_grad_() for out in outputs]
            each = [self._loss(leaf, target) for leaf, target in zip(leaves, y.chunk(self._micro_batches), strict=True)]
            loss = torch.stack(each).mean()
            errors = torch.stack(torch.autograd.grad(loss, leaves))
            loss = loss.detach()
        with naming_lost_processes(self._group):
            dist.broadcast(errors, group=self._group, group_src=len(self._made) - 1)
        for out, error in zip(outputs, errors, strict=True):
            signal = error if self.feedback is None else (error.flatten(1) @ self.feedback).view_as(out)
            out.backward(signal)
        outputs.clear()
        return loss
