"""Noticing an optimizer that was built on the user's model alone, and so never trains the learned state of a rule."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle


class UntrainedStateWatch:
    """Warns once when optimizer steps train the model but none of them has taken the rule's learned state.

    A step is seen by a hook that torch calls after every step of every optimizer; it is there from the first training
    call until the question is answered. The answer falls at the next training call, when every optimizer of the step
    has run: one for the model and another one for the learned state are as good as one for both.
    """

    def __init__(self) -> None:
        self._handle: RemovableHandle | None = None
        self._answered = False
        self._optimized: set[int] = set()

    def before_training(self, model: nn.Module, state: nn.Module, rule: str) -> None:
        """Called before every training call.

        Args:
            model: The user's model.
            state: What holds the rule's state; its parameters are the learned part.
            rule: For the message.
        """
        if self._answered:
            return
        if self._handle is None:
            self._handle = register_optimizer_step_post_hook(_noting(self))
            weakref.finalize(self, self._handle.remove)
            return
        if not any(id(p) in self._optimized for p in model.parameters()):
            return
        missing = [n for n, p in state.named_parameters() if p.requires_grad and id(p) not in self._optimized]
        self._close()
        if missing:
            warnings.warn(
                f"the optimizer does not train what rule {rule} learns: {', '.join(missing)}. "
                "Build it on compiled.parameters() (or compiled.param_groups()), not on the parameters of the model",
                stacklevel=5,
            )

    def _close(self) -> None:
        self._answered = True
        self._optimized.clear()
        if self._handle is not None:
            self._handle.remove()

    def note(self, optimizer: Optimizer) -> None:
        """Remember what an optimizer trains."""
        self._optimized.update(id(p) for group in optimizer.param_groups for p in group["params"])

    def __getstate__(self) -> dict[str, Any]:
        return {"_handle": None, "_answered": self._answered, "_optimized": set()}


def _noting(watch: UntrainedStateWatch) -> Any:
    """The hook; it does not keep the watch alive."""
    owner = weakref.ref(watch)

    def note(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        held = owner()
        if held is not None:
            held.note(optimizer)

    return note
