"""Errors of few-bit tables: 13 functions, 1 to 4 bits, two weights, in the derivative norm and in the primitive norm.

Each row holds, for one function, weight and size:

* `derivative`: the table with the least error of the derivative, as `fewbit` uses it; `bound` is what no table of so
  many levels goes below;
* `contiguous`: the same where every level serves one interval only, as published tables do;
* `primitive`: the table with the least error of the primitive (`fewbit{objective=primitive}`);
* `published`: ReGELU2 and ReSiLU2, under the uniform weight.

`python -m benchmarks.fewbit_tables` writes `results/fewbit_tables.json`.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from graphrewrite.passes.compression._samples import Table
from graphrewrite.passes.compression.approx_bp import published_table
from graphrewrite.passes.compression.tables import table
from torch.nn import functional as F

from benchmarks import common

FUNCTIONS = {
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "hardswish": F.hardswish,
    "logsigmoid": F.logsigmoid,
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
}


def errors(found: Table, bound: str) -> dict[str, Any]:
    """Both errors of a table, and how far it is from its certificate."""
    least = found.primitive_error if bound == "primitive" else found.error
    row = {"derivative_error": found.error, "primitive_error": found.primitive_error}
    if found.bound:
        row |= {"bound": found.bound, "over_bound": round(least / found.bound, 6)}
    return {**row, "intervals": len(found.codes)}


def main() -> None:
    """All tables."""
    rows = []
    for name, fn in FUNCTIONS.items():
        for weight in ("uniform", "normal"):
            for bits in (1, 2, 3, 4):
                started = time.perf_counter()
                best = table(fn, bits, weight=weight)  # type: ignore[arg-type]
                seconds = time.perf_counter() - started
                row: dict[str, Any] = {"function": name, "weight": weight, "bits": bits}
                row["derivative"] = {**errors(best, "derivative"), "seconds": round(seconds, 3)}
                row["contiguous"] = errors(table(fn, bits, weight=weight, contiguous=True), "derivative")  # type: ignore[arg-type]
                row["primitive"] = errors(table(fn, bits, weight=weight, objective="primitive"), "primitive")  # type: ignore[arg-type]
                if name in ("gelu", "silu") and weight == "uniform" and bits == 2:
                    row["published"] = errors(published_table(name), "")  # type: ignore[arg-type]
                rows.append(row)
                print(
                    f"{name:11s} {weight:8s} {bits} bits: derivative {best.error:.6f} "
                    f"(x{row['derivative']['over_bound']:.5f} of the bound), one interval per level "
                    f"{row['contiguous']['derivative_error']:.6f}, primitive {row['primitive']['primitive_error']:.7f}"
                )
    print(common.write("fewbit_tables", rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
