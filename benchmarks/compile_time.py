"""Compile time of GPT-2 small at full size: capture to the end of the first backward, against `torch.compile`.

    python -m benchmarks.compile_time

Each is run in a process of its own with cold caches. Writes `results/compile_time.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

from benchmarks.common import write

TOKENS = (2, 128)


def child(which: str) -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    import graphrewrite as gr

    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(use_cache=False)).train()
    x = torch.randint(0, 50257, TOKENS)
    gr.default_loss(model(x), x).backward()  # warm libraries
    started = time.perf_counter()
    if which == "graphrewrite":
        gr.compile(model, "bp").loss(x, x).backward()
    else:
        gr.default_loss(torch.compile(model)(x), x).backward()
    print(json.dumps({"which": which, "seconds": round(time.perf_counter() - started, 2)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", choices=["graphrewrite", "torch.compile"])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    rows = []
    for _ in range(options.rounds):
        for which in ("graphrewrite", "torch.compile"):
            with tempfile.TemporaryDirectory() as cache:
                environment = {
                    **os.environ,
                    "TORCHINDUCTOR_CACHE_DIR": cache,
                    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
                }
                result = subprocess.run(
                    [sys.executable, "-m", "benchmarks.compile_time", "--child", which],
                    env=environment, capture_output=True, text=True, check=True,
                )  # fmt: skip
            rows.append(json.loads(result.stdout.splitlines()[-1]))
            print(rows[-1])
    print("written to", write("compile_time", rows))


if __name__ == "__main__":
    main()
