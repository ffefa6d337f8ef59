"""Compression with what else a training step may have: other rules, autocast and scaler, DDP, any batch size."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import graphrewrite as gr
import processes

SLOW = pytest.mark.slow
RULES = (
    *("bp", "fa", "usf", "brsf", "frsf", "kp", "pfa", "dfa", "highway", "dual_propagation", "weight_mirror"),
    *("ff", "mono_forward", "local_loss", "lls", "counter_current", "drtp", "pepita", "foton"),
    *("predictive_coding", "equilibrium_propagation", "target_propagation"),
)


def net(width=24):
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(10, width), nn.ReLU()), nn.Sequential(nn.Linear(width, width), nn.ReLU())),
        *(nn.Sequential(nn.Linear(width, width), nn.Tanh()), nn.Linear(width, 3)),
    )


def batch(n, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 10, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def step(compiled, x, y):
    compiled.module.zero_grad()
    compiled.loss(x, y).backward()
    return torch.cat([p.grad.flatten() for p in compiled.module.parameters() if p.grad is not None])


def error(found, exact):
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    "codec", ["int8", *[pytest.param(c, marks=SLOW) for c in ("int4", "lloyd", "fp8", "hadamard")]]
)
def test_one_program_for_all_batch_sizes(codec):
    """The padding of the last group is no guard: nothing is captured again."""
    model = net()
    compiled = gr.compile(model, compress=["mask", codec], verify="off")
    for size in (48, 37, 33, 64, 50):
        x, y = batch(size)
        found = step(compiled, x, y)
        exact = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        assert error(found, torch.cat([g.flatten() for g in exact])) < (0.02 if codec == "int8" else 0.3)
    assert sum(len(programs) for programs in compiled._programs.values()) == 1


@pytest.mark.parametrize("rule", [pytest.param(rule, marks=() if rule == "kp" else SLOW) for rule in RULES])
def test_every_rule_with_codecs(rule):
    """The gradient is the rule's own but for the codec's error; nothing more is saved."""
    model, (x, y) = net(), batch(64)
    plain = gr.compile(model, rule, seed=2, verify="off")
    exact = step(plain, x, y)
    compiled = gr.compile(net(), rule, seed=2, compress=["mask", "int8"], verify="off")
    assert error(step(compiled, x, y), exact) < 0.05
    assert compiled.report().saved_bytes <= plain.report().saved_bytes


@SLOW
@pytest.mark.parametrize(
    "options", [{"compress": "compact"}, {"compress": "int8", "chunk": 2}], ids=["compact", "chunk"]
)
def test_autocast_with_a_scaler(options):
    x, y = batch(32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    found = []
    for given in ({}, options):
        model = net()
        compiled = gr.compile(model, **given)
        with torch.amp.autocast("cpu", dtype=torch.bfloat16):
            loss = compiled.loss(x, y)
        scaler.scale(loss).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]) / 1024)
    assert 0 < error(found[1], found[0]) < 0.05


def _distributed(rank, options):
    compiled = gr.compile(net(), **options)
    wrapped = DistributedDataParallel(compiled.loss_module())
    x, y = batch(32, seed=rank)
    wrapped(x, y).backward()
    return [p.grad.clone() for p in compiled.module.parameters()]


@SLOW
@pytest.mark.parametrize(
    "options",
    [{"compress": ["mask", "int8"]}, {"compress": "mask", "chunk": 4}, {"chunk": 4, "chunk_loss": "mean"}],
    ids=["int8", "joint", "mean"],
)
def test_data_parallel_is_the_mean_over_processes(options, tmp_path):
    """Each process compresses its own batch; gradients are averaged once, behind the last chunk."""
    alone = []
    for rank in range(processes.WORLD):
        compiled = gr.compile(net(), **options)
        compiled.loss(*batch(32, seed=rank)).backward()
        alone.append([p.grad for p in compiled.module.parameters()])
    for found in processes.run(_distributed, (options,), tmp_path):
        for gradient, *own in zip(found, *alone, strict=True):
            assert torch.allclose(gradient, sum(own) / processes.WORLD, rtol=1e-5, atol=1e-7)


# --- the preset ------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width=64):
        super().__init__()
        self.norm, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = (part.unsqueeze(1) for part in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


def test_compact_keeps_ten_of_sixteen_widths_in_a_byte_each():
    """Norm inputs are shared, GELU's output is computed again: 10 d are left, 8.25 bits each; no product runs twice."""
    torch.manual_seed(0)
    model = nn.Sequential(Layer(), Layer())
    x, cotangent = torch.randn(4, 32, 64), torch.randn(4, 32, 64)
    unit = x.numel() * 4 * len(model)
    found = {}
    for compress in (None, "compact"):
        model.zero_grad()
        compiled = gr.compile(model, compress=compress, dynamic=None)
        compiled(x).backward(cotangent)
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        aten = compiled.graph("aten")
        products = sum(str(n.target).startswith(("aten.mm", "aten.addmm")) for n in aten.nodes)
        found[compress] = compiled.report().saved_bytes / unit, gradients, products
    assert 15 < found[None][0] < 16.5
    assert found["compact"][0] < 2.7
    assert found["compact"][2] == found[None][2]
    assert 0 < error(found["compact"][1], found[None][1]) < 0.01


def test_a_preset_is_the_list_that_it_stands_for():
    x, y = batch(16)
    plans = []
    for compress in (
        "compact",
        ["ms_norm", "mask", "recompute", "int8{symmetric=true,group=64}"],
        ['none{only=["0"]}', "compact"],
        {"0": "compact"},
    ):
        compiled = gr.compile(net(), compress=compress, verify="off", dynamic=None).materialize(x, y)
        plans.append([(one.name, one.codec) for one in compiled.report().plan])
    assert plans[0] == plans[1]
    assert plans[2] != plans[0]
    assert {codec for name, codec in plans[3] if codec != "keep"} < {codec for _, codec in plans[0]} | {
        "mask",
        "recompute",
    }
