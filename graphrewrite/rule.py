"""Learning rules: passes that change which cotangent or gradient flows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

from torch import fx

from graphrewrite import textform
from graphrewrite.errors import RuleError
from graphrewrite.graph.core import Block
from graphrewrite.graph.joint import JointGraph
from graphrewrite.pipeline import Pass

FINER_BLOCKS = "choose finer blocks: blocks='layers' or a list of module globs; frozen ones do not count"
"""The remedy where a model was cut into too few blocks."""


@dataclass(frozen=True)
class Rule(Pass):
    """A pass at the operator level that trains the blocks assigned to it.

    `run(graph)` acts on `graph.rule_blocks()` only, so that a map from module glob to rule needs no special case.

    Class attributes:
        formula: The rule in one line.
        objective: `"global"`: blocks learn from the task loss; `"local"`: from losses of their own.
        needs_loss: Whether the loss must be in the graph: training works through `compiled.loss` only.
        changes_forward: Whether the trained network is read through another forward than the model's own.
        trains_feedback: Whether the rule has a phase of its own, between steps, in which feedback weights learn.
        early_backward: Whether blocks learn from what is known before the task loss, so that their backward can run in
            the forward; always so for local objectives.
        learns_state: Whether the rule has trainable state, so that `compiled.parameters()` grows when it is created.
    """

    level = "operator"
    formula: ClassVar[str] = ""
    objective: ClassVar[Literal["global", "local"]] = "global"
    needs_loss: ClassVar[bool] = False
    changes_forward: ClassVar[bool] = False
    trains_feedback: ClassVar[bool] = False
    early_backward: ClassVar[bool] = False
    learns_state: ClassVar[bool] = False

    @property
    def feedback_interval(self) -> int:
        """Training calls from one automatic feedback phase to the next; 0: none."""
        return 0

    def rewrite_feedback(self, graph: JointGraph) -> None:
        """For rules with `trains_feedback`: turn a captured forward graph into the feedback phase.

        What the phase does is `update_state`; everything else is dropped from the graph.
        """

    def rewrite_forward(self, graph: JointGraph) -> None:
        """For rules with `changes_forward`: turn a captured forward graph into what `predict` computes."""

    def block_answers(self, graph: JointGraph) -> dict[str, fx.Node]:
        """For rules whose blocks can answer alone: put class scores of each block into a captured forward graph.

        Returns:
            Block -> its scores, classes last; empty where blocks have no answer of their own.
        """
        del graph
        return {}

    def state_name(self, name: str) -> str:
        """The full name of a piece of this rule's state."""
        return f"{self.name}.{name}"


RuleSpec = str | Rule | type[Rule]


@dataclass(frozen=True)
class RuleMap:
    """Which rule trains which block: `(module glob, rule)` pairs, first match wins; the last entry is the default."""

    entries: tuple[tuple[str, Rule], ...]

    @staticmethod
    def of(rule: RuleSpec | Mapping[str, RuleSpec]) -> RuleMap:
        """From what `compile(rule=)` accepts. Modules that no glob matches learn by backpropagation."""
        if isinstance(rule, Mapping):
            entries = [(glob, build_rule(one)) for glob, one in rule.items()]
            return RuleMap((*entries, ("*", build_rule("bp"))))
        return RuleMap((("*", build_rule(rule)),))

    @property
    def rules(self) -> list[Rule]:
        """Each rule once, in order of its first entry."""
        return list(dict.fromkeys(rule for _, rule in self.entries))

    def assign(self, graph: JointGraph) -> None:
        """Write each block's rule into the graph.

        Raises:
            RuleError: A glob matches no block.
        """
        hits = [0] * len(self.entries)
        blocks: list[Block] = []
        for block in graph.blocks:
            number = next(i for i, (glob, _) in enumerate(self.entries) if _matches(block.name, glob))
            hits[number] += 1
            key = self.rules.index(self.entries[number][1])
            blocks.append(Block(block.name, block.index, str(self.entries[number][1]), key))
        named = self.entries[:-1] if len(self.entries) > 1 else ()
        for (glob, rule), count in zip(named, hits, strict=False):
            if count == 0:
                names = ", ".join(b.name for b in graph.blocks)
                raise RuleError(f"the glob {glob!r} of rule {rule} matches no block", remedy=f"blocks: {names}")
        graph.blocks = blocks

    def in_use(self, graph: JointGraph) -> list[tuple[int, Rule]]:
        """The rules that train at least one block, with their keys."""
        keys = {block.rule_key for block in graph.blocks}
        return [(i, rule) for i, rule in enumerate(self.rules) if i in keys]

    def __str__(self) -> str:
        if len(self.entries) == 1:
            return str(self.entries[0][1])
        return ", ".join(f"{glob}: {rule}" for glob, rule in self.entries[:-1])


def _matches(name: str, glob: str) -> bool:
    """A glob matches a block by its name, by that of a module around it, or by the call of a module (`layer@1`)."""
    plain = name.partition("@")[0].partition("#")[0]
    return fnmatchcase(name, glob) or fnmatchcase(plain, glob) or plain.startswith(glob + ".")


def build_rule(what: Any) -> Rule:
    """A rule from its name, text form, class or object."""
    rule = textform.build("rule", what)
    if not isinstance(rule, Rule):
        raise RuleError(f"{what!r} is no rule", remedy="pass a registered name, a text form or a Rule object")
    return rule


def select(names: Sequence[str], only: Sequence[str] = (), skip: Sequence[str] = ()) -> list[str]:
    """The names that match a glob of `only` (all, if empty) and none of `skip`; unmatched globs are errors."""
    for glob in (*only, *skip):
        if not any(fnmatchcase(name, glob) for name in names):
            raise RuleError(f"the glob {glob!r} matches no module", remedy=f"modules: {', '.join(names[:12])}")
    return [
        name
        for name in names
        if (not only or any(fnmatchcase(name, g) for g in only)) and not any(fnmatchcase(name, g) for g in skip)
    ]
