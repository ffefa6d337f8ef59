"""Files that commands write: found out to be unwritable before the work, not after it."""

from __future__ import annotations

import os
from pathlib import Path

from graphrewrite.errors import GraphRewriteError


def check_file(path: Path | None) -> None:
    """Refuse a file that cannot be written; None is no file."""
    if path is None:
        return
    folder = path.parent
    if path.is_dir():
        raise GraphRewriteError(f"cannot write {path}: it is a folder", remedy="name a file")
    if not folder.is_dir():
        raise GraphRewriteError(f"cannot write {path}: there is no folder {folder}", remedy="make the folder first")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise GraphRewriteError(f"cannot write {path}: permission denied", remedy="name another file")


def write_file(path: Path, text: str) -> None:
    """Write a file; what goes wrong is told in one line."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise GraphRewriteError(f"cannot write {path}: {error.strerror}", remedy="name another file") from error
