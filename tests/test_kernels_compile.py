"""Every kernel compiles for a CUDA device that is not there: from Triton to machine code of compute capability 9.0.

What the interpreter accepts the compiler may not. Offsets are looked at in Triton's intermediate code: the number of a
program is widened to 64 bits before anything is computed from it, so that no offset overflows beyond 2^31 elements.
This needs no device, but a process of its own, in which triton is imported without the interpreter.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]

SCRIPT = r"""
import re
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from graphrewrite.backends.triton.kernels import activation, goodness, hadamard, norms, projection, quantise

dtype = "*" + sys.argv[1]
types = dict.fromkeys(("x", "weight", "bias", "out", "g", "saved", "dx", "h", "g_out", "dh", "y", "normalised"), dtype)
types |= dict.fromkeys(("mean", "rstd", "dweight", "dbias", "squares", "g_squares", "borders", "levels"), "*fp32")
types["changes"] = "*i32"
types |= {"counter": "*i64", "codes": "*u8", "steps": "*bf16", "lows": "*bf16", "eps": "fp32", "scale": "fp32"}
types |= dict.fromkeys(("count", "padded", "size"), "i64")


def build(tuned, codes="*u8", **constants):
    kernel, config = tuned.fn, tuned.configs[0]
    constants |= config.kwargs
    found = {**types, "codes": codes}
    signature = {n: "constexpr" if n in constants else found.get(n, "i32") for n in kernel.arg_names}
    places = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": config.num_warps})
    assert made.asm["cubin"]
    assert not narrow(made.asm["ttir"]), (kernel.__name__, narrow(made.asm["ttir"]))
    print(kernel.__name__)


def narrow(code):
    # where the number of a program is used before it has 64 bits: what is computed from it may not fit 32
    number, found = set(), []
    for line in code.splitlines():
        made = re.match(r"\s*(%[\w]+) = (\S+) (.*)", line)
        if made and made[2] == "tt.get_program_id":
            number.add(made[1])
        elif number & set(re.findall(r"%\w+", line)) and not (made and made[2] == "arith.extsi"):
            found.append(line.strip())
    assert number
    return found


build(norms.forward, RMS=False, AFFINE=True, SHIFT=True, MEAN=True, KEEP=False, BLOCK=1024, normalised=None)
build(norms.forward, RMS=False, AFFINE=True, SHIFT=True, MEAN=False, KEEP=True, BLOCK=1024, mean=None)
bare = {"weight": None, "bias": None, "mean": None, "normalised": None}
build(norms.forward, RMS=True, AFFINE=False, SHIFT=False, MEAN=False, KEEP=False, BLOCK=64, **bare)
build(norms.backward, RMS=False, AFFINE=True, NORMALISED=False, BLOCK=1024)
build(norms.backward, RMS=True, AFFINE=False, NORMALISED=True, BLOCK=1024, weight=None, mean=None)
build(norms.parameters, SHIFT=True, per_program=64)
build(goodness.forward, width=3000)
build(goodness.backward, width=3000, NORMALISED=True)
build(goodness.backward, width=3000, NORMALISED=False, g_out=None)
build(projection.project, LIMIT=96, DISTRIBUTION="signs", TRANSPOSED=True, ALIGNED=True, WIDE=False)
build(projection.project, LIMIT=96, DISTRIBUTION="uniform", TRANSPOSED=False, ALIGNED=False, WIDE=False)
build(projection.project, LIMIT=96, DISTRIBUTION="normal", TRANSPOSED=False, ALIGNED=True, WIDE=False)
build(projection.project, LIMIT=96, DISTRIBUTION="normal", TRANSPOSED=True, ALIGNED=False, WIDE=False)
for kind in ("gelu", "gelu_tanh", "silu", "tanh", "relu", "sigmoid", ""):
    build(activation.forward, KIND=kind, FIRST=0, BORDERS=3, WIDTH=2, SHIFT=0)
build(activation.forward_three, KIND="silu", FIRST=2, BORDERS=11)
build(activation.backward, BITS=2, LAST=3)
build(activation.backward_three, LAST=7)
plain, turned = {"LOG": 0, "SCALE": 1.0}, {"LOG": 5, "SCALE": 0.25}
nearest = {"SYMMETRIC": False, "STOCHASTIC": False, "counter": None}
build(quantise.encode, WIDTH=128, BITS=8, LEVELS=255, QUARTERS=True, **nearest, **plain)
build(quantise.encode, WIDTH=32, BITS=4, LEVELS=7, SYMMETRIC=True, STOCHASTIC=True, QUARTERS=True, lows=None, **turned)
build(quantise.encode, WIDTH=32, BITS=2, LEVELS=3, SYMMETRIC=False, STOCHASTIC=True, QUARTERS=False, **plain)
build(quantise.grids, WIDTH=128, LEVELS=15, SYMMETRIC=False)
build(quantise.encode_with_grids, BITS=4, LEVELS=15, SYMMETRIC=False, STOCHASTIC=True)
build(quantise.decode, BITS=4, LEVELS=15, SYMMETRIC=False, CLAMP=False)
build(quantise.decode, BITS=8, LEVELS=127, SYMMETRIC=True, CLAMP=True, lows=None)
build(quantise.decode_rotated, BITS=4, LEVELS=15, SYMMETRIC=False, SIZE=128, LOG=7, SCALE=0.1)
build(quantise.decode_rotated, BITS=8, LEVELS=127, SYMMETRIC=True, SIZE=32, LOG=5, SCALE=0.2, lows=None)
build(hadamard.transform, SIZE=128, LOG=7, SCALE=0.1)
build(hadamard.encode, codes="*i8", LEVELS=127, STOCHASTIC=True, SIZE=128, LOG=7, SCALE=0.1)
"""


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_kernels_compile_to_machine_code(dtype, tmp_path):
    root = str(pathlib.Path(__file__).resolve().parents[1])
    script = tmp_path / "build.py"
    script.write_text(SCRIPT)  # a kernel's source is read from files
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, str(script), dtype], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.split()) == 34
