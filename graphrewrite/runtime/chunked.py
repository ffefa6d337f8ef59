"""One training step in chunks of the batch: with the memory of a chunk, and the gradient of the whole.

`"joint"`, for any loss of all outputs (contrastive losses): the forward runs chunk by chunk and keeps only its
results. The loss is taken of all of them. Its backward runs every chunk's forward again, with the same random numbers,
and pulls that chunk's part of the cotangent back (gradient caching; Gao et al., 2021).

`"mean"`, for losses that are means over samples: every chunk's loss is pulled back as soon as it is there, and the
weighted gradients are added up. The forward runs once.

Gradients are equal to those of the whole batch if samples do not see each other in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils import _pytree as pytree

from graphrewrite.errors import RuleError
from graphrewrite.graph.nodes import (
    BufferUpdate,
    Counter,
    InputSpec,
    InputUpdate,
    Loss,
    LossTerm,
    UserInput,
    UserOutput,
)
from graphrewrite.inputs import Inputs
from graphrewrite.runtime.program import Program
from graphrewrite.runtime.signature import Call

if TYPE_CHECKING:
    from graphrewrite.compiler import Options
    from graphrewrite.runtime.module import CompiledModule

ChunkLoss = Literal["joint", "mean"]
APART = 1e-2
"""Relative difference between a chunk's results and those of its halves from which samples see each other."""


def check_options(options: Options) -> None:
    """`compile(chunk=, chunk_loss=)`.

    Raises:
        RuleError: Something that a step in chunks cannot do.
    """
    if options.chunk_loss not in ("joint", "mean"):
        raise RuleError(f"chunk_loss={options.chunk_loss!r} is unknown", remedy="use 'joint' or 'mean'")
    count = options.chunk
    if count is None:
        return
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise RuleError(f"chunk={count!r} is no number of chunks", remedy="use an int of at least 1")
    if options.split_backward:
        raise RuleError(
            "chunk= and split_backward=True exclude each other: a chunk's backward ends before the next one begins",
            remedy="call loss() once per micro-batch, and backward_weight() at the end",
        )
    blocked = next((rule.name for rule in options.rules.rules if rule.needs_loss), None)
    if blocked is not None and options.chunk_loss == "joint":
        raise RuleError(
            f"rule {blocked} has no backward through the outputs, which a loss of all chunks together needs",
            remedy="if its loss is a mean over samples: chunk_loss='mean'",
        )


@dataclass
class _Chunk:
    """One chunk of a step.

    Attributes:
        program: What runs it.
        call: Its part of the inputs and targets.
        count: Its samples.
        counter: Seed, step and rank of its counter-based numbers.
        generators: State of torch's generators before its forward, by device; empty if it draws nothing.
    """

    program: Program
    call: Call
    count: int
    counter: torch.Tensor
    generators: dict[str, torch.Tensor]

    def values(self, compiled: CompiledModule, aliases: dict[InputSpec, torch.Tensor]) -> Callable[[InputSpec], Any]:
        """Values of the program's inputs, with aliases in the place of what is differentiated for."""
        fetch = compiled.fetch(self.program, self.call)

        def given(spec: InputSpec) -> Any:
            if spec in aliases:
                return aliases[spec]
            return self.counter if isinstance(spec, Counter) else fetch(spec)

        return given

    def aliases(self, compiled: CompiledModule) -> dict[InputSpec, torch.Tensor]:
        """Leaves of the chunk's own backward: hooks of parameters run once per step, not once per chunk."""
        fetch = compiled.fetch(self.program, self.call)
        return {spec: fetch(spec).detach().requires_grad_() for spec in self.program.differentiable}


def run_joint(compiled: CompiledModule, inputs: Inputs, count: int) -> Any:
    """The model's outputs for the whole batch; their backward runs in chunks, too."""
    _, pieces = split(inputs, None, count)
    chunks = [_prepare(compiled, "forward", piece, None, n) for piece, _, n in pieces]
    program = chunks[0].program
    leaves = _leaves(compiled, program, inputs)
    outputs = _Joint.apply(compiled, chunks, list(leaves), *leaves.values())  # type: ignore[no-untyped-call]
    if not program.samples_checked:
        _check_samples(compiled, chunks[0], pieces[0][0], outputs)
    return program.captured.rebuild(list(outputs))


def run_mean(compiled: CompiledModule, inputs: Inputs, targets: Any, count: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """The mean of the chunks' losses, whose gradients are computed already, and the parts of the loss."""
    if any(torch.is_autocast_enabled(d) and torch.get_autocast_dtype(d) == torch.float16 for d in ("cpu", "cuda")):
        raise RuleError(
            "chunk_loss='mean' computes gradients before a GradScaler can scale the loss",
            remedy="use chunk_loss='joint'",
        )
    _, pieces = split(inputs, targets, count)
    chunks = [_prepare(compiled, "loss", piece, target, n) for piece, target, n in pieces]
    program = chunks[0].program
    if not program.samples_checked:
        _check_mean(compiled, chunks[0], *pieces[0][:2])
    leaves = _leaves(compiled, program, inputs)
    terms: dict[str, Any] = {}
    loss = _Mean.apply(compiled, chunks, terms, list(leaves), *leaves.values())  # type: ignore[no-untyped-call]
    return loss, terms


# --- the batch in parts ----------------------------------------------------------------------------------------------


def split(inputs: Inputs, targets: Any, count: int) -> tuple[int, list[tuple[Inputs, Any, int]]]:
    """The batch in `count` nearly equal parts, as (inputs, targets, samples), and its size.

    Every tensor whose first dimension is that of the first tensor is split, others are handed to each part.

    Raises:
        RuleError: There is no batch, or fewer samples than parts.
    """
    leaves, spec = pytree.tree_flatten(((inputs.args, inputs.kwargs), targets))
    first = next((leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim), None)
    if first is None:
        raise RuleError("chunk= splits the batch, but no input is a tensor with a batch dimension")
    size = int(first.shape[0])
    if size < count:
        raise RuleError(f"a batch of {size} cannot be split into chunk={count} parts", remedy="use a smaller chunk=")
    found, start = [], 0
    for i in range(count):
        stop = start + size // count + (i < size % count)
        part = [_part(leaf, size, start, stop) for leaf in leaves]
        (args, kwargs), target = pytree.tree_unflatten(part, spec)
        found.append((Inputs(*args, **kwargs), target, stop - start))
        start = stop
    return size, found


def _is_split(leaf: Any, size: int) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.ndim > 0 and leaf.shape[0] == size


def _part(leaf: Any, size: int, start: int, stop: int) -> Any:
    if not _is_split(leaf, size):
        return leaf
    return leaf.detach()[start:stop].requires_grad_(leaf.requires_grad)


def _leaves(compiled: CompiledModule, program: Program, inputs: Inputs) -> dict[InputSpec, torch.Tensor]:
    """What the whole step is differentiated for."""
    given = pytree.tree_leaves((inputs.args, inputs.kwargs))
    return {
        spec: given[spec.index] if isinstance(spec, UserInput) else compiled.fetch(program, None)(spec)
        for spec in program.differentiable
    }


def _prepare(compiled: CompiledModule, kind: Any, inputs: Inputs, targets: Any, count: int) -> _Chunk:
    with torch.enable_grad():
        program, call = compiled.program_for(kind, inputs, targets)
    for spec in program.partition.forward_outputs:
        if isinstance(spec, (BufferUpdate, InputUpdate)):
            what = f"buffer {spec.name!r}" if isinstance(spec, BufferUpdate) else f"its input {spec.index}"
            raise RuleError(
                f"the forward updates {what}: with chunk= it would do so once per chunk, from a chunk's statistics",
                remedy="use layer or group normalisation, or put batch norms into eval()",
            )
    if program.updates_rule_state:
        raise RuleError(
            f"rule {compiled.rules} learns state of its own in the step, which chunk= would run once per chunk",
            remedy="compile without chunk=",
        )
    return _Chunk(program, call, count, compiled.next_counter(program), {})


def _check_samples(compiled: CompiledModule, chunk: _Chunk, inputs: Inputs, outputs: Sequence[Any]) -> None:
    """Whether the first chunk's outputs are those of its halves; not asked where random numbers differ anyway."""
    if chunk.count > 1 and not chunk.program.draws:
        with torch.no_grad():
            halves = [
                pytree.tree_leaves(compiled.module(*half.args, **half.kwargs))
                for half, _, _ in split(inputs, None, 2)[1]
            ]
        for whole, *both in zip(outputs, *halves, strict=True):
            if isinstance(whole, torch.Tensor) and whole.is_floating_point() and whole.ndim:
                _same(whole[: chunk.count], torch.cat(both), "an output of the model")
    chunk.program.samples_checked = True


def _check_mean(compiled: CompiledModule, chunk: _Chunk, inputs: Inputs, targets: Any) -> None:
    """Whether the first chunk's loss is the mean of its halves'."""
    if chunk.count > 3 and not chunk.program.draws:
        (n, parts), found = split(inputs, targets, 2), []
        whole = compiled.loss_without_backward(inputs, targets)
        for half, target, count in parts:
            found.append(compiled.loss_without_backward(half, target) * count / n)
        _same(whole, found[0] + found[1], "the loss")
    chunk.program.samples_checked = True


def _same(whole: torch.Tensor, parts: torch.Tensor, what: str) -> None:
    a, b = whole.detach().double(), parts.detach().double()
    if not bool((a - b).norm() <= APART * a.norm() + 1e-12) and bool(a.isfinite().all()):
        raise RuleError(
            f"{what} for a part of the batch is not that for the whole: chunks would change the gradient",
            remedy="chunk= needs samples that do not see each other in the model (no batch norm in training), and with "
            "chunk_loss='mean' a loss that is a mean over samples",
        )


# --- running them ----------------------------------------------------------------------------------------------------


@contextmanager
def _drawing(chunk: _Chunk) -> Iterator[None]:
    """The random numbers of the chunk's first forward once more; torch's generators are left as they were."""
    devices = [d for d in chunk.generators if d != "cpu"]
    with torch.random.fork_rng(devices=[torch.device(d) for d in devices], enabled=bool(chunk.generators)):
        if chunk.generators:
            torch.set_rng_state(chunk.generators["cpu"])
            for device in devices:
                torch.cuda.set_rng_state(chunk.generators[device], device)
        yield


def _remember(compiled: CompiledModule, chunk: _Chunk) -> None:
    if chunk.program.draws:
        chunk.generators["cpu"] = torch.get_rng_state()
        for device in {p.device for p in compiled.module.parameters() if p.device.type == "cuda"}:
            chunk.generators[str(device)] = torch.cuda.get_rng_state(device)


def _outputs(chunk: _Chunk, results: Sequence[Any]) -> list[Any]:
    found = {
        s.index: results[i] for s, i in chunk.program.partition.forward_outputs.items() if isinstance(s, UserOutput)
    }
    return [found[i] for i in range(len(found))]


class _Sum:
    """Gradients of chunks, put together: added for parameters, one behind the other for split inputs."""

    def __init__(self, specs: Sequence[InputSpec], shapes: Sequence[torch.Size]) -> None:
        self._shapes = dict(zip(specs, shapes, strict=True))
        self._total: dict[InputSpec, torch.Tensor | None] = dict.fromkeys(specs)
        self._parts: dict[InputSpec, list[torch.Tensor]] = {}

    def add(self, leaves: dict[InputSpec, torch.Tensor], grads: Sequence[torch.Tensor | None]) -> None:
        for (spec, leaf), grad in zip(leaves.items(), grads, strict=True):
            if isinstance(spec, UserInput) and leaf.shape != self._shapes[spec]:
                self._parts.setdefault(spec, []).append(torch.zeros_like(leaf) if grad is None else grad)
            elif grad is not None:
                known = self._total[spec]
                self._total[spec] = grad if known is None else known + grad

    def grads(self) -> list[torch.Tensor | None]:
        return [torch.cat(self._parts[s]) if s in self._parts else held for s, held in self._total.items()]


class _Joint(torch.autograd.Function):
    """Outputs of the whole batch, of which no activation is kept."""

    @staticmethod
    def forward(ctx: Any, compiled: Any, chunks: list[_Chunk], specs: list[InputSpec], *leaves: torch.Tensor) -> Any:
        made = []
        for chunk in chunks:
            _remember(compiled, chunk)
            given = chunk.values(compiled, {})
            program = chunk.program
            made.append(_outputs(chunk, program.run_forward([given(s) for s in program.partition.forward_inputs])))
            _check_rows(made[-1], chunk.count)
        ctx.compiled, ctx.chunks, ctx.specs = compiled, chunks, specs
        ctx.set_materialize_grads(False)
        # a parameter that is changed before the backward is an error, as everywhere
        ctx.save_for_backward(*leaves)
        whole = [_joined(parts) for parts in zip(*made, strict=True)]
        ctx.mark_non_differentiable(*[t for t in whole if isinstance(t, torch.Tensor) and not t.is_floating_point()])
        return tuple(whole)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        total = _Sum(ctx.specs, [leaf.shape for leaf in ctx.saved_tensors])
        start = 0
        for chunk in ctx.chunks:
            aliases = chunk.aliases(ctx.compiled)
            with torch.enable_grad(), _drawing(chunk):
                outputs = _outputs(chunk, chunk.program(chunk.values(ctx.compiled, aliases), _nothing))
            stop = start + chunk.count
            wanted = [
                (o, g[start:stop]) for o, g in zip(outputs, cotangents, strict=True) if g is not None and _has_grad(o)
            ]
            if wanted:
                grads = torch.autograd.grad(
                    [o for o, _ in wanted], list(aliases.values()), [g for _, g in wanted], allow_unused=True
                )
                total.add(aliases, grads)
            del outputs, wanted
            start = stop
        return (None, None, None, *total.grads())


class _Mean(torch.autograd.Function):
    """The mean of the chunks' losses; gradients are there when it returns."""

    @staticmethod
    def forward(
        ctx: Any,
        compiled: Any,
        chunks: list[_Chunk],
        terms: dict[str, Any],
        specs: list[InputSpec],
        *leaves: torch.Tensor,
    ) -> torch.Tensor:
        size = sum(chunk.count for chunk in chunks)
        total = _Sum(specs, [leaf.shape for leaf in leaves])
        loss: Any = 0.0
        for chunk in chunks:
            aliases, share = chunk.aliases(compiled), chunk.count / size
            with torch.enable_grad():
                results = chunk.program(chunk.values(compiled, aliases), _nothing)
                found = {spec: results[i] for spec, i in chunk.program.partition.forward_outputs.items()}
                scaled = found[Loss()] * share
                total.add(aliases, torch.autograd.grad(scaled, list(aliases.values()), allow_unused=True))
            loss = loss + scaled.detach()
            for spec, part in found.items():
                if isinstance(spec, LossTerm):
                    terms[spec.name] = terms.get(spec.name, 0.0) + part.detach() * share
        ctx.grads = total.grads()
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuleError("a second backward through the same step", remedy="call loss() again")
        return (None, None, None, None, *[None if g is None else g.mul_(cotangents[0]) for g in grads])


def _check_rows(outputs: Sequence[Any], count: int) -> None:
    for output in outputs:
        if isinstance(output, torch.Tensor) and (not output.ndim or output.shape[0] != count):
            raise RuleError(
                f"an output of shape {list(output.shape)} has not one row for each of a chunk's {count} samples",
                remedy="return per-sample values and reduce them in the loss",
            )


def _joined(parts: Sequence[Any]) -> Any:
    return torch.cat(list(parts)) if isinstance(parts[0], torch.Tensor) else parts[0]


def _has_grad(output: Any) -> bool:
    return isinstance(output, torch.Tensor) and output.requires_grad


def _nothing(_spec: Any, _result: Any) -> None:
    """Results of the backward that are no gradients; rules that have any are refused."""
