"""Dumped graphs: runnable Python that computes what the program computes."""

from __future__ import annotations

import ast
import importlib.util
import json
import pathlib
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import graphrewrite as gr
from cli_run import Run, run_fixture
from graphrewrite.observe import observing
from graphrewrite.report.dump import Dumper
from graphrewrite.report.source import to_python

run = run_fixture


def load(file: pathlib.Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Net(nn.Module):
    """A convolution, a normalisation with statistics, a residual sum, dropout and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.up = nn.Linear(3 * 16, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.norm(self.conv(x)))
        h = (h + x).flatten(1)
        return self.head(torch.nn.functional.gelu(self.up(h)))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(6, 1, 4, 4), torch.randint(0, 5, (6,))


def dumped(folder: pathlib.Path, rule: str, model: nn.Module | None = None, **options: Any):
    """A compiled model, the folder of its program, its values by what they are, and the results of a step."""
    model = model or Net()
    x, y = batch()
    with observing(Dumper(folder)) as dumper:
        compiled = gr.compile(model, rule, example_inputs=x, example_targets=y, **options)
    values = {f"parameter {n}": p.detach().clone() for n, p in model.named_parameters()}
    values |= {f"buffer {n}": b.clone() for n, b in model.named_buffers()}
    values |= {f"state {n}": s.detach().clone() for n, s in compiled.rule_state.items()}
    values |= {"input x": x, "target y": y, "cotangent of loss": torch.ones(())}
    values["counter (seed, step, rank)"] = torch.tensor([0, 0, 0])
    loss = compiled.loss(x, y)
    loss.backward()
    results = {f"gradient of parameter {n}": p.grad for n, p in model.named_parameters()}
    results |= {f"update of buffer {n}": b for n, b in model.named_buffers()}
    results["loss"] = loss.detach()
    return dumper.written[-1], values, results


def feed(module: ModuleType, values: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(module.OUTPUTS, module.run(*[values[what] for what in module.INPUTS]), strict=True))


@pytest.mark.parametrize("rule", ["bp", "dfa", "ff"])
def test_every_joint_graph_computes_what_the_program_computes(tmp_path: pathlib.Path, rule: str) -> None:
    """Bitwise, from differentiation to the last pass: at both levels, on real values."""
    folder, values, expected = dumped(tmp_path, rule)
    files = sorted(folder.glob("[0-9]*.py"))
    first = 1 if rule == "bp" else 2  # before the rule ran it is another rule's graph
    assert len(files) > first + 2
    for file in [*files[first:], folder / "operator.py"]:
        results = feed(load(file), values)
        compared = 0
        for what, held in results.items():
            if what in expected:
                assert torch.equal(held.detach(), expected[what]), f"{what} in {file.name}"
                compared += 1
        assert compared >= len(expected), file.name


@pytest.mark.parametrize("rule", ["bp", "ff"])
def test_the_stages_hand_on_what_they_save(tmp_path: pathlib.Path, rule: str) -> None:
    folder, values, expected = dumped(tmp_path, rule)
    forward, backward = load(folder / "forward.py"), load(folder / "backward.py")
    first = feed(forward, values)
    assert torch.equal(first["loss"], expected["loss"])
    saved = [held for what, held in first.items() if what.startswith("tap saved ")]
    given = [held.clone() if isinstance(held, torch.Tensor) else held for held in saved]
    results = dict(zip(backward.OUTPUTS, backward.run(*given, values["cotangent of loss"]), strict=True))
    assert len(results) == len([what for what in expected if what.startswith("gradient")])
    for what, held in results.items():
        assert torch.equal(held, expected[what]), what


@pytest.mark.slow
def test_files_run_as_scripts_with_torch_alone(tmp_path: pathlib.Path) -> None:
    folder, _, _ = dumped(tmp_path, "dfa")
    for name in ("operator.py", "backward.py"):
        text = (folder / name).read_text()
        assert "graphrewrite" not in text.partition("INPUTS = [")[0]
        done = subprocess.run([sys.executable, name], cwd=folder, capture_output=True, text=True, check=True)
        assert "gradient of parameter conv.weight: (3, 1, 3, 3)" in done.stdout


def test_the_user_s_modules_and_lines_are_told(tmp_path: pathlib.Path) -> None:
    folder, _, _ = dumped(tmp_path, "bp")
    text = (folder / "operator.py").read_text()
    assert "# module up, " in text
    assert "#   return self.head(torch.nn.functional.gelu(self.up(h)))" in text
    assert "--- backward of block" in text


def test_metadata_lies_beside_each_file(tmp_path: pathlib.Path) -> None:
    folder, _, _ = dumped(tmp_path, "ff")
    about = json.loads((folder / "program.json").read_text())
    assert about["kind"] == "loss"
    assert [s["step"] for s in about["steps"]][:4] == ["capture", "differentiate", "ff", "expand"]
    for step in about["steps"]:
        assert (folder / step["file"]).is_file()
    for file in folder.glob("*.py"):
        document = json.loads(file.with_suffix(".json").read_text())
        assert document["nodes"]
        calls = [n for n in document["nodes"] if n["op"] == "call"]
        function = next(
            d for d in ast.parse(file.read_text()).body if isinstance(d, ast.FunctionDef) and d.name == "run"
        )
        assert len([s for s in function.body if isinstance(s, ast.Assign)]) == len(calls)
    assert sum(one["bytes"] for one in about["saved"]) > 0


def test_a_custom_function_keeps_its_own_backward(tmp_path: pathlib.Path) -> None:
    class Triple(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, g):
            return 3 * g

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.high = nn.Linear(16, 6), nn.Linear(6, 5)

        def forward(self, x):
            return self.high(Triple.apply(torch.tanh(self.low(x.flatten(1)))))

    folder, values, expected = dumped(tmp_path, "bp", Odd())
    for name in ("operator.py", "03_fold_views.py"):
        results = feed(load(folder / name), values)
        assert torch.equal(results["gradient of parameter low.weight"], expected["gradient of parameter low.weight"])


def test_hostile_names_stay_comments() -> None:
    model = nn.Sequential()
    model.add_module("<b>torch</b>", nn.Linear(2, 3))
    made = gr.compile(model, example_inputs=torch.randn(2, 2), example_targets=torch.randint(0, 3, (2,)))
    text = to_python(made.graph("operator"), 'a """title""" \\ of\ntwo lines')
    names: dict[str, Any] = {"__name__": "dumped"}
    exec(compile(text, "dumped.py", "exec"), names)
    assert len(names["run"](*names["example"]())) == len(names["OUTPUTS"])


# --- the command and the environment variable ------------------------------------------------------------------------


def test_command_writes_and_lists_the_files(run: Run, tmp_path: pathlib.Path) -> None:
    told = run("dump", ":mlp", str(tmp_path / "a" / "b"), "--rule", "dfa")
    assert told.code == 0
    assert "00_capture.py  after capture" in told.out
    assert "drop_unread_statistics changed nothing" in told.out
    data = run("dump", ":mlp", str(tmp_path / "a" / "b"), "--rule", "dfa", "--json").data
    (program,) = data["programs"]
    assert pathlib.Path(program["folder"]) == tmp_path / "a" / "b" / "002_loss"
    assert (tmp_path / "a" / "b" / "001_loss" / "forward.py").is_file()


def test_a_folder_that_cannot_be_made_is_one_line(run: Run, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for place in (file, file / "below"):
        outcome = run("dump", ":mlp", str(place))
        assert (outcome.code, outcome.out) == (1, "")
        assert outcome.err.startswith(f"error: cannot write into {place}")
        assert len(outcome.err.splitlines()) == 1


def test_environment_variable_dumps_every_program(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHREWRITE_DUMP", str(tmp_path))
    x, y = batch()
    compiled = gr.compile(Net(), "ff")
    compiled.loss(x, y).backward()
    compiled.eval().predict(x)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["001_loss", "002_predict"]
    monkeypatch.delenv("GRAPHREWRITE_DUMP")
    gr.compile(Net(), "bp").materialize(x, y)
    assert len(list(tmp_path.iterdir())) == 2
    results = load(tmp_path / "002_predict" / "forward.py")
    assert len(results.run(*results.example())) == len(results.OUTPUTS)
