"""Every command's `--json` is what its published schema says, on real targets; and `--help` imports no torch."""

from __future__ import annotations

import copy
import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest

import graphrewrite
from cli_run import Run, run_fixture
from graphrewrite.cli.app import app

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed (the test extra)")

run = run_fixture
FOLDER = pathlib.Path(graphrewrite.__file__).parent / "report" / "schemas"
FAST = ("--epochs", "1", "--batch", "20", "--threads", "1")

CALLS = {
    "inspect": [
        ["inspect", ":mlp", "--rule", "dfa"],
        ["inspect", ":deep", "--level", "forward"],
        ["inspect", ":mlp", "--rule", "ff", "--level", "aten"],
        ["inspect", ":tokens", "--level", "backward"],
    ],
    "diff": [["diff", ":mlp", "--rule", "dfa"], ["diff", ":mlp", "--rule", "dfa", "--pass", "dfa"]],
    "explain": [["explain", ":deep", "--rule", "ff"]],
    "certify": [["certify", ":mlp", "--rule", "dfa"], ["certify", ":tokens", "--rule", "bp"]],
    "memory": [["memory", ":deep"], ["memory", ":mlp", "--rule", "ff", "--measure"]],
    "schedule": [["schedule", ":deep", "--rule", "ff"], ["schedule", ":untaught"]],
    "pipeline": [["schedule", ":deep", "--pipeline", "ZBVZeroBubble", "--stages", "4"]],
    "dump": [["dump", ":mlp", "{folder}/dump"]],
    "compare": [["compare", ":separable", "--rules", "bp,dfa", *FAST]],
    "rules": [["rules"]],
    "passes": [["passes"]],
    "codecs": [["codecs"]],
    "new": [["new", "rule", "echo", "--into", "{folder}"]],
}


def schema(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text())


@pytest.mark.parametrize("name", sorted(p.stem for p in FOLDER.glob("*.json")))
def test_schemas_are_schemas(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(schema(name))
    assert schema(name)["description"]


@pytest.mark.parametrize(("name", "words"), [(name, words) for name, calls in CALLS.items() for words in calls])
def test_output_follows_its_schema(run: Run, tmp_path: pathlib.Path, name: str, words: list[str]) -> None:
    data = run(*[word.replace("{folder}", str(tmp_path)) for word in words], "--json").data
    jsonschema.validate(data, schema(name), cls=jsonschema.Draft202012Validator)


def test_documents_of_a_dump_follow_theirs(run: Run, tmp_path: pathlib.Path) -> None:
    assert run("dump", ":mlp", str(tmp_path), "--rule", "ff").code == 0
    files = [p for p in tmp_path.rglob("*.json") if p.name != "program.json"]
    assert len(files) > 6
    for file in files:
        jsonschema.validate(json.loads(file.read_text()), schema("graph"), cls=jsonschema.Draft202012Validator)


def test_schemas_notice_what_is_missing_or_wrong(run: Run) -> None:
    data = run("inspect", ":mlp", "--json").data
    for spoil in (
        lambda d: d["nodes"][0].pop("bytes"),
        lambda d: d["nodes"][0].update(role="other"),
        lambda d: d["nodes"][0].update(bytes=-1),
        lambda d: d.update(unknown=1),
    ):
        wrong = copy.deepcopy(data)
        spoil(wrong)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema("inspect"), cls=jsonschema.Draft202012Validator)


def test_every_command_with_json_has_a_schema() -> None:
    for command in app.registered_commands:
        # a demo is a comparison, which is validated
        name = {"demo": "compare"}.get(command.name, command.name)
        assert (FOLDER / f"{name}.json").is_file()
        assert name in CALLS


def test_help_of_every_command_imports_no_torch() -> None:
    code = """
import sys
from graphrewrite.cli.app import app
names = [command.name for command in app.registered_commands]
for words in [["--help"], *[[name, "--help"] for name in names]]:
    try:
        app(words)
    except SystemExit as stop:
        assert not stop.code, words
heavy = {"torch", "numpy", "networkx", "jsonschema"} & set(sys.modules)
assert not heavy, heavy
print(len(names))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) == len(app.registered_commands)
