"""Rule state: feedback weights, heads, statistics, and the counter of the random operators."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from graphrewrite.errors import RuleError
from graphrewrite.graph.core import StateInit


class RuleState(nn.Module):
    """A tree of modules whose parameters and buffers are rule state, by dotted name."""

    def __init__(self, training: bool = True) -> None:
        super().__init__()
        self.training = training

    def create(self, inits: Mapping[str, StateInit], seed: int) -> list[str]:
        """Create what does not exist yet; each piece draws from a generator of its own, seeded by its name.

        Returns:
            The names created.
        """
        created = []
        for name, init in inits.items():
            existing = self.find(name)
            if existing is None:
                self._put(name, init, seed)
                created.append(name)
            elif tuple(existing.shape) != init.shape:
                raise RuleError(
                    f"rule state {name} has shape {tuple(existing.shape)}, this input needs {init.shape}",
                    remedy="train with one input size, or choose a rule option that shares its state over sizes",
                )
        return created

    def _put(self, name: str, init: StateInit, seed: int) -> None:
        digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        # drawn on the CPU: the same state on every device
        tensor = torch.empty(init.shape, dtype=init.dtype)
        with torch.no_grad():
            init.fill(tensor, generator)
        tensor = tensor.to(init.device)
        owner: nn.Module = self
        *path, leaf = name.split(".")
        # not by add_module and register_buffer: these refuse `a.1` beside `a.1.0`, and blocks may be named so
        for part in path:
            if part not in owner._modules:
                owner._modules[part] = RuleState(self.training)
            owner = owner._modules[part]  # type: ignore[assignment]
        if init.trainable:
            owner._parameters[leaf] = nn.Parameter(tensor)
        else:
            owner._buffers[leaf] = tensor

    def find(self, name: str) -> torch.Tensor | None:
        """The state of that name."""
        slot = self.slot(name)
        return slot[0][slot[1]] if slot else None

    def slot(self, name: str) -> tuple[dict[str, torch.Tensor], str] | None:
        """Where the state of that name lives."""
        owner: nn.Module | None = self
        *path, leaf = name.split(".")
        for part in path:
            owner = owner._modules.get(part) if owner is not None else None
        if owner is None:
            return None
        for held in (owner._parameters, owner._buffers):
            if leaf in held:
                return held, leaf  # type: ignore[return-value]
        return None

    def rebind(self, name: str, tensor: torch.Tensor) -> None:
        """Put another tensor in the place of a piece of fixed state; what was saved of the old one stays valid."""
        slot = self.slot(name)
        assert slot is not None, name
        held, leaf = slot
        held[leaf] = tensor.detach()

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All state by name."""
        yield from self.named_parameters()
        yield from self.named_buffers()
