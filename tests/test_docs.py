"""Every Python example of the README and of docs/ runs, and prints what the page says it prints."""

from __future__ import annotations

import contextlib
import io
import pathlib
import re
import warnings

import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def pages_with_examples() -> list[pathlib.Path]:
    return [page for page in PAGES if "```python" in page.read_text()]


@pytest.mark.parametrize("page", pages_with_examples(), ids=lambda page: page.name)
def test_examples_run(page: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "__main__"}
    printed = None
    for language, body in BLOCK.findall(page.read_text()):
        if language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(compile(body, str(page), "exec"), names)
            printed = out.getvalue()
        elif language == "text" and printed is not None:
            assert [line.rstrip() for line in printed.splitlines()] == [line.rstrip() for line in body.splitlines()]
            printed = None


def test_readme_has_the_two_commands() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert any(line.startswith("pip install") and "graphrewrite demo" in line for line in lines)
    assert any(line.startswith("pip install") and line.endswith("pytest") for line in lines)
