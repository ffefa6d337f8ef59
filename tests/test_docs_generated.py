"""The pages that are written from the code are what is committed, and the site builds."""

from __future__ import annotations

import importlib.util
import pathlib
import re

import pytest

from graphrewrite import registry
from graphrewrite.cli.app import app

DOCS = pathlib.Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_committed_pages_are_up_to_date(generate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Certificates, for which every rule is compiled, are taken from the page here, and proved in the next test."""
    rows = re.findall(r"^\| \[`(\w+)`\]\(#\1\) \| (.*) \|$", (DOCS / "rules.md").read_text(), re.MULTILINE)
    proved = {name: re.split(r"(?<!\\)\| ", cells)[1:-1] for name, cells in rows}
    monkeypatch.setattr(generate, "_certificate", lambda name: [cell.rstrip() for cell in proved[name]])
    assert generate.outdated() == [], "run python docs/generate.py"


@pytest.mark.slow
def test_committed_certificates_are_up_to_date(generate) -> None:
    assert generate.outdated() == [], "run python docs/generate.py"


def test_a_stale_page_is_noticed(generate, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "FOLDER", tmp_path)
    monkeypatch.setattr(generate, "PAGES", {"a.md": lambda: "new\n", "b.md": lambda: "b\n", "c.md": lambda: "c\n"})
    (tmp_path / "a.md").write_text("old\n")
    (tmp_path / "b.md").write_text("b\n")
    assert generate.outdated() == ["a.md", "c.md"]


def test_the_catalogue_has_every_rule_and_the_reference_every_command() -> None:
    rules = (DOCS / "rules.md").read_text()
    for name, origin in registry.known("rule").items():
        if origin == "built in":
            assert f"\n## {name}\n" in rules
    reference = (DOCS / "cli_reference.md").read_text()
    for command in app.registered_commands:
        assert f"\n## {command.name}\n" in reference


def test_links_between_pages_lead_somewhere() -> None:
    for page in DOCS.glob("*.md"):
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path: pathlib.Path) -> None:
    config = pytest.importorskip("mkdocs.config", reason="mkdocs is not installed (the docs extra)")
    build = pytest.importorskip("mkdocs.commands.build")
    loaded = config.load_config(str(DOCS.parent / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True)
    build.build(loaded)
    assert (tmp_path / "site" / "first_rule" / "index.html").is_file()
