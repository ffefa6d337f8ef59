"""Pipelines in which no stage waits for a gradient: each learns from a head of its own, or from the broadcast error.

torchrun --nproc-per-node 2 examples/local_pipeline.py
torchrun --nproc-per-node 4 examples/local_pipeline.py --rule dfa
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from graphrewrite.backends.distributed import DFAPipeline, LocalPipeline, cut
from torch import nn

MICRO_BATCHES, SIZE, WIDTH, CLASSES = 8, 4, 16, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rule", choices=["local", "dfa"], default="local")
    rule = parser.parse_args().rule
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device(f"cuda:{rank % torch.cuda.device_count()}" if backend == "nccl" else "cpu")
    torch.manual_seed(0)
    model = nn.Sequential(
        *[nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(2 * ranks)], nn.Linear(WIDTH, CLASSES)
    )
    made = cut(model, torch.randn(SIZE, WIDTH), ranks)
    pipeline: LocalPipeline | DFAPipeline
    if rule == "dfa":
        pipeline = DFAPipeline(made, MICRO_BATCHES, device=device)
    else:
        pipeline = LocalPipeline(made, lambda out: nn.Linear(out.shape[-1], CLASSES), MICRO_BATCHES, device=device)
    optimizer = torch.optim.AdamW(pipeline.parameters(), 1e-2)
    draw = torch.Generator().manual_seed(1)  # the same numbers in all processes: their heads draw others
    centres = torch.randn(CLASSES, WIDTH, generator=draw)
    for step in range(40):
        y = torch.randint(0, CLASSES, (SIZE * MICRO_BATCHES,), generator=draw)
        x = centres[y] + torch.randn(len(y), WIDTH, generator=draw)
        optimizer.zero_grad()
        loss = pipeline.step(x.to(device), y.to(device))
        optimizer.step()
        if pipeline.is_last and loss is not None and step % 20 == 19:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
