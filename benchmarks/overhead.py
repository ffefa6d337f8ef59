"""What `rule="bp"` costs against eager mode: step time, fixed cost per call, saved bytes.

    python -m benchmarks.overhead

Ratios are medians of interleaved pairs; the reference against itself is printed beside them. Writes
`results/overhead.json`.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import graphrewrite as gr
from benchmarks.common import ratio, write


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(h.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def mlp(width: int, depth: int) -> nn.Module:
    layers = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def conv_net() -> nn.Module:
    def stage(a: int, b: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))

    return nn.Sequential(stage(3, 32), stage(32, 64), stage(64, 128), nn.Flatten(), nn.Linear(128 * 16, 10))


def cases() -> dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]]:
    return {
        "mlp 12-16-5, batch 8": (
            lambda: nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5)),
            lambda: (torch.randn(8, 12), torch.randint(0, 5, (8,))),
        ),
        "mlp 8 x 1024, batch 256": (
            lambda: mlp(1024, 8),
            lambda: (torch.randn(256, 1024), torch.randint(0, 10, (256,))),
        ),
        "conv net, 64 images of 32 x 32": (
            conv_net,
            lambda: (torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,))),
        ),
        "transformer 6 x 256, 4 x 128 tokens": (
            lambda: nn.Sequential(*[Layer(256, 4) for _ in range(6)], nn.Linear(256, 10)),
            lambda: (torch.randn(4, 128, 256), torch.randint(0, 10, (4, 128))),
        ),
    }


def step(model: nn.Module, call: Callable[[Any], Any], x: Any, y: Any) -> None:
    for p in model.parameters():
        p.grad = None
    gr.default_loss(call(x), y).backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(2)
    rows = []
    for name, (make, batch) in cases().items():
        torch.manual_seed(0)
        model = make()
        reference = copy.deepcopy(model)
        x, y = batch()
        compiled = gr.compile(model, "bp")
        found = ratio(
            lambda m=model, c=compiled, x=x, y=y: step(m, c, x, y),
            lambda r=reference, x=x, y=y: step(r, r, x, y),
            rounds=rounds,
        )
        fixed = (found.median - 1) * found.reference_ms * 1e3
        rows.append({"case": name, **found.row(), "extra_us_per_step": round(fixed, 1)})
        print(
            f"{name:<38} eager {found.reference_ms:8.2f} ms   ratio {found.median:.3f} "
            f"[{found.low:.3f}, {found.high:.3f}]   eager/eager {found.same:.3f}   extra {fixed:.0f} us"
        )
    print("written to", write("overhead", rows))


if __name__ == "__main__":
    main()
