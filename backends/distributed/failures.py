"""Telling that another process is gone from an error of one's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist

from graphrewrite.errors import GraphRewriteError

_SIGNS = ("closed by peer", "connection reset", "broken pipe", "timed out", "timeout", "socket", "gloo", "nccl")


class LostProcessError(GraphRewriteError):
    """Another process of the job ended, or did not answer within the timeout of the process group."""


@contextlib.contextmanager
def naming_lost_processes(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Say what it means when communication fails.

    Raises:
        LostProcessError: Communication failed inside.
    """
    try:
        yield
    except GraphRewriteError:
        raise
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, dist.DistError) and not any(sign in text.lower() for sign in _SIGNS):
            raise
        raise LostProcessError(
            f"process {dist.get_rank(group)} lost another process of the job, which ended, or did not answer within "
            f"the timeout of its process group: {text.splitlines()[0]}",
            remedy="look at that process's own error; end this one, and go on from the last checkpoint "
            "(graphrewrite.backends.distributed.checkpoint). The timeout is that of init_process_group(timeout=)",
        ) from error
