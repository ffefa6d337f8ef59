"""What capture must refuse, because it would be dropped without a word."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from graphrewrite.errors import CaptureError

_RECURRENT_LIMIT = 256


class _HookWatch(TorchFunctionMode):
    """Sees `Tensor.register_hook` inside a forward: export would lose it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.register_hook:
            raise CaptureError(
                "the forward registers a hook on a tensor (Tensor.register_hook), which a captured graph cannot keep",
                remedy="write the change of the gradient as a torch.autograd.Function, or as a graphrewrite pass",
            )
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def watching_hooks() -> Iterator[None]:
    """Raise `CaptureError` when the code run inside registers a tensor hook."""
    with _HookWatch():
        yield


def check_modules(model: nn.Module) -> None:
    """Refuse what would be lost: backward hooks, cumulative batch-norm statistics, parameters that are sharded."""
    check_whole(model)
    for name, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise CaptureError(
                "a module has a backward hook, which a captured graph cannot keep",
                module=name or type(module).__name__,
                remedy="remove the hook, or write it as a torch.autograd.Function or a graphrewrite pass",
            )
        cumulative = getattr(module, "momentum", 0.1) is None and getattr(module, "track_running_stats", False)
        if cumulative and module.training and isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise CaptureError(
                "batch normalisation with momentum=None divides by a counter that lives in a tensor",
                module=name,
                remedy="set a momentum, e.g. 0.1",
            )


def check_whole(model: nn.Module) -> None:
    """Refuse parameters of which this process holds a part: a captured graph reads them where no hook gathers them."""
    tensors = sys.modules.get("torch.distributed.tensor")
    if tensors is None:
        return  # nobody has made one
    for name, parameter in model.named_parameters():
        if isinstance(parameter, tensors.DTensor):
            raise CaptureError(
                f"parameter {name} is sharded over processes (a DTensor), and nothing has gathered it",
                module=name.rpartition(".")[0],
                remedy="shard the root, fully_shard(compiled.loss_module()), and neither the model nor modules inside "
                "of it; call the sharded view, not compiled.loss",
            )


def recurrent_modules(model: nn.Module) -> list[str]:
    """Paths of `nn.LSTM`, `nn.GRU` and `nn.RNN` modules: they are unrolled over time."""
    return [name for name, m in model.named_modules() if isinstance(m, nn.RNNBase)]


def long_sequence(length: int) -> bool:
    """Whether unrolling over `length` steps deserves a warning."""
    return length > _RECURRENT_LIMIT
