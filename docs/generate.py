"""Write the pages that come from the code: `rules.md`, `matrix.md`, `results.md`, `passes.md` and `cli_reference.md`.

python docs/generate.py            # write them
python docs/generate.py --check    # exit code 1 if a committed page is not what would be written
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import torch
import typer
from torch import nn

from graphrewrite import api, registry
from graphrewrite.cli.app import app
from graphrewrite.cli.listing import options_of
from graphrewrite.errors import GraphRewriteError
from graphrewrite.report.certificates import PROPERTIES
from graphrewrite.testing import zoo

FOLDER = Path(__file__).resolve().parent
NOTE = "<!-- Written by docs/generate.py from the code; edit that instead. -->"

ABOUT = (
    "What each rule does, with the certificate that is proved for it on a net of three linear layers with two `tanh` "
    'between them, `blocks="layers"`. `graphrewrite certify TARGET` proves it for your own model.'
)


ABOUT_MATRIX = (
    "Which combinations of rule, model, codec, split and backend train: every cell took two steps, at the captured "
    "batch size and at another one, with default options and blocks; losses, gradients and predictions were finite "
    "and every weight moved. Where a combination is refused, the message of the error says why. "
    "`python -m benchmarks.matrix` tries the cells, and says which of all combinations it tries."
)


def rules_page() -> str:
    """The catalogue of rules: metadata, options, and the certificate on a small net."""
    parts = [
        "# Rules",
        NOTE,
        "",
        ABOUT,
        "",
        "| rule | objective | " + " | ".join(p.replace("_", " ") for p in PROPERTIES) + " | radius | what it is |",
        "|---|---|" + "---|" * (len(PROPERTIES) + 2),
    ]
    found = {
        name: registry.find("rule", name) for name, origin in registry.known("rule").items() if origin == "built in"
    }
    proofs = {name: _certificate(name) for name in found}
    for name, rule in found.items():
        cells = [f"[`{name}`](#{name})", _text(rule, "objective"), *proofs[name], _text(rule, "summary")]
        parts.append(f"| {' | '.join(cells)} |")
    for name, rule in found.items():
        parts += ["", f"## {name}", "", f"{_text(rule, 'summary')}.", ""]
        facts = {
            "Formula": f"`{rule.formula}`" if rule.formula else "",
            "Paper": rule.paper,
            "Trains through": "`compiled.loss(x, y)` only"
            if rule.needs_loss is True
            else "`compiled.loss(x, y)`, or `compiled(x)` and a loss outside",
            "Forward": "trains a forward of its own: read it through `compiled.predict(x)`"
            if rule.changes_forward is True
            else "",
            "Trained": _trained(name),
            "Measured": _measured(name),
        }
        parts += [f"- **{key}**: {held}" for key, held in facts.items() if held]
        parts += ["", _docstring(rule)]
        parts += _options(rule)
    return "\n".join(parts) + "\n"


def matrix_page() -> str:
    """Rule x model x codec x split x backend, from what `benchmarks/matrix.py` found."""
    rows = _rows(RESULTS / "matrix.json")
    reasons: dict[str, int] = {}

    def cell(row: dict[str, Any] | None) -> str:
        if row is None:
            return "not tried"
        if row["outcome"] == "trains":
            return "yes"
        word = "no" if row["outcome"] == "refuses" else "**fails**"
        return f"{word} ({reasons.setdefault(row['why'], len(reasons) + 1)})"

    def table(of: str, lines: list[str], across: str, heads: list[str], **fixed: Any) -> list[str]:
        held = {(row[of], row[across]): row for row in rows if all(row[key] == want for key, want in fixed.items())}
        out = [f"| {of} | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
        for line in lines:
            cells = [cell(held.get((line, head))) for head in heads]
            if any(one != "not tried" for one in cells):
                out.append(f"| {_linked(of, line)} | {' | '.join(cells)} |")
        return out

    def found(key: str, **fixed: Any) -> list[str]:
        return list(dict.fromkeys(row[key] for row in rows if all(row[k] == want for k, want in fixed.items())))

    plain = {"codec": "none", "split": False, "backend": "eager"}
    rules = [name for name, origin in registry.known("rule").items() if origin == "built in"]
    models = found("model", **plain)
    codecs = [name for name, origin in registry.known("codec").items() if origin == "built in"]
    outcomes = [row["outcome"] for row in rows]
    counts = [f"{outcomes.count(one)} {one}" for one in ("trains", "refuses", "fails") if one in outcomes]
    parts = ["# The matrix", NOTE, "", ABOUT_MATRIX, "", f"{len(rows)} cells: {', '.join(counts)}.", ""]
    parts += ["## Rules and models", "", *table("rule", rules, "model", models, **plain), ""]
    coded = found("model", rule="bp", split=False, backend="eager", codec="int4")
    parts += ["## Codecs and models, under backpropagation", ""]
    parts += [*table("codec", codecs, "model", coded, rule="bp", split=False, backend="eager"), ""]
    parts += ["## Every rule on the MLP: codec, split, backend", ""]
    ways = {
        "`int4`": {**plain, "codec": "int4"},
        "in two stages": {**plain, "split": True},
        "`inductor`": {**plain, "backend": "inductor"},
        "`triton`": {**plain, "backend": "triton"},
    }
    parts += [f"| rule | {' | '.join(ways)} |", "|---|" + "---|" * len(ways)]
    on_mlp = [row for row in rows if row["model"] == "mlp"]
    for rule in rules:
        own = [row for row in on_mlp if row["rule"] == rule]
        cells = [cell(next((r for r in own if all(r[k] == v for k, v in way.items())), None)) for way in ways.values()]
        parts.append(f"| {_linked('rule', rule)} | {' | '.join(cells)} |")
    parts += ["", "## Backpropagation in two stages, and compiled by Inductor", ""]
    ways = {"in two stages": ways["in two stages"], "`inductor`": ways["`inductor`"]}
    parts += [f"| model | {' | '.join(ways)} |", "|---|" + "---|" * len(ways)]
    for model in list(dict.fromkeys([*models, *found("model", backend="inductor")])):
        own = [row for row in rows if row["rule"] == "bp" and row["model"] == model]
        cells = [cell(next((r for r in own if all(r[k] == v for k, v in way.items())), None)) for way in ways.values()]
        parts.append(f"| `{model}` | {' | '.join(cells)} |")
    parts += ["", "## Several at once", "", "| rule | model | codec | split | backend | |", "|---|---|---|---|---|---|"]
    for row in rows:
        if sum((row["codec"] != "none", row["split"], row["backend"] != "eager")) > 1:
            split = "two stages" if row["split"] else ""
            names = f"`{row['rule']}` | `{row['model']}` | `{row['codec']}` | {split} | `{row['backend']}`"
            parts.append(f"| {names} | {cell(row)} |")
    parts += ["", "## Why not", ""] if reasons else []
    parts += [f"{number}. {_cell(reason)}" for reason, number in reasons.items()]
    described = [(name, inspect.getdoc(zoo.factory(name)) or "") for name in models]
    parts += ["", "## The models", "", *(f"- `{name}`: {_cell(text)}" for name, text in described)]
    return "\n".join(parts) + "\n"


def _linked(kind: str, name: str) -> str:
    page = {"rule": "rules.md", "codec": "passes.md"}[kind]
    return f"[`{name}`]({page}#{name})"


ABOUT_RESULTS = (
    "Published figures beside ours, and beside backpropagation in the same run: test error in percent, after the last "
    "epoch. Ours come from the files in `benchmarks/results`, each written by the command named; most runs are smaller "
    "than the published ones, and the last column says in what. Mean and standard deviation are over three seeds, a "
    "single number is of one. What to compare is the distance to backpropagation in "
    "the same column. Every figure that the benchmarks hold of a rule is in [the rules' catalogue](rules.md)."
)


def results_page() -> str:
    """Ours, published and backpropagation, from the list in `benchmarks/reproduce/anchors.py`."""
    anchors = _anchors()

    def percent(held: float | None) -> str:
        return "" if held is None else f"{held:.2f}"

    head = ["rule", "ours", "bp, same run", "published", "bp, same publication", "publication", "why they differ"]
    parts = ["# Published figures and ours", NOTE, "", ABOUT_RESULTS, ""]
    parts += [f"| {' | '.join(head)} |", "|---|" + "---|" * (len(head) - 1)]
    commands: dict[str, str] = {}
    waiting = []
    for one in anchors.ANCHORS:
        ours, beside = one.ours()
        if not ours:
            waiting.append(one)
            continue
        commands.setdefault(one.file, one.command)
        cells = [
            f"`{one.rule}`",
            anchors.shown(ours),
            anchors.shown(beside),
            percent(one.published),
            percent(one.published_bp),
        ]
        parts.append(f"| {' | '.join([*cells, _cell(one.source), _cell(one.gap)])} |")
    rest = list(anchors.others())
    if rest:
        parts += ["", "| | ours | published |", "|---|---|---|"]
        parts += [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rest]
    parts += [
        "",
        "How to make them again. All take `--quick` for a short trial, whose figures mean nothing and are kept apart.",
        "A run that was interrupted goes on where it was when it is called again, some only with `--resume`.",
        "",
    ]
    parts += [f"- `benchmarks/results/{file}.json`: `{command}`" for file, command in commands.items()]
    if waiting:
        parts += ["", "Not run yet, for want of time or of a GPU:", ""]
        parts += [f"- `{a.rule}`, {_cell(a.source)}: {a.published:.2f} %; `{a.command}`" for a in waiting]
    return "\n".join(parts) + "\n"


def _anchors() -> Any:
    spec = importlib.util.spec_from_file_location("anchors", RESULTS.parent / "reproduce" / "anchors.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["anchors"] = module
    spec.loader.exec_module(module)
    return module


def passes_page() -> str:
    """The catalogue of passes and codecs."""
    parts = ["# Passes and codecs", NOTE, ""]
    for kind in ("pass", "codec"):
        for name, origin in registry.known(kind).items():
            if origin != "built in":
                continue
            found = registry.find(kind, name)
            parts += [f"## {name}", "", _docstring(found)]
            if kind == "pass":
                numerics = "keeps every number bitwise" if found.preserves_numerics else "may change numbers"
                parts += ["", f"- **Level**: {found.level}; {numerics}."]
            parts += [*_options(found), ""]
    return "\n".join(parts)


def cli_page() -> str:
    """The reference of the command line."""
    group: Any = typer.main.get_command(app)
    parts = ["# Command line reference", NOTE, "", str(group.help or ""), "", str(group.epilog or "")]
    for name, command in group.commands.items():
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
        usage = " ".join(["graphrewrite", name, *(p.metavar or p.name.upper() for p in arguments)])
        parts += ["", f"## {name}", "", f"`{usage} [OPTIONS]`", "", inspect.cleandoc(command.help or ""), ""]
        parts += ["| option | | default |", "|---|---|---|"]
        for one in options:
            spelled = ", ".join(f"`{text}`" for text in [*one.opts, *one.secondary_opts])
            default = "" if one.is_flag or one.default in (None, "") else f"`{_plain(one.default)}`"
            parts.append(f"| {spelled} | {_cell(one.help or '')} | {default} |")
    return "\n".join(parts) + "\n"


PAGES = {
    "rules.md": rules_page,
    "matrix.md": matrix_page,
    "results.md": results_page,
    "passes.md": passes_page,
    "cli_reference.md": cli_page,
}


def outdated() -> list[str]:
    """The pages whose committed text is not what would be written."""
    return [
        name
        for name, make in PAGES.items()
        if not (FOLDER / name).is_file() or (FOLDER / name).read_text(encoding="utf-8") != make()
    ]


def _certificate(name: str) -> list[str]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    x, y = torch.randn(5, 6), torch.randint(0, 4, (5,))
    try:
        compiled = api.compile(model, name, example_inputs=x, example_targets=y, blocks="layers")
    except GraphRewriteError as error:
        return [f"not defined here: {_cell(error.message)}", *[""] * len(PROPERTIES)]
    held = compiled.report().certificates
    return [*("yes" if getattr(held, p) else "no" for p in PROPERTIES), str(held.locality_radius)]


RESULTS = FOLDER.parent / "benchmarks" / "results"


def _rows(file: Path) -> list[dict[str, Any]]:
    held = json.loads(file.read_text(encoding="utf-8")).get("rows") if file.is_file() else []
    return [row for row in held if isinstance(row, dict)] if isinstance(held, list) else []


def _trained(name: str) -> str:
    """The models that the rule was tried on and trains."""
    rows = [row for row in _rows(RESULTS / "matrix.json") if row["rule"] == name and row["outcome"] == "trains"]
    models = dict.fromkeys(row["model"] for row in rows if (row["codec"], row["backend"]) == ("none", "eager"))
    return f"{', '.join(models)} ([what was tried](matrix.md))" if models else ""


def _measured(name: str) -> str:
    """What the result files say of the rule beside what they say of backpropagation."""
    found = []
    for file in sorted(RESULTS.glob("*.json")):
        if "_seed" in file.stem:  # the page of published figures has their mean
            continue
        rows = [row for row in _rows(file) if isinstance(row.get("rule"), str)]
        references = {_setting(row): _error(row) for row in rows if row["rule"] == "bp"}
        for row in rows:
            error, reference = _error(row), references.get(_setting(row))
            if error and row["rule"].partition("{")[0] == name:
                where = f"{_setting(row)}, " if _setting(row) else ""
                beside = f", bp {reference}" if reference and name != "bp" else ""
                found.append(f"`{row['rule']}` test error {error}{beside} ({where}`benchmarks/results/{file.name}`)")
    return "; ".join(dict.fromkeys(_cell(one) for one in found))


def _setting(row: dict[str, Any]) -> str:
    held = [str(row[key]) for key in ("net", "task", "model") if isinstance(row.get(key), str)]
    return ", ".join([*held, *([f"seed {row['seed']}"] if isinstance(row.get("seed"), int) else [])])


def _error(row: dict[str, Any]) -> str:
    for key in ("test_error_percent", "test_error", "test accuracy by epoch", "test_accuracy"):
        held = row.get(key)
        last = held[-1] if isinstance(held, list) and held else held
        if isinstance(last, (int, float)):
            return f"{100 * (1 - last):.2f} %" if "accuracy" in key else f"{last:.2f} %"
    return ""


def _docstring(found: Any) -> str:
    """What a class says of itself, without its arguments."""
    return (inspect.getdoc(found) or "").partition("\nArgs:")[0].strip()


def _options(found: Any) -> list[str]:
    options = options_of(found)
    if not options:
        return []
    about = _argument_texts(inspect.getdoc(found) or "")
    rows = [f"| `{name}` | `{_plain(default)}` | {_cell(about.get(name, ''))} |" for name, default in options.items()]
    return ["", "| option | default | |", "|---|---|---|", *rows]


def _argument_texts(doc: str) -> dict[str, str]:
    found: dict[str, str] = {}
    name = ""
    for line in doc.partition("\nArgs:\n")[2].splitlines():
        if line.startswith("    ") and not line.startswith("     "):
            name, _, text = line.strip().partition(":")
            found[name] = text.strip()
        elif line.strip() and name:
            found[name] += f" {line.strip()}"
        elif not line.strip():
            name = ""
    return found


def _plain(held: Any) -> str:
    return str(getattr(held, "value", held)).replace("|", "\\|")


def _text(rule: Any, name: str) -> str:
    held = getattr(rule, name)
    return "depends on options" if isinstance(held, property) else _cell(str(held))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def main() -> None:
    """Write or check."""
    if "--check" in sys.argv[1:]:
        stale = outdated()
        if stale:
            sys.exit(f"out of date: {', '.join(stale)}; run python docs/generate.py")
        return
    for name, make in PAGES.items():
        (FOLDER / name).write_text(make(), encoding="utf-8")
        print(FOLDER / name)


if __name__ == "__main__":
    main()
