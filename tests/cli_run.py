"""Running the `graphrewrite` command inside the tests' own process."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from graphrewrite.cli.app import app

TARGETS = str(pathlib.Path(__file__).with_name("targets.py"))


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


Run = Callable[..., Outcome]


@pytest.fixture(name="run")
def run_fixture(capsys: pytest.CaptureFixture[str]) -> Run:
    """The command. A word that starts with ":" is a factory of `targets.py`."""

    def invoke(*words: str) -> Outcome:
        args = [TARGETS + word if word.startswith(":") else word for word in words]
        with pytest.raises(SystemExit) as stop:
            app(args)
        out, err = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), out, err)

    return invoke
