"""`graphrewrite new`: a package that installs, passes its own tests and works through `compile`."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import venv

import pytest

import graphrewrite
from cli_run import Run, run_fixture

run = run_fixture
ROOT = pathlib.Path(__file__).parent.parent
SOURCES = pathlib.Path(graphrewrite.__file__).parent.parent

USE = {
    "rule": 'gr.compile(model, rule="{name}").loss(x, y).backward()',
    "pass": 'gr.compile(model, passes=["{name}"]).loss(x, y).backward()',
    "codec": 'assert isinstance(registry.find("codec", "{name}")(), gr.Codec)',
}


def _script(kind: str, name: str) -> str:
    return "\n".join(
        [
            "import torch, graphrewrite as gr",
            "from graphrewrite import registry",
            "model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))",
            "x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))",
            f'assert registry.known("{kind}")["{name}"] == "graphrewrite-{name.replace("_", "-")}"',
            USE[kind].format(name=name),
            'print("it works")',
        ]
    )


def _call(words: list[str], path: list[pathlib.Path], cwd: pathlib.Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", ["rule", "pass", "codec"])
@pytest.mark.slow
def test_a_new_package_installs_tests_itself_and_works(run: Run, tmp_path: pathlib.Path, kind: str) -> None:
    name = f"my_{kind}"
    data = run("new", kind, name.replace("_", "-"), "--into", str(tmp_path / "work"), "--json").data
    folder = pathlib.Path(data["folder"])
    assert folder == tmp_path / "work" / f"graphrewrite-my-{kind}"
    site = tmp_path / "site"
    words = ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(site), str(folder)]
    pip = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert pip.returncode == 0, pip.stderr
    path = [site, SOURCES]
    told = _call([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)], path, tmp_path)
    assert " passed" in told
    assert "failed" not in told
    assert _call([sys.executable, "-c", _script(kind, name)], path, tmp_path).strip() == "it works"


def test_what_is_written_is_told(run: Run, tmp_path: pathlib.Path) -> None:
    outcome = run("new", "rule", "echo", "--into", str(tmp_path))
    assert outcome.code == 0
    assert "pyproject.toml" in outcome.out
    assert "pip install -e" in outcome.out
    text = (tmp_path / "graphrewrite-echo" / "graphrewrite_echo" / "__init__.py").read_text()
    assert "class Echo(gr.Rule):" in text
    for file in (tmp_path / "graphrewrite-echo").rglob("*.*"):
        if file.is_file():
            assert "$" not in file.read_text()


def test_what_is_written_is_clean(run: Run, tmp_path: pathlib.Path) -> None:
    for kind in ("rule", "pass", "codec"):
        assert run("new", kind, f"a_{kind}", "--into", str(tmp_path)).code == 0
    for file in tmp_path.rglob("*.py"):
        compile(file.read_text(), str(file), "exec")
        assert max(len(line) for line in file.read_text().splitlines()) <= 120


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["rule", "Upper"], "'Upper' is no registry name"),
        (["rule", "class"], "'class' is no registry name"),
        (["rule", "dfa"], "there is a rule named 'dfa' already (built in)"),
        (["codec", "bf16"], "there is a codec named 'bf16' already"),
        (["pass", "fold-views"], "there is a pass named 'fold_views' already"),
    ],
)
def test_bad_names_are_one_line(run: Run, tmp_path: pathlib.Path, words: list[str], told: str) -> None:
    outcome = run("new", *words, "--into", str(tmp_path))
    assert (outcome.code, outcome.out) == (1, "")
    (line,) = outcome.err.splitlines()
    assert told in line
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(run: Run, tmp_path: pathlib.Path) -> None:
    assert run("new", "rule", "echo", "--into", str(tmp_path)).code == 0
    outcome = run("new", "rule", "echo", "--into", str(tmp_path))
    assert outcome.code == 1
    assert "is there already" in outcome.err
    file = tmp_path / "file"
    file.write_text("")
    outcome = run("new", "rule", "echo", "--into", str(file))
    assert outcome.code == 1
    assert "cannot write" in outcome.err
    assert run("new", "kernel", "echo").code == 2


@pytest.mark.slow
def test_a_new_rule_in_a_fresh_environment(run: Run, tmp_path: pathlib.Path) -> None:
    """`graphrewrite new` in an empty folder, then pip in a new environment that has torch from this one only."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=True, system_site_packages=False)
    python = str(home / "bin" / "python")
    # torch is large: the environment borrows what this one has, but installs both packages itself
    (site,) = home.glob("lib/python*/site-packages")
    borrowed = [p for p in sys.path if p.endswith("site-packages")]
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    # the setuptools that comes with a new environment may be too old to read a licence expression
    _call([python, "-m", "pip", "uninstall", "-q", "-y", "setuptools"], [], tmp_path)
    work = tmp_path / "empty"
    work.mkdir()
    _call([python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", str(ROOT)], [], work)
    _call([python, "-m", "graphrewrite.cli", "new", "rule", "fresh"], [], work)
    folder = work / "graphrewrite-fresh"
    _call([python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", str(folder)], [], work)
    assert " passed" in _call([python, "-m", "pytest", "-q", str(folder)], [], work)
    assert _call([python, "-c", _script("rule", "fresh")], [], work).strip() == "it works"
    listed = _call([python, "-m", "graphrewrite.cli", "rules"], [], work)
    assert "graphrewrite-fresh" in listed
