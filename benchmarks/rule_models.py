"""Which rule trains which kind of model: two steps of each pair, and the reason where a rule refuses.

    python benchmarks/rule_models.py                   # the pairs that the result file does not have yet
    python benchmarks/rule_models.py --all             # all of them: half an hour on a slow core
    python benchmarks/rule_models.py --rules fa kp --all

Models are those of `graphrewrite.testing.zoo`. Writes `results/rule_models.json`, anew after each pair, from which
`docs/generate.py` makes the page `docs/rule_models.md`.
"""

from __future__ import annotations

import argparse
import json
import warnings

import torch
from common import RESULTS, write

from graphrewrite import registry
from graphrewrite.testing.matrix import outcome

MODELS = ("mlp", "cnn", "resnet", "gpt2", "bert", "vit", "gcn", "gat", "sage", "lstm")
FILE = "rule_models"


def built_in() -> list[str]:
    return [name for name, source in registry.known("rule").items() if source == "built in"]


def recorded() -> dict[str, dict[str, str]]:
    path = RESULTS / f"{FILE}.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    return {row["rule"]: row["models"] for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rules", nargs="+", default=built_in())
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--all", action="store_true", help="also pairs that are in the result file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    held = recorded()
    for model in given.models:
        for rule in given.rules:
            found = held.setdefault(rule, {})
            if model in found and not given.all:
                continue
            found[model] = outcome(rule, model)
            print(f"{rule:18} {model:8} {found[model]}", flush=True)
            in_order = [(name, held[name]) for name in built_in() if held.get(name)]
            rows = [{"rule": n, "models": {m: ms[m] for m in MODELS if m in ms}} for n, ms in in_order]
            write(FILE, rows)


if __name__ == "__main__":
    main()
