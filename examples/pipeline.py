"""Pipeline training on PyTorch's engine, with weight gradients filling the bubble.

torchrun --nproc-per-node 2 examples/pipeline.py
torchrun --nproc-per-node 4 examples/pipeline.py --schedule InterleavedZeroBubble
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from graphrewrite.backends.distributed import Pipeline, cut
from torch import nn

MICRO_BATCHES, SIZE, WIDTH = 8, 4, 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schedule", default="ZBVZeroBubble")
    schedule = parser.parse_args().schedule
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device(f"cuda:{rank % torch.cuda.device_count()}" if backend == "nccl" else "cpu")
    torch.manual_seed(0)
    stages = ranks if schedule in ("GPipe", "1F1B") else 2 * ranks
    model = nn.Sequential(*[Block() for _ in range(2 * ranks)], nn.Linear(WIDTH, 4))
    made = cut(model, torch.randn(SIZE, WIDTH), stages)
    pipeline = Pipeline(made, schedule, MICRO_BATCHES, device=device)
    optimizer = torch.optim.AdamW(pipeline.parameters(), 1e-2)
    centres = torch.randn(4, WIDTH)
    for step in range(20):
        y = torch.randint(0, 4, (SIZE * MICRO_BATCHES,))  # the same numbers in all processes
        x = centres[y] + torch.randn(len(y), WIDTH)
        optimizer.zero_grad()
        loss = pipeline.step(x.to(device), y.to(device))
        optimizer.step()
        if loss is not None and step % 10 == 9:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
