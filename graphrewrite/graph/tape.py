"""Running one operator on detached leaves: the local tape from which its VJP is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphrewrite.graph.ops import call_operator

Read = Callable[[fx.Node], Any]


class Tape:
    """One operator run under autograd on detached leaves.

    Attributes:
        outputs: The operator's tensor results by position, still attached to the tape.
        result: What the operator returned, detached, for the operators after it.
    """

    def __init__(
        self,
        node: fx.Node,
        read: Read,
        wrt: Sequence[int] | None = None,
        replaced: Mapping[int, Any] | None = None,
    ) -> None:
        """Run `node`.

        Args:
            node: A forward operator.
            read: Value of each input node.
            wrt: Positions of flattened inputs that become leaves; None: every floating-point tensor.
            replaced: Other values for some positions.
        """
        replaced = replaced or {}
        self._leaves: dict[int, torch.Tensor] = {}
        flat, spec = pytree.tree_flatten((node.args, node.kwargs))
        position = 0
        for i, leaf in enumerate(flat):
            if not isinstance(leaf, fx.Node):
                continue
            val = replaced[position] if position in replaced else read(leaf)
            wanted = wrt is None or position in wrt
            if wanted and isinstance(val, torch.Tensor) and (val.is_floating_point() or val.is_complex()):
                val = val.detach().requires_grad_()
                self._leaves[position] = val
            flat[i] = val
            position += 1
        args, kwargs = pytree.tree_unflatten(flat, spec)
        with torch.enable_grad():
            raw = call_operator(node.target, args, kwargs)  # type: ignore[arg-type]
        self._single = not isinstance(raw, (tuple, list))
        self.outputs: list[Any] = [raw] if self._single else list(raw)
        self.result: Any = self._detach(raw)

    @staticmethod
    def _detach(raw: Any) -> Any:
        if isinstance(raw, (tuple, list)):
            return (
                type(raw)(Tape._detach(r) for r in raw)
                if type(raw) in (tuple, list)
                else [Tape._detach(r) for r in raw]
            )
        return raw.detach() if isinstance(raw, torch.Tensor) and raw.requires_grad else raw

    def requires_grad(self) -> set[int]:
        """Positions of outputs that depend differentiably on a leaf."""
        return {i for i, o in enumerate(self.outputs) if isinstance(o, torch.Tensor) and o.requires_grad}

    def vjp(self, cotangents: Sequence[torch.Tensor | None], wrt: Sequence[int]) -> list[torch.Tensor | None]:
        """Cotangents of the inputs at `wrt`; None where an output does not depend on one."""
        pairs = [
            (o, c)
            for o, c in zip(self.outputs, cotangents, strict=True)
            if c is not None and isinstance(o, torch.Tensor) and o.requires_grad
        ]
        leaves = [(i, self._leaves[p]) for i, p in enumerate(wrt) if p in self._leaves]
        grads: list[torch.Tensor | None] = [None] * len(wrt)
        if not pairs or not leaves:
            return grads
        outs, cots = zip(*pairs, strict=True)
        found = torch.autograd.grad(
            outs, [leaf for _, leaf in leaves], list(cots), retain_graph=True, allow_unused=True
        )
        for (i, _), grad in zip(leaves, found, strict=True):
            grads[i] = grad
        return grads

    def arrival(self, positions: Sequence[int]) -> list[int]:
        """`positions` in the order in which autograd's engine hands on their cotangents.

        An operator that autograd takes apart (attention in its plain form) does not deliver in the order of its
        arguments; where one value stands at several, the order decides how their sum is rounded.
        """
        arrived: list[int] = []
        leaves = [self._leaves[p] for p in positions if p in self._leaves]
        outs = [self.outputs[i] for i in sorted(self.requires_grad())]
        handles = [self._leaves[p].register_hook(_noting(arrived, p)) for p in positions if p in self._leaves]
        torch.autograd.grad(outs, leaves, [torch.empty_like(o) for o in outs], retain_graph=True, allow_unused=True)
        for handle in handles:
            handle.remove()
        return arrived + [p for p in positions if p not in arrived]


def _noting(arrived: list[int], position: int) -> Callable[[torch.Tensor], None]:
    def note(_: torch.Tensor) -> None:
        arrived.append(position)

    return note
