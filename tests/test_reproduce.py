"""The scripts of published figures: a trial of each, with real data."""

from __future__ import annotations

import importlib
import json
import pathlib
import sys

import pytest

CASES = {
    "dfa_real": ([], ["dfa_cora", "dfa_shakespeare"]),
    "feedback_mnist": (["--nets", "mlp"], ["feedback_mnist_mlp_640"]),
    "ff_variants": ([], ["ff_mnist", "forward_gnn"]),
    "forward_mnist": (["--rules", "bp@1e-2", "pepita@3e-2"], ["forward_mnist"]),
    "learning": (["--rules", "bp,dfa", "--width", "16"], ["learning"]),
    "local_cifar": (["--rules", "bp", "mono_forward"], ["local_cifar"]),
    "local_mnist": (["--rules", "bp", "mono_forward"], ["local_mnist"]),
    "pepita_cifar": ([], ["pepita_cifar"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_trial_writes_its_rows_and_leaves_the_kept_ones(
    name: str, data_folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, files = CASES[name]
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent.parent))  # the benchmarks are not installed
    common, course, script = (
        importlib.import_module(f"benchmarks.{module}")
        for module in ("common", "reproduce.course", f"reproduce.{name}")
    )
    for module in (common, course, *([script] if hasattr(script, "RESULTS") else [])):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "--quick", "--data", str(data_folder), *words])
    script.main()
    assert not list(tmp_path.glob("*.json"))
    for file in files:
        rows = json.loads((tmp_path / "quick" / f"{file}.json").read_text())["rows"]
        assert [row for row in rows if "setting" not in row or "rule" in row], file
    # once more: what is there is kept where a script can tell
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--resume"])
    before = {file: (tmp_path / "quick" / f"{file}.json").read_text() for file in files}
    if name in ("dfa_real", "learning", "pepita_cifar"):
        script.main()
        for file in files:
            assert json.loads((tmp_path / "quick" / f"{file}.json").read_text()) == json.loads(before[file])
