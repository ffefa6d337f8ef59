"""Class labels inside the graph: checked, coded, written into inputs, and turned into negative samples.

A label of -100 means "no label": its code is the neutral one and its sample has no part in any loss.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from graphrewrite import random
from graphrewrite.errors import RuleError

NO_LABEL = -100

_LIBRARY = torch.library.Library("graphrewrite", "FRAGMENT")
_LIBRARY.define("checked_labels(Tensor y, int classes) -> Tensor")


def _checked(y: torch.Tensor, classes: int) -> torch.Tensor:
    wrong = ((y < 0) & (y != NO_LABEL)) | (y >= classes)
    text = f"is out of range: the model tells {classes} classes apart, 0 to {classes - 1}"
    if y.is_cuda:  # no waiting for the device
        torch._assert_async(wrong.any().logical_not(), f"a label {text}")
    elif bool(wrong.any()):
        raise RuleError(
            f"label {int(y[wrong][0])} {text}", remedy=f"use labels in that range, {NO_LABEL} for samples without one"
        )
    return y.clone()


_LIBRARY.impl("checked_labels", _checked, "CompositeExplicitAutograd")
torch.library.register_fake("graphrewrite::checked_labels", lambda y, classes: torch.empty_like(y), lib=_LIBRARY)


def checked_labels(y: torch.Tensor, classes: int) -> torch.Tensor:
    """The labels themselves; when it runs, labels out of range raise `RuleError` (on CUDA: an assertion)."""
    return torch.ops.graphrewrite.checked_labels(y, classes)  # type: ignore[no-any-return]


def codes(y: torch.Tensor, classes: int, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """One-hot codes times `scale`, (batch, classes); the neutral one, scale / classes each, where there is no label."""
    hot = (y.unsqueeze(1) == torch.arange(classes, device=y.device)).to(dtype) * scale
    return torch.where((y == NO_LABEL).unsqueeze(1), scale / classes, hot)


def overlay(x: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """Write a class code over the first elements of each sample: the first pixels of the first row.

    Args:
        x: Samples, (batch, ...), at least as many elements each as there are classes.
        code: One-hot or neutral class codes, (batch, classes).
    """
    flat = x.flatten(1)
    return torch.cat([code.to(x.dtype), flat[:, code.shape[1] :]], dim=1).reshape(x.shape)


def wrong_labels(y: torch.Tensor, classes: int, counter: torch.Tensor, stream: int) -> torch.Tensor:
    """A uniformly random class that is not y; no label where y is none."""
    return other_labels(y, classes, 1 + random.integers(counter, stream, y.shape, classes - 1))


def other_labels(y: torch.Tensor, classes: int, distance: torch.Tensor | int) -> torch.Tensor:
    """The class `distance` behind y, in a circle; no label where y is none."""
    return torch.where(y == NO_LABEL, y, (y + distance) % classes)


def hybrid_images(x: torch.Tensor, counter: torch.Tensor, stream: int, blurs: int) -> torch.Tensor:
    """Negative images: each one and the next one of the batch, mixed by a mask of large random regions.

    The mask is a random bit image, blurred `blurs` times with [1/4, 1/2, 1/4] in both directions and cut at 1/2, so
    that short-range correlations are those of real images and long-range ones are not.

    Args:
        x: Images, (batch, channels, height, width).
        counter: The (seed, step, rank) triple.
        stream: Random stream.
        blurs: How often the mask is blurred.
    """
    batch, _, height, width = x.shape
    bits = random.uniform(counter, stream, [batch, 1, height, width], x.dtype).round()
    row = x.new_ones(3) / 4 + F.one_hot(torch.ones((), dtype=torch.int64, device=x.device), 3) / 4
    kernel = torch.outer(row, row).to(x.dtype).reshape(1, 1, 3, 3)
    for _ in range(blurs):
        bits = F.conv2d(F.pad(bits, (1, 1, 1, 1), mode="replicate"), kernel)
    mask = bits > 0.5
    return torch.where(mask, x, x.roll(1, 0))
