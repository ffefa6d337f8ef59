"""The loss that `compile` uses where none is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

from graphrewrite.errors import RuleError


def default_loss(outputs: Any, targets: Any) -> torch.Tensor:
    """Cross-entropy with the class dimension last: on a tensor, on `.logits`, or on `["logits"]`.

    Integer targets have the shape of the outputs without the last dimension (-100 is ignored); floating-point
    targets of the outputs' own shape are class probabilities.
    """
    logits = outputs
    if not isinstance(logits, torch.Tensor):
        logits = getattr(outputs, "logits", None)
        if logits is None and isinstance(outputs, Mapping):
            logits = outputs.get("logits")
    if not isinstance(logits, torch.Tensor) or not isinstance(targets, torch.Tensor):
        raise RuleError(
            f"the default loss cannot read outputs of type {type(outputs).__name__} with targets of type "
            f"{type(targets).__name__}",
            remedy="give loss=callable(outputs, targets) to compile",
        )
    if logits.dim() > 2:
        classes = logits.shape[-1]
        logits = logits.reshape(-1, classes)
        targets = targets.reshape(-1, classes) if targets.is_floating_point() else targets.reshape(-1)
    return F.cross_entropy(logits, targets)
