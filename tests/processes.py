"""Real processes for the tests of what is distributed: two of them, on gloo."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta
from typing import Any

import torch

WORLD = 2


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _enter(rank: int, port: int, work: Any, arguments: tuple[Any, ...], results: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=timedelta(seconds=240))
    try:
        torch.save(work(rank, *arguments), f"{results}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def run(work: Any, arguments: tuple[Any, ...], folder: Any, limit: float = 500.0) -> list[Any]:
    """`work(rank, *arguments)` in two processes; what each returned."""
    context = torch.multiprocessing.spawn(
        _enter, (free_port(), work, arguments, str(folder)), nprocs=WORLD, join=False, daemon=True
    )
    try:
        deadline = time.monotonic() + limit
        while not context.join(timeout=max(deadline - time.monotonic(), 0)):
            assert time.monotonic() < deadline, "the processes did not end"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.terminate()
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(WORLD)]
