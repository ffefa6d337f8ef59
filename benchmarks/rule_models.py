"""Which rule trains which kind of model: two steps of each pair, and the reason where a rule refuses.

    python benchmarks/rule_models.py                   # the pairs that the result file does not have yet
    python benchmarks/rule_models.py --all             # all of them: half an hour on a slow core
    python benchmarks/rule_models.py --rules fa kp --all

Models are those of `graphrewrite.testing.zoo`. Writes `results/rule_models.json`, anew after each rule, from which
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


def built_in() -> list[str]:
    return [name for name, source in registry.known("rule").items() if source == "built in"]


def recorded() -> dict[str, dict[str, str]]:
    path = RESULTS / "rule_models.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    return {row["rule"]: row["models"] for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rules", nargs="+", default=built_in())
    parser.add_argument("--all", action="store_true", help="also pairs that are in the result file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    held = recorded()
    for rule in given.rules:
        known = {} if given.all else held.get(rule, {})
        missing = [model for model in MODELS if model not in known]
        if not missing:
            continue
        held[rule] = {model: known[model] if model in known else outcome(rule, model) for model in MODELS}
        rows = [{"rule": name, "models": held[name]} for name in built_in() if name in held]
        print(rule, held[rule], write("rule_models", rows), flush=True)


if __name__ == "__main__":
    main()
