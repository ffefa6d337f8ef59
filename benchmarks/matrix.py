"""Rule x model x codec x split x backend: two training steps of each combination, and the reason where one refuses.

    python -m benchmarks.matrix                          # the cells that the result file does not have yet
    python -m benchmarks.matrix --again fails            # and those that failed (or: refuses, trains, all)
    python -m benchmarks.matrix --only gpt2 dfa --list   # only cells that name one of each word; list, do not run

All combinations would be 29 rules x 17 models x 20 codecs x 2 x 3. These are the ones tried (`cells`):

- rules: every rule on every model, without a codec, backward in one piece, eager backend;
- codecs: backpropagation with every codec on four models (`CODEC_MODELS`), and every rule with `int4` on an MLP;
- split: backpropagation in two stages on every model, and every rule in two stages on an MLP;
- backends: Inductor with backpropagation on small models (`BACKEND_MODELS`) and with every rule on an MLP; our kernels
  with every codec and every rule on an MLP;
- combined: codec, split and backend at once, for rules of every family (`COMBINED`).

A cell runs in a process of its own, forked from one that has imported everything, with a limit on CPU time. `trains`:
losses, gradients and predictions were finite and every weight moved, at two batch sizes; `refuses`: a `RuleError` or
`BackendError` at capture; `fails`: anything else. Writes `results/matrix.json`, anew after each cell, from which
`docs/generate.py` makes the page `docs/matrix.md`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import signal
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

from benchmarks.common import RESULTS, write
from graphrewrite import registry
from graphrewrite.errors import BackendError, RuleError
from graphrewrite.testing import matrix, zoo

FILE = "matrix"
MODELS = (
    *("mlp", "lenet", "cnn", "resnet", "unet", "convnext", "gpt2", "llama", "bert", "vit", "t5", "mamba", "moe"),
    *("lstm", "gcn", "gat", "sage"),
)
CODEC_MODELS = ("mlp", "cnn", "gpt2", "gcn")
BACKEND_MODELS = ("mlp", "lenet", "cnn", "gpt", "moe", "gcn")
COMBINED = (
    ("dfa", "gpt2", "fewbit", True, "eager"),
    ("dfa", "cnn", "int4", True, "eager"),
    ("kp", "gpt2", "int8", True, "eager"),
    ("ff", "mlp", "int4", False, "inductor"),
    ("mono_forward", "gpt2", "int4", True, "eager"),
    ("mono_forward", "mlp", "int8", False, "inductor"),
    ("local_loss", "resnet", "recompute", False, "eager"),
    ("lls", "cnn", "bf16", True, "eager"),
    ("bp", "gpt2", "hot", True, "eager"),
    ("bp", "gpt2", "approx_bp", True, "eager"),
    ("bp", "mlp", "int4", True, "inductor"),
    ("bp", "gpt2", "int2", False, "triton"),
    ("pepita", "cnn", "mask", False, "eager"),
    ("target_propagation", "mlp", "bf16", True, "eager"),
    ("predictive_coding", "mlp", "int8", True, "eager"),
    ("forward_gradient", "mlp", "int8", False, "inductor"),
    ("forward_gnn", "gcn", "int8", True, "eager"),
    ("highway", "resnet", "velora", True, "eager"),
    ("dual_propagation", "vit", "lowrank", False, "eager"),
    ("reinmax", "bert", "topk", True, "eager"),
)


@dataclass(frozen=True)
class Cell:
    """One combination."""

    rule: str
    model: str
    codec: str = "none"
    split: bool = False
    backend: str = "eager"

    def run(self) -> None:
        """Two training steps."""
        options: dict[str, Any] = {} if self.codec == "none" else {"compress": self.codec}
        matrix.train(self.rule, self.model, split_backward=self.split, backend=self.backend, **options)

    def __str__(self) -> str:
        split = "split" if self.split else ""
        return " ".join(f"{word:18}" for word in (self.rule, self.model, self.codec, split, self.backend))


def built_in(kind: str) -> list[str]:
    return [name for name, source in registry.known(kind).items() if source == "built in"]


def cells() -> Iterator[Cell]:
    """What is tried, each once."""
    rules, codecs = built_in("rule"), [name for name in built_in("codec") if name != "none"]
    yield from (Cell(rule, model) for model in MODELS for rule in rules)
    yield from (Cell("bp", model, codec) for model in CODEC_MODELS for codec in codecs)
    yield from (Cell("bp", model, split=True) for model in MODELS)
    yield from (Cell(*one) for one in COMBINED)
    yield from (Cell(rule, "mlp", split=True) for rule in rules if rule != "bp")
    yield from (Cell(rule, "mlp", "int4") for rule in rules if rule != "bp")
    yield from (Cell("bp", "mlp", codec, backend="triton") for codec in codecs)
    yield from (Cell(rule, "mlp", backend="triton") for rule in rules)
    yield from (Cell("bp", model, backend="inductor") for model in BACKEND_MODELS)
    yield from (Cell(rule, "mlp", backend="inductor") for rule in rules if rule != "bp")


def attempt(cell: Cell, limit: int) -> dict[str, Any]:
    """Run a cell in a fork of this process, which has imported what it needs and trained nothing."""
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    child = context.Process(target=_in_child, args=(cell, writer, limit), daemon=True)
    child.start()
    writer.close()
    try:
        found = reader.recv()
    except EOFError:
        found = {"outcome": "fails"}
    child.join()
    if "why" not in found and found["outcome"] == "fails":
        over = child.exitcode == -signal.SIGXCPU
        found["why"] = f"over {limit} s of CPU time" if over else f"the process died with exit code {child.exitcode}"
    return {**asdict(cell), **found}


def _in_child(cell: Cell, writer: Connection, limit: int) -> None:
    # seconds of CPU time: those of the clock say nothing on a machine that does other things as well
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        cell.run()
    except (RuleError, BackendError) as error:
        writer.send({"outcome": "refuses", "error": type(error).__name__, "why": error.message})
    except Exception as error:  # noqa: BLE001 - whatever it is becomes a row of the table
        tail = [line.strip() for line in traceback.format_tb(error.__traceback__)[-4:]]
        writer.send({"outcome": "fails", "error": type(error).__name__, "why": str(error)[:600], "traceback": tail})
    else:
        writer.send({"outcome": "trains"})


def recorded() -> dict[Cell, dict[str, Any]]:
    """What the result file has, of the cells that there still are."""
    path = RESULTS / f"{FILE}.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    keys = [Cell(**{name: row[name] for name in Cell.__dataclass_fields__}) for row in rows]
    return dict(zip(keys, rows, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", nargs="+", default=[], choices=["fails", "refuses", "trains", "all"])
    parser.add_argument("--only", nargs="+", default=[], help="words, all of which a cell must name")
    parser.add_argument("--skip", nargs="+", default=[], help="words, none of which a cell may name")
    parser.add_argument("--limit", type=int, default=300, help="seconds of CPU time per cell")
    parser.add_argument("--list", action="store_true", help="print the cells that would run")
    given = parser.parse_args()
    held, planned = recorded(), list(dict.fromkeys(cells()))

    def wanted(cell: Cell) -> bool:
        words = [cell.rule, cell.model, cell.codec, "split" if cell.split else "whole", cell.backend]
        named = all(word in words for word in given.only) and not any(word in words for word in given.skip)
        return named and (cell not in held or bool({held[cell]["outcome"], "all"} & {*given.again}))

    waiting = [cell for cell in planned if wanted(cell)]
    if given.list:
        print(*waiting, sep="\n")
        return
    zoo.make("gpt2"), zoo.make("gcn")  # imported before the first fork
    for number, cell in enumerate(waiting, 1):
        held[cell] = attempt(cell, given.limit)
        row = held[cell]
        print(f"{number}/{len(waiting)} {cell} {row['outcome']} {row.get('why', '')}", flush=True)
        # another run of this script may have added cells in the meantime
        merged = {**recorded(), cell: row}
        write(FILE, [merged[one] for one in planned if one in merged])


if __name__ == "__main__":
    main()
