"""The package: what a wheel holds, what importing costs, and that every public name resolves."""

from __future__ import annotations

import ast
import importlib
import pathlib
import subprocess
import sys
import tomllib
import zipfile

import pytest

import graphrewrite as gr
from graphrewrite import registry
from graphrewrite.pipeline import Pass
from graphrewrite.rule import Rule

ROOT = pathlib.Path(__file__).resolve().parents[1]
PRIVATE = "torch._"
ALLOWED_PRIVATE = {"torch.utils._pytree", "torch.utils._python_dispatch"}
"""Underscored, but what the documentation of torch itself tells extension authors to use."""


def sources(*folders: str) -> list[pathlib.Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


# --- the wheel -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> set[str]:
    """Names of the files in a wheel that is built from the checkout; nothing is written into the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for part in ("graphrewrite", "passes", "backends", "pyproject.toml", "README.md", "LICENSE"):
        (source / part).symlink_to(ROOT / part)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(folder),
    ]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300, check=False)
    assert built.returncode == 0, built.stderr[-2000:]
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def test_wheel_holds_every_module(wheel):
    expected = {str(p.relative_to(ROOT)) for p in sources("graphrewrite")}
    expected |= {f"graphrewrite/{p.relative_to(ROOT)}" for p in sources("passes", "backends")}
    assert {n for n in wheel if n.endswith(".py")} == expected


def test_wheel_holds_what_is_no_module(wheel):
    assert "graphrewrite/py.typed" in wheel
    assert "graphrewrite/report/page.css" in wheel
    assert any(n.endswith("licenses/LICENSE") for n in wheel)
    assert any(n.endswith("entry_points.txt") for n in wheel)


def test_wheel_claims_one_import_name(wheel):
    assert {n.partition("/")[0] for n in wheel if ".dist-info/" not in n} == {"graphrewrite"}


def test_every_folder_with_modules_is_listed():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {p.parent.relative_to(ROOT) for p in sources("graphrewrite", "passes", "backends")}
    names = {".".join(f.parts) for f in folders}
    assert listed == {n if n.startswith("graphrewrite") else f"graphrewrite.{n}" for n in names}


# --- importing -------------------------------------------------------------------------------------------------------


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", ["", "--help", "--version", "compare --help", "rules --help"])
def test_help_imports_no_torch(command):
    if not command:
        code = "import graphrewrite, sys\nprint(graphrewrite.__version__, 'torch' in sys.modules)"
        assert run(code).split() == [gr.__version__, "False"]
        return
    code = (
        "import sys\nfrom graphrewrite.cli import main\n"
        f"sys.argv = ['graphrewrite', *{command.split()!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print('torch' in sys.modules)"
    )
    assert run(code).split()[-1] == "False"


def test_errors_import_no_torch():
    assert run("import sys\nfrom graphrewrite import GraphRewriteError\nprint('torch' in sys.modules)") == "False\n"


@pytest.mark.parametrize("name", gr.__all__)
def test_public_name_resolves(name):
    assert getattr(gr, name) is not None
    assert name in dir(gr)


def test_public_names_are_listed_once_and_the_same_everywhere():
    assert sorted(gr.__all__, key=str.lower) == sorted({*gr._PUBLIC, "__version__"}, key=str.lower)
    assert len(set(gr.__all__)) == len(gr.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = gr.nonsense


def test_version_is_the_projects():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == gr.__version__


@pytest.mark.parametrize("path", sources("graphrewrite", "passes", "backends"), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_can_be_imported_and_says_what_it_is_for(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    name = ".".join(parts if parts[0] == "graphrewrite" else ("graphrewrite", *parts))
    if parts[-1] == "__main__":
        assert ast.get_docstring(ast.parse(path.read_text()))  # importing it would run it
        return
    if "kernels" in parts and parts[-1] != "kernels":
        pytest.importorskip("triton")
    assert importlib.import_module(name).__doc__


# --- the registry ----------------------------------------------------------------------------------------------------


def builtin() -> list[tuple[str, str]]:
    kinds = ("rule", "pass", "codec", "backend")
    return [(kind, name) for kind in kinds for name, origin in registry.known(kind).items() if origin == "built in"]


@pytest.mark.parametrize(("kind", "name"), builtin())
def test_what_is_registered_is_what_it_says(kind, name):
    found = registry.find(kind, name)
    if kind == "backend":
        assert callable(found)
        return
    one = found()
    assert one.name == name
    if kind in ("rule", "pass"):
        assert isinstance(one, Rule if kind == "rule" else Pass)
        assert one.level in ("operator", "aten")
        assert one.summary
        assert not one.summary.endswith(".")
    if kind == "rule":
        assert one.formula


UNNAMED = {"compress_saved", "plan_memory", "tables"}
"""What `compress=` and `memory_budget=` make of codecs, and the public functions for derivative tables."""


@pytest.mark.parametrize("folder", ["cleanup", "compression", "rules", "schedule"])
def test_a_file_of_a_rule_or_pass_is_registered(folder):
    table = importlib.import_module(f"graphrewrite.passes.{folder}").REGISTRY
    files = {p.stem for p in (ROOT / "passes" / folder).glob("*.py") if not p.stem.startswith("_")}
    assert {path.partition(":")[0].rpartition(".")[2] for path in table.values()} == files - UNNAMED


# --- private torch ---------------------------------------------------------------------------------------------------


def private_torch(path: pathlib.Path) -> list[str]:
    """Private torch modules that a file imports."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "torch" else [node.module]
            )
    return [name for name in found if name.startswith(PRIVATE)]


def test_private_torch_modules_are_imported_in_one_file():
    users = {str(p.relative_to(ROOT)) for p in sources("graphrewrite", "passes", "backends") if private_torch(p)}
    assert users == {"graphrewrite/_compat.py"}


def test_underscored_parts_of_torch_are_known():
    """Outside of `_compat.py`, underscored torch modules are imported only where torch documents them."""
    found = set()
    for path in sources("graphrewrite", "passes", "backends"):
        if path.name == "_compat.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("torch"):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names if alias.name.startswith("torch")}
    hidden = {n for n in found if any(part.startswith("_") for part in n.split("."))}
    assert all(any(n == a or n.startswith(a + ".") for a in ALLOWED_PRIVATE) for n in hidden), hidden
