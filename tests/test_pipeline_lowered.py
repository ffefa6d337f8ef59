"""Zero-bubble schedules on stages that Inductor compiled: torch's own compiled stages are refused by them."""

from __future__ import annotations

import pytest
import torch
from graphrewrite.backends.distributed import Pipeline, cut
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleZBVZeroBubble

import graphrewrite as gr
import processes

MICRO_BATCHES, SIZE, WIDTH, STAGES = 4, 3, 8, 4
SCHEDULES = ("1F1B", "ZBVZeroBubble", "DualPipeV", "InterleavedZeroBubble")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def blocks() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[Block() for _ in range(STAGES)])


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(SIZE * MICRO_BATCHES, WIDTH, generator=generator), torch.randint(
        0, WIDTH, (SIZE * MICRO_BATCHES,), generator=generator
    )


def work(rank: int) -> dict[str, object]:
    x, y = batch()
    found: dict[str, object] = {}
    for schedule in SCHEDULES:
        model = blocks()
        made = cut(model, x[:SIZE], 2 if schedule == "1F1B" else STAGES)
        pipeline = Pipeline(made, schedule, MICRO_BATCHES, backend="inductor")
        loss = pipeline.step(x, y)
        programs = [c.program() for c in pipeline.stages.values()]
        found[schedule] = {
            "loss": None if loss is None else loss.item(),
            "gradients": {
                n: p.grad
                for c in pipeline.stages.values()
                for n, p in c.module.named_parameters()
                if p.grad is not None
            },
            "backends": sorted({name for c in pipeline.stages.values() for name in c.report().backend_coverage}),
            "weight stages": sum(p.backward_weight is not None for p in programs),
        }
    return found


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return processes.run(work, (), tmp_path_factory.mktemp("lowered"))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_compiled_stages_are_one_process(ran, schedule):
    model, (x, y) = blocks(), batch()
    loss = gr.default_loss(model(x), y)
    loss.backward()
    ranks = [result[schedule] for result in ran]
    (found,) = [r["loss"] for r in ranks if r["loss"] is not None]
    assert found == pytest.approx(loss.item(), abs=1e-6)
    gradients = ranks[0]["gradients"] | ranks[1]["gradients"]
    assert set(gradients) == {name for name, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        assert (gradients[name] - p.grad).abs().max() <= 1e-6 * p.grad.abs().max().clamp(min=1), name
    assert all(r["backends"] == ["inductor"] for r in ranks)
    assert sum(r["weight stages"] for r in ranks) == (2 if schedule == "1F1B" else STAGES)


@pytest.mark.slow
def test_torchs_compiled_stages_are_refused(tmp_path):
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    try:
        stages = [PipelineStage(torch.compile(Block()), i, 2, torch.device("cpu")) for i in range(2)]
        with pytest.raises(RuntimeError, match=r"torch\.compile"):
            ScheduleZBVZeroBubble(stages, 4, loss_fn=gr.default_loss)
    finally:
        torch.distributed.destroy_process_group()
