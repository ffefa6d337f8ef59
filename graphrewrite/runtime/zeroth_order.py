"""Zeroth-order steps in place: perturb the weights, look at the loss, put them back, move them."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import nn

from graphrewrite import random
from graphrewrite.errors import RuleError
from graphrewrite.graph.aliasing import owns_no_memory
from graphrewrite.graph.nodes import Param, nbytes, value
from graphrewrite.inputs import as_inputs, as_targets

if TYPE_CHECKING:
    from graphrewrite.runtime.module import CompiledModule
    from graphrewrite.runtime.program import Program


LEAST, MOST = 1 << 8, 1 << 14
"""How many numbers are drawn at a time: between these, as many as there is room for. The least takes 4 kB."""
BYTES_PER_NUMBER = 12


class Directions(Protocol):
    """What a rule must tell for its steps to be taken in place."""

    count: int
    kind: str
    scale: float
    distribution: str
    shared: bool
    in_place: bool

    def streams(self, names: Sequence[str]) -> list[int]:
        """The random stream of each parameter."""


def zo_step(compiled: CompiledModule, x: Any, y: Any, lr: float, weight_decay: float) -> torch.Tensor:
    """See `CompiledModule.zo_step`."""
    inputs, targets = as_inputs(x), as_targets(y)
    with torch.enable_grad():
        program, _ = compiled.program_for("loss", inputs, targets)
    rule = _rule_of(compiled, program)
    specs = [spec for spec in program.operator.inputs if isinstance(spec, Param) and spec in program.differentiable]
    parameters = dict(compiled.module.named_parameters())
    weights = [parameters[spec.name] for spec in specs]
    _warn_about_halves(compiled, weights)
    ranks = 1 if rule.shared else _world()
    walk = _Walk(
        weights, rule.streams([str(spec) for spec in specs]), _counter(compiled, rule), rule, _piece(program, weights)
    )

    def loss() -> torch.Tensor:
        found = compiled.task_loss(compiled.module(*inputs.args, **inputs.kwargs), targets).detach()
        return _mean_over_ranks(found) if rule.shared else found

    with torch.no_grad(), _alike(compiled.module) as again:
        slopes, seen = _slopes(walk, rule, again(loss), ranks)
        for weight in weights:
            if weight_decay and weight.dim() > 1:
                weight.mul_(1 - lr * weight_decay)
        for (rank, number), slope in _exchanged(compiled, slopes, ranks).items():
            walk.move(rank, number, -lr * slope / (rule.count * ranks))
    compiled._step += 1
    mean = torch.stack(seen).mean()
    if not rule.shared:
        mean = _mean_over_ranks(mean)
    compiled.losses = {"task": mean}
    return mean


def _slopes(
    walk: _Walk, rule: Directions, loss: Callable[[], torch.Tensor], ranks: int
) -> tuple[list[float], list[torch.Tensor]]:
    """The difference of losses along each of this rank's directions, and all losses; the weights end up as they were.

    Moving to and fro rounds. So that the weights stay equal on all ranks, bit by bit, each makes the moves of all.
    """
    eps, slopes, seen = rule.scale, [], []
    base = loss() if rule.kind == "forward" else None
    if base is not None:
        seen.append(base)
    own = _rank() if ranks > 1 else 0
    for rank, number in itertools.product(range(ranks), range(rule.count)):
        mine = rank == own
        away = eps
        walk.move(rank, number, eps)
        try:
            above = loss() if mine else None
            below = None
            if rule.kind == "central":
                walk.move(rank, number, -2 * eps)
                away = -eps
                below = loss() if mine else None
        finally:
            # also where the model or the loss raises: a step that is not taken leaves the weights where they were
            walk.move(rank, number, -away)
        if above is None:
            continue
        other = below if below is not None else base
        seen += [above] if below is None else [above, below]
        slope = (above.double() - (0.0 if other is None else other.double())) / (eps if below is None else 2 * eps)
        slopes.append(slope.item())
    return slopes, seen


def _exchanged(compiled: CompiledModule, slopes: Sequence[float], ranks: int) -> dict[tuple[int, int], float]:
    """The differences of all ranks, by rank and number of the direction: all that ranks need of each other."""
    if ranks == 1:
        return {(0, number): slope for number, slope in enumerate(slopes)}
    everyone: list[Any] = [None] * ranks
    mine = (compiled._options.seed, compiled._step)
    torch.distributed.all_gather_object(everyone, (mine, list(slopes)))
    if any(theirs != mine for theirs, _ in everyone):
        raise RuleError(
            f"zo_step moves all ranks along the directions of all, but they draw from different (seed, step): "
            f"{', '.join(str(theirs) for theirs, _ in everyone)}",
            remedy="compile with the same seed on all ranks, and load the same state",
        )
    return {(rank, number): slope for rank, (_, own) in enumerate(everyone) for number, slope in enumerate(own)}


class _Walk:
    """Moves weights along random directions that are drawn a piece at a time and never held."""

    def __init__(
        self,
        weights: Sequence[nn.Parameter],
        streams: Sequence[int],
        counter: torch.Tensor,
        rule: Directions,
        piece: int,
    ) -> None:
        self._weights = list(zip(weights, streams, strict=True))
        self._counter = counter
        self._distribution = rule.distribution
        self._piece = piece

    def move(self, rank: int, number: int, by: float) -> None:
        """Add `by` times direction `number` of a rank (counted from this process's, if directions are shared)."""
        counter = self._counter + torch.tensor([0, 0, rank], device=self._counter.device)
        for weight, stream in self._weights:
            held, ordered = weight.data, weight.is_contiguous()
            if ordered:
                flat = held.view(-1)
            else:
                # no flat view: all that the weight spans in memory, where its numbers are dealt by place
                flat = held.as_strided(
                    [1 + sum((n - 1) * s for n, s in zip(held.shape, held.stride(), strict=True))], [1]
                )
            # places take three times the room of numbers
            piece = self._piece if ordered else _whole(self._piece / 4)
            for start, numbers in random.in_chunks(counter, stream, held.numel(), number, self._distribution, piece):
                if ordered:
                    flat[start : start + numbers.numel()].add_(numbers.to(held.dtype), alpha=by)
                else:
                    places = _places(held, start, numbers.numel())
                    flat[places] = flat[places].add_(numbers.to(held.dtype), alpha=by)
                    del places
                # the next piece is drawn in its place
                del numbers


def _places(weight: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """Where in memory `count` elements lie, from the one on that is `start` in the order of the indices."""
    number = torch.arange(start, start + count, device=weight.device)
    places = torch.zeros_like(number)
    for size, step in zip(reversed(weight.shape), reversed(weight.stride()), strict=True):
        places.add_(number.remainder(size), alpha=step)
        number.floor_divide_(size)
    return places


def _piece(program: Program, weights: Sequence[nn.Parameter]) -> int:
    """How many numbers to draw at a time: room is what the forward pass's largest value took, or 3 % of the weights."""
    made = max((nbytes(value(n)) for n in program.operator.forward_nodes() if not owns_no_memory(n)), default=0)
    return _whole(max(made, sum(w.nbytes for w in weights) // 32) // BYTES_PER_NUMBER)


def _whole(count: float) -> int:
    """A number of numbers that vector instructions divide: then it does not matter to rounding where pieces end."""
    return min(MOST, max(LEAST, int(count) // LEAST * LEAST))


@contextlib.contextmanager
def _alike(module: nn.Module) -> Iterator[Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]]:
    """Let several passes draw the same random numbers; buffers are updated by the first one only."""
    buffers = [b for b in module.buffers() if b is not None]
    after: list[torch.Tensor] = []
    devices = sorted({t.get_device() for t in (*module.parameters(), *buffers) if t.is_cuda})
    before = (torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in devices])
    ended: list[Any] = []

    def again(loss: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            if ended:
                _restore(before, devices)
            found = loss()
            if not ended:
                ended.append((torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in devices]))
                after.extend(b.clone() for b in buffers)
            return found

        return run

    yield again
    if ended:
        _restore(ended[0], devices)
        for buffer, held in zip(buffers, after, strict=True):
            buffer.copy_(held)


def _restore(states: tuple[torch.Tensor, list[torch.Tensor]], devices: Sequence[int]) -> None:
    torch.set_rng_state(states[0])
    for device, state in zip(devices, states[1], strict=True):
        torch.cuda.set_rng_state(state, device)


def _rule_of(compiled: CompiledModule, program: Program) -> Directions:
    rules = [rule for _, rule in compiled._options.rules.in_use(program.operator)]
    found = [rule for rule in rules if getattr(rule, "in_place", False)]
    if len(rules) != 1 or not found:
        raise RuleError(
            f"zo_step updates every block along random directions, the rule is {', '.join(map(str, rules))}",
            remedy="compile the whole model with zeroth_order (method=spsa or stein), or train with loss and an "
            "optimizer",
        )
    return cast("Directions", found[0])


def _counter(compiled: CompiledModule, rule: Directions) -> torch.Tensor:
    """The random counter that directions count ranks from: 0 if this process draws for all, or for itself alone."""
    counter = compiled._counter()
    if rule.shared or _world() > 1:
        counter[2] = 0
    return counter


def _world() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _rank() -> int:
    return torch.distributed.get_rank()


def _mean_over_ranks(loss: torch.Tensor) -> torch.Tensor:
    if _world() > 1:
        torch.distributed.all_reduce(loss)
        loss = loss / _world()
    return loss


def _warn_about_halves(compiled: CompiledModule, weights: Sequence[nn.Parameter]) -> None:
    halves = sorted({str(w.dtype).removeprefix("torch.") for w in weights if w.dtype.itemsize < 4})
    if halves and "zo_step" not in compiled._warned:
        compiled._warned.add("zo_step")
        warnings.warn(
            f"zo_step moves {' and '.join(halves)} weights to and fro in place: they do not come back exactly (about "
            "4e-3 per step in fp16). Keep the weights in float32 under autocast",
            stacklevel=4,
        )
