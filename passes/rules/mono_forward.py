"""Mono-Forward: every block learns through a matrix of its own that maps its output to the classes."""

from __future__ import annotations

from dataclasses import dataclass

from graphrewrite.passes.rules._heads import Head, HeadRule
from graphrewrite.passes.rules._local_heads import Pred, Tokens


@dataclass(frozen=True)
class MonoForward(HeadRule):
    """Cut the blocks from each other and teach each hidden one through logits M_l h_l, judged by the task's own loss.

    W_l and M_l learn together; nothing is normalised and there is one forward pass. The last block is trained by the
    task loss. This is `local_loss{head=pred}` with another start and without a bias.

    Args:
        features: Maps are average-pooled until at most this many features remain.
        tokens: Which token of a sequence with one answer is read: the `"mean"` of all, the `"first"`, the `"last"`.
    """

    features: int = 2048
    tokens: Tokens = "mean"

    name = "mono_forward"
    summary = "Mono-Forward: local logits M_l h_l for every block, one forward pass"
    formula = "L_l = loss(M_l h_l, y),  M_l ~ N(0, 2/n_l),  h_l cut"
    paper = "Gong, Li, Abdulla: Mono-Forward: Backpropagation-Free Algorithm for Efficient Neural Network Training"

    def make_head(self) -> Head:
        """M_l."""
        return Pred(start="normal", bias=False, features=self.features, tokens=self.tokens)
