"""The one error family of graphrewrite.

Every error names what went wrong and, where known, the graph node, the module path of the user's model, the
source line, and what to do about it.
"""

from __future__ import annotations


class GraphRewriteError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        message: What went wrong, in one sentence.
        node: Name of the graph node concerned.
        module: Path of the user's submodule concerned (`"encoder.layers.3"`).
        source: `file:line` of the user's code concerned.
        remedy: What the user can do about it.
    """

    def __init__(
        self,
        message: str,
        *,
        node: str | None = None,
        module: str | None = None,
        source: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.message = message
        self.node = node
        self.module = module
        self.source = source
        self.remedy = remedy
        places = [f"{label} {value}" for label, value in (("node", node), ("module", module), ("at", source)) if value]
        text = message if not places else f"{message} [{', '.join(places)}]"
        if remedy:
            text += f"\n  remedy: {remedy}"
        super().__init__(text)


class CaptureError(GraphRewriteError):
    """The model could not be turned into a graph (data-dependent control flow, unsupported hooks, ...)."""


class RuleError(GraphRewriteError):
    """A rule, pass or codec was asked for something it is not defined on, or was given a wrong option."""


class VerifyError(GraphRewriteError):
    """A graph broke an invariant of the intermediate representation; the pass that broke it is named."""


class BackendError(GraphRewriteError):
    """A backend cannot lower a graph, or is not available on this machine."""
