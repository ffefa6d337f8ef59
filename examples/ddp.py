"""Data parallel training with a backward in two stages: gradients are reduced once, behind the weight stage.

torchrun --nproc-per-node 2 examples/ddp.py
torchrun --nproc-per-node 4 examples/ddp.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import graphrewrite as gr

MICRO_BATCHES, SIZE = 4, 8


def main() -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend)
    rank = dist.get_rank()
    device = torch.device(f"cuda:{rank % torch.cuda.device_count()}" if backend == "nccl" else "cpu")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 4)).to(device)
    compiled = gr.compile(model, split_backward=True)
    centres = torch.randn(4, 16, device=device)
    generator = torch.Generator(device).manual_seed(1 + rank)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.randint(0, 4, (SIZE,), device=device, generator=generator)
        return centres[y] + torch.randn(SIZE, 16, device=device, generator=generator), y

    compiled.materialize(*batch())
    parallel = DistributedDataParallel(compiled.loss_module())
    optimizer = torch.optim.AdamW(compiled.parameters(), 1e-2)
    for step in range(30):
        optimizer.zero_grad()
        with parallel.no_sync():
            for _ in range(MICRO_BATCHES - 1):
                (parallel(*batch()) / MICRO_BATCHES).backward()
        loss = parallel(*batch())
        (loss / MICRO_BATCHES).backward()
        compiled.backward_weight(concat=True)  # one larger product per layer, and one reduction
        optimizer.step()
        if rank == 0 and step % 10 == 9:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    # all processes hold the same weights
    total = torch.stack([p.detach().double().sum() for p in model.parameters()]).sum()
    sums = [torch.empty_like(total) for _ in range(dist.get_world_size())]
    dist.all_gather(sums, total)
    assert all(torch.equal(sums[0], other) for other in sums)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
