"""Pipelines on torch's engine: cutting a model, running it in two real processes, and simulating schedules."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import os
import pathlib
import random
import subprocess
import sys

import pytest
import torch
from graphrewrite.backends.distributed import (
    SCHEDULES,
    DFAPipeline,
    LocalPipeline,
    Pipeline,
    actions_of,
    cut,
    optimise,
    simulate,
)
from graphrewrite.backends.distributed.optimise import greedy, lower_bound
from graphrewrite.backends.distributed.pipeline import stages_of_rank
from graphrewrite.backends.distributed.repeated import orders
from graphrewrite.backends.distributed.search import beam
from graphrewrite.backends.distributed.simulate import Action, StageCost
from graphrewrite.backends.distributed.solve import solve
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import graphrewrite as gr
import processes
from graphrewrite.testing import zoo

MICRO_BATCHES = 4
SIZE = 3
RUNS = {"ZBVZeroBubble": 4}
SLOW_RUNS = {"GPipe": 2, "1F1B": 2, "InterleavedZeroBubble": 4, "LoopedBFS": 4, "Interleaved1F1B": 4, "DualPipeV": 4}


def blocks_model() -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh()) for _ in range(3)]
    return nn.Sequential(*blocks, nn.Linear(6, 3)).double()


def batch(classes: int = 3):
    generator = torch.Generator().manual_seed(1)
    count = SIZE * MICRO_BATCHES
    return torch.randn(count, 6, generator=generator).double(), torch.randint(0, classes, (count,), generator=generator)


def named_gradients(modules) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for m in modules for n, p in m.named_parameters() if p.grad is not None}


def one_process(model: nn.Module, x, y) -> tuple[float, dict[str, torch.Tensor]]:
    loss = gr.default_loss(model(x), y)
    loss.backward()
    return loss.item(), named_gradients([model])


# --- in two processes ----------------------------------------------------------------------------------------------


def run_schedule(schedule, stages: int, **options):
    made = cut(blocks_model(), batch()[0][:SIZE], stages)
    pipeline = Pipeline(made, schedule, MICRO_BATCHES, **options)
    x, y = batch()
    loss = pipeline.step(x, y)
    optimizer = torch.optim.SGD(pipeline.parameters(), 0.1)
    found = named_gradients(c.module for c in pipeline.stages.values())
    optimizer.step()
    optimizer.zero_grad()
    again = pipeline.step(x, y)  # nothing is left of the first step
    return {
        "loss": None if loss is None else [loss.item(), again.item()],
        "gradients": found,
        "pending": [c.pending for c in pipeline.stages.values()],
    }


def run_tied():
    case = zoo.make("gpt")
    case.model.double()
    torch.manual_seed(2)
    x, y = case.batch(SIZE * MICRO_BATCHES)
    made = cut(case.model, x[:SIZE], 2, tied="replicate")
    pipeline = Pipeline(made, "1F1B", MICRO_BATCHES)
    for _ in range(2):
        pipeline.step(x, y)  # gradients of two batches add up
    return named_gradients(c.module for c in pipeline.stages.values())


def run_local():
    torch.manual_seed(5)
    pipeline = LocalPipeline(
        cut(blocks_model(), batch()[0][:SIZE], 2), lambda out: nn.Linear(out.shape[-1], 3).double(), MICRO_BATCHES
    )
    loss = pipeline.step(*batch())
    return {"loss": loss.item(), "gradients": named_gradients([pipeline.module.body.module])} | {
        "head": {} if pipeline.module.head is None else pipeline.module.head.state_dict(),
        "actions": [str(a) for a in pipeline.schedule.pipeline_order_with_comms[pipeline.schedule.rank]],
    }


def run_dfa():
    pipeline = DFAPipeline(cut(blocks_model(), batch()[0][:SIZE], 2), MICRO_BATCHES)
    pipeline.step(*batch())
    return {"gradients": named_gradients([pipeline.module.body.module]), "feedback": pipeline.feedback}


def run_data_parallel(rank: int):
    """Two micro-batches per process and step; their weight gradients are computed, and reduced, once."""
    compiled = gr.compile(blocks_model(), split_backward=True)
    x, y = batch()
    mine = [slice(6 * rank + 3 * i, 6 * rank + 3 * i + 3) for i in range(2)]
    compiled.materialize(x[mine[0]], y[mine[0]])
    parallel = DistributedDataParallel(compiled.loss_module())
    reductions = []

    def reduce(state, bucket):
        reductions.append(bucket.index())
        work = torch.distributed.all_reduce(bucket.buffer() / 2, async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    parallel.register_comm_hook(None, reduce)
    found = []
    for concat in (False, True):
        compiled.zero_grad()
        reductions.clear()
        with parallel.no_sync():
            (parallel(x[mine[0]], y[mine[0]]) / 2).backward()
            if not concat:
                compiled.backward_weight()
        (parallel(x[mine[1]], y[mine[1]]) / 2).backward()
        early = len(reductions)
        compiled.backward_weight(concat=concat)
        found.append({"gradients": named_gradients([compiled.module]), "early": early, "reductions": len(reductions)})
    return found


def work(rank: int, slow: bool):
    found = {name: run_schedule(name, stages) for name, stages in (SLOW_RUNS if slow else RUNS).items()}
    if slow:
        made = optimise([StageCost(1, 1.3, 0.7)] * 4, [0, 1, 1, 0], MICRO_BATCHES)
        found["optimised"] = run_schedule(made.actions, 4)
        found["tied"] = run_tied()
        found["fa"] = run_schedule("1F1B", 2, rule="fa")
    else:
        found["local"] = run_local()
        found["dfa"] = run_dfa()
        found["data"] = run_data_parallel(rank)
    return found


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return processes.run(work, (False,), tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def thorough(tmp_path_factory):
    return processes.run(work, (True,), tmp_path_factory.mktemp("thorough"))


def assert_gradients(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, gradient in found.items():
        assert gradient.any()
        assert (gradient - wanted[name]).abs().max() <= 1e-6 * wanted[name].abs().max().clamp(min=1e-3), name


def check_schedule(results, schedule: str) -> None:
    loss, wanted = one_process(blocks_model(), *batch())
    ranks = [result[schedule] for result in results]
    assert_gradients(ranks[0]["gradients"] | ranks[1]["gradients"], wanted)
    assert not set(ranks[0]["gradients"]) & set(ranks[1]["gradients"])
    (losses,) = [r["loss"] for r in ranks if r["loss"] is not None]
    assert losses[0] == pytest.approx(loss, abs=1e-9)
    assert losses[1] < losses[0]
    assert all(pending == 0 for r in ranks for pending in r["pending"])


@pytest.mark.parametrize("schedule", RUNS)
def test_pipeline_is_one_process(quick, schedule):
    check_schedule(quick, schedule)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [*SLOW_RUNS, "optimised"])
def test_other_schedules_are_one_process(thorough, schedule):
    check_schedule(thorough, schedule)


@pytest.mark.slow
def test_other_rules_run_in_a_pipeline(thorough):
    names = set().union(*(r["fa"]["gradients"] for r in thorough))
    assert names == {n for n, _ in blocks_model().named_parameters()}
    _, bp = one_process(blocks_model(), *batch())
    # the last layer has its exact gradient, what is below one of it has not
    found = thorough[0]["fa"]["gradients"] | thorough[1]["fa"]["gradients"]
    assert torch.allclose(found["3.weight"], bp["3.weight"])
    assert not torch.allclose(found["0.0.weight"], bp["0.0.weight"])


@pytest.mark.slow
def test_copies_of_a_tied_parameter_get_one_gradient(thorough):
    case = zoo.make("gpt")
    case.model.double()
    torch.manual_seed(2)
    x, y = case.batch(SIZE * MICRO_BATCHES)
    _, wanted = one_process(case.model, x, y)
    for found in thorough:
        assert "token.weight" in found["tied"]
        assert_gradients(found["tied"], {n: 2 * wanted[n] for n in found["tied"]})


def test_local_stages_learn_from_their_own_heads(quick):
    model, (x, y) = blocks_model(), batch()
    first, second = model[:2], model[2:]
    if set(quick[0]["local"]["gradients"]) != {n for n, _ in first.named_parameters()}:
        first, second = model[:1], model[1:]
    head = nn.Linear(6, 3).double()
    head.load_state_dict(quick[0]["local"]["head"])
    h = first(x)
    losses = [gr.default_loss(head(h), y), gr.default_loss(second(h.detach()), y)]
    sum(losses).backward()
    wanted = named_gradients([model])
    assert_gradients(quick[0]["local"]["gradients"] | quick[1]["local"]["gradients"], wanted)
    assert [r["local"]["loss"] for r in quick] == pytest.approx([loss.item() for loss in losses])
    # each sends a micro-batch before it learns from it, and nothing comes back
    assert quick[0]["local"]["actions"][:4] == ["0F0", "0SEND_F0", "0W0", "0F1"]
    assert not [a for r in quick for a in r["local"]["actions"] if "SEND_B" in a or "RECV_B" in a]


def test_error_broadcast_to_all_stages(quick):
    model, (x, y) = blocks_model(), batch()
    names = set(quick[0]["dfa"]["gradients"])
    cut_at = next(i for i in range(1, 4) if {n for n, _ in model[:i].named_parameters()} == names)
    first, second = model[:cut_at], model[cut_at:]
    h = first(x)
    scores = second(h.detach())
    (error,) = torch.autograd.grad(gr.default_loss(scores, y), scores, retain_graph=True)
    h.backward(error @ quick[0]["dfa"]["feedback"])
    scores.backward(error)
    assert quick[1]["dfa"]["feedback"] is None
    assert_gradients(quick[0]["dfa"]["gradients"] | quick[1]["dfa"]["gradients"], named_gradients([model]))


@pytest.mark.parametrize("concat", [False, True])
def test_data_parallel_reduces_once_behind_the_weight_stage(quick, concat):
    _, wanted = one_process(blocks_model(), *batch())
    for result in quick:
        found = result["data"][concat]
        assert_gradients(found["gradients"], wanted)
        assert (found["early"], found["reductions"]) == (0, 1)


# --- cutting -------------------------------------------------------------------------------------------------------


class Skips(nn.Module):
    """The last block reads the input, an integer and the first block's output; a buffer changes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(4)])
        self.norm = nn.BatchNorm1d(6)
        self.embed = nn.Embedding(5, 6)

    def forward(self, x, ids):
        first = h = torch.relu(self.layers[0](x))
        for layer in self.layers[1:-1]:
            h = self.norm(torch.tanh(layer(h))) if layer is self.layers[2] else torch.tanh(layer(h))
        return self.layers[-1](h + first) + x + self.embed(ids)


def test_stages_one_after_the_other_are_the_model():
    model = Skips()
    x, ids = torch.randn(4, 6), torch.tensor([1, 1, 4, 0])
    made = cut(model, (x, ids), 4)
    reference = copy.deepcopy(model)
    h = (x, ids)
    for part in made.parts:
        assert [tuple(t.shape) for t in h] == [tuple(t.shape) for t in part.inputs]
        assert [t.requires_grad for t in h] == [t.requires_grad for t in part.inputs]
        out = part.module(*h)
        h = out if isinstance(out, tuple) else (out,)
    wanted = reference(x, ids)
    assert torch.equal(h[0], wanted)
    h[0].square().sum().backward()
    wanted.square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    assert torch.equal(model.norm.running_mean, reference.norm.running_mean)
    assert {b for part in made.parts for b in part.blocks} >= {f"layers.{i}" for i in range(4)}


def test_the_most_expensive_stage_is_as_cheap_as_can_be():
    widths = [4, 40, 4, 24, 24, 4, 40, 4]
    model = nn.Sequential(*[nn.Linear(a, b) for a, b in itertools.pairwise(widths)])
    made = cut(model, torch.randn(8, 4), 3)
    whole = cut(model, torch.randn(8, 4), len(widths) - 1)
    each = [part.cost.total for part in whole.parts]
    best = min(
        max(sum(each[:a]), sum(each[a:b]), sum(each[b:])) for a, b in itertools.combinations(range(1, len(each)), 2)
    )
    assert max(part.cost.total for part in made.parts) == best
    assert sum(part.cost.total for part in made.parts) == sum(each)


def test_what_cannot_be_cut_is_refused():
    model = blocks_model()
    x = batch()[0][:SIZE]
    with pytest.raises(gr.RuleError, match="9 stages of a model with 4 blocks"):
        cut(model, x, 9)
    with pytest.raises(gr.RuleError, match="tied='maybe'"):
        cut(model, x, 2, tied="maybe")
    case = zoo.make("gpt")
    with pytest.raises(gr.RuleError, match=r"token.weight is used by stages 0 and 1"):
        cut(case.model, case.batch(2)[0], 2)


@pytest.mark.parametrize(
    ("schedule", "stages", "match"),
    [("1F1B", 4, "one stage per process"), ("ZBVZeroBubble", 2, "two stages"), ("LoopedBFS", 3, "equal number")],
)
def test_schedules_say_how_many_stages_they_run(schedule, stages, match):
    with pytest.raises(gr.RuleError, match=match):
        stages_of_rank(schedule, 0, 2, stages)
    with pytest.raises(gr.RuleError, match="unknown"):
        stages_of_rank("2F2B", 0, 2, 2)


@pytest.fixture
def alone(tmp_path):
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    yield
    torch.distributed.destroy_process_group()


def test_unequal_micro_batches_are_refused(alone):
    x, y = batch()
    pipeline = Pipeline(cut(blocks_model(), x[:SIZE], 1), "1F1B", MICRO_BATCHES)
    with pytest.raises(gr.RuleError, match="is not 4 micro-batches"):
        pipeline.step(x[:-1], y[:-1])
    with pytest.raises(gr.RuleError, match="takes 1 tensors, got 2"):
        pipeline.step((x, x), y)
    with pytest.raises(gr.RuleError, match="needs the targets"):
        pipeline.step(x)
    loss = pipeline.step(x, y)
    assert loss.item() == pytest.approx(one_process(blocks_model(), x, y)[0])


# --- simulation ----------------------------------------------------------------------------------------------------

UNEVEN = StageCost(1, 1.3, 0.7)
BUBBLES = [
    ("1F1B", 2, 4, StageCost(), 0.200),
    ("GPipe", 4, 8, StageCost(), 0.273),
    ("1F1B", 8, 16, StageCost(), 0.304),
    ("Interleaved1F1B", 4, 8, UNEVEN, 0.158),
    ("InterleavedZeroBubble", 4, 8, StageCost(), 0.059),
    ("InterleavedZeroBubble", 4, 8, UNEVEN, 0.091),
    ("ZBVZeroBubble", 8, 16, StageCost(), 0.068),
    ("ZBVZeroBubble", 4, 8, UNEVEN, 0.075),
    ("DualPipeV", 8, 16, UNEVEN, 0.114),
    ("DualPipeV", 2, 4, StageCost(), 0.040),
]
"""Idle share of each schedule, from an independent simulation of the engine's actions, that sends what is ready."""


def test_what_the_engine_runs_as_one_sends_when_both_are_over():
    """The engine lists a pair's messages behind the pair."""
    for joined, starts in ((False, [1, 2]), (True, [2, 3])):
        actions = [[Action("F", 0, 0, joined), Action("F", 0, 1)], [Action("F", 1, 0), Action("F", 1, 1)]]
        timeline = simulate(actions, [StageCost()] * 2)
        assert [span.start for span in timeline.spans[1]] == starts
    # on the process itself the next stage goes on at once
    actions = [[Action("F", 0, 0, True), Action("F", 1, 0)]]
    assert simulate(actions, [StageCost()] * 2).makespan == 2


@pytest.mark.parametrize(("schedule", "ranks", "micro_batches", "cost", "bubble"), BUBBLES)
def test_bubbles_of_the_engines_schedules(schedule, ranks, micro_batches, cost, bubble):
    actions = actions_of(schedule, ranks, micro_batches)
    assert any(a.joined for own in actions for a in own) == (schedule == "DualPipeV")
    apart = [[dataclasses.replace(a, joined=False) for a in own] for own in actions]
    timeline = simulate(apart, [cost] * 2 * ranks)
    assert timeline.bubble == pytest.approx(bubble, abs=6e-4)
    stages = 2 * ranks if "1F1B" not in (schedule, schedule[-4:]) and schedule != "GPipe" else None
    total = sum(span.end - span.start for own in timeline.spans for span in own)
    assert timeline.busy == pytest.approx(total)
    if stages:
        assert total == pytest.approx(stages * micro_batches * 3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_simulated_actions_keep_their_order(schedule):
    ranks, micro_batches = 3, 6
    actions = actions_of(schedule, ranks, micro_batches)
    timeline = simulate(actions, [StageCost()] * 6, communication=0.25)
    end = {span.action: span.end for own in timeline.spans for span in own}
    place = {span.action.stage: span.rank for own in timeline.spans for span in own}
    start = {span.action: span.start for own in timeline.spans for span in own}
    last = max(place)
    for action, at in start.items():
        if action.kind == "F" and action.stage:
            before = Action("F", action.stage - 1, action.micro_batch)
        elif action.kind in "IB" and action.stage < last:
            before = next(a for k in "IB" if (a := Action(k, action.stage + 1, action.micro_batch)) in end)
        else:
            continue
        delay = 0.25 if place[before.stage] != place[action.stage] else 0.0
        assert at >= end[before] + delay - 1e-9
    for own in timeline.spans:
        assert all(b.start >= a.end for a, b in itertools.pairwise(own))


def test_local_rules_send_nothing_back():
    ranks, micro_batches = 4, 8
    local = simulate(actions_of("ForwardOnly", ranks, micro_batches), [StageCost()] * ranks, local=True)
    assert local.messages == {"activations": (ranks - 1) * micro_batches, "cotangents": 0}
    # only the filling of the pipeline is left: the last process starts (p - 1) F late
    assert local.makespan == (ranks - 1) * 1 + micro_batches * 3
    assert max(local.peak) == 1
    assert local.bubble < simulate(actions_of("1F1B", ranks, micro_batches), [StageCost()] * ranks).bubble


def test_memory_of_the_schedules():
    cost = StageCost(saved=10, held=4)
    gpipe = simulate(actions_of("GPipe", 4, 8), [cost] * 4)
    one = simulate(actions_of("1F1B", 4, 8), [cost] * 4)
    assert gpipe.peak == [80] * 4
    assert one.peak == [40, 30, 20, 10]
    whole = simulate([[Action("F", 0, 0), Action("I", 0, 0), Action("F", 0, 1), Action("W", 0, 0)]], [cost])
    assert whole.peak == [14]


def test_schedules_that_do_not_go_on_are_named():
    with pytest.raises(gr.RuleError, match="does not go on"):
        simulate([[Action("W", 0, 0), Action("I", 0, 0)]], [StageCost()])
    with pytest.raises(gr.RuleError, match="ZBVZeroBubble"):
        actions_of("ZBVZeroBubble", 2, 4, stages=6)
    with pytest.raises(gr.RuleError, match="spread evenly"):
        actions_of("Interleaved1F1B", 2, 4, stages=5)


# --- schedules made for given costs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("backward", "weight"), [(1.3, 0.7), (1.17, 0.83), (1.0, 1.0), (0.8, 1.2)])
def test_a_schedule_for_measured_costs_reaches_the_bound(backward, weight):
    ranks, micro_batches = 2, 4
    costs = [StageCost(1, backward, weight)] * 2 * ranks
    place = [*range(ranks), *reversed(range(ranks))]
    made = optimise(costs, place, micro_batches)
    fixed = simulate(actions_of("ZBVZeroBubble", ranks, micro_batches), costs)
    assert made.timeline.makespan <= fixed.makespan + 1e-9
    assert made.gap == pytest.approx(0, abs=1e-9)
    # LB = m (F + I + W) v + (p - 1) F
    assert made.bound == pytest.approx(micro_batches * (1 + backward + weight) * 2 + (ranks - 1))
    capped = optimise(costs, place, micro_batches, cap=2 * ranks)
    assert max(capped.timeline.peak) <= 2 * ranks
    assert capped.timeline.makespan <= fixed.makespan + 1e-9


@pytest.mark.parametrize(("backward", "weight"), [(1.3, 0.7), (1, 1), (0.8, 1.2)])
def test_half_the_memory_of_1f1b_as_fast_as_v_half(backward, weight):
    """Qi et al. 2024: V-Half holds (p + 2) // 2 micro-batches, and waits about p / 2 of the time of one."""
    ranks, micro_batches = 4, 8
    place, costs = [*range(ranks), *reversed(range(ranks))], [StageCost(1, backward, weight)] * 2 * ranks
    half = 2 * ((ranks + 2) // 2)  # a stage saves 1 unit of 2
    rivals = []
    for order in orders(place, micro_batches, [3]):
        made = greedy(costs, place, micro_batches, given=order)
        assert [[a for a in own if a.kind != "W"] for own in made] == order
        rivals.append(simulate(made, costs))
    assert min(max(one.peak) for one in rivals) <= half
    best = min(one.makespan for one in rivals)
    if backward == weight:
        assert best <= 6 * (micro_batches + ranks / 2)
    made = optimise(costs, place, micro_batches, cap=half)
    assert max(made.timeline.peak) <= half
    assert made.timeline.makespan <= best


def test_a_made_schedule_runs_every_action_once():
    costs = [StageCost(1, 2, 0.5), StageCost(3, 1, 1), StageCost(0.5, 1, 2)]
    made = optimise(costs, [0, 1, 2], 5, communication=0.3)
    found = sorted((a.stage, a.kind, a.micro_batch) for own in made.actions for a in own)
    assert found == sorted((s, k, mb) for s in range(3) for k in "FIW" for mb in range(5))
    assert made.timeline.makespan >= made.bound - 1e-9


@pytest.mark.parametrize(("backward", "weight"), [(1.3, 0.7), (1.0, 1.0)])
@pytest.mark.parametrize("live", [1, 2])
def test_schedules_under_a_cap_are_proved_the_shortest(live, backward, weight):
    """A process whose memory is full waits for its first cotangents: the bound knows."""
    ranks, micro_batches = 2, 4
    costs = [StageCost(1, backward, weight)] * 2 * ranks
    place = [*range(ranks), *reversed(range(ranks))]
    made = optimise(costs, place, micro_batches, cap=2 * live, solve_seconds=60)
    assert made.proved
    assert max(made.timeline.peak) <= 2 * live
    # the last process runs 2 * live forwards from 1 on; its first cotangents are there behind 4 F and one I
    waits = max(0.0, 4 + backward - 1 - 2 * live)
    bound = 1 + waits + micro_batches * 2 * (1 + backward + weight)
    assert lower_bound(costs, place, micro_batches, 0.0, 2 * live) == pytest.approx(bound)
    assert made.bound >= bound - 1e-9
    assert live == 1 or made.bound == pytest.approx(bound)


def uneven(seed: int, stages: int) -> list[StageCost]:
    draw = random.Random(seed)
    return [StageCost(*(round(draw.uniform(0.5, 1.5), 1) for _ in range(3))) for _ in range(stages)]


def brute_force(costs, place, micro_batches: int) -> float:
    """The shortest of all schedules: every order of every process."""
    ranks = max(place) + 1

    def orders(rank):
        own = [Action(kind, s, mb) for s in range(len(costs)) if place[s] == rank for kind in "FIW" for mb in range(m)]
        for order in itertools.permutations(own):
            at = {a: i for i, a in enumerate(order)}
            if all(
                at[Action("F", a.stage, a.micro_batch)] <= at[Action("I", a.stage, a.micro_batch)] <= at[a]
                for a in own
                if a.kind == "W"
            ) and all(not a.micro_batch or at[Action(a.kind, a.stage, a.micro_batch - 1)] < at[a] for a in own):
                yield list(order)

    m = micro_batches
    found = []
    for held in itertools.product(*(list(orders(rank)) for rank in range(ranks))):
        with contextlib.suppress(gr.RuleError):  # some orders wait for one another
            found.append(simulate(list(held), costs).makespan)
    return min(found)


@pytest.mark.parametrize("seed", range(3))
def test_no_order_of_a_small_pipeline_is_shorter(seed):
    costs = uneven(seed, 2)
    shortest = brute_force(costs, [0, 1], 2)
    made = optimise(costs, [0, 1], 2, solve_seconds=60)
    assert made.proved
    assert made.timeline.makespan == pytest.approx(shortest)
    assert made.bound == pytest.approx(shortest)
    assert lower_bound(costs, [0, 1], 2, 0.0) <= shortest + 1e-9
    searched = beam(costs, [0, 1], 2, 0.0, float("inf"), width=50, below=1e9, bound=0.0)
    assert simulate(searched, costs).makespan == pytest.approx(shortest)


@pytest.mark.parametrize("capped", [False, True])
def test_the_integer_program_agrees_with_the_search(capped):
    costs, place = uneven(4, 4), [0, 1, 1, 0]
    cap = 3.0 if capped else None
    bound = lower_bound(costs, place, 2, 0.1, cap)
    made = optimise(costs, place, 2, communication=0.1, cap=cap)
    best = made.timeline.makespan
    solved, proved = solve(costs, place, 2, 0.1, cap, bound=bound, below=1.05 * best, seconds=100)
    timeline = simulate(solved, costs, communication=0.1)
    assert timeline.makespan == pytest.approx(proved, rel=1e-4)
    assert timeline.makespan <= best + 1e-6
    if capped:
        assert max(timeline.peak) <= cap


def test_pipelines_that_are_too_large_for_the_solver_are_refused():
    with pytest.raises(gr.RuleError, match="too many for the solver"):
        solve([StageCost()] * 8, [0, 1, 2, 3, 3, 2, 1, 0], 8, 0.0, None, bound=0.0, below=99.0, seconds=1)


def test_caps_that_hold_nothing_are_refused():
    with pytest.raises(gr.RuleError, match="the cap is 1"):
        optimise([StageCost(saved=1)] * 4, [0, 1, 1, 0], 4, cap=1)
    with pytest.raises(gr.RuleError, match="2 costs for 1 stages"):
        optimise([StageCost()] * 2, [0], 4)


def test_schedules_of_other_pipelines_are_refused(alone):
    x, _ = batch()
    made = optimise([StageCost()], [0], 3)
    with pytest.raises(gr.RuleError, match="3 micro-batches, the pipeline 1 on 1 and 4"):
        Pipeline(cut(blocks_model(), x[:SIZE], 1), made.actions, MICRO_BATCHES)
    made = optimise([StageCost()], [0], MICRO_BATCHES)
    pipeline = Pipeline(cut(blocks_model(), x[:SIZE], 1), made.actions, MICRO_BATCHES)
    loss = pipeline.step(*batch())
    assert loss.item() == pytest.approx(one_process(blocks_model(), *batch())[0])


# --- example scripts -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(
    "words",
    [
        ["ddp.py"],
        ["pipeline.py"],
        ["pipeline.py", "--schedule", "1F1B"],
        ["local_pipeline.py"],
        ["local_pipeline.py", "--rule", "dfa"],
    ],
    ids=" ".join,
)
def test_examples_train(words, count):
    root = pathlib.Path(__file__).parent.parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [*command, str(root / "examples" / words[0]), *words[1:]],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    losses = [float(line.rpartition(" ")[2]) for line in ran.stdout.splitlines() if line.startswith("step")]
    assert len(losses) >= 2
    assert losses[-1] < 1.0  # four classes at random: 1.39
