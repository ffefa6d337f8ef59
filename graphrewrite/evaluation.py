"""Looking into what a rule trained: what each block answers alone, and how sparse its activations are.

>>> block_accuracy(compiled, data.test)                                          # doctest: +SKIP
{'0': 0.951, '2': 0.972, '4': 0.974}
>>> sparsity(compiled, x)                                                        # doctest: +SKIP
{'0': 0.83, '2': 0.71}
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from graphrewrite.datasets import Split
from graphrewrite.errors import RuleError
from graphrewrite.graph.nodes import Tap
from graphrewrite.inputs import as_inputs
from graphrewrite.training import class_scores, count_right, in_batches

if TYPE_CHECKING:
    from graphrewrite.runtime.module import CompiledModule


def block_predictions(compiled: CompiledModule, x: Any) -> dict[str, torch.Tensor]:
    """What each block answers alone: the scores of its local head, its goodness for every class, its products.

    As with `predict`, no gradient is recorded, and the model runs in the mode it is in.

    Args:
        compiled: A model compiled with a rule whose blocks learn through answers of their own.
        x: As for `compiled.loss`.

    Returns:
        Block -> scores, classes last. The block that computes the model's output answers with it.

    Raises:
        RuleError: Blocks have no answers of their own under the rule.
    """
    found = _taps(compiled, "answers", x)
    if not found:
        raise RuleError(
            f"under {compiled.rules} blocks give no answer of their own",
            remedy="mono_forward, local_loss, lls, ff and forward_gnn have blocks that do",
        )
    return found


def block_accuracy(compiled: CompiledModule, split: Split, batch: int = 1024) -> dict[str, float]:
    """Share of targets to which each block alone gives the highest score, in eval mode; -100 does not count.

    Args:
        compiled: As for `block_predictions`.
        split: Inputs and integer targets.
        batch: Samples at once; inputs and targets that do not share their first size (graphs) are one batch.
    """
    was_training = compiled.training
    compiled.eval()
    right: dict[str, int] = {}
    total = 0
    for piece in in_batches(split, batch):
        for block, scores in block_predictions(compiled, piece.x).items():
            hits, counted = count_right(class_scores(scores), piece.y)
            right[block] = right.get(block, 0) + hits
        total += counted
    compiled.train(was_training)
    return {block: hits / max(total, 1) for block, hits in right.items()}


def sparsity(compiled: CompiledModule, x: Any) -> dict[str, float]:
    """Share of zeros in the activations that each block hands on, in the forward that `predict` runs.

    Args:
        compiled: Any compiled model.
        x: As for `compiled.loss`.

    Returns:
        Block -> share, for the blocks that others read.
    """
    return {block: share.item() for block, share in _taps(compiled, "sparsity", x).items()}


def _taps(compiled: CompiledModule, kind: Literal["answers", "sparsity"], x: Any) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        results = compiled.run_forward(kind, as_inputs(x))
    return {spec.name: held for spec, held in results.items() if isinstance(spec, Tap)}
