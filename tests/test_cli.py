"""The `graphrewrite` command: what it prints, what it refuses, and that its help is light."""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from cli_run import TARGETS, Run, run_fixture
from graphrewrite import registry
from graphrewrite.cli.app import app
from graphrewrite.cli.options import several_rules
from graphrewrite.errors import GraphRewriteError
from graphrewrite.textform import split_commas

run = run_fixture

COMMANDS = ("inspect", "diff", "certify", "memory", "compare", "demo", "rules", "passes", "codecs")


# --- help ------------------------------------------------------------------------------------------------------------


def test_help_imports_no_torch() -> None:
    code = f"""
import sys
from graphrewrite.cli.app import app
for words in [["--help"], ["--version"], *[[c, "--help"] for c in {COMMANDS!r}]]:
    try:
        app(words)
    except SystemExit as stop:
        assert not stop.code, words
heavy = {{"torch", "numpy", "networkx", "sklearn"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert command in done.stdout


def test_entry_point_runs_as_a_process() -> None:
    words = [sys.executable, "-m", "graphrewrite.cli", "rules", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert {"bp", "dfa", "ff"} <= {rule["name"] for rule in json.loads(done.stdout)["rules"]}
    assert done.stderr == ""


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["inspect", ":raising"], "raised ValueError: no such weights"),
        (["inspect", ":one_value"], "return (model, example_inputs)"),
        (["inspect", ":four_values"], "returned 4 values"),
        (["inspect", ":no_model"], "returned a str in the place of the model"),
        (["inspect", ":a_list"], "Inputs(*args, **kwargs)"),
        (["inspect", ":undecided"], "torch.where"),
        (["inspect", ":not_callable"], "cannot be called"),
        (["inspect", ":nothing"], "it defines: mlp"),
        (["inspect", "nowhere.py:mlp"], "no file nowhere.py"),
        (["inspect", "no_such_package.module:mlp"], "no module 'no_such_package'"),
        (["inspect", "json:nothing"], "json has no 'nothing'"),
        (["inspect", "something"], "package.module:factory"),
        (["inspect", "nowhere.pt2"], "no file nowhere.pt2"),
        (["inspect", ":mlp", "--rule", "nope"], "no rule is named 'nope'"),
        (["inspect", ":mlp", "--rule", "dfa{shard=true}"], "has no option 'shard'"),
        (["inspect", ":mlp", "--rule", "dfa{spatial=what}"], "'dense'"),
        (["inspect", ":mlp", "--rule", "dfa{scale=much}"], "expected float, got str"),
        (["inspect", ":mlp", "--rule", "ff{embed=nowhere:f}"], "No module named 'nowhere'"),
        (["inspect", ":mlp", "--rule", "nope=dfa"], "matches no block"),
        (["inspect", ":mlp", "--blocks", "nope*"], "no module matches"),
        (["inspect", ":mlp", "--seed", "-1"], "negative"),
        (["inspect", ":mlp", "--loss", "nope"], "names no function"),
        (["inspect", ":untaught", "--rule", "ff"], "(model, example_inputs, example_targets)"),
        (["inspect", ":tokens", "--rule", "ff"], "floating-point input"),
        (["certify", ":mlp", "--rule", "bp", "--rule", "nope"], "no rule is named 'nope'"),
    ],
)
def test_errors_are_one_line_and_exit_code_one(run: Run, words: list[str], told: str) -> None:
    outcome = run(*words)
    assert outcome.code == 1
    assert outcome.out == ""
    lines = outcome.err.splitlines()
    assert told in lines[-1]
    assert lines[-1].startswith("error: ")
    assert len(lines) == 1


@pytest.mark.parametrize(
    "words",
    [
        ["nope"],
        ["inspect"],
        ["inspect", ":mlp", "--level", "nope"],
        ["inspect", ":mlp", "--rule", "bp", "--rule", "dfa"],
        ["diff", ":mlp"],
        ["compare", "--epochs", "0"],
        ["rules", "--nope"],
    ],
)
def test_usage_errors_are_exit_code_two(run: Run, words: list[str]) -> None:
    outcome = run(*words)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err


def test_debug_keeps_the_traceback() -> None:
    with pytest.raises(GraphRewriteError, match="no such weights") as caught:
        app(["inspect", f"{TARGETS}:raising", "--debug"])
    assert isinstance(caught.value.__cause__, ValueError)


def test_unexpected_errors_are_one_line_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("somewhere\ndeep")

    monkeypatch.setattr(registry, "known", broken)
    outcome = run("rules")
    assert outcome.code == 1
    assert outcome.err.splitlines() == ["error: ZeroDivisionError: somewhere; run again with --debug for the traceback"]


def test_a_damaged_export_is_told_in_one_line(run: Run, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"no archive")
    outcome = run("inspect", str(path))
    assert outcome.code == 1
    assert len(outcome.err.splitlines()) == 1
    assert "torch.export.save" in outcome.err


@dataclass
class Scores:
    """A result that torch does not know in another process."""

    logits: torch.Tensor


class Scorer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> Scores:
        return Scores(self.linear(x))


def test_an_export_that_returns_objects_of_a_library_is_told_plainly(run: Run, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.pt2"
    torch.export.register_dataclass(Scores, serialized_type_name="a.library.Scores")
    torch.export.save(torch.export.export(Scorer(), (torch.randn(4, 3),)), path)
    # a process that reads the file knows nothing of this registration
    text = f"from graphrewrite.cli.app import app; app(['inspect', {str(path)!r}])"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "a.library.Scores, which torch cannot rebuild from a file; remedy: export it again with plain tuples" in line


# --- reading options -------------------------------------------------------------------------------------------------


def test_rules_are_read_one_by_one_and_globs_as_one_map() -> None:
    assert several_rules(["dfa{scale=2}", "a.*=ff{peer=0}", "b=dfa"]) == [
        "dfa{scale=2}",
        {"a.*": "ff{peer=0}", "b": "dfa"},
    ]
    assert several_rules(None) == []


def test_commas_in_braces_do_not_separate() -> None:
    assert split_commas("bp, ff{peer=0,threshold=2},dfa") == ["bp", "ff{peer=0,threshold=2}", "dfa"]


def test_names_may_have_hyphens(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._registered["rule"], "my_rule", registry.find("rule", "dfa"))
    data = run("inspect", ":mlp", "--rule", "my-rule", "--json").data
    assert any(node["role"] == "signal" for node in data["nodes"])


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_json_is_a_consistent_graph(run: Run) -> None:
    data = run("inspect", ":mlp", "--json").data
    nodes = data["nodes"]
    assert [node["id"] for node in nodes] == list(range(len(nodes)))
    assert all(source < node["id"] for node in nodes for source in node["inputs"])
    by_name = {node["name"]: node for node in nodes}
    assert len(by_name) == len(nodes)
    w = by_name["w_linear_1"]
    assert nodes[w["mirrors"]]["name"] == "linear_1"
    assert (w["role"], w["block"], w["module"], w["op"], w["target"]) == ("gradient", "2", "2", "call", "vjp")
    assert w["type"] == [{"dtype": "float32", "shape": [16, 16]}, {"dtype": "float32", "shape": [16]}]
    assert by_name["linear_1"]["type"] == {"dtype": "float32", "shape": ["s0", 16]}
    assert by_name["linear_1"]["bytes"] == 4 * 16 * 4
    assert by_name["linear_1"]["target"] == "aten.linear.default"
    assert by_name["linear_1"]["made_by"] == "capture"
    assert by_name["0.weight"]["target"] == "parameter 0.weight"
    assert [block["name"] for block in data["blocks"]] == ["0", "2", "4"]
    gradients = {one["what"]: nodes[one["node"]] for one in data["outputs"] if one["what"].startswith("gradient")}
    assert gradients["gradient of parameter 2.weight"]["inputs"] == [w["id"]]
    assert data["parameters"] == sum(p.numel() for p in _mlp().parameters())


def test_inspect_counts_flops_by_role(run: Run) -> None:
    flops = run("inspect", ":mlp", "--json").data["flops"]
    products = 12 * 16 + 16 * 16 + 16 * 5
    # two operations per product and sample; the first layer has no input cotangent
    assert flops == {
        "forward": 2 * 4 * products,
        "gradient": 2 * 4 * products,
        "cotangent": 2 * 4 * (products - 12 * 16),
    }


def test_inspect_text_has_every_operator_in_its_block(run: Run) -> None:
    outcome = run("inspect", ":mlp", "--rule", "dfa")
    assert outcome.code == 0
    assert outcome.err == ""
    blocks: dict[str, list[str]] = {}
    section = block = ""
    for line in outcome.out.splitlines():
        if line and not line.startswith(" "):
            section = line
        elif line.startswith("  ") and not line.startswith("    "):
            block = line.split()[0]
        elif line.startswith("    %"):
            blocks.setdefault(f"{section} {block}" if section in ("forward", "backward") else section, []).append(
                line.split()[0]
            )
    assert blocks["forward 2"] == ["%linear_1", "%relu_1"]
    assert blocks["backward 2"] == ["%mm_1", "%d_relu_1", "%w_linear_1"]
    assert blocks["backward loss"] == ["%d_cross_entropy_loss"]
    assert list(blocks).index("backward 4") < list(blocks).index("backward 0")
    assert "%dfa.feedback.0" in blocks["inputs"]
    # the columns of a section are aligned
    starts = [
        line.index("  cotangent") for line in outcome.out.splitlines() if re.search("  cotangent( |$)(?!of)", line)
    ]
    assert len(starts) == 3
    assert len(set(starts)) == 1


def test_inspect_forward_level_is_what_was_captured_whatever_the_rule(run: Run) -> None:
    plain = run("inspect", ":mlp", "--level", "forward", "--json").data
    under_ff = run("inspect", ":mlp", "--level", "forward", "--rule", "ff", "--json").data
    names = [node["name"] for node in plain["nodes"] if node["op"] == "call"]
    assert names == ["linear", "relu", "linear_1", "relu_1", "linear_2", "cross_entropy_loss"]
    assert [node["name"] for node in under_ff["nodes"] if node["op"] == "call"] == names
    assert {block["rule"] for block in under_ff["blocks"]} == {"ff"}
    assert plain["flops"] is None


def test_inspect_aten_level_has_no_vjp_node(run: Run) -> None:
    nodes = run("inspect", ":mlp", "--level", "aten", "--json").data["nodes"]
    assert "aten.threshold_backward.default" in {node["target"] for node in nodes}
    assert "vjp" not in {node["target"] for node in nodes}


def test_inspect_takes_a_map_of_rules(run: Run) -> None:
    data = run("inspect", ":mlp", "--rule", "0=dfa", "--rule", "2=dfa{scale=2}", "--json").data
    assert [block["rule"] for block in data["blocks"]] == ["dfa", "dfa{scale=2}", "bp"]


def test_inspect_reads_another_loss(run: Run) -> None:
    nodes = run("inspect", ":regression", "--loss", ":square_loss", "--json").data["nodes"]
    targets = {node["target"] for node in nodes if node["role"] == "loss"}
    assert targets == {"aten.sub.Tensor", "aten.square.default", "aten.mean.default"}


def test_inspect_reads_an_exported_program_with_the_modules_of_its_model(run: Run, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(_mlp(), (torch.randn(4, 12),)), path)
    data = run("inspect", str(path), "--blocks", "layers", "--json").data
    assert [block["name"] for block in data["blocks"]] == ["0", "2", "4"]
    assert "d_linear_1" in {node["name"] for node in data["nodes"]}
    forward = run("inspect", str(path), "--level", "forward", "--json").data
    assert {node["role"] for node in forward["nodes"]} == {"input", "forward"}


def _mlp() -> torch.nn.Module:
    import targets

    model: torch.nn.Module = targets.mlp()[0]
    return model


# --- diff ------------------------------------------------------------------------------------------------------------


def test_diff_of_a_rule_with_itself_is_empty(run: Run) -> None:
    data = run("diff", ":mlp", "--rule", "bp", "--json").data
    assert (data["removed"], data["added"], data["rerouted"]) == (0, 0, 0)
    assert data["flops"][0] == data["flops"][1] > 0
    assert sum(block["kept"] for block in data["blocks"]) == 14


def test_diff_names_the_cotangents_that_dfa_reroutes(run: Run) -> None:
    data = run("diff", ":mlp", "--rule", "dfa", "--json").data
    blocks = {block["name"]: block for block in data["blocks"]}

    def names(block: str, kind: str) -> list[str]:
        return [change["name"] for change in blocks[block][kind]]

    assert [names(b, "removed") for b in ("0", "2", "4")] == [[], ["d_linear_1"], ["d_linear_2"]]
    assert [names(b, "added") for b in ("0", "2", "4")] == [["mm"], ["mm_1"], []]
    assert [names(b, "rerouted") for b in ("0", "2", "4")] == [["d_relu"], ["d_relu_1"], []]
    moved = blocks["0"]["rerouted"][0]
    assert (moved["was"], moved["now"]) == (["%d_linear_1"], ["%mm (signal)"])
    # a product with 2.weight, 16 x 16, left the second block; one with a 5 x 16 feedback matrix came to each
    assert blocks["2"]["flops"][1] - blocks["2"]["flops"][0] == 2 * 4 * (5 * 16 - 16 * 16)
    assert blocks["0"]["flops"][1] - blocks["0"]["flops"][0] == 2 * 4 * 5 * 16
    assert data["saved_bytes"][0] == data["saved_bytes"][1] == sum(b["saved_bytes"][0] for b in blocks.values())


def test_diff_against_another_rule_and_of_residual_sums(run: Run) -> None:
    same = run("diff", ":mlp", "--rule", "dfa{scale=2}", "--against", "dfa", "--json").data
    assert (same["removed"], same["added"], same["rerouted"]) == (0, 0, 0)
    assert same["rules"] == ["dfa", "dfa{scale=2}"]
    deep = run("diff", ":deep", "--rule", "dfa", "--json").data
    rerouted = {c["name"]: c["now"] for block in deep["blocks"] for c in block["rerouted"]}
    # what lies inside a block keeps its derivative: only the cotangent of each block's output is another one
    assert set(rerouted) == {"d_add", "d_add_1", "d_add_2", "d_add_3"}
    assert all("(signal)" in now[0] for now in rerouted.values())


def test_diff_knows_an_operator_again_in_other_forward_passes() -> None:
    from graphrewrite.cli.diff import text_of
    from graphrewrite.cli.targets import load_target
    from graphrewrite.report.diff import compare_compiled, to_json

    loaded = load_target(f"{TARGETS}:mlp")
    found = compare_compiled(loaded.compile("bp"), loaded.compile("ff"))
    first = to_json(found)["blocks"][0]
    passes = {change["name"]: change["passes"] for change in first["removed"]}
    assert passes["linear"] == ["pos", "neg", "neutral"]
    assert passes["w_linear"] == ["pos", "neg"]
    short, full = ("\n".join(line.plain for line in text_of(found, full=f)) for f in (False, True))
    assert "now in pass pos, neg, neutral" in short
    # many added nodes are told in one line, unless all are asked for
    assert "forward operators of pass neg: " in short
    assert "operators of pass neg" not in full
    assert "  + %philox_neg" in full
    assert "  + %philox_neg" not in short


# --- certify, memory -------------------------------------------------------------------------------------------------


def test_certify_tells_the_rules_apart_and_why_one_is_refused(run: Run) -> None:
    data = run("certify", ":mlp", "--rule", "bp", "--rule", "dfa", "--rule", "ff", "--json").data
    rules = {one["rule"]: one for one in data["rules"]}
    assert [rules[r]["weight_transport"] for r in ("bp", "dfa", "ff")] == [True, False, False]
    assert [rules[r]["backward_locked"] for r in ("bp", "dfa", "ff")] == [True, False, False]
    assert [rules[r]["update_locked"] for r in ("bp", "dfa", "ff")] == [True, True, False]
    assert [rules[r]["locality_radius"] for r in ("bp", "dfa", "ff")] == [2, 2, 0]
    assert rules["ff"]["forward_passes"] == 3
    path = rules["bp"]["blocks"][0]["weight_transport"]["path"]
    assert path[-1] == "parameter 2.weight"


@pytest.mark.slow
def test_certify_without_a_rule_takes_every_rule_there_is(run: Run) -> None:
    data = run("certify", ":two_layers", "--json").data
    names = [one["rule"].partition("{")[0] for one in data["rules"]]
    assert sorted([*names, *data["refused"]]) == sorted(registry.known("rule"))
    assert "floating-point input" in data["refused"]["ff"]


def test_certify_prints_the_paths_on_request(run: Run) -> None:
    shown = run("certify", ":mlp", "--rule", "bp", "--rule", "dfa", "--paths").out
    assert "  0: weight transport, because" in shown
    assert "    reads parameter 2.weight" in shown
    assert re.search(r"^dfa +no +no +yes +yes +2 +1 ", shown, re.MULTILINE)
    assert not re.search("^ff ", shown, re.MULTILINE)
    assert "because" not in run("certify", ":mlp", "--rule", "dfa").out


def test_memory_merges_equal_layers_and_predicts_what_is_measured(run: Run) -> None:
    data = run("memory", ":deep", "--measure", "--json").data
    layers = data["layers"][0]
    assert layers["layers"] == [f"layers.{i}" for i in range(4)]
    # of each layer: the rectified 6 x 16 and, but for the first, the 6 x 8 that comes in, counted where it is made
    assert sorted(v["bytes"] for v in layers["values"]) == [6 * 8 * 4, 6 * 16 * 4]
    assert data["saved_bytes"] == sum(group["bytes"] for group in data["layers"])
    assert data["predicted_peak"] == max(*data["live_bytes"]["forward"], *data["live_bytes"]["backward"])
    assert data["measured_peak"] == pytest.approx(data["predicted_peak"], rel=0.1)


def test_memory_prints_a_table_and_a_plot(run: Run) -> None:
    outcome = run("memory", ":deep", "--rule", "dfa")
    assert "layers.0 .. layers.3 (4 layers)" in outcome.out
    assert "█" in outcome.out
    assert "measured" not in outcome.out
    assert run("memory", ":untaught", "--measure").code == 0


# --- rules, passes ---------------------------------------------------------------------------------------------------


def test_lists_have_every_registered_name_with_its_options(run: Run) -> None:
    rules = {entry["name"]: entry for entry in run("rules", "--json").data["rules"]}
    assert set(rules) == set(registry.known("rule"))
    assert rules["dfa"]["options"]["spatial"] == "auto"
    assert rules["ff"]["objective"] == "local"
    passes = {entry["name"]: entry for entry in run("passes", "--json").data["passes"]}
    assert set(passes) == set(registry.known("pass"))
    assert passes["early_local_backward"]["options"] == {"fp16_scale": 4096.0}
    codecs = {entry["name"]: entry for entry in run("codecs", "--json").data["codecs"]}
    assert set(codecs) == set(registry.known("codec"))
    assert codecs["bf16"]["summary"].startswith("Round to bfloat16")
    assert codecs["bf16"]["summary"] in run("codecs").out
    text = run("rules").out
    assert not [line for line in text.splitlines() if line != line.rstrip()]
    for entry in rules.values():
        assert entry["paper"] in text
        assert entry["formula"] in text


def test_a_plugin_that_cannot_be_imported_is_listed_with_the_reason(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    original = registry.find

    def find(kind: Any, name: str) -> Any:
        if name == "dfa":
            raise ImportError("no module named plugin_dependency")
        return original(kind, name)

    monkeypatch.setattr(registry, "find", find)
    rules = {entry["name"]: entry for entry in run("rules", "--json").data["rules"]}
    assert "plugin_dependency" in rules["dfa"]["summary"]
    assert rules["bp"]["formula"]
    assert run("rules").code == 0
