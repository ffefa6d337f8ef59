"""Common parts of rules whose blocks learn from objectives of their own."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import fx

from graphrewrite.errors import RuleError
from graphrewrite.graph.core import Block
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import LOSS_BLOCK, Target, UserInput, fix, hint, info, is_float, same_size, value
from graphrewrite.rule import FINER_BLOCKS

RMS_EPS = 1e-8


def rms_normalise(h: torch.Tensor) -> torch.Tensor:
    """H / (RMS(h) + 1e-8), over all dimensions but the first: no mean is removed, there is no affine part."""
    rms = h.square().mean(dim=tuple(range(1, h.dim())), keepdim=True).sqrt()
    return h / (rms + RMS_EPS)


def class_count(graph: JointGraph, given: int | None = None) -> int:
    """The number of classes: what is given, else the last dimension of the model's first output."""
    if given is not None:
        return given
    if not graph.model_outputs or value(graph.model_outputs[0]).dim() == 0:
        raise RuleError(
            "the model has no floating-point output with a class dimension, so the number of classes is unknown",
            remedy="give the rule's num_classes",
        )
    return fix(value(graph.model_outputs[0]).shape[-1])


def label_input(graph: JointGraph) -> fx.Node:
    """The targets as one integer class per sample."""
    targets = [n for s, n in graph.inputs.items() if isinstance(s, Target)]
    if not targets:
        raise RuleError(
            "this rule needs the targets in the graph", remedy="train with compiled.loss(x, y), give example_targets"
        )
    y = targets[0]
    if len(targets) > 1 or is_float(y) or value(y).dim() != 1:
        raise RuleError(
            f"this rule needs one integer class per sample as target, got {value(y).dtype} of {value(y).dim()} "
            "dimensions",
            remedy="pass a 1-d int64 tensor of class indices",
        )
    return y


def refuse_other_batches(values: Sequence[fx.Node], y: fx.Node) -> None:
    """Values that are compared with the labels row by row have as many rows: not the nodes of several graphs."""
    for node in values:
        rows, labels = value(node).shape[0], value(y).shape[0]
        if not same_size(rows, labels):
            raise RuleError(
                "this rule compares every row with a label of its own, and there are "
                f"{hint(labels)} labels for {hint(rows)} rows, numbers that need not be the same",
                node=node.name,
                module=info(node).module,
                remedy="give one label per row, or use a rule whose learning signal is the task's own loss (bp, dfa)",
            )


def float_input(graph: JointGraph) -> fx.Node:
    """The model's first floating-point input with a batch dimension."""
    inputs = [n for s, n in graph.inputs.items() if isinstance(s, UserInput)]
    for node in inputs:
        if is_float(node) and value(node).dim() > 1:
            return node
    kinds = ", ".join(str(value(n).dtype) for n in inputs) or "none"
    raise RuleError(
        f"this rule writes labels into a floating-point input, the model's inputs are: {kinds}",
        remedy="feed the embedding's output as input, or use another rule",
    )


def final_blocks(graph: JointGraph) -> set[str]:
    """Blocks that compute an output of the model which the loss (or the caller) reads."""
    return {info(n).block for n in graph.model_outputs} - {LOSS_BLOCK}


def hidden_blocks(graph: JointGraph, final: Collection[str] | None = None) -> list[Block]:
    """The running rule's blocks but the final ones; default: those of `final_blocks`.

    Raises:
        RuleError: There is none.
    """
    last = final_blocks(graph) if final is None else final
    hidden = [b for b in graph.rule_blocks() if b.name not in last]
    if not hidden:
        raise RuleError(
            "a local rule needs at least one block before the one that computes the output",
            remedy=FINER_BLOCKS,
        )
    return hidden


def refuse_blocks_before(graph: JointGraph, rule_blocks: Sequence[Block], rule: str) -> None:
    """Blocks of another rule in front of these would get no gradient: nothing comes back through a cut."""
    mine = {b.name for b in rule_blocks}
    first_foreign = next((b for b in graph.blocks if b.name not in mine), None)
    last_mine = max(b.index for b in rule_blocks)
    if first_foreign is not None and first_foreign.index < last_mine and first_foreign.name not in final_blocks(graph):
        raise RuleError(
            f"block {first_foreign.name} learns by {first_foreign.rule} but lies before blocks that learn by {rule}: "
            "no cotangent would reach it",
            module=first_foreign.name,
            remedy=f"let {rule} train everything up to its last block",
        )
