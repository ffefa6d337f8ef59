"""Backward in two stages: the same gradients as in one, whatever the order in which weight gradients are asked for."""

from __future__ import annotations

import copy
import gc
import pickle
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import graphrewrite as gr
from graphrewrite.analysis.liveness import LiveBytes
from graphrewrite.graph.nodes import Grad, Role, UserInput, ancestors, info, is_float, value
from graphrewrite.pipeline import build_pass
from graphrewrite.testing import zoo
from graphrewrite.testing.compare import assert_same, call, gradients
from helpers import clean_graph, joint_graph

RULES = ["fa", "mono_forward", *(pytest.param(rule, marks=pytest.mark.slow) for rule in ("dfa", "kp", "highway"))]
SLOW = {"gcn", "gpt"}
MODELS = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in zoo.names()]


def twins(model: nn.Module, rule: str = "bp", **options):
    """The same model compiled in one stage and in two."""
    other = copy.deepcopy(model)
    return gr.compile(model, rule, **options), gr.compile(other, rule, split_backward=True, **options)


def assert_equal_gradients(one: gr.CompiledModule, two: gr.CompiledModule, *, exact: bool = True) -> None:
    right = dict(one.named_parameters())
    found = 0
    for name, parameter in two.named_parameters():
        assert_same(parameter.grad, right[name].grad, f"gradient of {name}", exact=exact)
        found += parameter.grad is not None
    assert found


def losses(compiled: gr.CompiledModule, batches, loss=None) -> list[torch.Tensor]:
    """One loss per batch, alternately `compiled.loss` and an outside loss where the rule allows it."""
    found = []
    for i, (x, y) in enumerate(batches):
        torch.manual_seed(i)
        found.append(compiled.loss(x, y) if loss is None else loss(call(compiled, x), y))
    return found


class Tied(nn.Module):
    """Embedding and head share a matrix, a linear map is used twice, a parameter is used through views of it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.twice = nn.Linear(8, 8)
        self.both = nn.Parameter(torch.randn(16, 8))
        self.norm = nn.LayerNorm(8)
        self.plain = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.embed(ids)
        h = self.twice(torch.relu(self.twice(h)))
        h = self.norm(h) + torch.tanh(F.linear(h, self.both[:8])) * F.linear(h, self.both[8:])
        return F.linear(self.plain(h).transpose(0, 1), self.embed.weight)


def tied_batch(n: int = 3):
    return torch.randint(0, 3, (n, 5)), torch.randint(0, 7, (5, n))  # three ids only: they repeat


class Stage(nn.Module):
    """A part of a model: its input wants a gradient."""

    def __init__(self, width: int = 16, layers: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {"a": nn.Linear(width, 4 * width), "b": nn.Linear(4 * width, width), "n": nn.LayerNorm(width)}
            )
            for _ in range(layers)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer["b"](F.gelu(layer["a"](layer["n"](x))))
        return x


# --- equality ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_equals_one_stage_on_every_model(name):
    case = zoo.make(name)
    one, two = twins(case.model, loss=case.loss)
    batches = [case.batch(n) for n in (case.sizes[0], case.sizes[1], case.sizes[0])]
    for loss in losses(one, batches):
        loss.backward()
    first, second, third = losses(two, batches)
    first.backward()
    second.backward()
    assert two.pending == 2
    two.backward_weight(1)
    third.backward()
    two.backward_weight(2)
    assert two.pending == 0
    assert_equal_gradients(one, two)
    assert_concatenation_is_close(one, two, batches)


def assert_concatenation_is_close(one: gr.CompiledModule, two: gr.CompiledModule, batches) -> None:
    """Sums in another order: measured by the largest gradient, since some are nothing but rounding."""
    right = gradients(one.module)
    largest = max(g.abs().max() for g in right.values() if g is not None)
    two.zero_grad()
    for loss in losses(two, batches):
        loss.backward()
    two.backward_weight(concat=True)
    for parameter, found in gradients(two.module).items():
        assert (found is None) == (right[parameter] is None)
        if found is not None:
            assert (found - right[parameter]).abs().max() <= 1e-5 * largest, parameter
    # what runs for each micro-batch starts from sums that the first stage has made
    for node in two.program().concat_plan().apart.values():
        assert all(value(source).numel() <= value(node).numel() for source in ancestors([node]) if is_float(source))


@pytest.mark.parametrize("rule", RULES)
def test_equals_one_stage_under_other_rules(rule):
    one, two = twins(zoo.make("mlp").model, rule, blocks="layers")
    batches = [zoo.make("mlp").batch(n) for n in (4, 6)]
    for compiled in (one, two):
        compiled.materialize(*batches[0])
        for loss in losses(compiled, batches):
            loss.backward()
    two.backward_weight()
    assert_equal_gradients(one, two)
    left, right = one.rule_state, two.rule_state
    for name, held in left.items():
        assert_same(right[name], held, name)


@pytest.mark.parametrize("through", ["loss", pytest.param("forward", marks=pytest.mark.slow)])
def test_tied_reused_and_viewed_weights(through):
    one, two = twins(Tied().double())
    outside = None if through == "loss" else gr.default_loss
    batches = [tied_batch(3), tied_batch(2), tied_batch(3)]
    for loss in losses(one, batches, outside):
        loss.backward()
    for loss in losses(two, batches, outside):
        loss.backward()
        two.backward_weight()
    assert_equal_gradients(one, two)


def test_torchs_own_split_gives_the_same():
    from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

    reference = Stage()
    two = gr.compile(copy.deepcopy(reference), split_backward=True)
    x, cotangent = torch.randn(3, 4, 16, requires_grad=True), torch.randn(3, 4, 16)
    out = reference(x)
    (wanted,), groups = stage_backward_input([out], [cotangent], [x], reference.parameters())
    stage_backward_weight(reference.parameters(), groups)
    own = x.detach().requires_grad_()
    two(own).backward(cotangent)
    assert_same(own.grad, wanted, "gradient of the input")
    two.backward_weight()
    for name, parameter in two.named_parameters():
        assert_same(parameter.grad, dict(reference.named_parameters())[name].grad, name)


def test_outputs_that_nothing_uses():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.a(x), self.b(x)

    one, two = twins(Two())
    x = torch.randn(5, 4)
    for compiled in (one, two):
        compiled(x)[0].sum().backward()
    two.backward_weight()
    assert one.module.b.weight.grad is None
    assert_equal_gradients(one, two)


def test_clipping_accumulation_and_scaler():
    one, two = twins(zoo.make("mlp").model)
    for compiled in (one, two):
        optimizer = torch.optim.SGD(compiled.parameters(), 0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        torch.manual_seed(1)
        for _ in range(2):
            optimizer.zero_grad()
            for _ in range(2):
                scaler.scale(compiled.loss(*zoo.make("mlp").batch(4)) / 2).backward()
            if compiled is two:
                compiled.backward_weight()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(compiled.parameters(), 0.05)
            scaler.step(optimizer)
            scaler.update()
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert_same(b.detach(), a.detach(), name)
    assert_equal_gradients(one, two)


@pytest.mark.slow
def test_same_under_autocast():
    one, two = twins(zoo.make("mlp").model)
    batch = zoo.make("mlp").batch(4)
    for compiled in (one, two):
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled.loss(*batch)
        loss.backward()
    two.backward_weight()
    assert_equal_gradients(one, two)


def test_alignment_is_that_of_one_stage():
    one, two = twins(zoo.make("mlp").model, "fa")
    batch = zoo.make("mlp").batch(4)
    left, right = one.alignment(*batch), two.alignment(*batch)
    assert two.pending == 0
    assert {n: left[n] for n in left} == {n: right[n] for n in right}
    assert all(p.grad is None for p in two.parameters())


# --- what runs when ------------------------------------------------------------------------------------------------


def test_first_stage_computes_no_weight_gradient():
    two = gr.compile(Stage(), split_backward=True)
    x = torch.randn(2, 3, 16, requires_grad=True)
    two(x).sum().backward()
    assert x.grad.any()
    have = {name for name, p in two.named_parameters() if p.grad is not None}
    assert have == {"layers.0.n.weight", "layers.0.n.bias"}
    part = two.program().partition
    assert not [n for n in part.order["backward"] if info(n).role is Role.GRADIENT and n.users]
    assert not [n for n in part.order["weight"] if info(n).role is Role.SIGNAL]
    assert [s for s in part.backward_outputs if isinstance(s, Grad) and isinstance(s.of, UserInput)]
    two.backward_weight()
    assert all(p.grad is not None for p in two.parameters())


def test_cotangents_run_in_the_first_stage_though_no_input_wants_one(ready):
    part = ready.program().partition
    roles = Counter(info(n).role for n in part.order["weight"])
    assert set(roles) == {Role.GRADIENT}
    assert sum(1 for n in part.order["backward"] if "mm" in str(n.target)) == 2


def test_gradients_of_inputs_alone_leave_nothing_pending():
    two = gr.compile(Stage(), split_backward=True)
    x = torch.randn(2, 3, 16, requires_grad=True)
    (wanted,) = torch.autograd.grad(copy.deepcopy(two.module)(x).sum(), x)
    (found,) = torch.autograd.grad(two(x).sum(), x)
    assert_same(found, wanted, "gradient of the input")
    assert two.pending == 0


def test_frozen_parameters_are_left_alone():
    model = zoo.make("mlp").model
    model[2].requires_grad_(False)
    one, two = twins(model)
    batch = zoo.make("mlp").batch(4)
    one.loss(*batch).backward()
    two.loss(*batch).backward()
    two.backward_weight()
    assert two.module[2].weight.grad is None
    assert_equal_gradients(one, two)


def test_hooks_see_the_weight_gradients(ready):
    two, seen = ready, []
    handle = two.module[0].weight.register_hook(lambda g: seen.append(g.clone()) or 2 * g)
    two.backward_weight()
    handle.remove()
    assert len(seen) == 1
    assert_same(two.module[0].weight.grad, 2 * seen[0], "the hook's gradient")


def test_weight_tasks_run_in_any_order():
    one, two = twins(zoo.make("mlp").model.double())
    batches = [zoo.make("mlp").batch(4) for _ in range(3)]
    batches = [(x.double(), y) for x, y in batches]
    tasks = []
    for loss in losses(two, batches):
        loss.backward()
        tasks.append(two.weight_task())
    assert two.pending == 0
    for i in (1, 2, 0):
        tasks[i]()
    for loss in losses(one, batches):
        loss.backward()
    assert_equal_gradients(one, two, exact=False)
    with pytest.raises(gr.RuleError, match="has run already"):
        tasks[0]()


# --- the pass ------------------------------------------------------------------------------------------------------


def split_graph(model: nn.Module, x, y):
    graph = clean_graph(model, x, y)
    return graph, build_pass("split_backward").run(graph)


def test_the_pass_marks_weight_gradients_and_keeps_everything_else():
    case = zoo.make("mlp")
    batch = case.batch(4)
    plain = clean_graph(copy.deepcopy(case.model), *batch)
    graph, result = split_graph(case.model, *batch)
    assert result.modified
    assert [n.name for n in graph.nodes] == [n.name for n in plain.nodes]
    for node, other in zip(graph.nodes, plain.nodes, strict=True):
        if node.op == "call_function":
            assert info(node).but(stage="", mirrors=None) == info(other).but(mirrors=None)
            assert info(node).stage in ("", "weight")
    again = build_pass("split_backward").run(graph)
    assert not again.modified
    assert not [text for _, _, text in graph.log.entries if "stays in the first stage" in text]


def test_the_pass_does_not_fire_where_nothing_is_separable():
    graph, result = split_graph(nn.LayerNorm(5), torch.randn(4, 5), torch.randint(0, 5, (4,)))
    assert not result.modified
    assert any("layer_norm" in text for _, _, text in graph.log.entries)
    with pytest.raises(gr.RuleError, match="expanded graph"):
        joint_graph(nn.Linear(5, 5), torch.randn(4, 5), torch.randint(0, 5, (4,))).split_backward()


def test_the_pass_changes_no_number():
    two = gr.compile(zoo.make("mlp").model, split_backward=True, verify="numeric")
    two.loss(*zoo.make("mlp").batch(4)).backward()
    two.backward_weight()


def test_a_gradient_that_an_input_needs_stays_in_the_first_stage():
    """An input that is a linear map's second operand: the gradient of the first one is no weight gradient."""

    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Linear(4, 4)

        def forward(self, x, w):
            return F.linear(self.scale(x), w)

    one, two = twins(Products())
    x, w = torch.randn(3, 4), torch.randn(2, 4, requires_grad=True)
    found = []
    for compiled in (one, two):
        w.grad = None
        compiled(x, w).square().sum().backward()
        found.append(w.grad)
    assert_same(found[1], found[0], "gradient of w")
    two.backward_weight()
    assert_equal_gradients(one, two)


# --- several micro-batches as one ----------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def test_concatenation_adds_products_into_one_result():
    one, two = twins(Stage().double())
    batches = [torch.randn(n, 3, 16).double() for n in (2, 4, 2, 3)]
    for x in batches:
        one(x).square().sum().backward()
        two(x).square().sum().backward()
    with Products() as seen:
        two.backward_weight(concat=True)
    assert (seen.count["aten::mm"], seen.count["aten::addmm_"]) == (2, 6)
    assert not seen.count["aten::cat"]
    assert_equal_gradients(one, two, exact=False)


def test_concatenation_in_low_precision_rounds_once():
    two = gr.compile(Stage().bfloat16(), split_backward=True, dynamic=None)
    right = Stage().bfloat16().double()
    right.load_state_dict(two.module.state_dict())
    for _ in range(4):
        x = torch.randn(8, 3, 16).bfloat16()
        two(x).square().sum().backward()
        right(x.double()).square().sum().backward()
    with Products() as seen:
        two.backward_weight(concat=True)
    assert seen.count["aten::mm"] == 2
    assert seen.count["aten::cat"] > 0
    for p, q in zip(two.module.parameters(), right.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 0.02 * q.grad.norm()


def test_concatenation_copies_nothing():
    """The stated cap: what is held, and the gradients once."""
    two = gr.compile(nn.Sequential(*[nn.Linear(32, 32) for _ in range(6)]), split_backward=True, dynamic=None)
    for _ in range(4):
        two(torch.randn(64, 32)).square().sum().backward()
    weights = sum(p.nbytes for p in two.module.parameters())
    with LiveBytes([v for one in two._weights.pending for v in one.values if torch.is_tensor(v)]) as live:
        two.backward_weight(concat=True)
    assert live.peak <= weights + max(p.nbytes for p in two.module.parameters())


def test_what_does_not_add_up_is_computed_apart():
    class Squared(nn.Module):
        """The weight is multiplied by itself: its gradient reads the product's, which adds up, not linearly."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))
            self.other = nn.Linear(4, 3)

        def forward(self, x):
            return F.linear(x, torch.sin(self.weight)) + self.other(x)

    one, two = twins(Squared().double())
    for n in (2, 5):
        x, y = torch.randn(n, 4).double(), torch.randint(0, 3, (n,))
        one.loss(x, y).backward()
        two.loss(x, y).backward()
    two.backward_weight(concat=True)
    assert_equal_gradients(one, two, exact=False)


def test_concatenation_adds_into_what_is_there():
    one, two = twins(zoo.make("mlp").model.double())
    for compiled in (one, two):
        torch.manual_seed(3)
        for _ in range(2):
            for n in (3, 2, 3):
                x, y = zoo.make("mlp").batch(n)
                compiled.loss(x.double(), y).backward()
            if compiled is two:
                compiled.backward_weight(2, concat=True)
                compiled.backward_weight(concat=True)
    assert_equal_gradients(one, two, exact=False)


@pytest.mark.slow
def test_concatenation_of_tied_weights():
    one, two = twins(Tied().double())
    for compiled in (one, two):
        torch.manual_seed(3)
        for n in (3, 2, 3):
            compiled.loss(*tied_batch(n)).backward()
    two.backward_weight(concat=True)
    assert_equal_gradients(one, two, exact=False)


# --- bytes ---------------------------------------------------------------------------------------------------------


def test_report_counts_what_is_held_and_names_what_is_not_split():
    two = gr.compile(Stage(), split_backward=True)
    x = torch.randn(2, 3, 16, requires_grad=True)
    out = two(x)
    out.backward(torch.randn_like(out))
    report = two.report()
    assert report.held_bytes == two._weights.pending[0].nbytes == two.program().partition.held_bytes
    # the inputs of both maps (d, 4d) and the cotangents of their outputs (4d, d), for 6 tokens of 16
    assert report.held_bytes == 10 * 6 * 16 * 4
    assert len(report.not_split) == 2
    assert all("layer_norm" in reason for reason in report.not_split)
    assert "held between the two stages of the backward" in str(report)
    assert {row.kind for row in report.held if row.nbytes} == {"activation", "cotangent"}


def test_activations_that_no_weight_gradient_reads_die_in_the_first_stage():
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(8, 8)

        def forward(self, x):
            h = self.map(x)
            for _ in range(5):
                h = torch.sigmoid(h) * h
            return h

    two = gr.compile(Deep(), split_backward=True)
    x = torch.randn(4, 8, requires_grad=True)
    two(x).sum().backward()
    part = two.program().partition
    assert part.saved_bytes >= 5 * 4 * 8 * 4
    assert part.held_bytes == 4 * 8 * 4  # the cotangent of its output; its input is the caller's


@pytest.mark.parametrize("compress", ["int8", pytest.param("recompute", marks=pytest.mark.slow)])
def test_compression_composes(compress):
    """What is stored encoded is held encoded, and decoded in both stages; the gradients are those of one stage."""
    plain = gr.compile(Stage(), split_backward=True)
    one, two = twins(plain.module, compress=compress)
    x, cotangent = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    found = []
    for compiled in (plain, one, two):
        own = x.clone().requires_grad_()
        compiled.zero_grad()
        compiled(own).backward(cotangent)
        found.append(own.grad)
        if compiled is plain:
            compiled.discard_pending()
    assert_same(found[2], found[1], "gradient of the input")
    two.backward_weight()
    assert_equal_gradients(one, two)
    assert two.report().held_bytes < plain.report().held_bytes
    assert two.program().partition.held_bytes == two.report().held_bytes


def pair_of_backwards(one: gr.CompiledModule, two: gr.CompiledModule, *shape: int) -> None:
    """One backward of each on the same numbers; the gradients of the inputs are compared bitwise."""
    x, cotangent = torch.randn(shape), torch.randn(shape)
    found = []
    for compiled in (one, two):
        own = x.clone().requires_grad_()
        compiled(own).backward(cotangent)
        found.append(own.grad)
    assert_same(found[1], found[0], "gradient of the input")


def pair_of_steps(one: gr.CompiledModule, two: gr.CompiledModule) -> None:
    """One step of each on the same numbers."""
    pair_of_backwards(one, two, 2, 4, 16)
    assert two.report().held_bytes == two._weights.pending[0].nbytes
    two.backward_weight()


@pytest.mark.parametrize(
    "options", [{"compress": "recompute{plan=blocks}"}, pytest.param({"memory_budget": 0.4}, marks=pytest.mark.slow)]
)
def test_a_budget_lets_the_weight_stage_compute_again(options):
    """Inputs of maps and cotangents of their outputs, by products that the first stage has run as well."""
    one, two = twins(Stage(layers=2))
    two = gr.compile(two.module, split_backward="split_backward{budget=0.75}", **options)
    plain = gr.compile(copy.deepcopy(one.module), split_backward=True, **options)
    pair_of_steps(copy.deepcopy(one), plain)
    pair_of_steps(one, two)
    assert two.report().held_bytes <= 0.75 * plain.report().held_bytes
    assert_equal_gradients(one, two)
    repeated = [n for n in two.program().partition.order["weight"] if "mm" in str(n.target)]
    assert len(repeated) > len([n for n in plain.program().partition.order["weight"] if "mm" in str(n.target)])


@pytest.mark.parametrize(
    "options", [{"compress": "int8"}, pytest.param({"memory_budget": 0.5}, marks=pytest.mark.slow)]
)
def test_held_cotangents_can_be_encoded(options):
    """The gradients of the inputs are bitwise those without; weight gradients are off by what the codec loses."""
    one, two = twins(Stage(width=128))
    one = gr.compile(one.module, split_backward=True, **options)
    two = gr.compile(two.module, split_backward="split_backward{codec=int8}", **options)
    pair_of_backwards(one, two, 4, 8, 128)
    for compiled in (one, two):
        compiled.backward_weight()
    cotangents = [row for row in two.report().held if row.kind == "cotangent" and row.nbytes]
    assert cotangents
    assert all(row.codec == "int8" for row in cotangents)
    assert two.report().held_bytes < 0.6 * one.report().held_bytes
    right, off = gradients(one.module), gradients(two.module)
    for name, g in right.items():
        error = (off[name] - g).norm() / g.norm()
        assert 0 <= error < 0.01
        assert (error > 0) == (".n." not in name), name  # normalisations have theirs from the first stage


def test_what_a_split_cannot_do_is_refused():
    x = torch.randn(2, 4, 16, requires_grad=True)
    two = gr.compile(Stage(), split_backward="split_backward{budget=64}")
    with pytest.raises(gr.RuleError, match="the lowest feasible is"):
        two(x)
    with pytest.raises(gr.RuleError, match=r"budget=1\.5"):
        gr.compile(Stage(), split_backward="split_backward{budget=1.5}")
    with pytest.raises(gr.GraphRewriteError, match="split_backward='fold_views'"):
        gr.compile(Stage(), split_backward="fold_views")
    two = gr.compile(Stage(), split_backward="split_backward{codec=recompute}")
    with pytest.raises(gr.RuleError, match="stores nothing in another form"):
        two(x)


def test_nothing_outlives_the_second_stage():
    two = gr.compile(Stage(), split_backward=True)
    x = torch.randn(2, 3, 16, requires_grad=True)
    two(x).sum().backward()
    one = two._weights.pending[0]
    two.backward_weight()
    assert one.values == []


# --- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled_once():
    return gr.compile(zoo.make("mlp").model, split_backward=True)


@pytest.fixture
def ready(compiled_once):
    """A module with one micro-batch pending."""
    compiled_once.zero_grad()
    compiled_once.discard_pending()
    compiled_once.loss(*zoo.make("mlp").batch(4)).backward()
    return compiled_once


@pytest.mark.parametrize("taken", [False, True])
def test_step_before_the_second_stage_is_refused(ready, taken):
    optimizer = torch.optim.SGD(ready.parameters(), 0.1)
    before = copy.deepcopy(ready.module.state_dict())
    task = ready.weight_task() if taken else ready.backward_weight
    with pytest.raises(gr.RuleError, match=r"optimizer.step\(\) before backward_weight\(\)"):
        optimizer.step()
    assert all(torch.equal(held, before[name]) for name, held in ready.module.state_dict().items())
    torch.optim.SGD([nn.Parameter(torch.ones(1))]).step()  # another model's optimizer goes on
    task()
    optimizer.step()


def test_weights_that_changed_in_between_are_refused(ready):
    with torch.no_grad():
        ready.module[2].weight.mul_(2)
    for concat in (False, True):
        with pytest.raises(gr.RuleError, match=r"2\.weight was changed between the two stages"):
            ready.backward_weight(concat=concat)
    assert ready.pending == 1  # nothing was lost
    task = ready.weight_task()
    with pytest.raises(gr.RuleError, match=r"2\.weight was changed between the two stages"):
        task()


def test_a_cotangent_that_changed_in_between_is_refused():
    two = gr.compile(Stage(), split_backward=True)
    out = two(torch.randn(2, 3, 16, requires_grad=True))
    given = torch.ones_like(out)
    out.backward(given)
    given.zero_()
    with pytest.raises(gr.RuleError, match="changed in place between the two stages"):
        two.backward_weight()


def test_fewer_pending_than_asked_for(ready):
    with pytest.raises(gr.RuleError, match="1 micro-batches are pending"):
        ready.backward_weight(2)
    with pytest.raises(gr.RuleError, match="n is a number"):
        ready.backward_weight(-1)
    assert ready.pending == 1
    ready.backward_weight(1)
    with pytest.raises(gr.RuleError, match="no micro-batch is pending"):
        ready.weight_task()
    ready.backward_weight()


def test_pending_micro_batches_can_be_given_up(ready):
    ready.discard_pending()
    assert ready.pending == 0
    torch.optim.SGD(ready.parameters(), 0.1).step()


def test_modules_in_one_stage_have_no_second():
    compiled = gr.compile(zoo.make("mlp").model)
    for method in (compiled.backward_weight, compiled.weight_task, compiled.discard_pending):
        with pytest.raises(gr.RuleError, match="split_backward=True"):
            method()


def test_copies_start_with_nothing_pending(ready):
    for other in (copy.deepcopy(ready), pickle.loads(pickle.dumps(ready))):
        assert other.pending == 0
        other.loss(*zoo.make("mlp").batch(4)).backward()
        other.backward_weight()
        assert other.module[0].weight.grad is not None


def test_the_hook_goes_with_the_module():
    from torch.optim.optimizer import _global_optimizer_pre_hooks

    gc.collect()
    before = len(_global_optimizer_pre_hooks)
    two = gr.compile(zoo.make("mlp").model, split_backward=True)
    two.loss(*zoo.make("mlp").batch(4)).backward()
    assert len(_global_optimizer_pre_hooks) == before + 1
    del two
    gc.collect()
    assert len(_global_optimizer_pre_hooks) == before


def test_backend_without_a_weight_stage_is_refused(monkeypatch):
    from graphrewrite.backends import eager

    lower = eager.lower
    monkeypatch.setattr(eager, "lower", lambda part: lower(part)[:2])
    two = gr.compile(zoo.make("mlp").model, split_backward=True)
    with pytest.raises(gr.BackendError, match="no weight stage"):
        two.loss(*zoo.make("mlp").batch(4))
