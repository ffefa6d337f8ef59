"""Rules, codecs, two-stage backward, backends and several processes at once: what the parts say is what the whole does.

Of each composition: gradients against a reference that is put together from the parts, certificates as those of the
rule alone, and saved bytes as the rule's own bytes and the codec's plan predict them.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import graphrewrite as gr
import processes
from graphrewrite.report.certificates import PROPERTIES
from graphrewrite.testing import assert_same, gradients


def net(act: type[nn.Module] = nn.GELU) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 64), act(), nn.Linear(64, 64), nn.LayerNorm(64), act(), nn.Linear(64, 5))


def batch(n: int = 32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, 12, generator=draw), torch.randint(0, 5, (n,), generator=draw)


def compiled(act: type[nn.Module] = nn.GELU, **options: Any) -> gr.CompiledModule:
    x, y = batch()
    return gr.compile(net(act), example_inputs=x, example_targets=y, blocks="layers", **options)


def step(one: gr.CompiledModule, split: bool = False) -> dict[str, torch.Tensor | None]:
    one.zero_grad()
    one.loss(*batch()).backward()
    if split:
        one.backward_weight()
    return gradients(one.module)


def proofs(one: gr.CompiledModule) -> list[Any]:
    found = one.report().certificates
    return [
        found.forward_passes,
        *[(b.block, b.locality_radius, *(bool(getattr(b, p)) for p in PROPERTIES)) for b in found.blocks],
    ]


def assert_bytes_are_predicted(whole: gr.CompiledModule, rule: gr.CompiledModule) -> None:
    """The rule's saved bytes, less what the plan says that each treatment spares."""
    plan = whole.report().plan
    assert whole.report().saved_bytes == rule.report().saved_bytes - sum(t.before - t.after for t in plan)


def relative_error(actual: dict[str, Any], wanted: dict[str, Any]) -> float:
    pairs = [(actual[name], held) for name, held in wanted.items() if held is not None]
    assert all(left is not None for left, _ in pairs)
    return max(((left - right).norm() / right.norm().clamp_min(1e-12)).item() for left, right in pairs)


RULES = ["bp", "dfa", "kp", "highway"]


@pytest.mark.parametrize("rule", ["dfa", *(pytest.param(r, marks=pytest.mark.slow) for r in RULES if r != "dfa")])
def test_rule_codec_and_split(rule):
    """Eight bits and two stages: certificates of the rule, bytes of the plan, gradients of the codec alone."""
    alone, coded = compiled(rule=rule), compiled(rule=rule, compress="int8")
    whole = compiled(rule=rule, compress="int8", split_backward=True)
    assert proofs(whole) == proofs(coded) == proofs(alone)
    assert_bytes_are_predicted(coded, alone)
    assert any(t.codec.startswith("int8") and t.after < t.before for t in coded.report().plan)
    expected = step(coded)
    for name, gradient in step(whole, split=True).items():
        assert_same(gradient, expected[name], name)
    assert 0 < relative_error(expected, step(alone)) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["ff", "mono_forward"])
def test_local_rule_has_nothing_left_to_compress(rule):
    """Gradients are computed in the forward: what a codec could take is dead by then, so nothing changes."""
    alone, coded = compiled(rule=rule), compiled(rule=rule, compress="int4")
    assert proofs(coded) == proofs(alone)
    assert not any(b.update_locked for b in coded.report().certificates.blocks[:-1])
    assert_bytes_are_predicted(coded, alone)
    if not any(t.after < t.before for t in coded.report().plan):
        expected = step(alone)
        for name, gradient in step(coded).items():
            assert_same(gradient, expected[name], name)


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "codec"), [("ff", "int4"), ("dfa", "int8"), ("bp", "mask")])
def test_rule_codec_and_inductor(rule, codec):
    """The backend changes what runs the graph: not its certificates, not its bytes, and gradients by rounding."""
    act = nn.LeakyReLU if codec == "mask" else nn.GELU
    alone, eager = compiled(act, rule=rule), compiled(act, rule=rule, compress=codec)
    fused = compiled(act, rule=rule, compress=codec, backend="inductor")
    assert proofs(fused) == proofs(eager) == proofs(alone)
    assert_bytes_are_predicted(eager, alone)
    assert fused.report().saved_bytes == eager.report().saved_bytes < alone.report().saved_bytes
    rest = [row for row in fused.report().coverage if row.backend != "inductor"]
    assert len(rest) < len(fused.report().coverage) / 2
    assert all(row.reason for row in rest), "what another backend runs says why"
    # what differs by rounding may have another code: each is off by at most the error of the codec
    coding = relative_error(step(eager), step(alone))
    assert (coding == 0) == (codec == "mask")
    assert relative_error(step(fused), step(eager)) < max(1e-4, 2 * coding)


@pytest.mark.slow
def test_codecs_in_a_list_spare_what_each_does_alone():
    """ReLU's mask and integers for the rest: every value has the treatment of the first codec that takes it."""
    relu = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 5))
    x, y = batch()

    def of(compress: Any) -> gr.CompiledModule:
        return gr.compile(copy.deepcopy(relu), compress=compress, example_inputs=x, example_targets=y)

    both, masks, integers, plain = of(["mask", "int8"]), of("mask"), of("int8"), of(None)
    spared = {name: t.before - t.after for one in (masks,) for t in one.report().plan if (name := t.name)}
    rest = {t.name: t.before - t.after for t in integers.report().plan}
    expected = sum(max(spared.get(name, 0), 0) or rest[name] for name in rest)
    assert plain.report().saved_bytes - both.report().saved_bytes == expected


# --- in two processes ------------------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {"rule": "dfa", "compress": "fewbit", "split_backward": True, "blocks": "layers"}


def train_in_parallel(rank: int) -> dict[str, Any]:
    one = gr.compile(net(), **OPTIONS)
    x, y = batch()
    mine = slice(16 * rank, 16 * rank + 16)
    one.materialize(x[mine], y[mine])
    parallel = DistributedDataParallel(one.loss_module())
    parallel(x[mine], y[mine]).backward()
    one.backward_weight()
    return {"gradients": gradients(one.module), "proofs": proofs(one), "bytes": one.report().saved_bytes}


@pytest.mark.slow
def test_dfa_fewbit_two_stages_and_data_parallel(tmp_path):
    """Each process has the mean of the gradients that the two halves give without one another."""
    found = processes.run(train_in_parallel, (), tmp_path)
    x, y = batch()
    halves, alone = [], gr.compile(net(), **OPTIONS)
    for rank in range(2):
        mine = slice(16 * rank, 16 * rank + 16)
        alone.zero_grad()
        alone.loss(x[mine], y[mine]).backward()
        alone.backward_weight()
        halves.append(gradients(alone.module))
    plain = gr.compile(net(), OPTIONS["rule"], blocks="layers", example_inputs=x[:16], example_targets=y[:16])
    assert proofs(alone) == proofs(plain)
    # the inputs of two GELUs, 3 bits for each element in the place of 32
    spared = 2 * 16 * 64 * (32 - 3) // 8
    assert alone.report().saved_bytes == plain.report().saved_bytes - spared
    for one in found:
        assert one["proofs"] == proofs(alone)
        assert one["bytes"] == alone.report().saved_bytes
        for name, gradient in one["gradients"].items():
            torch.testing.assert_close(gradient, (halves[0][name] + halves[1][name]) / 2)


def stages() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh())
    second = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(12, 6, generator=draw, dtype=torch.float64)
    return nn.Sequential(first, second).double(), x, torch.randint(0, 3, (12,), generator=draw)


def whole_mono_forward() -> gr.CompiledModule:
    """One block for each stage of the pipeline."""
    model, x, y = stages()
    return gr.compile(model, "mono_forward", blocks=["0", "1"], example_inputs=x, example_targets=y)


def train_in_a_pipeline(rank: int) -> dict[str, Any]:
    from graphrewrite.backends.distributed import LocalPipeline, cut

    model, x, y = stages()
    made = cut(model, x[:3], 2)
    assert [tuple(part.blocks) for part in made.parts] == [("0",), ("1",)]
    (matrix,) = [held for held in whole_mono_forward().rule_state.values() if held.shape == (3, 6)]

    def head(out: torch.Tensor) -> nn.Module:
        made = nn.Linear(6, 3, bias=False, dtype=torch.float64)
        made.weight.data.copy_(matrix)
        return made

    sent = []
    make = torch.distributed.P2POp.__init__

    def counted(self: Any, op: Any, tensor: torch.Tensor, *rest: Any, **named: Any) -> None:
        if op is torch.distributed.isend:
            sent.append(tensor.nbytes)
        make(self, op, tensor, *rest, **named)

    torch.distributed.P2POp.__init__ = counted
    pipeline = LocalPipeline(made, head, 4)
    pipeline.step(x, y)
    return {"gradients": gradients(pipeline.module.body.module), "sent": sent}


@pytest.mark.slow
def test_mono_forward_and_pipeline(tmp_path):
    """Two stages that learn from heads of their own, nothing sent back: as one process with a block for each stage."""
    found = processes.run(train_in_a_pipeline, (), tmp_path)
    one = whole_mono_forward()
    assert not any(b.update_locked for b in one.report().certificates.blocks)
    # four micro-batches of what leaves the first block go on, and nothing comes back
    assert [process["sent"] for process in found] == [[3 * 6 * 8] * 4, []]
    _, x, y = stages()
    one.loss(x, y).backward()
    wanted = gradients(one.module)
    pieces = found[0]["gradients"] | found[1]["gradients"]
    assert pieces.keys() == wanted.keys()
    for name, gradient in pieces.items():
        torch.testing.assert_close(gradient, wanted[name])
