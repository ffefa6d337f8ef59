"""Local auxiliary losses: every block learns through a head, of which there is a choice."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from graphrewrite.passes.rules._heads import Head, HeadRule

from graphrewrite import registry, textform
from graphrewrite.errors import RuleError

HEADS = {
    "pred": "graphrewrite.passes.rules._local_heads:Pred",
    "sim": "graphrewrite.passes.rules._local_heads:Sim",
    "predsim": "graphrewrite.passes.rules._local_heads:PredSim",
    "dgl": "graphrewrite.passes.rules._local_heads:Dgl",
    "aug_local": "graphrewrite.passes.rules._aug_local:AugLocal",
    "target_projection": "graphrewrite.passes.rules._local_heads:TargetProjection",
}


@dataclass(frozen=True)
class LocalLoss(HeadRule):
    """Cut the blocks from each other and teach each hidden one by a local loss on its output.

    The last block is trained by the task loss. Prediction heads use that same loss, so soft labels, regression and
    ignored targets work for them as they do for the model.

    Args:
        head: `"pred"`, `"sim"`, `"predsim"`, `"dgl"`, `"aug_local"`, `"target_projection"`, each with options in braces
            (`"predsim{beta=0.9}"`); `"package.module:MyHead"`; or a `Head` object or class.
    """

    head: str | Head | type[Head] = "predsim"

    name = "local_loss"
    summary = "local auxiliary losses: a head on every block (pred, sim, predsim, dgl, aug_local, ...)"
    formula = "L_l = (1−β) loss(D h_l, y) + β ‖S(A h_l) − S(onehot y)‖²  (predsim)"
    paper = (
        "Nøkland, Eidnes 2019; Belilovsky et al. 2020 (dgl); Ma et al. 2024 (aug_local); tpSGD 2021 (target_projection)"
    )

    def __post_init__(self) -> None:
        """Know the head, or say which there are."""
        self.make_head()

    def make_head(self) -> Head:
        """The chosen head."""
        return build_head(self.head)


def build_head(what: Any) -> Head:
    """A head from its name, text form, import path, class or object."""
    options: dict[str, Any] = {}
    made = what
    if isinstance(what, str):
        path, brace, rest = what.partition("{")
        if ":" in path:
            made = registry.load(path)
            _, options = textform.split_text("head" + brace + rest)
        else:
            name, options = textform.split_text(what)
            if name not in HEADS:
                raise RuleError(
                    f"no head is named {name!r}", remedy=f"known: {', '.join(HEADS)}, or package.module:MyHead"
                )
            made = registry.load(HEADS[name])
    if isinstance(made, type) and issubclass(made, Head):
        wrong = sorted(set(options) - {f.name for f in dataclasses.fields(made)})
        if wrong:
            fields = ", ".join(f.name for f in dataclasses.fields(made)) or "none"
            raise RuleError(f"head {what!r} has no option {wrong[0]!r}", remedy=f"its options are: {fields}")
        made = made(**options)
    if not isinstance(made, Head):
        raise RuleError(f"{what!r} is no head", remedy="derive it from graphrewrite.passes.rules.local_loss.Head")
    return made
