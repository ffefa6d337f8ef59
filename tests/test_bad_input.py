"""Bad input: a clear error or correct behaviour, and the user's model is left as it was."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphrewrite as gr


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def batch(n: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 6), torch.randint(0, 3, (n,))


def fingerprint(model: nn.Module) -> dict:
    """Everything of a model that compiling could touch."""
    found = {}
    for path, module in model.named_modules():
        kept = {k: v for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")}
        hooks = {k: list(v.items()) for k, v in kept.items() if k.endswith("hooks") or "hooks_" in k}
        found[path] = (type(module), {k: v for k, v in kept.items() if k not in hooks}, hooks, list(module._modules))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found["tensors"] = {n: (id(t), t.requires_grad, t._version, t.dtype) for n, t in tensors.items()}
    return found


def assert_untouched(model: nn.Module, before: dict, state: dict[str, torch.Tensor]) -> None:
    assert fingerprint(model) == before
    assert all(p.grad is None for p in model.parameters())
    for name, held in model.state_dict().items():
        assert torch.equal(held, state[name]), name


# --- the model is never modified -------------------------------------------------------------------------------------


class Branching(nn.Module):
    """Its own attributes, a buffer, a hook, mixed modes, a frozen parameter, and maybe a data-dependent branch."""

    def __init__(self, branches: bool) -> None:
        super().__init__()
        self.branches = branches
        self.body = mlp()
        self.norm = nn.BatchNorm1d(6)
        self.norm.eval()
        self.body[0].bias.requires_grad_(False)
        self.body[2].register_forward_hook(lambda module, args, out: out * 2)
        self.note = {"anything": [1, 2]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.body(self.norm(x))
        if self.branches and out.sum() > 0:
            return -out
        return out


@pytest.mark.parametrize("rule", ["bp", "dfa", "ff"])
def test_compiling_leaves_the_model_alone(rule):
    model = Branching(False)
    before, state = fingerprint(model), copy.deepcopy(model.state_dict())
    compiled = gr.compile(model, rule)
    compiled.materialize(*batch())
    compiled.report()
    compiled.predict(batch()[0])
    assert compiled.module is model
    assert_untouched(model, before, state)


@pytest.mark.parametrize(
    ("model", "rule", "options"),
    [
        (Branching(True), "bp", {}),
        (Branching(False), "dfa", {"blocks": ["body"]}),
        (Branching(False), "bp", {"blocks": ["nothing.*"]}),
        (Branching(False), "bp", {"loss": lambda outputs, y: outputs}),
        (Branching(False), {"nothing": "dfa"}, {}),
    ],
    ids=["branch", "one block", "blocks", "loss", "rule map"],
)
def test_failing_leaves_the_model_alone(model, rule, options):
    before, state = fingerprint(model), copy.deepcopy(model.state_dict())
    generator = torch.random.get_rng_state()
    compiled = gr.compile(model, rule, **options)
    x, y = torch.ones(5, 6), torch.zeros(5, dtype=torch.long)
    with pytest.raises(gr.GraphRewriteError):
        compiled.loss(x, y)
    assert_untouched(model, before, state)
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert torch.is_grad_enabled()


# --- what compile is asked for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "backprop"}, "no rule is named 'backprop'"),
        ({"rule": "dfa{sharde=true}"}, "no option 'sharde'"),
        ({"backend": "tritn"}, "no backend is named 'tritn'"),
        ({"verify": "always"}, "verify='always' is unknown"),
        ({"passes": ["fold"]}, "no pass is named 'fold'"),
    ],
)
def test_unknown_names_are_refused_at_once(options, message):
    with pytest.raises(gr.GraphRewriteError, match=message) as error:
        gr.compile(mlp(), **options)
    assert error.value.remedy


@pytest.mark.parametrize(
    "rule", ["dfa{spatial=wide}", "dfa{distribution=cauchy}", "ff{goodness=cube}", "ff{readout=first}"]
)
def test_unknown_values_of_options_are_refused(rule):
    with pytest.raises(gr.RuleError, match="is unknown") as error:
        gr.compile(mlp(), rule, example_inputs=batch()[0], example_targets=batch()[1])
    assert error.value.remedy


@pytest.mark.parametrize("what", [lambda x: x, "model", nn.Linear])
def test_only_a_module_is_compiled(what):
    with pytest.raises(gr.GraphRewriteError, match=r"nn\.Module"):
        gr.compile(what)


def test_a_compiled_model_is_not_compiled_again():
    with pytest.raises(gr.GraphRewriteError, match="compiled already"):
        gr.compile(gr.compile(mlp()))


def test_backend_and_device_that_are_absent():
    with pytest.raises(gr.GraphRewriteError, match="no backend"):
        gr.compile(mlp(), backend="cuda")
    if not torch.cuda.is_available():
        compiled = gr.compile(mlp())
        with pytest.raises((RuntimeError, AssertionError), match=r"CUDA|cuda|NVIDIA"):
            compiled.to("cuda")
        assert all(p.device.type == "cpu" for p in compiled.parameters())


# --- ff --------------------------------------------------------------------------------------------------------------


def test_ff_needs_the_loss_in_the_graph():
    model = mlp()
    compiled = gr.compile(model, "ff")
    x, y = batch()
    outputs = compiled(x)
    assert torch.equal(outputs, model(x))
    with pytest.raises(gr.RuleError, match=r"compiled\.loss"):
        gr.default_loss(outputs, y).backward()
    with pytest.raises(gr.RuleError, match="needs targets"):
        compiled.materialize(x)


def test_ff_refuses_integer_inputs():
    model = nn.Sequential(nn.Embedding(7, 8), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(gr.RuleError, match="floating-point input") as error:
        gr.compile(model, "ff").loss(torch.randint(0, 7, (4, 2)), torch.randint(0, 3, (4,)))
    assert error.value.remedy


def test_ff_refuses_targets_that_are_no_classes():
    with pytest.raises(gr.RuleError, match="one integer class per sample"):
        gr.compile(mlp(), "ff").loss(torch.randn(5, 6), torch.rand(5, 3).softmax(1))


@pytest.mark.parametrize("rule", ["dfa", "ff"])
def test_one_block_is_too_few(rule):
    with pytest.raises(gr.RuleError, match="block") as error:
        gr.compile(nn.Linear(6, 3), rule).loss(*batch())
    assert "blocks=" in str(error.value)


# --- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["bp", "dfa"])
def test_empty_batch(rule):
    """The mean over nothing is no number, and so is its gradient, as in eager mode; the next batch is unharmed."""
    model = mlp()
    reference = copy.deepcopy(model)
    compiled = gr.compile(model, rule)
    x, y = batch(0)
    assert compiled.loss(x, y).isnan()
    compiled.loss(x, y).backward()
    gr.default_loss(reference(x), y).backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p.grad.isnan(), q.grad.isnan())
    assert compiled.loss(*batch()).isfinite()


def test_nan_input_gives_nan_and_no_error():
    model = mlp()
    reference = copy.deepcopy(model)
    x, y = batch()
    x[0, 0] = float("nan")
    loss = gr.compile(model).loss(x, y)
    loss.backward()
    gr.default_loss(reference(x), y).backward()
    assert loss.isnan()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p.grad.isnan(), q.grad.isnan())
        assert torch.equal(p.grad.nan_to_num(), q.grad.nan_to_num())


@pytest.mark.parametrize("rule", ["bp", "dfa", "ff"])
def test_targets_of_the_wrong_shape(rule):
    model = mlp()
    before, state = fingerprint(model), copy.deepcopy(model.state_dict())
    compiled = gr.compile(model, rule)
    x, y = batch()
    with pytest.raises(gr.GraphRewriteError):
        compiled.loss(x, torch.randint(0, 3, (5, 2)))
    with pytest.raises((gr.GraphRewriteError, ValueError)):
        compiled.loss(x, y[:4])
    assert_untouched(model, before, state)
    assert compiled.loss(x, y).isfinite()


def test_wrong_number_of_targets_after_capture():
    compiled = gr.compile(mlp())
    x, y = batch()
    compiled.loss(x, y)
    with pytest.raises((gr.GraphRewriteError, ValueError, RuntimeError)):
        compiled.loss(x, y[:4]).backward()


def test_wrong_number_of_features():
    x, y = torch.randn(5, 7), torch.zeros(5, dtype=torch.long)
    compiled = gr.compile(mlp())
    with pytest.raises(gr.CaptureError) as error:
        compiled.loss(x, y)
    assert error.value.module == "0"
    assert compiled.loss(*batch()).isfinite()


@pytest.mark.parametrize("x", [[torch.zeros(2, 6)], 3.0, None])
def test_ambiguous_inputs_are_refused(x):
    with pytest.raises(gr.GraphRewriteError, match="ambiguous") as error:
        gr.compile(mlp()).loss(x, torch.zeros(2, dtype=torch.long))
    assert "Inputs" in error.value.remedy


# --- models ----------------------------------------------------------------------------------------------------------


def test_data_dependent_control_flow_names_the_place():
    with pytest.raises(gr.CaptureError) as error:
        gr.compile(Branching(True)).loss(*batch())
    assert error.value.source.startswith(__file__)
    assert error.value.remedy


def test_model_without_parameters():
    compiled = gr.compile(nn.Sequential(nn.Flatten(), nn.Softmax(1)))
    x = torch.randn(4, 3)
    assert torch.equal(compiled(x), x.softmax(1))
    loss = compiled.loss(x, torch.zeros(4, dtype=torch.long))
    assert torch.equal(loss, gr.default_loss(x.softmax(1), torch.zeros(4, dtype=torch.long)))
    assert not loss.requires_grad
    x.requires_grad_()
    compiled.loss(x, torch.zeros(4, dtype=torch.long)).backward()
    assert x.grad.any()


def test_everything_frozen():
    model = mlp().requires_grad_(False)
    loss = gr.compile(model).loss(*batch())
    assert not loss.requires_grad
    assert loss.isfinite()


class NoTensor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> str:
        self.a(x)
        return "no tensor"


def test_output_that_is_no_tensor():
    with pytest.raises(gr.GraphRewriteError, match="cannot read outputs of type str") as error:
        gr.compile(NoTensor()).loss(*batch())
    assert "loss=" in str(error.value)


def unreduced(outputs, y):
    return F.cross_entropy(outputs, y, reduction="none")


@pytest.mark.parametrize("loss", [unreduced, functools.partial(unreduced)], ids=["function", "partial"])
def test_loss_that_is_no_scalar(loss):
    with pytest.raises(
        gr.CaptureError, match=r"the loss unreduced does not return a scalar tensor but .* \(\w+\)"
    ) as error:
        gr.compile(mlp(), loss=loss).loss(*batch())
    assert "mean" in error.value.remedy
    with pytest.raises(gr.CaptureError, match="but no tensor"):
        gr.compile(mlp(), loss=lambda outputs, y: 0.0).loss(*batch())


@pytest.mark.parametrize("rule", ["bp", "mono_forward"])
def test_loss_that_weighs_its_samples(rule):
    """`reduction="none"` inside a loss: for symbolic sizes torch itself mistakes its shape."""

    def weighted(outputs, y):
        return (unreduced(outputs, y) * (1 + y)).mean()

    model, (x, y) = mlp(), batch()
    compiled = gr.compile(model, rule, example_inputs=x, example_targets=y, loss=weighted)
    for size in (len(x), len(x) - 1):
        compiled.zero_grad()
        compiled.loss(x[:size], y[:size]).backward()
        outputs = model(x[:size])
        torch.testing.assert_close(compiled.losses["task"], weighted(outputs, y[:size]))
        last = list(model.parameters())[-1]
        (expected,) = torch.autograd.grad(weighted(outputs, y[:size]), [last])
        assert torch.equal(last.grad, expected)


def test_loss_that_does_not_depend_on_the_model():
    loss = gr.compile(mlp(), loss=lambda outputs, y: y.float().sum()).loss(*batch())
    assert not loss.requires_grad or all(p is None for p in torch.autograd.grad(loss, [], allow_unused=True))


# --- rows that data choose -----------------------------------------------------------------------------------------


class Sorted(nn.Module):
    """Rows go through one layer or another by the sign of their first number."""

    def __init__(self):
        super().__init__()
        self.above, self.below, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = x.new_zeros(len(x), 8)
        for layer, chosen in ((self.above, x[:, 0] > 0), (self.below, x[:, 0] <= 0)):
            rows = chosen.nonzero()[:, 0]
            h = h.index_copy(0, rows, layer(x[rows]))
        return self.head(h.relu())


class Chosen(Sorted):
    """Some rows go through two layers, the others through none."""

    def forward(self, x):
        rows = (x[:, 0] > 0).nonzero()[:, 0]
        h = self.below(nn.functional.pad(self.above(x[rows]).relu(), (0, -2)))
        return self.head(x.new_zeros(len(x), 8).index_copy(0, rows, h))


@pytest.mark.parametrize("rule", ["ff", "target_propagation", "dfa"])
def test_blocks_of_other_rows_than_the_batch_are_refused(rule):
    x, y = torch.randn(20, 6), torch.randint(0, 3, (20,))
    with pytest.raises(gr.RuleError, match=r"rows|batch dimension") as error:
        gr.compile(Chosen(), rule, example_inputs=x, example_targets=y)
    assert error.value.node
    assert error.value.remedy


@pytest.mark.parametrize("rule", ["pepita", "predictive_coding"])
def test_rows_chosen_anew_in_a_second_pass(rule):
    """The example's number of rows in it hangs on the error of the first pass."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 6), torch.randint(0, 3, (20,))
    compiled = gr.compile(Sorted(), rule, example_inputs=x, example_targets=y)
    compiled.loss(x[:13], y[:13]).backward()
    assert all(p.grad.isfinite().all() for p in compiled.parameters())


# --- backward twice --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["bp", "dfa", "ff"])
def test_double_backward_is_refused(rule):
    compiled = gr.compile(mlp(), rule)
    loss = compiled.loss(*batch())
    with pytest.raises(gr.RuleError, match="double backward") as error:
        torch.autograd.grad(loss, list(compiled.parameters()), create_graph=True)
    assert error.value.remedy


def test_second_backward_of_early_gradients_is_refused():
    loss = gr.compile(mlp(), "ff").loss(*batch())
    loss.backward(retain_graph=True)
    with pytest.raises((gr.RuleError, RuntimeError), match=r"second (backward|time)"):
        loss.backward()
