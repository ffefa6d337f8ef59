"""What silently goes wrong in capture, expansion and scheduling: one test for each known case."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import graphrewrite as gr
from graphrewrite.testing.compare import assert_same, assert_trains_like_eager


def batch(n: int = 6, features: int = 8, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, features), torch.randint(0, classes, (n,))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 4)


def two_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [batch(6), batch(6), batch(3), batch(1)]


# --- no_grad -------------------------------------------------------------------------------------------------------


class NoGrad(Net):
    def forward(self, x):
        h = torch.tanh(self.a(x))
        with torch.no_grad():
            scale = h.abs().mean() + self.b.weight.norm()
        return self.b(h) * scale


class NestedGrad(Net):
    def forward(self, x):
        with torch.no_grad():
            h = self.a(x)
            with torch.enable_grad():
                k = self.b(torch.tanh(h))
            m = k.mean()
        return k * m


class NoGradInside(Net):
    def forward(self, x):
        h = self.a(x)
        with torch.no_grad():
            k, m = h.split(4, dim=1)
            k = k * m
        return self.b(h) + k


@pytest.mark.parametrize("model", [NoGrad, NestedGrad, NoGradInside])
def test_no_grad_region_stays_undifferentiated(model):
    assert_trains_like_eager(model(), two_batches())


# --- custom autograd functions -------------------------------------------------------------------------------------


class SignSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, slope):
        ctx.save_for_backward(x)
        ctx.slope = slope
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (x.abs() < 1) * ctx.slope, None


class TwoOutputs(torch.autograd.Function):
    @staticmethod
    def forward(x, y):
        return x * y, x + y

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g, h):
        x, y = ctx.saved_tensors
        return 3 * g * y + h, 5 * g * x + h


bound = SignSTE.apply


class WithFunction(Net):
    def forward(self, x):
        return self.b(SignSTE.apply(self.a(x), 0.5)) + SignSTE.apply(self.b(x), 2.0)


class WithBoundFunction(Net):
    def forward(self, x):
        return self.b(bound(self.a(x), 0.5))


class WithTwoOutputs(Net):
    def forward(self, x):
        p, q = TwoOutputs.apply(self.a(x), x)
        return self.b(p * q)


@pytest.mark.parametrize("model", [WithFunction, WithBoundFunction, WithTwoOutputs])
def test_custom_function_keeps_its_backward(model):
    assert_trains_like_eager(model(), two_batches(), verify="numeric")


class MutatingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x.mul_(2)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class WithMutatingFunction(Net):
    def forward(self, x):
        return self.b(MutatingFunction.apply(self.a(x)))


def test_custom_function_that_mutates_is_refused():
    with pytest.raises(gr.GraphRewriteError, match="mutates its input"):
        gr.compile(WithMutatingFunction()).loss(*batch())


# --- hooks ---------------------------------------------------------------------------------------------------------


class WithTensorHook(Net):
    def forward(self, x):
        h = self.a(x)
        h.register_hook(lambda g: g * 2)
        return self.b(h)


def test_tensor_hook_is_refused():
    with pytest.raises(gr.CaptureError, match="register_hook"):
        gr.compile(WithTensorHook()).loss(*batch())


class Plain(Net):
    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def test_backward_hook_is_refused():
    model = Plain()
    model.a.register_full_backward_hook(lambda m, gi, go: None)
    with pytest.raises(gr.CaptureError, match="backward hook") as error:
        gr.compile(model).loss(*batch())
    assert error.value.module == "a"


def test_forward_hook_is_captured_and_a_later_one_warned_about():
    model = Plain()
    model.a.register_forward_hook(lambda m, args, out: out * 2)
    compiled = assert_trains_like_eager(model, two_batches())
    model.b.register_forward_hook(lambda m, args, out: out)
    with pytest.warns(UserWarning, match="b"):
        compiled.loss(*batch())


def test_parameter_hook_still_runs():
    model = Plain()
    seen = []
    model.a.weight.register_hook(lambda g: seen.append(g.shape))
    gr.compile(model).loss(*batch())
    gr.compile(model).loss(*batch()).backward()
    assert seen == [torch.Size([8, 8])]


# --- outputs -------------------------------------------------------------------------------------------------------


class SameTwice(Net):
    def forward(self, x):
        h = self.b(torch.relu(self.a(x)))
        return h, h


class ReturnsParameter(Net):
    def forward(self, x):
        return self.b(torch.relu(self.a(x))), self.a.weight, self.b.weight.t(), self.a.bias


class ReturnsInput(Net):
    def forward(self, x):
        return self.b(torch.relu(self.a(x))), x, x.t()


def sum_of_all(outputs, y):
    return F.cross_entropy(outputs[0], y) + sum((o * o).sum() for o in outputs[1:])


@pytest.mark.parametrize("model", [SameTwice, ReturnsParameter, ReturnsInput])
def test_aliased_outputs(model):
    assert_trains_like_eager(model(), two_batches(), loss=sum_of_all)


def test_unused_output_gives_none_as_in_eager():
    class Two(Net):
        def forward(self, x):
            return self.a(x), self.b(x)

    model, reference = Two(), None
    reference = copy.deepcopy(model)
    x, _ = batch()
    gr.compile(model)(x)[1].sum().backward()
    reference(x)[1].sum().backward()
    assert model.a.weight.grad is None
    assert reference.a.weight.grad is None
    assert torch.equal(model.b.weight.grad, reference.b.weight.grad)


# --- sizes ---------------------------------------------------------------------------------------------------------


class ReadsSize(Net):
    def forward(self, x):
        return self.b(self.a(x)) / x.shape[0] + x.numel()


@pytest.mark.parametrize("first", [1, 2, 5])
def test_size_read_in_python(first):
    assert_trains_like_eager(ReadsSize(), [batch(first), batch(first), batch(7), batch(1), batch(4)])


def test_empty_batch():
    assert_trains_like_eager(Plain(), [batch(4), batch(4)], loss=lambda o, y: o.sum())
    model, reference = Plain(), None
    reference = copy.deepcopy(model)
    compiled = gr.compile(model, loss=lambda o, y: o.sum())
    x, y = torch.zeros(0, 8), torch.zeros(0, dtype=torch.long)
    compiled.loss(x, y).backward()
    reference(x).sum().backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


class BranchesOnSize(Net):
    def forward(self, x):
        h = self.a(x)
        if x.shape[0] > 4:
            h = torch.relu(h)
        return self.b(h)


def test_branch_on_a_size_is_guarded():
    compiled = assert_trains_like_eager(BranchesOnSize(), [batch(n) for n in (6, 6, 3, 3, 5, 5, 2, 2)])
    assert compiled._captures == {"loss": 2, "forward": 2}


# --- autocast ------------------------------------------------------------------------------------------------------


def test_autocast_is_part_of_the_capture():
    model, reference = Plain(), None
    reference = copy.deepcopy(model)
    compiled = gr.compile(model)
    for x, y in two_batches():
        for m in (model, reference):
            m.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            actual = compiled.loss(x, y)
            expected = gr.default_loss(reference(x), y)
        actual.backward()
        expected.backward()
        assert torch.equal(actual, expected)
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
    assert torch.equal(compiled.loss(x, y), gr.default_loss(reference(x), y))  # and off again


class UsedTwice(Net):
    def forward(self, x):
        return self.b(torch.relu(self.a(torch.relu(self.a(x)))))


def test_module_used_twice_under_autocast():
    model = UsedTwice()
    reference = copy.deepcopy(model)
    compiled = gr.compile(model)
    x, y = batch()
    with torch.autocast("cpu", torch.bfloat16):
        compiled.loss(x, y).backward()
        gr.default_loss(reference(x), y).backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


class AutocastInside(Net):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            h = self.a(x)
        return self.b(h.float())


def test_autocast_inside_the_model():
    assert_trains_like_eager(AutocastInside(), two_batches())


# --- what is differentiable ----------------------------------------------------------------------------------------


class OddOperators(Net):
    def forward(self, x):
        h = self.a(x)
        noise = torch.bernoulli(torch.full_like(h, 0.5))
        top = h.detach() * 2 + h.argmax(dim=1, keepdim=True)
        fresh = h.new_empty(h.shape).fill_(1.0)
        h = h * noise + top * fresh + (h > 0).float() + torch.round(h)
        h[:, 0] += 1
        h[h[:, 1] > 0, 2] = 0.5
        values, index = h.sort(dim=1)
        return self.b(values.gather(1, index).cumsum(1).clamp(-3, 3))


def test_only_autograd_decides_what_is_differentiable():
    assert_trains_like_eager(OddOperators(), two_batches())


# --- checkpoint ----------------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, 8)) for _ in range(3)]
        )
        self.head = nn.Linear(8, 4)
        self.reentrant = reentrant

    def forward(self, x):
        for layer in self.layers:
            x = x + checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.head(x)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
def test_checkpoint_has_the_same_gradients(reentrant, dropout):
    model = Checkpointed(reentrant, dropout)
    batches = two_batches()
    for x, _ in batches:
        x.requires_grad_(reentrant)  # what reentrant checkpointing needs in eager mode
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_trains_like_eager(model, batches)


def saved_bytes(output: torch.Tensor, known: list[torch.Tensor]) -> int:
    """Bytes of the storages that the graph behind `output` holds, those of `known` tensors not counted."""
    storages, seen, stack = {}, set(), [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        held = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        held += list(getattr(node, "saved_tensors", ()))
        for tensor in held:
            for t in tensor if isinstance(tensor, (tuple, list)) else [tensor]:
                if isinstance(t, torch.Tensor):
                    storages[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        stack += [parent for parent, _ in node.next_functions]
    for tensor in known:
        storages.pop(tensor.untyped_storage()._cdata, None)
    return sum(storages.values())


def test_checkpoint_saves_no_more_than_without_its_inside():
    x, y = batch(64)
    model = Checkpointed(False)
    compiled = gr.compile(model, example_inputs=x, example_targets=y)
    saved = compiled.report().saved
    inside = [row for row in saved if row.module.startswith("layers.") and row.nbytes]
    # of three regions only their inputs remain, two of which are activations of width 8
    assert {row.nbytes for row in inside} <= {64 * 8 * 4}
    assert any(record.text == "recompute_regions" and record.modified for record in compiled.report().passes)
    plain = Checkpointed(False)
    plain.forward = lambda h: plain.head(_chain(plain.layers, h))
    assert compiled.report().saved_bytes < 0.5 * gr.compile(plain).materialize(x, y).report().saved_bytes


def _chain(layers, x):
    for layer in layers:
        x = x + layer(x)
    return x


# --- other refusals ------------------------------------------------------------------------------------------------


def test_cumulative_batch_norm_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=None), nn.Linear(8, 4))
    with pytest.raises(gr.CaptureError, match="momentum"):
        gr.compile(model).loss(*batch())


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Plain()
        self.gate = Gate()

    def forward(self, x):
        return self.gate(self.inner(x))


class Gate(nn.Module):
    def forward(self, h):
        if h.sum() > 0:  # data-dependent
            return h * 2
        return h


def test_data_dependent_branch_names_module_and_line(capfd):
    with pytest.raises(gr.CaptureError) as error:
        gr.compile(Branching()).loss(*batch())
    assert error.value.module == "gate"
    assert error.value.source is not None
    assert error.value.source.rpartition(":")[0] == __file__
    assert "torch.where" in str(error.value)
    assert len(capfd.readouterr().err) < 200


class ItemAndMask(Net):
    def forward(self, x):
        h = self.a(x)
        kept = h[h[:, 0] > -10]
        return self.b(kept)


def test_boolean_mask_is_captured():
    assert_trains_like_eager(ItemAndMask(), two_batches(), loss=lambda outputs, y: outputs.square().mean())


class MutatesInput(Net):
    def forward(self, x):
        x.mul_(2.0)
        return self.b(torch.relu(self.a(x)))


def test_input_mutation_is_copied_back():
    model = MutatesInput()
    reference = copy.deepcopy(model)
    compiled = gr.compile(model)
    for x, y in two_batches():
        mine, theirs = x.clone(), x.clone()
        model.zero_grad(), reference.zero_grad()
        compiled.loss(mine, y).backward()
        gr.default_loss(reference(theirs), y).backward()
        assert torch.equal(mine, theirs)
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)


# --- layouts -------------------------------------------------------------------------------------------------------


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4 * 16, 4)

    def forward(self, x):
        return self.head(self.conv(x).relu().flatten(1))


def test_channels_last_input_after_a_contiguous_one():
    def images(n):
        return torch.randn(n, 3, 4, 4), torch.randint(0, 4, (n,))

    x, y = images(5)
    assert_trains_like_eager(
        Conv(), [(x, y), (x, y), (x.contiguous(memory_format=torch.channels_last), y), (x.transpose(2, 3), y)]
    )


def test_cotangent_with_other_strides():
    model = Plain()
    reference = copy.deepcopy(model)
    x, _ = batch()
    g = torch.randn(4, 6).t()
    gr.compile(model)(x).backward(g)
    reference(x).backward(g)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


class DropsTransposed(nn.Module):
    """Dropout of a transposed value, behind a linear layer and behind a convolution of images in channels-last form."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.mix, self.head = nn.Linear(16, 16), nn.Linear(4, 4)

    def forward(self, x):
        h = F.dropout(self.conv(x), 0.3)
        h = F.dropout(self.mix(h.flatten(2)).transpose(1, 2), 0.5)
        return self.head(h).mean(1)


@pytest.mark.parametrize("options", [{}, {"compress": "mask"}])
def test_dropout_draws_in_the_order_of_memory(options):
    """In place, as eager mode draws, and along the shape are other numbers if a value is transposed."""
    x, y = torch.randn(5, 3, 4, 4), torch.randint(0, 4, (5,))
    one = (x[:1].contiguous(memory_format=torch.channels_last), y[:1])
    assert_trains_like_eager(
        DropsTransposed(), [(x, y), (x.contiguous(memory_format=torch.channels_last), y), one], **options
    )


class LearnedBias(nn.Module):
    """Attention whose mask is a parameter, heads merged by `transpose` and `reshape`, as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 4)
        self.bias = nn.Parameter(torch.randn(2, 5, 5))

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias[None, :, : x.shape[1], : x.shape[1]])
        return self.out(h.transpose(1, 2).contiguous().reshape(*x.shape[:2], 8)).mean(1)


def test_attention_with_a_trained_mask():
    assert_trains_like_eager(
        LearnedBias(), [(torch.randn(n, t, 8), torch.randint(0, 4, (n,))) for n, t in ((3, 5), (3, 5), (2, 4), (1, 5))]
    )


def test_an_input_that_has_a_gradient_already():
    """Another program is captured for the same tensor: what the first backward left in `.grad` is no part of it."""
    x, y = batch()
    x.requires_grad_()
    for compiled in (gr.compile(Plain()), gr.compile(Plain())):
        expected = torch.autograd.grad(gr.default_loss(compiled.module(x), y), x)[0]
        before = 0 if x.grad is None else x.grad.clone()
        compiled.loss(x, y).backward()
        assert_same(x.grad, before + expected, "gradient of the input")


# --- runtime -------------------------------------------------------------------------------------------------------


def test_double_backward_is_a_clear_error():
    compiled = gr.compile(Plain())
    loss = compiled.loss(*batch())
    with pytest.raises(gr.RuleError, match="double backward"):
        torch.autograd.grad(loss, list(compiled.parameters()), create_graph=True)


def test_second_backward_through_a_freed_graph_is_an_error():
    loss = gr.compile(Plain()).loss(*batch())
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_retained_graph_gives_the_same_gradients_again():
    model = Plain()
    loss = gr.compile(model).loss(*batch())
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss.backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(first, model.parameters(), strict=True))


def test_weights_changed_between_forward_and_backward_are_noticed():
    model = Plain()
    loss = gr.compile(model).loss(*batch())
    with torch.no_grad():
        model.b.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_are_not_held_elsewhere():
    """`.grad` takes over the returned tensors without a copy when nothing else holds them."""
    model = Plain()
    compiled = gr.compile(model, blocks="layers")
    compiled.loss(*batch()).backward()
    for p in model.parameters():
        assert p.grad.is_contiguous()
