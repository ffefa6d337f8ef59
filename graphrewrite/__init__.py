"""graphrewrite: change how a PyTorch model learns, by rewriting its backward graph.

>>> import graphrewrite as gr
>>> compiled = gr.compile(model, rule="dfa")           # doctest: +SKIP
>>> compiled.loss(x, y).backward()                     # doctest: +SKIP
"""

from __future__ import annotations

import importlib
import pathlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Block",
    "CaptureError",
    "Codec",
    "CompiledModule",
    "GraphRewriteError",
    "Inputs",
    "JointGraph",
    "Pass",
    "PassManager",
    "PassResult",
    "Rule",
    "RuleError",
    "SavedCodec",
    "VerifyError",
    "__version__",
    "compile",
    "default_loss",
    "register",
]

_HERE = pathlib.Path(__file__).resolve().parent
if (_HERE.parent / "passes" / "rules").is_dir() and (_HERE.parent / "backends").is_dir():
    # in a checkout, `passes` and `backends` lie beside this package; installed, they lie inside it
    __path__.append(str(_HERE.parent))

# name -> module; resolved on first use, so that `graphrewrite --help` never imports torch
_PUBLIC = {
    "compile": "graphrewrite.api",
    "default_loss": "graphrewrite.objective",
    "CompiledModule": "graphrewrite.runtime.module",
    "Inputs": "graphrewrite.inputs",
    "JointGraph": "graphrewrite.graph.joint",
    "Block": "graphrewrite.graph.core",
    "Codec": "graphrewrite.graph.codec",
    "SavedCodec": "graphrewrite.graph.codec",
    "Pass": "graphrewrite.pipeline",
    "PassManager": "graphrewrite.pipeline",
    "PassResult": "graphrewrite.pipeline",
    "Rule": "graphrewrite.rule",
    "register": "graphrewrite.registry",
    "GraphRewriteError": "graphrewrite.errors",
    "CaptureError": "graphrewrite.errors",
    "RuleError": "graphrewrite.errors",
    "VerifyError": "graphrewrite.errors",
    "BackendError": "graphrewrite.errors",
}


if TYPE_CHECKING:
    from graphrewrite.api import compile
    from graphrewrite.errors import BackendError, CaptureError, GraphRewriteError, RuleError, VerifyError
    from graphrewrite.graph.codec import Codec, SavedCodec
    from graphrewrite.graph.core import Block
    from graphrewrite.graph.joint import JointGraph
    from graphrewrite.inputs import Inputs
    from graphrewrite.objective import default_loss
    from graphrewrite.pipeline import Pass, PassManager, PassResult
    from graphrewrite.registry import register
    from graphrewrite.rule import Rule
    from graphrewrite.runtime.module import CompiledModule


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
