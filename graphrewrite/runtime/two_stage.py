"""The second stage of a split backward: micro-batches whose weight gradients are still to be computed.

The first stage leaves what the weight graph reads here. Running it hands the gradients to autograd, so that they reach
`.grad` the way every tool of torch expects: parameter hooks, accumulation and DDP's reduction see them.

An optimizer step on parameters whose gradient is still pending would silently train with a part of it. It is refused by
a hook that torch calls before every step of every optimizer, which is the last moment at which nothing is lost yet: at
the next training call the parameters would already have moved.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from graphrewrite._compat import will_execute
from graphrewrite.errors import RuleError
from graphrewrite.graph.nodes import Grad
from graphrewrite.runtime.concat import run_concatenated

if TYPE_CHECKING:
    from graphrewrite.runtime.program import Program

Deliver = Callable[[Any, Any], None]


class MicroBatch:
    """What the first stage of one backward left for the second.

    Attributes:
        program: The compiled signature it belongs to.
        values: What the weight stage reads, by position in `partition.held`.
        leaves: The parameters and learned state that get a gradient, with their specification.
        missing: Positions of the cotangents that autograd did not hand in.
    """

    def __init__(
        self,
        program: Program,
        values: list[Any],
        leaves: list[tuple[Grad, torch.Tensor]],
        missing: frozenset[int],
        on_backward: Deliver,
    ) -> None:
        self.program = program
        self.values = values
        self.leaves = leaves
        self.missing = missing
        self.on_backward = on_backward
        self._versions = [v._version if isinstance(v, torch.Tensor) else 0 for v in values]
        self._leaf_versions = [leaf._version for _, leaf in leaves]

    @property
    def nbytes(self) -> int:
        """Bytes held for it, parameters, buffers and inputs not counted."""
        held = zip(self.program.partition.held, self.values, strict=False)
        tensors = {v.untyped_storage()._cdata: v.nbytes for one, v in held if one.nbytes and torch.is_tensor(v)}
        return sum(tensors.values())

    def check_unchanged(self) -> None:
        """What the gradients belong to must be what it was in the first stage.

        Raises:
            RuleError: A parameter, or a value that is held, was changed in place, or its memory given back.
        """
        for spec, leaf in self.leaves:
            if leaf.numel() and not leaf.untyped_storage().size():
                raise RuleError(
                    f"{spec.of} was sharded again behind .backward(): its gradient would reach nothing",
                    remedy="fully_shard reduces and shards at the end of .backward(): use split_backward=False with "
                    "it, or DistributedDataParallel",
                )
        for (spec, leaf), version in zip(self.leaves, self._leaf_versions, strict=True):
            if leaf._version != version:
                raise RuleError(
                    f"{spec.of} was changed between the two stages of the backward: the pending weight gradients "
                    "belong to its old value",
                    remedy="call backward_weight() before anything changes the parameters",
                )
        for one, held, version in zip(self.program.partition.held, self.values, self._versions, strict=False):
            if isinstance(held, torch.Tensor) and held._version != version:
                raise RuleError(
                    "a tensor that the weight stage reads was changed in place between the two stages of the backward",
                    node=one.node.name,
                    remedy="call backward_weight() first, or do not write into inputs, outputs or their cotangents",
                )


class WeightQueue:
    """The micro-batches of one compiled module whose weight gradients are pending, oldest first."""

    def __init__(self) -> None:
        self.pending: deque[MicroBatch] = deque()
        self._taken: list[MicroBatch] = []
        self._handle: RemovableHandle | None = None
        # autograd reaches the first stage through it where every parameter's gradient is deferred
        self.anchor = torch.empty(0, requires_grad=True)
        self._accumulate = torch.autograd.graph.get_gradient_edge(self.anchor).node

    @property
    def trains(self) -> bool:
        """Whether the running backward is to reach the parameters, or wants the gradients of some inputs only."""
        return will_execute(self._accumulate)

    def add(self, micro_batch: MicroBatch) -> None:
        """Leave a micro-batch for the second stage."""
        if self._handle is None:
            self._handle = register_optimizer_step_pre_hook(_refusing(self))
            weakref.finalize(self, self._handle.remove)
        self.pending.append(micro_batch)

    def run_oldest(self, n: int | None, concat: bool = False) -> None:
        """Compute the weight gradients of the n oldest pending micro-batches; None: of all.

        Raises:
            RuleError: Fewer are pending, or something that they read was changed; then they all stay pending.
        """
        count = len(self.pending) if n is None else n
        if isinstance(n, bool) or count < 0:
            raise RuleError(f"backward_weight(n={n!r}): n is a number of micro-batches, or None for all")
        if count > len(self.pending):
            raise RuleError(
                f"backward_weight(n={n}), but {len(self.pending)} micro-batches are pending",
                remedy="each .backward() leaves one; backward_weight() runs all there are",
            )
        chosen = [self.pending[i] for i in range(count)]
        for one in chosen:
            one.check_unchanged()
        if concat:
            for _ in chosen:
                self.pending.popleft()
            for results, one in run_concatenated(chosen):
                _hand_over(results, one)
            return
        for one in chosen:
            self.pending.popleft()
            _hand_over(one.program.run_weight(one), one)

    def take_newest(self) -> Callable[[], None]:
        """A function that computes the weight gradients of the newest pending micro-batch."""
        if not self.pending:
            raise RuleError(
                "weight_task(): no micro-batch is pending", remedy="call it once behind each .backward(), not before"
            )
        one = self.pending.pop()
        self._taken.append(one)

        def run() -> None:
            if one not in self._taken:
                raise RuleError("this weight task has run already", remedy="take a new one behind each .backward()")
            one.check_unchanged()
            self._taken.remove(one)
            _hand_over(one.program.run_weight(one), one)

        return run

    def discard(self) -> None:
        """Forget everything that is pending."""
        self.pending.clear()
        self._taken.clear()

    def refuse(self, optimizer: Optimizer) -> None:
        """Called before every optimizer step: no gradient of its parameters may be pending.

        Raises:
            RuleError: One is.
        """
        waiting = [*self.pending, *self._taken]
        if not waiting:
            return
        stepping = {id(p) for group in optimizer.param_groups for p in group["params"]}
        late = {str(spec.of): None for one in waiting for spec, leaf in one.leaves if id(leaf) in stepping}
        if late:
            count = sum(1 for one in waiting if one.leaves)
            raise RuleError(
                f"optimizer.step() before backward_weight(): the weight gradients of {count} micro-batch"
                f"{'es' if count > 1 else ''} are pending, among them that of {next(iter(late))}",
                remedy="call backward_weight() behind the last .backward(), before clipping, unscaling and the step; "
                "discard_pending() gives the gradients up",
            )


def _hand_over(results: list[tuple[Any, Any]], one: MicroBatch) -> None:
    """Give gradients to autograd, which adds them into `.grad`; the list is empty then."""
    leaves = {id(spec): leaf for spec, leaf in one.leaves}  # hashing a specification takes longer
    gradients: list[Any] = []
    targets: list[torch.Tensor] = []
    while results:
        # no other reference may be left: autograd copies what it cannot take over
        spec, result = results.pop()
        if not isinstance(spec, Grad):
            one.on_backward(spec, result)
        elif result is not None:
            gradients.append(result)
            targets.append(leaves[id(spec)])
        del result
    with torch.enable_grad():
        given: Any = _Accumulate.apply(gradients, *targets) if targets else None  # type: ignore[no-untyped-call]
    if given is not None and given.requires_grad:
        torch.autograd.backward(given, torch.empty_like(given))


class _Accumulate(torch.autograd.Function):
    """Its backward returns gradients that are there already."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Any], *leaves: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return leaves[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        # autograd keeps a gradient as it is only if nothing else refers to it
        gradients = tuple(ctx.gradients)
        ctx.gradients.clear()
        return None, *gradients


def _refusing(queue: WeightQueue) -> Any:
    """The hook; it does not keep the queue alive."""
    owner = weakref.ref(queue)

    def refuse(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        held = owner()
        if held is not None:
            held.refuse(optimizer)

    return refuse
