"""`fully_shard` around the root: parameters are gathered for a step, gradients reduced; what cannot work is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import graphrewrite as gr
import processes

SIZE, STEPS = 4, 3


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    return torch.randn(2 * SIZE, 6, generator=draw).double(), torch.randint(0, 3, (2 * SIZE,), generator=draw)


def train(compiled: gr.CompiledModule, view: nn.Module, part: slice) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.AdamW(compiled.module.parameters(), 1e-2)
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        view(x[part], y[part]).backward()
        optimizer.step()
    full = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in compiled.module.named_parameters()}
    return {n: p.detach().clone() for n, p in full.items()}


def refusal(what) -> str:
    try:
        what()
    except gr.GraphRewriteError as error:
        return str(error)
    return ""


def work(rank: int) -> dict[str, object]:
    mesh = init_device_mesh("cpu", (2,))
    mine = slice(rank * SIZE, (rank + 1) * SIZE)
    x, y = (t[mine] for t in batch(0))
    found: dict[str, object] = {}
    for rule in ("bp", "dfa"):
        compiled = gr.compile(model(), rule, blocks="layers", dynamic=None)
        compiled.materialize(x, y)
        view = compiled.loss_module()
        fully_shard(view, mesh=mesh)
        found[rule] = train(compiled, view, mine)
        shapes = {n: (tuple(p.to_local().shape), tuple(p.shape)) for n, p in compiled.module.named_parameters()}
        found[f"shapes {rule}"] = shapes
    for name, sharded in (("block", lambda m: m[0]), ("model", lambda m: m)):
        inner = model()
        fully_shard(sharded(inner), mesh=mesh)
        late = gr.compile(inner, dynamic=None).loss_module()
        fully_shard(late, mesh=mesh)
        found[name] = refusal(lambda late=late: late(x, y))
    split = gr.compile(model(), dynamic=None, split_backward=True)
    view = split.loss_module()
    fully_shard(view, mesh=mesh)
    view(x, y).backward()
    found["split"] = refusal(split.backward_weight)
    split.discard_pending()
    return found


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return processes.run(work, (), tmp_path_factory.mktemp("sharded"))


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["bp", "dfa"])
def test_a_sharded_root_trains_as_one_process(ran, rule):
    alone = gr.compile(model(), rule, blocks="layers", dynamic=None)
    wanted = train(alone, alone.loss_module(), slice(None))
    for result in ran:
        assert set(result[rule]) == set(wanted)
        for name, held in wanted.items():
            assert torch.allclose(result[rule][name], held, rtol=0, atol=1e-12), name
        assert any(local[0] < whole[0] for local, whole in result[f"shapes {rule}"].values())


@pytest.mark.slow
@pytest.mark.parametrize("what", ["block", "model"])
def test_shards_inside_the_model_are_refused(ran, what):
    for result in ran:
        assert "is sharded over processes" in result[what]
        assert "fully_shard(compiled.loss_module())" in result[what]


@pytest.mark.slow
def test_deferred_gradients_are_not_lost_without_a_word(ran):
    for result in ran:
        assert "was sharded again behind .backward()" in result["split"]
        assert "split_backward=False" in result["split"]
