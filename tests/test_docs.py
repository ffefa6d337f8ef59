"""Every example of the README and of docs/ runs, and prints what the page says it prints.

* `python` blocks run one after the other; a `text` block behind one is what it prints.
* A `python file=NAME` block is written to that file instead.
* A `console` block holds a command after `$ ` and what it prints, where `...` stands for anything.
"""

from __future__ import annotations

import contextlib
import io
import pathlib
import re
import shlex
import sys
import warnings

import pytest
import torch

from graphrewrite.cli.app import app

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def pages_with_examples() -> list[pathlib.Path]:
    return [page for page in PAGES if "```python" in page.read_text() or "```console" in page.read_text()]


@pytest.mark.parametrize("page", pages_with_examples(), ids=lambda page: page.name)
def test_examples_run(
    page: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "__main__"}
    printed = None
    for language, file, body in BLOCK.findall(page.read_text()):
        if file:
            (tmp_path / file).write_text(body)
        elif language == "console":
            command, _, wanted = body.removeprefix("$ graphrewrite ").partition("\n")
            with pytest.raises(SystemExit):
                app(shlex.split(command))
            shown = capsys.readouterr()
            assert_matches(shown.out + shown.err, wanted)
        elif language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(compile(body, str(page), "exec"), names)
            printed = out.getvalue()
        elif language == "text" and printed is not None:
            assert [line.rstrip() for line in printed.splitlines()] == [line.rstrip() for line in body.splitlines()]
            printed = None
    assert torch.get_num_threads() == threads


def assert_matches(shown: str, wanted: str) -> None:
    pattern = "".join(".*" if part == "..." else re.escape(part) for part in re.split(r"(\.\.\.)", wanted.rstrip()))
    assert re.fullmatch(pattern, shown.rstrip(), re.DOTALL), f"wanted:\n{wanted}\nprinted:\n{shown}"


def test_readme_has_the_two_commands() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert any(line.startswith("pip install") and "graphrewrite demo" in line for line in lines)
    assert any(line.startswith("pip install") and line.endswith("pytest") for line in lines)
