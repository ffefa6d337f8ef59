"""Common part of the passes that give operators another derivative, which needs less kept."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from graphrewrite.errors import RuleError
from graphrewrite.graph.codec import inside
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import Constant, Role, info
from graphrewrite.pipeline import Pass, PassResult


@dataclass(frozen=True)
class ApproximateBackward(Pass):
    """A pass at the operator level, behind the rules: the forward stays bitwise as it is, derivatives change.

    What it takes are operators of the model whose derivative is still their own and that a cotangent reaches.

    Args:
        only: Globs of module paths (`"*.mlp"`): operators of other modules are left alone.
        skip: Globs of module paths whose operators are left alone.
    """

    only: tuple[str, ...] = field(default=(), kw_only=True)
    skip: tuple[str, ...] = field(default=(), kw_only=True)

    formula: ClassVar[str] = ""

    @abstractmethod
    def rewrite(self, graph: JointGraph, wanted: Callable[[fx.Node], bool]) -> int:
        """Replace derivatives of operators that are `wanted`; returns of how many."""

    def run(self, graph: JointGraph) -> PassResult:
        """Find the operators and replace their derivatives."""
        if not graph.table.seeds:
            return PassResult(graph, False)
        modules = {info(n).module for n in graph.forward_nodes() if info(n).role is Role.FORWARD}
        for glob in (*self.only, *self.skip):
            if not any(inside(module, glob) for module in modules):
                known = ", ".join(sorted(m for m in modules if m)[:12])
                raise RuleError(f"the glob {glob!r} of {self.name} matches no module", remedy=f"modules: {known}")
        with graph.deferred():
            count = self.rewrite(graph, self._wanted)
        if not count:
            self.fail(graph, "found no operator whose derivative it replaces")
        return PassResult(graph, count > 0)

    def _wanted(self, node: fx.Node) -> bool:
        module = info(node).module
        if any(inside(module, glob) for glob in self.skip):
            return False
        return not self.only or self.named(node)

    def named(self, node: fx.Node) -> bool:
        """Whether the user asked for the operators of this module in particular."""
        return any(inside(info(node).module, glob) for glob in self.only)

    def untouched(self, graph: JointGraph, node: fx.Node) -> bool:
        """Whether an operator's derivative is its own; says so where it is not."""
        rows = graph.table.rows(node)
        if all(row.plain for row in rows):
            return True
        self.fail(graph, "its derivative was replaced already", node)
        return False


def shared_constant(graph: JointGraph, tensor: torch.Tensor, name: str) -> fx.Node:
    """A constant of the graph, one for all that read the same numbers."""
    for spec, node in graph.inputs.items():
        known = graph.constants.get(spec.name) if isinstance(spec, Constant) else None
        if known is None or (known.dtype, known.device) != (tensor.dtype, tensor.device):
            continue
        if torch.equal(known, tensor):
            return node
    return graph.constant(tensor, name)
