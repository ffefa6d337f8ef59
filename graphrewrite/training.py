"""Training one model under several rules side by side: what `compare`, `demo` and the benchmarks share.

Every rule trains a copy of the same model on the same batches in the same order. Steps are interleaved (batch by
batch, each rule in turn, the order rotating), so that step times can be compared on a machine that does other things
as well.

>>> learners = side_by_side(model, ["bp", "dfa"], split, Budget(epochs=5))       # doctest: +SKIP
>>> train(learners, dataset, Budget(epochs=5))                                   # doctest: +SKIP
>>> learners[1].points[-1].accuracy                                              # doctest: +SKIP
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphrewrite import api
from graphrewrite.analysis.blocks import Blocks
from graphrewrite.analysis.certificates import Certificates
from graphrewrite.datasets import Dataset, Split
from graphrewrite.errors import GraphRewriteError, RuleError
from graphrewrite.inputs import Inputs
from graphrewrite.rule import Rule, RuleMap
from graphrewrite.runtime.module import CompiledModule

WARM_UP = 10
"""Steps at the start whose times do not count."""

POINTS = 25
"""How many times accuracy and alignment are measured during training, at most."""


@dataclass(frozen=True)
class Budget:
    """How long and how fast to train: the same for every rule.

    Attributes:
        epochs: Passes over the training set.
        batch: Samples per step; what is left over at the end of an epoch is not used in it.
        rate: Learning rate of Adam at the start.
        rates: Rule name -> another learning rate at the start.
        cooldown: Over which last share of the steps the rate falls linearly to zero; 0: it does not fall.
        seed: Seed of the batches' order and of the rules' state.
    """

    epochs: int = 100
    batch: int = 64
    rate: float = 3e-3
    rates: Mapping[str, float] = field(default_factory=dict)
    cooldown: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Point:
    """What was measured after some epochs.

    Attributes:
        epoch: How many epochs were over.
        accuracy: Share of held-out samples that `compiled.predict` classifies rightly.
        loss: Mean of the rule's own loss over the last epoch.
        alignment: Block -> cosine of its gradient to backpropagation's; nan where one of them is zero.
    """

    epoch: int
    accuracy: float
    loss: float
    alignment: dict[str, float]


@dataclass
class Learner:
    """One rule's copy of the model, its optimizer and its course.

    Attributes:
        rule: Text form of the rule, or of the map.
        rules: The rules in use.
        compiled: The copy.
        optimizer: Its optimizer.
        saved_bytes: Bytes between forward and backward at the training batch's size.
        certificates: What was proved about the graph that trains.
        seconds: Time of every step.
        points: Measurements.
    """

    rule: str
    rules: tuple[Rule, ...]
    compiled: CompiledModule
    optimizer: torch.optim.Optimizer
    saved_bytes: int
    certificates: Certificates
    seconds: list[float] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    loss_sum: float = 0.0

    def step(self, x: Any, y: Any) -> None:
        """One training step, timed."""
        device = next(self.compiled.parameters()).device
        _wait(device)
        started = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.compiled.loss(x, y)
        loss.backward()
        self.optimizer.step()
        _wait(device)
        self.seconds.append(time.perf_counter() - started)
        self.loss_sum += loss.item()

    @property
    def median_seconds(self) -> float:
        """Median time of a step, the first ones left out."""
        return statistics.median(self._counted())

    def _counted(self) -> list[float]:
        return self.seconds[min(WARM_UP, len(self.seconds) // 2) :]

    def ratio_to(self, other: Learner) -> float:
        """Median over steps of this rule's time divided by the other's on the same batch."""
        return statistics.median(a / b for a, b in zip(self._counted(), other._counted(), strict=True))


def side_by_side(
    model: nn.Module,
    rules: Sequence[Any],
    example: Split,
    budget: Budget,
    *,
    blocks: Blocks = "auto",
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
) -> list[Learner]:
    """Compile a copy of the model for each rule.

    Args:
        model: The model; it is copied, never trained.
        rules: What `compile` takes as rules.
        example: A batch to capture with, of the size to train with.
        budget: Learning rates and seed.
        blocks: As for `compile`.
        loss: As for `compile`.
    """
    learners = []
    for rule in rules:
        compiled = api.compile(
            copy.deepcopy(model).train(),
            rule,
            example_inputs=example.x,
            example_targets=example.y,
            blocks=blocks,
            loss=loss,
            seed=budget.seed,
        )
        report = compiled.report()
        rate = budget.rates.get(report.rule.partition("{")[0], budget.rate)
        parameters = [p for p in compiled.parameters() if p.requires_grad]
        if not parameters:
            raise GraphRewriteError("the model has no parameter to train", remedy="unfreeze some of them")
        optimizer = torch.optim.Adam(parameters, lr=rate)
        in_use = tuple(one for _, one in RuleMap.of(rule).in_use(compiled.graph("operator")))
        learners.append(Learner(report.rule, in_use, compiled, optimizer, report.saved_bytes, report.certificates))
    return learners


def train(
    learners: Sequence[Learner],
    data: Dataset,
    budget: Budget,
    *,
    on_step: Callable[[], None] | None = None,
    on_point: Callable[[], None] | None = None,
    checkpoint: Path | None = None,
) -> None:
    """Train all learners on the same batches, interleaved, and measure them on the way.

    Args:
        learners: What to train.
        data: Training and test set; inputs and targets may be any tree of tensors that share their first size.
        budget: As given to `side_by_side`.
        on_step: Called after every step of all learners: for progress bars.
        on_point: Called after every measurement of all learners.
        checkpoint: File that holds the course after every epoch, until the last one is over. If it is there at the
            start, the course goes on from it, bit for bit; `on_step` and `on_point` are not called for what it holds.

    Raises:
        GraphRewriteError: The file is of other rules, another budget or another number of samples.
    """
    count = sample_count(data.train)
    probe = take(data.train, torch.arange(min(count, 256))) if count else data.train
    # what cannot be judged is better found out before the training than after it
    accuracy(learners[0].compiled, probe)
    total = steps_of(data.train, budget)
    every = max(1, budget.epochs // POINTS)

    def factor(step: int) -> float:
        left = max(0.0, 1.0 - step / total)
        return min(1.0, left / budget.cooldown) if budget.cooldown else 1.0

    schedules = [torch.optim.lr_scheduler.LambdaLR(one.optimizer, factor) for one in learners]
    generator = torch.Generator().manual_seed(budget.seed)
    course = _Course(checkpoint, learners, schedules, generator, f"{budget}, {count} samples")
    over = course.resume()
    turn = over * (total // budget.epochs)
    for epoch in range(over + 1, budget.epochs + 1):
        for batch in _batches(data.train, count, budget.batch, generator):
            turn += 1
            for i in range(len(learners)):
                learners[(turn + i) % len(learners)].step(*batch)
            for schedule in schedules:
                schedule.step()
            if on_step is not None:
                on_step()
        if epoch % every == 0 or epoch == budget.epochs:
            for one in learners:
                one.points.append(measure(one, epoch, probe, data.test, total // budget.epochs))
            if on_point is not None:
                on_point()
        for one in learners:
            one.loss_sum = 0.0
        course.save(epoch)
    course.end()


@dataclass(frozen=True)
class _Course:
    """What a training that was interrupted needs to go on as if it had not been."""

    path: Path | None
    learners: Sequence[Learner]
    schedules: Sequence[torch.optim.lr_scheduler.LambdaLR]
    generator: torch.Generator
    setting: str

    def save(self, epoch: int) -> None:
        if self.path is None:
            return
        held = {
            "setting": self.setting,
            "rules": [one.rule for one in self.learners],
            "epoch": epoch,
            "order": self.generator.get_state(),
            "random": torch.get_rng_state(),
            "devices": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "learners": [
                {
                    "state": one.compiled.state_dict(),
                    "optimizer": one.optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "seconds": one.seconds,
                    "points": [asdict(point) for point in one.points],
                }
                for one, schedule in zip(self.learners, self.schedules, strict=True)
            ],
        }
        # an interruption while it is written leaves the former one
        beside = self.path.with_name(self.path.name + ".part")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(held, beside)
        os.replace(beside, self.path)

    def resume(self) -> int:
        """How many epochs are over."""
        if self.path is None or not self.path.is_file():
            return 0
        held = torch.load(self.path, weights_only=True)
        if (held["setting"], held["rules"]) != (self.setting, [one.rule for one in self.learners]):
            raise GraphRewriteError(
                f"{self.path} holds a training of {', '.join(held['rules'])} with {held['setting']}, not of "
                f"{', '.join(one.rule for one in self.learners)} with {self.setting}",
                remedy="ask for the same, or remove the file",
            )
        for one, schedule, own in zip(self.learners, self.schedules, held["learners"], strict=True):
            one.compiled.load_state_dict(own["state"])
            one.optimizer.load_state_dict(own["optimizer"])
            schedule.load_state_dict(own["schedule"])
            one.seconds[:] = own["seconds"]
            one.points[:] = [Point(**point) for point in own["points"]]
        self.generator.set_state(held["order"])
        torch.set_rng_state(held["random"])
        if held["devices"]:
            torch.cuda.set_rng_state_all(held["devices"])
        return int(held["epoch"])

    def end(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def steps_of(split: Split, budget: Budget) -> int:
    """How many steps `train` takes."""
    count = sample_count(split)
    return budget.epochs * (max(1, count // budget.batch) if count else 1)


def measure(learner: Learner, epoch: int, probe: Split, test: Split, steps: int) -> Point:
    """Accuracy on a test set, and alignment with backpropagation on a batch."""
    angles = learner.compiled.alignment(probe.x, probe.y).blocks
    return Point(
        epoch,
        accuracy(learner.compiled, test),
        learner.loss_sum / steps,
        {block: angle.cosine for block, angle in angles.items()},
    )


def accuracy(compiled: CompiledModule, split: Split, batch: int = 1024) -> float:
    """Share of targets that `predict` gives the highest score, in eval mode; targets of -100 do not count."""
    was_training = compiled.training
    compiled.eval()
    right = total = 0
    for piece in in_batches(split, batch):
        hits, counted = count_right(class_scores(compiled.predict(piece.x)), piece.y)
        right += hits
        total += counted
    compiled.train(was_training)
    return right / max(total, 1)


def in_batches(split: Split, batch: int) -> list[Split]:
    """A set in pieces of `batch` samples; one piece if its tensors do not share their first size."""
    count = sample_count(split)
    return [take(split, i) for i in torch.arange(count).split(batch)] if count else [split]


def count_right(scores: torch.Tensor, y: torch.Tensor) -> tuple[int, int]:
    """How many targets have the highest score, and how many count: -100 does not."""
    if y.is_floating_point() or y.shape != scores.shape[:-1]:
        raise RuleError(
            f"accuracy needs one integer class per prediction, the targets are {y.dtype} of shape {tuple(y.shape)} for "
            f"scores of shape {tuple(scores.shape)}",
            remedy="compare rules on a classification task",
        )
    counted = y != -100
    return int(((scores.argmax(-1) == y) & counted).sum()), int(counted.sum())


def class_scores(outputs: Any) -> torch.Tensor:
    """The tensor of class scores, class dimension last: the output, its `.logits` or its `["logits"]`."""
    scores = outputs if isinstance(outputs, torch.Tensor) else getattr(outputs, "logits", None)
    if scores is None and isinstance(outputs, Mapping):
        scores = outputs.get("logits")
    if not isinstance(scores, torch.Tensor):
        raise RuleError(
            f"no class scores in outputs of type {type(outputs).__name__}",
            remedy="return a tensor with the classes last, or an object with .logits",
        )
    return scores


# --- batches -------------------------------------------------------------------------------------------------------


def sample_count(split: Split) -> int:
    """The first size that all tensors of inputs and targets share; 0 if they do not: then the set is one batch."""
    sizes: set[int] = set()
    _map(lambda t: sizes.add(len(t) if t.dim() else 0), split)
    return sizes.pop() if len(sizes) == 1 else 0


def take(split: Split, index: torch.Tensor) -> Split:
    """Some samples of a set."""
    return _map(lambda t: t[index], split)


def hold_out(split: Split, share: float = 0.2, seed: int = 0) -> Dataset | None:
    """Set a random share of the samples aside as a test set; None if there are fewer than 100 samples."""
    count = sample_count(split)
    if count < 100:
        return None
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    cut = count - int(count * share)
    return Dataset(take(split, order[:cut]), take(split, order[cut:]))


def _map(fn: Callable[[torch.Tensor], Any], split: Split) -> Split:
    """Call `fn` on every tensor of inputs and targets."""

    def tree(held: Any) -> Any:
        if isinstance(held, Inputs):
            return Inputs(*tree(held.args), **tree(held.kwargs))
        return pytree.tree_map(lambda t: fn(t) if isinstance(t, torch.Tensor) else t, held)

    return Split(tree(split.x), tree(split.y))


def _batches(split: Split, count: int, size: int, generator: torch.Generator) -> Iterator[Split]:
    if not count:
        yield split
        return
    order = torch.randperm(count, generator=generator)
    for index in order.split(min(size, count)):
        if len(index) == min(size, count):
            yield take(split, index)


def _wait(device: torch.device) -> None:
    """Kernels of a GPU run on after the call that starts them."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
