"""Processes that die: a clear error in time, no half-written checkpoint, and training that goes on bitwise."""

from __future__ import annotations

import multiprocessing
import os
import pathlib
import signal
import time
from datetime import timedelta

import pytest
import torch
from graphrewrite.backends.distributed import LostProcessError, Pipeline, checkpoint, cut
from graphrewrite.backends.distributed.failures import naming_lost_processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import graphrewrite as gr
from processes import free_port

STEPS, DIES_AT, TIMEOUT = 5, 3, 20
WORLD = 2


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def batch(step: int, rank: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(8, 6, generator=draw), torch.randint(0, 3, (8,), generator=draw)


def same_everywhere(state: dict[str, object]) -> bool:
    for held in state.values():
        if isinstance(held, torch.Tensor):
            found = [torch.empty_like(held) for _ in range(WORLD)]
            torch.distributed.all_gather(found, held)
            if not torch.equal(found[0], found[1]):
                return False
    return True


def data_parallel(rank: int, rule: str, folder: str, until: int, dies: bool) -> dict[str, object]:
    """Train from the last checkpoint on, saving each step; what the model and the rule hold at the end."""
    compiled = gr.compile(model(), rule, blocks="layers", dynamic=None)
    compiled.materialize(*batch(0))
    optimizer = torch.optim.AdamW(compiled.parameters(), 1e-2)
    held = {"modules": {"model": compiled}, "optimizers": {"model": optimizer}}
    begun = checkpoint.latest(folder)
    if begun is not None:
        for p in compiled.parameters():
            torch.nn.init.zeros_(p)
        assert checkpoint.load(folder, **held) == begun
    parallel = DistributedDataParallel(compiled.loss_module())
    for step in range(begun or 0, until):
        optimizer.zero_grad()
        parallel(*batch(step, rank)).backward()
        optimizer.step()
        if dies and step + 1 == DIES_AT and rank == 1:
            # the other process has written its part of the checkpoint, or waits for this one
            os.kill(os.getpid(), signal.SIGKILL)
        with naming_lost_processes():
            checkpoint.save(folder, step + 1, **held)
    state = compiled.state_dict()
    return {
        "same": same_everywhere(state),
        "state": {k: v for k, v in state.items() if isinstance(v, torch.Tensor)},
        "steps": compiled._step,
    }


def pipelined(rank: int, folder: str, until: int, dies: str) -> dict[str, object]:
    x, _ = batch(0)
    pipeline = Pipeline(cut(model(), x[:4], 2), "1F1B", 2)
    optimizer = torch.optim.AdamW(pipeline.parameters(), 1e-2)
    modules = {f"stage{i}": stage for i, stage in pipeline.stages.items()}
    optimizers = {f"stage{i}": optimizer for i in pipeline.stages}
    begun = checkpoint.latest(folder) or 0
    if begun:
        checkpoint.load(folder, modules, optimizers)
    for step in range(begun, until):
        if rank == 1 and step + 1 == DIES_AT:
            if dies == "ends":
                os.kill(os.getpid(), signal.SIGKILL)
            elif dies == "hangs":
                time.sleep(10 * TIMEOUT)
        optimizer.zero_grad()
        pipeline.step(*batch(step))
        optimizer.step()
        checkpoint.save(folder, step + 1, modules, optimizers)
    return {"state": {n: p.detach() for s in pipeline.stages.values() for n, p in s.module.named_parameters()}}


def enter(rank: int, ports: list[int], results: str, jobs: list[tuple]) -> None:
    torch.set_num_threads(1)
    for i, (work, *arguments) in enumerate(jobs):
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(ports[i]))
        # what is compared runs for as long as it takes
        wait = timedelta(seconds=TIMEOUT if i and i == len(jobs) - 1 else 200)
        torch.distributed.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=wait)
        try:
            torch.save(work(rank, *arguments), f"{results}/{i}.{rank}.pt")
        except LostProcessError as error:
            pathlib.Path(f"{results}/{i}.{rank}.txt").write_text(str(error))
            os._exit(7)
        torch.distributed.destroy_process_group()


def launch(jobs: list[tuple], results: pathlib.Path) -> list[int | None]:
    """The exit codes of two processes that do these jobs, one after the other."""
    context = multiprocessing.get_context("spawn")
    ports = [free_port() for _ in jobs]
    started = [context.Process(target=enter, args=(rank, ports, str(results), jobs)) for rank in range(WORLD)]
    for process in started:
        process.start()
    deadline = time.monotonic() + 300
    while any(process.is_alive() for process in started) and time.monotonic() < deadline:
        if any(process.exitcode for process in started):
            deadline = min(deadline, time.monotonic() + 2 * TIMEOUT)  # as torchrun ends the others
        time.sleep(0.1)
    codes = [process.exitcode for process in started]
    for process in started:
        if process.is_alive():
            process.kill()
        process.join()
    return codes


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["dfa", "local_loss"])
def test_training_goes_on_from_the_last_whole_checkpoint(rule, tmp_path):
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    codes = launch([(data_parallel, rule, whole, STEPS, False), (data_parallel, rule, broken, STEPS, True)], tmp_path)
    assert codes == [7, -signal.SIGKILL]
    assert "process 0 lost another process of the job" in (tmp_path / "1.0.txt").read_text()
    assert checkpoint.latest(broken) == DIES_AT - 1
    assert (pathlib.Path(broken) / f"step_{DIES_AT}.part").is_dir()
    wanted = [torch.load(tmp_path / f"0.{rank}.pt") for rank in range(WORLD)]
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    assert launch([(data_parallel, rule, broken, STEPS, False)], resumed) == [0, 0]
    for rank in range(WORLD):
        found = torch.load(resumed / f"0.{rank}.pt")
        assert found["same"]
        assert wanted[rank]["same"]
        assert found["steps"] == wanted[rank]["steps"]
        assert any(name.startswith("_graphrewrite") for name in found["state"])
        assert set(found["state"]) == set(wanted[rank]["state"])
        for name, held in wanted[rank]["state"].items():
            assert torch.equal(found["state"][name], held), name
    assert checkpoint.latest(broken) == STEPS
    assert not list(pathlib.Path(broken).glob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("dies", ["ends", "hangs"])
def test_a_pipeline_names_the_process_that_is_gone(dies, tmp_path):
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    jobs = [(pipelined, whole, STEPS, ""), (pipelined, broken, STEPS, dies)]
    codes = launch(jobs, tmp_path)
    assert codes[0] == 7
    assert codes[1] == (-signal.SIGKILL if dies == "ends" else None)  # it hangs still
    text = (tmp_path / "1.0.txt").read_text()
    assert "process 0 lost another process of the job" in text
    assert "go on from the last checkpoint" in text
    assert checkpoint.latest(broken) == DIES_AT - 1
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    assert launch([(pipelined, broken, STEPS, "")], resumed) == [0, 0]
    for rank in range(WORLD):
        wanted, found = torch.load(tmp_path / f"0.{rank}.pt"), torch.load(resumed / f"0.{rank}.pt")
        assert wanted["state"]
        for name, held in wanted["state"].items():
            assert torch.equal(found["state"][name], held), name


@pytest.fixture
def alone(tmp_path):
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    yield
    torch.distributed.destroy_process_group()


def test_checkpoints_are_whole_or_none(alone, tmp_path, monkeypatch):
    compiled = gr.compile(model(), "dfa", blocks="layers", dynamic=None, example_inputs=batch(0)[0])
    optimizer = torch.optim.AdamW(compiled.parameters(), 1e-2)
    modules, optimizers = {"model": compiled}, {"model": optimizer}
    folder = tmp_path / "checkpoints"
    with pytest.raises(gr.RuleError, match="holds no whole checkpoint"):
        checkpoint.load(folder, modules, optimizers)
    compiled.loss(*batch(0)).backward()
    optimizer.step()
    before = {k: v.clone() for k, v in compiled.state_dict().items() if isinstance(v, torch.Tensor)}
    checkpoint.save(folder, 1, modules, optimizers)
    with pytest.raises(gr.RuleError, match="is a checkpoint"):
        checkpoint.save(folder, 1, modules, optimizers)

    def broken(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_parts", broken)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(folder, 2, modules, optimizers)
    assert checkpoint.latest(folder) == 1
    compiled.loss(*batch(1)).backward()
    optimizer.step()
    moments = optimizer.state[next(compiled.parameters())]["exp_avg"].clone()
    fresh = torch.optim.AdamW(compiled.parameters(), 1e-2)
    assert checkpoint.load(folder, modules, {"model": fresh}) == 1
    for name, held in compiled.state_dict().items():
        if isinstance(held, torch.Tensor):
            assert torch.equal(held, before[name]), name
    assert not torch.equal(fresh.state[next(compiled.parameters())]["exp_avg"], moments)
    assert fresh.state_dict()["state"][0]["step"] == 1
    with pytest.raises(gr.RuleError, match="no whole checkpoint of step 9"):
        checkpoint.load(folder, modules, optimizers, step=9)
    with pytest.raises(gr.RuleError, match="holds no module 'other'"):
        checkpoint.load(folder, {"other": compiled}, {})


def test_only_errors_of_communication_are_renamed(alone):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), naming_lost_processes():
        torch.ones(2, 3) @ torch.ones(2, 3)
    with pytest.raises(LostProcessError, match="lost another process"), naming_lost_processes():
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:1")
