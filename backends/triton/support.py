"""Whether Triton kernels can run here, and how an operator is registered with its kernels."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from graphrewrite.errors import BackendError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels compute on; float64 stays with the reference."""

_LIBRARY = torch.library.Library("graphrewrite", "FRAGMENT")


@functools.cache
def installed() -> bool:
    """Whether the `triton` package is installed."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether kernels run on the CPU, in Triton's interpreter (`TRITON_INTERPRET=1`, set before triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("0", "")


def unavailable() -> str:
    """Why no kernel can run in this process; "" if they can."""
    if not installed():
        return "triton is not installed"
    if not interpreting() and not torch.cuda.is_available():
        return "there is no CUDA device, and TRITON_INTERPRET is not set"
    return ""


def runs_on(device: torch.device) -> str:
    """Why no kernel can run on tensors of this device; "" if they can."""
    if not installed():
        return "triton is not installed"
    if device.type == "cpu" and not interpreting():
        return "tensors on the CPU need Triton's interpreter (TRITON_INTERPRET=1)"
    if device.type not in ("cpu", "cuda"):
        return f"Triton kernels run on CUDA devices, not on {device.type}"
    return ""


def unfit(*tensors: torch.Tensor | None) -> str:
    """Why no kernel takes these tensors: device, dtype, zero size; "" if one can. Works on fake values."""
    for tensor in tensors:
        if tensor is None:
            continue
        reason = runs_on(tensor.device)
        if reason:
            return reason
        if tensor.is_floating_point() and tensor.dtype not in FLOATS:
            return f"the kernel computes in float32 and narrower, not in {str(tensor.dtype).removeprefix('torch.')}"
        if any(isinstance(size, int) and size == 0 for size in tensor.shape):
            return "the tensor is empty"
    return ""


@dataclass(frozen=True)
class Kernel:
    """One operator of ours and what runs it.

    Attributes:
        name: Of the operator, in `torch.ops.graphrewrite`.
        reference: Plain PyTorch; what the CPU runs, and what a kernel is tested against.
        launch: Runs the Triton kernel on the same arguments.
        why_not: The reason for which the kernel does not take these arguments, "" if it does; fake values will do.
    """

    name: str
    reference: Callable[..., Any]
    launch: Callable[..., Any]
    why_not: Callable[..., str]

    @property
    def op(self) -> Any:
        """The operator."""
        return getattr(torch.ops.graphrewrite, self.name).default

    def __call__(self, *args: Any) -> Any:
        """The kernel where it applies, the reference elsewhere."""
        return self.reference(*args) if self.why_not(*args) else self.launch(*args)


KERNELS: dict[str, Kernel] = {}
"""All operators that have a kernel, by name."""


def operator(
    schema: str,
    *,
    reference: Callable[..., Any],
    launch: Callable[..., Any],
    fake: Callable[..., Any],
    why_not: Callable[..., str],
) -> Kernel:
    """Define an operator: the reference on the CPU, the kernel on CUDA and under the interpreter, a fake for tracing.

    Args:
        schema: `"name(Tensor x, float eps) -> (Tensor, Tensor)"`.
        reference: See `Kernel`.
        launch: See `Kernel`.
        fake: Shapes and dtypes of the results.
        why_not: See `Kernel`.
    """
    name = schema.partition("(")[0]
    kernel = Kernel(name, reference, launch, why_not)
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, kernel, "CPU")
    _LIBRARY.impl(name, kernel, "CUDA")
    torch.library.register_fake(f"graphrewrite::{name}", fake, lib=_LIBRARY)
    KERNELS[name] = kernel
    return kernel


def differentiable(name: str, backward: Callable[..., Any], keep: Callable[..., None]) -> None:
    """Give an operator a derivative, for rules that let theirs be traced.

    Args:
        name: Of an operator that is defined already.
        backward: `backward(ctx, *cotangents)`.
        keep: `keep(ctx, inputs, output)`.
    """
    torch.library.register_autograd(f"graphrewrite::{name}", backward, setup_context=keep, lib=_LIBRARY)


def traffic(*tensors: torch.Tensor | None) -> int:
    """Bytes of tensors that are each read or written once."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def require(kernel: Kernel, *args: Any) -> None:
    """Raise if a kernel does not take these arguments."""
    reason = kernel.why_not(*args)
    if reason:
        raise BackendError(f"the kernel {kernel.name} does not apply: {reason}", remedy="call the operator instead")


def next_power_of_two(n: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << max(n - 1, 0).bit_length()


def rows_of(x: torch.Tensor, dims: int) -> torch.Tensor:
    """A tensor as a matrix whose rows hold the last `dims` dimensions, with unit stride inside.

    Strided rows are read as they are, everything else is copied.
    """
    rows = x.reshape(-1, math.prod(x.shape[x.dim() - dims :]))
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
