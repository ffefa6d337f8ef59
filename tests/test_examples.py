"""The scripts in examples/ run, each as a user would start it, and learn something."""

from __future__ import annotations

import pathlib
import re
import runpy
import sys
import warnings

import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "examples"

# the arguments, the modules it needs besides the package, and what its last line must say
SCRIPTS = {
    "plain_loop": (["--rule", "dfa", "--epochs", "4"], [], ("percent", 75.0)),
    "node_classification": (["--rule", "mono_forward", "--epochs", "30"], ["torch_geometric"], ("percent", 90.0)),
    "hf_trainer": (["--rule", "dfa", "--steps", "12"], ["transformers", "accelerate"], ("loss", 5.53)),
    "lightning_module": (["--rule", "mono_forward", "--epochs", "3"], ["lightning"], ("percent", 80.0)),
    "accelerate_loop": (["--rule", "kp", "--epochs", "3"], ["accelerate"], ("percent", 75.0)),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_example_runs_and_learns(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    arguments, needed, (kind, limit) = SCRIPTS[name]
    for module in needed:
        pytest.importorskip(module)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GRAPHREWRITE_DATA", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    last = capsys.readouterr().out.strip().splitlines()[-1]
    if kind == "percent":
        assert float(re.search(r"([\d.]+) %", last)[1]) > limit, last
    else:
        # log(256) = 5.545 is the loss of knowing nothing about bytes
        assert float(re.search(r"steps: ([\d.]+)", last)[1]) < limit, last


def test_every_example_is_run() -> None:
    distributed = {"ddp", "local_pipeline", "pipeline"}
    assert {p.stem for p in FOLDER.glob("*.py")} - distributed == set(SCRIPTS)
