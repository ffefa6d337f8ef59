"""`local_loss`: every head against a plain PyTorch loop, gradient by gradient."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from graphrewrite.passes.rules._aug_local import evenly, pyramid
from graphrewrite.passes.rules._heads import Head, Weight, normal
from torch import nn
from torch.nn import functional as F

import graphrewrite as gr
from graphrewrite.errors import RuleError
from graphrewrite.testing import zoo
from helpers import assert_close

PREFIX = "_graphrewrite.local_loss.head."


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3)
    ).double()


def data(n: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 6, dtype=torch.float64), torch.randint(0, 3, (n,))


def compile_(model, head: str, x, y, **options):
    compiled = gr.compile(
        model, f"local_loss{{head={head}}}", example_inputs=(x,), example_targets=y, **{"blocks": "layers", **options}
    )
    with torch.no_grad():
        for name, held in compiled.rule_state.items():
            if "running" not in name:
                held.normal_(0.0, 0.5)  # zero starts would hide errors
    return compiled


def grads_of(compiled, x, y) -> dict[str, torch.Tensor]:
    compiled.zero_grad()
    torch.manual_seed(0)
    compiled.loss(x, y).backward()
    return {name: p.grad.clone() for name, p in compiled.named_parameters() if p.grad is not None}


def assert_local(compiled, x, y, blocks: list[str]) -> None:
    """Certificate, and bitwise the same gradients when everything behind a block changes."""
    proved = compiled.report().certificates
    assert proved.locality_radius == 0
    assert not proved.update_locked
    assert not proved.weight_transport
    before = grads_of(compiled, x, y)
    groups = {g["name"]: {id(p) for p in g["params"]} for g in compiled.param_groups()}
    saved = {name: p.detach().clone() for name, p in compiled.named_parameters()}
    for i, block in enumerate(blocks[:-1]):
        behind = set().union(*(groups[b] for b in blocks[i + 1 :]))
        with torch.no_grad():
            for p in compiled.parameters():
                if id(p) in behind:
                    p.add_(torch.randn_like(p))
        after = grads_of(compiled, x, y)
        mine = [n for n, p in compiled.named_parameters() if id(p) in groups[block]]
        assert len(mine) >= 2
        for name in mine:
            assert torch.equal(before[name], after[name]), name
        with torch.no_grad():
            for name, p in compiled.named_parameters():
                p.copy_(saved[name])


# --- the heads, written down once more ------------------------------------------------------------------------------


def cosines(rows: torch.Tensor) -> torch.Tensor:
    """Pairwise cosines of centred rows, one pair at a time."""
    centred = [row - row.mean() for row in rows]
    return torch.stack([
        torch.stack([a @ b / ((a @ a).sqrt() * (b @ b).sqrt()) for b in centred]) for a in centred
    ])  # fmt: skip


def pred(h, w, y):
    return F.cross_entropy(h @ w["weight"].t() + w["bias"], y)


def sim(h, w, y):
    return (cosines(h @ w["similarity"].t()) - cosines(F.one_hot(y, 3).to(h.dtype))).square().mean()


def predsim(h, w, y):
    return 0.2 * pred(h, w, y) + 0.8 * sim(h, w, y)


def norm_relu(h, w, name):
    return F.relu(F.batch_norm(h, None, None, w[f"{name}_scale"], w[f"{name}_shift"], training=True))


def dgl(h, w, y):
    for i in range(3):
        h = norm_relu(h @ w[f"hidden{i}_weight"].t(), w, f"hidden{i}")
    return pred(h, w, y)


def towards_target(h, w, y):
    return (h - w["projection"][y]).square().mean()


def along_target(h, w, y):
    return -sum(a @ b for a, b in zip(h, w["projection"][y], strict=True)) / h.numel()


def aug(h, w, y):
    """Depth 2: copies of both later layers for the first, of the one later layer for the second."""
    for number, name in enumerate(("2", "4")):
        prefix = f"aux{number}.{name}"
        if f"{prefix}_weight" in w:
            h = torch.tanh(h @ w[f"{prefix}_weight"].t() + w[f"{prefix}_bias"])
    if "aux0.4_weight" in w:
        h = torch.tanh(h @ w["aux0.4_weight"].t() + w["aux0.4_bias"])
    return pred(h, w, y)


def aug_flat(h, w, y):
    """Depth 1: one copy of the last hidden layer, behind an adapter where the widths differ."""
    if "aux0.adapter" in w:
        h = h @ w["aux0.adapter"].t()
    if "aux0.4_weight" in w:
        h = torch.tanh(h @ w["aux0.4_weight"].t() + w["aux0.4_bias"])
    return pred(h, w, y)


HEADS = {
    "pred": pred,
    "sim": sim,
    '"predsim{beta=0.8}"': predsim,
    "dgl": dgl,
    "target_projection": towards_target,
    '"target_projection{distance=dot}"': along_target,
    "aug_local": aug,
    '"aug_local{depth=1}"': aug_flat,
}


IN_OTHERS = ("sim", '"aug_local{depth=1}"')


@pytest.mark.parametrize("head", [pytest.param(h, marks=pytest.mark.slow) if h in IN_OTHERS else h for h in HEADS])
def test_gradients_are_those_of_the_loop(head):
    model, (x, y) = mlp(), data()
    compiled = compile_(model, head, x, y)
    reference = copy.deepcopy(model)
    state = {n: s.detach().clone().requires_grad_(s.requires_grad) for n, s in compiled.rule_state.items()}
    h, losses = x, {}
    for name in ("0", "2", "4"):
        h = torch.tanh(reference[int(name)](h.detach()))
        start = f"local_loss.head.{name}."
        weights = {n.removeprefix(start): s for n, s in state.items() if n.startswith(start)}
        losses[name] = HEADS[head](h, weights, y)
    losses["task"] = F.cross_entropy(reference[6](h.detach()), y)
    sum(losses.values()).backward()
    wanted = {n: p.grad for n, p in reference.named_parameters()}
    wanted.update({f"_graphrewrite.{n}": s.grad for n, s in state.items() if s.requires_grad})
    assert_close(grads_of(compiled, x, y), wanted, rtol=1e-6 if "sim" in head else 1e-10)
    for name, loss in losses.items():
        torch.testing.assert_close(compiled.losses[name], loss.detach(), rtol=1e-7, atol=1e-9)
    assert_local(compiled, x, y, ["0", "2", "4", "6"])


# --- convolutions ---------------------------------------------------------------------------------------------------


class Stage(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(self.conv(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(Stage(2, 4, 1), Stage(4, 4, 2), Stage(4, 6, 1))
        self.fc = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.stages(x).mean((2, 3)))


def pooled(h):
    """4 x 8 x 8 features, at most 64: halved to 4 x 4."""
    return F.avg_pool2d(h, 2).flatten(1) if h[0].numel() == 256 else h.flatten(1)


def conv_predsim(h, w, y):
    if h.dim() == 2:
        return 0.01 * pred(h, w, y) + 0.99 * sim(h, w, y)
    rows = F.conv2d(h, w["similarity"], padding=1).flatten(2).std(2)
    similar = (cosines(rows) - cosines(F.one_hot(y, 3).to(h.dtype))).square().mean()
    return 0.01 * pred(pooled(h), w, y) + 0.99 * similar


def conv_dgl(h, w, y):
    if h.dim() == 2:
        return dgl(h, w, y)
    h = F.avg_pool2d(h, 4)
    for i in range(3):
        h = norm_relu(F.conv2d(h, w[f"conv{i}_weight"]), w, f"conv{i}")
    return dgl(h.flatten(1), w, y)


@pytest.mark.parametrize(("head", "loss"), [('"predsim{features=64}"', conv_predsim), ("dgl", conv_dgl)])
@pytest.mark.slow
def test_heads_on_maps(head, loss):
    # 8 x 8 positions, then 4 x 4 (dgl pools to 2 x 2 and 1 x 1), then their mean, which joins the last stage's block
    model = Net().double()
    x, y = torch.randn(6, 2, 8, 8, dtype=torch.float64), torch.randint(0, 3, (6,))
    compiled = compile_(model, head, x, y, blocks="auto")
    reference = copy.deepcopy(model)
    state = {n: s.detach().clone().requires_grad_() for n, s in compiled.rule_state.items()}
    h, total = x, 0.0
    for i, stage in enumerate(reference.stages):
        h = stage(h.detach()) if i < 2 else stage(h.detach()).mean((2, 3))
        start = f"local_loss.head.stages.{i}."
        total = total + loss(h, {n.removeprefix(start): s for n, s in state.items() if n.startswith(start)}, y)
    (total + F.cross_entropy(reference.fc(h.detach()), y)).backward()
    wanted = {n: p.grad for n, p in reference.named_parameters()}
    wanted.update({f"_graphrewrite.{n}": s.grad for n, s in state.items()})
    assert_close(grads_of(compiled, x, y), wanted, rtol=1e-5)  # the standard deviation is smoothed by 1e-8
    for name, buffer in reference.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name], buffer)


def test_aug_local_copies_blocks_with_their_normalisation():
    """Depth 2 on three stages: the first reads copies of the second and third, the second a copy of the third."""
    model = Net().double()
    x, y = torch.randn(6, 2, 8, 8, dtype=torch.float64), torch.randint(0, 3, (6,))
    compiled = compile_(model, "aug_local", x, y, blocks="auto")
    held = {n.removeprefix("local_loss.head."): s for n, s in compiled.rule_state.items()}

    def twin(stage: Stage, prefix: str, path: str) -> Stage:
        made = copy.deepcopy(stage)
        with torch.no_grad():
            for name, p in (*made.named_parameters(), *made.named_buffers()):
                key = f"{prefix}.{path}_{name.replace('.', '_')}"
                if key in held:
                    p.copy_(held[key])
        return made

    reference = copy.deepcopy(model)
    twins = {
        "stages.0.aux0": (twin(model.stages[1], "stages.0.aux0", "stages_1"), "stages_1"),
        "stages.0.aux1": (twin(model.stages[2], "stages.0.aux1", "stages_2"), "stages_2"),
        "stages.1.aux0": (twin(model.stages[2], "stages.1.aux0", "stages_2"), "stages_2"),
    }
    assert sum("norm_running_mean" in name for name in held) == 3
    heads = {n: s.detach().clone().requires_grad_() for n, s in held.items() if n.endswith((".weight", ".bias"))}
    h, total = x, 0.0
    for i, stage in enumerate(reference.stages):
        h = stage(h.detach()) if i < 2 else stage(h.detach()).mean((2, 3))
        z = h
        for prefix, (aux, path) in twins.items():
            if prefix.startswith(f"stages.{i}."):
                z = aux(z) if path != "stages_2" else aux(z).mean((2, 3))
        total = total + F.cross_entropy(z.flatten(1) @ heads[f"stages.{i}.weight"].t() + heads[f"stages.{i}.bias"], y)
    (total + F.cross_entropy(reference.fc(h.detach()), y)).backward()
    wanted = {n: p.grad for n, p in reference.named_parameters()}
    wanted.update({PREFIX + n: s.grad for n, s in heads.items()})
    for prefix, (aux, path) in twins.items():
        for name, p in aux.named_parameters():
            wanted[f"{PREFIX}{prefix}.{path}_{name.replace('.', '_')}"] = p.grad
    assert_close(grads_of(compiled, x, y), wanted, rtol=1e-10)
    for prefix, (aux, path) in twins.items():
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(held[f"{prefix}.{path}_norm_{name}"], getattr(aux.norm, name))


def test_the_pyramid():
    assert [pyramid(i, 10, 5, 0.5) for i in range(9)] == [5, 5, 4, 4, 4, 4, 4, 3, 3]
    assert [pyramid(i, 10, 5, 0.0) for i in range(9)] == [5] * 9
    assert pyramid(8, 10, 5, 1.0) == 1
    assert evenly(list("abcdef"), 3) == ["b", "d", "f"]
    assert evenly(list("abcde"), 2) == ["c", "e"]
    assert evenly(list("ab"), 4) == ["a", "b"]


# --- heads of one's own, sharing, targets --------------------------------------------------------------------------


class Probe(Head):
    def init(self, site):
        return {"weight": Weight((site.width, site.features()), normal(0.1))}

    def forward(self, site, weights, h):
        return site.answer(site.pooled(h) @ weights["weight"].t())


class TooWide(Probe):
    def forward(self, site, weights, h):
        return h


class Misfit(Probe):
    def init(self, site):
        return {"weight": Weight((site.width, site.features() + 1), normal(0.1))}


def test_a_head_of_ones_own():
    model, (x, y) = mlp(), data()
    compiled = compile_(model, Probe.__module__ + ":Probe", x, y)
    assert str(compiled._options.rules) == f"local_loss{{head={Probe.__module__}:Probe}}"
    w = compiled.rule_state["local_loss.head.0.weight"].detach().clone().requires_grad_()
    F.cross_entropy(torch.tanh(model[0](x)) @ w.t(), y).backward()
    wanted = w.grad
    assert_close({"w": grads_of(compiled, x, y)[PREFIX + "0.weight"]}, {"w": wanted}, rtol=1e-12)
    rule = gr.passes.rules.local_loss.LocalLoss(head=Probe())
    other = gr.compile(model, rule, example_inputs=(x,), example_targets=y, blocks="layers")
    assert other.rule_state.keys() == compiled.rule_state.keys()
    with pytest.raises(RuleError, match=r"head of 0 answers \(s\d+, 8\), the model answers \(s\d+, 3\)"):
        compile_(model, Probe.__module__ + ":TooWide", x, y)
    with pytest.raises(RuleError, match=r"head Misfit does not fit the output of 0, \(s\d+, 8\)") as error:
        compile_(model, Probe.__module__ + ":Misfit", x, y)
    assert "site.features()" in error.value.remedy


def test_shared_heads_learn_from_all_blocks():
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3, bias=False)).double()
    x, y = data()
    options = {"example_inputs": (x,), "example_targets": y, "blocks": "layers"}
    shared = gr.compile(model, "mono_forward{share=heads}", **options)
    assert list(shared.rule_state) == ["mono_forward.head.shared.weight"]
    a = torch.tanh(model[0](x))
    b = torch.tanh(model[2](a)).detach()
    m = shared.rule_state["mono_forward.head.shared.weight"].detach().clone().requires_grad_()
    (F.cross_entropy(a.detach() @ m.t(), y) + F.cross_entropy(b @ m.t(), y)).backward()
    name = "_graphrewrite.mono_forward.head.shared.weight"
    assert_close({"m": grads_of(shared, x, y)[name]}, {"m": m.grad}, rtol=1e-12)
    # the model's own last matrix in the place of the heads: no state at all
    tied = gr.compile(model, "mono_forward{share=unembedding}", **options)
    assert not tied.rule_state
    u = model[4].weight.detach().clone().requires_grad_()
    sum(F.cross_entropy(h.detach() @ u.t(), y) for h in (a, b, b)).backward()
    assert_close({"u": grads_of(tied, x, y)["4.weight"]}, {"u": u.grad}, rtol=1e-12)
    with pytest.raises(RuleError, match="Sim has no matrix"):
        gr.compile(model, "local_loss{head=sim,share=unembedding}", **options)


@pytest.mark.slow
def test_similarity_with_soft_labels_and_with_ignored_ones():
    model, (x, y) = mlp(), data(6)
    compiled = compile_(model, "sim", x, y)
    soft = torch.rand(6, 3, dtype=torch.float64).softmax(1)
    compiled.loss(x, soft)
    a = compiled.rule_state["local_loss.head.0.similarity"]
    rows = torch.tanh(model[0](x)) @ a.t()
    expected = (cosines(rows) - cosines(soft)).square().mean()
    torch.testing.assert_close(compiled.losses["0"], expected.detach())
    y[[0, 4]] = -100
    compiled.loss(x, y)
    kept = y != -100
    expected = (cosines(rows[kept]) - cosines(F.one_hot(y[kept], 3).double())).square().mean()
    torch.testing.assert_close(compiled.losses["0"], expected.detach())


@pytest.mark.slow
def test_masked_node_classification():
    """A loss that picks the training nodes serves the heads as it serves the model."""
    case = zoo.make("gcn")
    x, y = case.batch(4)
    mask = torch.arange(len(y)) % 3 == 0

    def loss(outputs, targets):
        labels, chosen = targets
        picked = outputs.log_softmax(-1).gather(1, labels.unsqueeze(1)).squeeze(1)
        return -(picked * chosen).sum() / chosen.sum()

    compiled = gr.compile(case.model, "mono_forward", loss=loss).materialize(x, (y, mask.float()))
    compiled.loss(x, (y, mask.float()))
    h = F.relu(case.model.convs[0](*x))
    head = compiled.rule_state["mono_forward.head.convs.0.weight"]
    expected = F.cross_entropy((h @ head.t())[mask], y[mask])
    torch.testing.assert_close(compiled.losses["convs.0"], expected.detach())


def test_sequences_with_one_answer_read_a_token():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 8)
            self.last = nn.Linear(8, 3)

        def forward(self, x):
            return self.last(torch.tanh(self.first(x)).mean(1))

    model, x, y = Tokens().double(), torch.randn(4, 5, 6, dtype=torch.float64), torch.randint(0, 3, (4,))
    for tokens, pick in (("mean", lambda h: h.mean(1)), ("last", lambda h: h[:, -1])):
        # the mean over tokens belongs to the block of the first layer: look before it
        compiled = gr.compile(
            Before(model), f"mono_forward{{tokens={tokens}}}", example_inputs=(x,), example_targets=y, blocks="layers"
        )
        head = compiled.rule_state["mono_forward.head.model.first.weight"]
        compiled.loss(x, y)
        expected = F.cross_entropy(pick(torch.tanh(model.first(x))) @ head.t(), y)
        torch.testing.assert_close(compiled.losses["model.first"], expected.detach())


class Before(nn.Module):
    """Two layers over tokens, then the mean: the first block's boundary is a sequence."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.middle = nn.Linear(8, 8).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.last(self.middle(torch.tanh(self.model.first(x))).mean(1))


def test_bad_input():
    model, (x, y) = mlp(), data()
    with pytest.raises(RuleError, match="no head is named 'predd'"):
        gr.compile(model, "local_loss{head=predd}")
    with pytest.raises(RuleError, match="no option 'gamma'"):
        gr.compile(model, 'local_loss{head="pred{gamma=1}"}')
    with pytest.raises(RuleError, match="start='ones' is unknown"):
        compile_(model, '"pred{start=ones}"', x, y)
    with pytest.raises(RuleError, match="gives no answer that could be summed"):
        gr.compile(model, "local_loss{head=sim,predict=sum}", example_inputs=(x,), example_targets=y, blocks="layers")
    compiled = compile_(model, "sim", x, y)
    with pytest.raises(RuleError, match=r"class -1, the model's output has 3 classes"):
        compiled.loss(x, torch.tensor([0, -1, 2, 1, 0]))
    scalar = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0)).double()
    with pytest.raises(RuleError, match="the number of classes is unknown"):
        compile_(scalar, "sim", x, y, loss=lambda outputs, y: (outputs - y).square().mean())
    dense = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1))
    with pytest.raises(RuleError, match="compares one row per sample"):
        gr.compile(dense, "local_loss{head=sim}", loss=F.cross_entropy).materialize(
            torch.randn(2, 2, 4, 4), torch.randint(0, 3, (2, 4, 4))
        )


def test_starts():
    """D starts at zero, A at U[-1/sqrt(n), 1/sqrt(n))."""
    model, (x, y) = mlp(), data()
    compiled = gr.compile(model, "local_loss", example_inputs=(x,), example_targets=y, blocks="layers")
    held = compiled.rule_state
    assert not held["local_loss.head.0.weight"].any()
    assert held["local_loss.head.0.similarity"].abs().max() <= 1 / math.sqrt(8)
    assert held["local_loss.head.0.similarity"].abs().max() > 0.8 / math.sqrt(8)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["predsim", "dgl", "aug_local", "target_projection"])
@pytest.mark.parametrize("name", ["cnn", "resnet", "vit", "gpt2", "gcn"])
def test_zoo(name, head):
    case = zoo.make(name)
    x, y = case.batch(case.sizes[0])
    compiled = gr.compile(case.model, f"local_loss{{head={head}}}", loss=case.loss).materialize(x, y)
    for size in case.sizes[:2]:
        grads = grads_of(compiled, *case.batch(size))
        assert all(g.isfinite().all() for g in grads.values())
        assert grads.keys() == {n for n, p in compiled.named_parameters() if p.requires_grad}
    proved = compiled.report().certificates
    assert proved.locality_radius == 0
    assert not proved.update_locked
    assert set(compiled.losses) == {*(b.block for b in proved.blocks[:-1]), "task"}
