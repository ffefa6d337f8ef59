"""Launch configurations, tried once per shape class on a GPU; the first one under the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import triton
from graphrewrite.backends.triton.support import interpreting


def tuned(configs: Sequence[Any], key: Sequence[str], **options: Any) -> Callable[[Any], Any]:
    """`triton.autotune`; without a GPU there is nothing to measure."""
    wrapped: Callable[[Any], Any] = triton.autotune(
        configs=list(configs[:1] if interpreting() else configs), key=list(key), **options
    )
    return wrapped
