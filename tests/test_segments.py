"""The backward in segments: the same gradients, handed to autograd block by block, and reduced by DDP meanwhile."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import graphrewrite as gr
import processes
from graphrewrite.runtime import program as runtime
from graphrewrite.runtime.segments import Chain
from graphrewrite.testing.compare import assert_same, gradients


class Tied(nn.Module):
    """A parameter of the first block is read by the last one; a norm, a bias that nothing reads; two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.mix = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.GELU())
        self.up = nn.Linear(6, 6)
        self.alone = nn.Parameter(torch.zeros(3))

    def forward(self, ids: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.mix(self.embed(ids) + x)
        return self.up(h) @ self.embed.weight.T, h.sum()


def net() -> nn.Sequential:
    return nn.Sequential(*[layer for _ in range(3) for layer in (nn.Linear(6, 6), nn.Tanh())], nn.Linear(6, 3))


def same(actual: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert set(actual) == set(wanted)
    for name, held in wanted.items():
        assert_same(actual[name], held, name)


@pytest.fixture
def reducing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As inside the forward of a DistributedDataParallel."""
    monkeypatch.setattr(runtime, "reduces_gradients", lambda: True)


def batch(n: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=draw), torch.randint(0, 3, (n,), generator=draw)


@pytest.mark.parametrize("rule", ["bp", "kp", "dfa"])
def test_segments_compute_the_same_gradients(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    compiled = gr.compile(net(), rule, blocks="layers", dynamic=None)
    compiled.materialize(batch()[0].requires_grad_(), batch()[1])
    found = []
    for cut in (False, True):
        monkeypatch.setattr(runtime, "reduces_gradients", lambda cut=cut: cut)
        compiled.zero_grad()
        for seed in range(2):  # the second one is added
            x, y = batch(seed=seed)
            compiled.loss(x.requires_grad_(), y).backward()
        found.append((gradients(compiled), x.grad))
    assert compiled.program("loss").segments is not None
    assert len(compiled.program("loss").segments) == 4
    same(found[1][0], found[0][0])
    assert torch.equal(found[1][1], found[0][1])


def test_tied_unused_and_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Tied()
    compiled = gr.compile(model, blocks="layers", dynamic=None)
    ids, x = torch.tensor([1, 2, 1]), torch.randn(3, 6)
    for which in (0, 1):
        found = []
        for cut in (False, True):
            monkeypatch.setattr(runtime, "reduces_gradients", lambda cut=cut: cut)
            compiled.zero_grad()
            compiled(ids, x)[which].sum().backward()
            found.append(gradients(model))
        same(found[1], found[0])
        assert (found[1]["up.weight"] is None) == (which == 1)
        assert found[1]["alone"] is None


def test_a_part_of_the_gradients_and_two_backwards(reducing: None) -> None:
    torch.manual_seed(0)
    compiled = gr.compile(net(), blocks="layers", dynamic=None)
    x, y = batch()
    compiled.loss(x, y).backward()
    wanted = gradients(compiled.module)
    last = compiled.module[6].weight
    (found,) = torch.autograd.grad(compiled.loss(x, y), [last])
    assert torch.equal(found, wanted["6.weight"])
    compiled.zero_grad()
    loss = compiled.loss(x, y)
    loss.backward(retain_graph=True)
    loss.backward()
    assert all(torch.equal(g, 2 * wanted[name]) for name, g in gradients(compiled.module).items())
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_gradients_are_accumulated_before_the_next_segment_runs(
    reducing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    compiled = gr.compile(net(), blocks="layers", dynamic=None)
    events = recorded(monkeypatch.setattr)
    for name, p in compiled.module.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _p, layer=name[0]: events.append(layer))
    compiled.loss(*batch()).backward()
    assert events == [e for k, layer in enumerate("6420") for e in (f"segment {k}", layer, layer)]


def test_nothing_outlives_a_step(reducing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = gr.compile(net(), blocks="layers", dynamic=None)
    made: list[Any] = []
    monkeypatch.setattr(runtime, "Chain", lambda *a: made.append(c := Chain(*a)) or c)
    gc.collect()
    gc.disable()
    try:
        loss = compiled.loss(*batch())
        chain = weakref.ref(made.pop())
        loss.backward()
        assert chain() is not None
        assert not chain()._values
        del loss
        assert chain() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("options", [{"rule": "mono_forward"}, {"split_backward": True}])
def test_what_is_not_cut(reducing: None, options: dict[str, Any]) -> None:
    compiled = gr.compile(net(), blocks="layers", dynamic=None, **options)
    compiled.loss(*batch()).backward()
    assert compiled.program("loss").segments is None


# --- two processes ---------------------------------------------------------------------------------------------------


def recorded(patch: Any) -> list[str]:
    """Segments, as they begin."""
    events: list[str] = []
    run = Chain.run

    def noted(chain: Chain, k: int) -> Any:
        events.append(f"segment {k}")
        return run(chain, k)

    patch(Chain, "run", noted)
    return events


def work(rank: int, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    model = net().double()
    model.load_state_dict(state)
    compiled = gr.compile(model, blocks="layers", dynamic=None)
    x, y = batch(seed=rank)
    compiled.materialize(x.double(), y)
    parallel = DistributedDataParallel(compiled.loss_module(), bucket_cap_mb=1e-4)
    events = recorded(setattr)

    def reduce(bucket: Any) -> Any:
        events.append(f"bucket {bucket.index()}")
        work = torch.distributed.all_reduce(bucket.buffer().div_(2), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    parallel.register_comm_hook(None, lambda _state, bucket: reduce(bucket))
    for _ in range(2):  # the buckets are built anew behind the first step
        events.clear()
        compiled.zero_grad()
        parallel(x.double(), y).backward()
    return {"events": events, "gradients": gradients(model)}


@pytest.mark.slow
def test_ddp_reduces_buckets_before_the_backward_is_over(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = net().double()
    wanted: dict[str, torch.Tensor] = {}
    compiled = gr.compile(model, blocks="layers", dynamic=None)
    for rank in range(2):
        compiled.zero_grad()
        x, y = batch(seed=rank)
        compiled.loss(x.double(), y).backward()
        for name, g in gradients(model).items():
            wanted[name] = g / 2 + wanted.get(name, 0)
    for found in processes.run(work, (model.state_dict(),), tmp_path):
        events = found["events"]
        last = events.index("segment 3")
        early = [e for e in events[:last] if e.startswith("bucket")]
        assert len(early) >= 3, events
        assert events.index("bucket 0") < events.index("segment 1"), events
        same(found["gradients"], wanted)
