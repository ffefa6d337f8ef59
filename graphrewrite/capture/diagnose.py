"""Turning torch's capture failures into errors that name the user's module and line."""

from __future__ import annotations

import os
import traceback
from types import TracebackType

import torch
from torch import nn

from graphrewrite._compat import GuardOnDataDependentSymNode
from graphrewrite.errors import CaptureError, GraphRewriteError

_TORCH = os.path.dirname(torch.__file__)
_OURS = os.path.dirname(os.path.dirname(__file__))

_HINTS = (
    (
        ("data-dependent", "Could not guard on data", "Could not extract specialized integer"),
        "the forward branches on tensor values; use torch.where or torch.cond, or move the branch out of the model",
    ),
    (("torch.cond",), "see the documentation of torch.cond for what its branches may do"),
    (
        ("dict of torch.export", "Unsupported output", "pytree", "not a supported type", "Unsupported input type"),
        (
            "inputs and outputs must be tensors, constants and pytrees of them; register your class with "
            "torch.export.register_dataclass or torch.utils._pytree.register_pytree_node"
        ),
    ),
    (
        ("fake implementation", "no fake impl", "meta kernel", "Meta tensors", "meta device"),
        "give the operator a fake implementation with torch.library.register_fake",
    ),
)


def explain_failure(error: Exception, model: nn.Module) -> GraphRewriteError:
    """A `CaptureError` with the user's line, the module path and a hint, from whatever torch raised."""
    if isinstance(error, GraphRewriteError):
        return error
    source, module = _origin(error.__traceback__, model)
    reason = _first_line(error)
    hint = next((hint for words, hint in _HINTS if any(word in str(error) for word in words)), None)
    if isinstance(error, GuardOnDataDependentSymNode) and hint is None:
        hint = _HINTS[0][1]
    return CaptureError(
        f"the model cannot be captured: {type(error).__name__}: {reason}",
        module=module,
        source=source,
        remedy=hint or "make the forward exportable: torch.export.export(model, args, strict=False) must succeed",
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else "no message"


def _origin(trace: TracebackType | None, model: nn.Module) -> tuple[str | None, str | None]:
    """`file:line` of the last frame that is the user's, and the path of the innermost module on the way to it."""
    names = {id(m): name for name, m in model.named_modules()}
    source = module = None
    for frame, line in traceback.walk_tb(trace):
        held = frame.f_locals.get("self")
        if isinstance(held, nn.Module) and id(held) in names:
            module = names[id(held)] or type(held).__name__
        filename = frame.f_code.co_filename
        if not filename.startswith((_TORCH, _OURS)) and os.path.exists(filename):
            source = f"{filename}:{line}"
    return source, module


def user_line(stack_trace: str | None) -> str:
    """`file:line` of the last frame outside torch in a node's recorded stack trace; "" if there is none."""
    found = ""
    for line in (stack_trace or "").splitlines():
        text = line.strip()
        if not text.startswith('File "'):
            continue
        filename, _, rest = text[6:].partition('"')
        if filename.startswith((_TORCH, _OURS, "torch" + os.sep)) or "<eval_with_key>" in filename:
            continue
        number = rest.partition("line ")[2].partition(",")[0]
        found = f"{filename}:{number}"
    return found
