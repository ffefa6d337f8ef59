"""Forward-Forward against independent loops written from the formulas, option by option."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from graphrewrite.passes.rules._labels import codes, hybrid_images, overlay, wrong_labels
from graphrewrite.passes.rules.ff import ForwardForward
from torch import nn
from torch.nn import functional as F

import graphrewrite as gr
from graphrewrite.testing import zoo
from graphrewrite.testing.compare import gradients
from helpers import assert_close

CLASSES, BATCH = 4, 5


def mlp() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, CLASSES)).double()


def shallow() -> nn.Sequential:
    """One hidden block, where more would show nothing else."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, CLASSES)).double()


def batch(n: int = BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(n, 12, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, CLASSES, (n,), generator=generator)


def next_label(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (y + 1) % CLASSES


def blanked(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Negatives that are no relabelled samples."""
    return x.flip(1) * 0.5


def hand_step(rule: ForwardForward, **options) -> dict[str, torch.Tensor]:
    """Gradients of the compiled rule on the MLP."""
    model, (x, y) = mlp(), batch()
    compiled = gr.compile(model, rule, **options)
    compiled.loss(x, options.pop("y", y)).backward()
    return {n: g for n, g in gradients(model).items() if g is not None}


# --- the oracle ------------------------------------------------------------------------------------------------


def rms(h):
    return h / (h.pow(2).mean(tuple(range(1, h.dim())), keepdim=True).sqrt() + 1e-8)


def put(x, label, scale=1.0):
    """Labels (batch,) over the first elements; None: the neutral code."""
    x = x.clone()
    flat = x.reshape(len(x), -1)
    for i in range(len(x)):
        for c in range(CLASSES):
            flat[i, c] = scale / CLASSES if label is None else scale * float(label[i] == c)
    return flat.reshape(x.shape)


def hidden_outputs(blocks, h):
    found = []
    for block in blocks:
        found.append(block(rms(h.detach())))
        h = found[-1]
    return found


def oracle(model, blocks, last, positive, negatives, neutral, y, *, goodness="sum", threshold=1.0, loss="hinton",
           alpha=4.0, collaboration="none", peer=0.0, momentum=0.9):  # fmt: skip
    """Hinton's algorithm, sample by sample, with the variants of the losses; gradients by name, and the losses."""
    outs_p = hidden_outputs(blocks, positive)
    outs_n = [hidden_outputs(blocks, n) for n in negatives]

    def logit(h):
        units = h[0].numel()
        g = h.flatten(1).pow(2).sum(1)
        return g / units - threshold if goodness == "mean" else g - threshold * units

    gp = [logit(h) for h in outs_p]
    gn = [[logit(h) for h in outs] for outs in outs_n]
    total, losses = 0.0, []
    for i in range(len(blocks)):
        friends = {"none": [], "previous": list(range(i)), "all": [t for t in range(len(blocks)) if t != i]}
        value = 0.0
        for b in range(len(y)):
            p = gp[i][b] + sum(gp[t][b].detach() for t in friends[collaboration])
            part = 0.0
            for k in range(len(negatives)):
                n = gn[k][i][b] + sum(gn[k][t][b].detach() for t in friends[collaboration])
                if loss == "symba":
                    part = part + torch.log1p(torch.exp(-alpha * (p - n))) / len(negatives)
                else:
                    # cross-entropy of "is positive", over positives and negatives
                    part = part - 0.5 * (torch.sigmoid(p).log() + torch.sigmoid(-n).log()) / len(negatives)
            value = value + part / len(y)
        if peer:
            axes = tuple(d for d in range(outs_p[i].dim()) if d != 1)
            m = momentum * 0.5 + (1 - momentum) * outs_p[i].mean(axes)
            value = value + peer * (m.mean() - m).pow(2).mean()
        losses.append(value.item())
        total = total + value
    task = F.cross_entropy(last(rms(hidden_outputs(blocks, neutral)[-1].detach())), y)
    (total + task).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, [task.item(), *losses]


def mlp_oracle(wrongs, scale=1.0, **options):
    model, (x, y) = mlp(), batch()
    blocks = [nn.Sequential(model[0], model[1]), nn.Sequential(model[2], model[3])]
    negatives = [w if w.is_floating_point() else put(x, w, scale) for w in wrongs]
    return oracle(model, blocks, model[4], put(x, y, scale), negatives, put(x, None, scale), y, **options)


# --- the whole step --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": "symba", "alpha": 0.5, "collaboration": "all"},
        {"collaboration": "previous", "goodness": "mean", "threshold": 0.3},
        {"peer": 0.2, "collaboration": "all"},
        pytest.param({"goodness": "mean", "threshold": 0.3}, marks=pytest.mark.slow),
        pytest.param({"loss": "symba"}, marks=pytest.mark.slow),
        pytest.param({"collaboration": "all"}, marks=pytest.mark.slow),
        pytest.param({"peer": 0.7}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_step_against_hintons_formula(options):
    _, y = batch()
    expected, losses = mlp_oracle([next_label(None, y)], **options)
    model, (x, y) = mlp(), batch()
    compiled = gr.compile(model, ForwardForward(negatives=next_label, **{"peer": 0, **options}))
    total = compiled.loss(x, y)
    total.backward()
    assert_close(gradients(model), expected)
    assert list(compiled.losses) == ["task", "0", "2"]
    reported = torch.stack(list(compiled.losses.values()))
    torch.testing.assert_close(reported, torch.tensor(losses, dtype=torch.float64))
    torch.testing.assert_close(total.detach(), torch.tensor(sum(losses), dtype=torch.float64))


def test_random_negatives():
    """The same wrong labels, drawn outside the graph, give the same step."""
    _, y = batch()
    wrong = wrong_labels(y, CLASSES, torch.tensor([11, 0, 0]), 1)
    expected, _ = mlp_oracle([wrong])
    assert_close(hand_step(ForwardForward(peer=0), seed=11), expected)


def test_all_negatives():
    _, y = batch()
    wrongs = [(y + k) % CLASSES for k in range(1, CLASSES)]
    expected, _ = mlp_oracle(wrongs)
    assert_close(hand_step(ForwardForward(peer=0, negatives="all")), expected)


def test_negatives_of_the_users_own():
    x, y = batch()
    expected, _ = mlp_oracle([blanked(x, y)])
    assert_close(hand_step(ForwardForward(peer=0, negatives=blanked)), expected)


def test_label_scale_and_embed():
    _, y = batch()
    expected, _ = mlp_oracle([next_label(None, y)], scale=3.0)
    assert_close(hand_step(ForwardForward(peer=0, negatives=next_label, label_scale=3.0)), expected)
    tripled = ForwardForward(peer=0, negatives=next_label, embed=lambda x, code: overlay(x, 3 * code))
    assert_close(hand_step(tripled), expected)


def test_samples_without_a_label_have_no_part_in_the_losses():
    model, (x, y) = mlp(), batch()
    partly = y.clone()
    partly[2] = -100
    kept = torch.tensor([0, 1, 3, 4])
    compiled = gr.compile(model, ForwardForward(peer=0, negatives="all"))
    compiled.loss(x, partly).backward()
    found = gradients(model)
    compiled.zero_grad()
    compiled.loss(x[kept], y[kept]).backward()
    assert_close(found, gradients(model))


# --- identity 13 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
def test_closed_form_of_the_gradient(sign):
    """G_l(positive) = -sigma(theta - g) 2 h_l h_{l-1}^T, G_l(negative) = sigma(g - theta) 2 h_l h_{l-1}^T."""
    model, (x, y) = shallow(), batch(1)
    grads = {}
    for negatives in (next_label, lambda x, y: x * 0):  # zero input: the negative's weight gradient is none
        fresh = shallow()
        gr.compile(fresh, ForwardForward(peer=0, negatives=negatives)).loss(x, y).backward()
        grads[negatives is next_label] = gradients(fresh)
    with torch.no_grad():
        above = rms(put(x, y if sign > 0 else (y + 1) % CLASSES))
        h = torch.relu(model[0](above))
        g = h.pow(2).sum()
        factor = -torch.sigmoid(7 - g) if sign > 0 else torch.sigmoid(g - 7)
        expected = 0.5 * factor * 2 * h.t() @ above
    positive = grads[False]["0.weight"]
    found = positive if sign > 0 else grads[True]["0.weight"] - positive
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


# --- negatives -------------------------------------------------------------------------------------------------


def test_wrong_labels_are_wrong_and_cover_all_others():
    y = torch.arange(5).repeat_interleave(4000)
    wrong = wrong_labels(y, 5, torch.tensor([1, 2, 0]), 3)
    assert not (wrong == y).any()
    assert wrong.min() >= 0
    for c in range(5):
        share = wrong[y == c].bincount(minlength=5) / 4000
        others = share[torch.arange(5) != c]
        assert share[c] == 0
        assert ((others - 0.25).abs() < 0.03).all()


def test_negatives_change_from_step_to_step_and_come_back_with_the_seed():
    def course(seed):
        compiled = gr.compile(shallow(), "ff", seed=seed)
        return [compiled.loss(*batch()).item() for _ in range(3)]

    first = course(0)
    assert len(set(first)) == 3
    assert course(0) == first
    assert course(1) != first


def test_codes():
    y = torch.tensor([2, -100])
    expected = torch.tensor([[0, 0, 0.5, 0], [0.125] * 4])
    assert torch.equal(codes(y, 4, 0.5, torch.float32), expected)


class _Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(36, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x.flatten(1))))))


def test_hybrid_images_mix_two_images_in_large_regions():
    counter = torch.tensor([0, 0, 0])
    black, white = torch.zeros(1, 2, 28, 28), torch.ones(1, 2, 28, 28)
    pair = torch.cat([black, white])
    mixed = hybrid_images(pair, counter, 1, 6)
    assert set(mixed.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(mixed[:, 0], mixed[:, 1])  # one mask for all channels
    share = mixed.mean((1, 2, 3))
    assert ((share > 0.2) & (share < 0.8)).all()
    edges = (mixed[:, 0].diff(dim=-1) != 0).float().mean()
    rough = hybrid_images(pair, counter, 1, 0)
    assert edges < 0.5 * (rough[:, 0].diff(dim=-1) != 0).float().mean()


@pytest.mark.slow
def test_hybrid_negatives_train_without_labels_in_the_input():
    torch.manual_seed(1)
    model = _Images().double()
    x, y = torch.rand(6, 1, 6, 6, dtype=torch.float64), torch.randint(0, CLASSES, (6,))
    compiled = gr.compile(copy.deepcopy(model), "ff{negatives=hybrid,peer=0,blurs=2}", blocks="layers")
    compiled.loss(x, y).backward()
    negative = hybrid_images(x, torch.tensor([0, 0, 0]), 1, 2)
    blocks = [lambda h: F.relu(model.a(h.flatten(1))), lambda h: F.relu(model.b(h))]
    expected, _ = oracle(model, blocks, model.c, x, [negative], x, y)
    assert_close(gradients(compiled.module), expected)
    plain = model.c(rms(F.relu(model.b(rms(F.relu(model.a(rms(x).flatten(1))))))))
    torch.testing.assert_close(compiled.predict(x), plain.detach())


# --- block by block --------------------------------------------------------------------------------------------


def test_batch_norm_net_learns_by_bp_inside_and_ff_across():
    torch.manual_seed(2)
    model = zoo.make("cnn").model.double()
    model.features[7].p = 0.0
    x, y = torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.randint(0, CLASSES, (6,))
    model.classifier = nn.Linear(32, CLASSES).double()
    reference = copy.deepcopy(model)
    compiled = gr.compile(model, ForwardForward(negatives=next_label, peer=0.3), blocks="auto")
    compiled.loss(x, y).backward()
    # the flattening belongs to the second block: its units are channels times positions
    blocks = [reference.features[:4], lambda h: reference.features[4:](h).flatten(1)]
    expected, _ = oracle(
        reference, blocks, reference.classifier,
        put(x, y), [put(x, next_label(x, y))], put(x, None), y, peer=0.3,
    )  # fmt: skip
    assert_close(gradients(model), expected, 1e-8)
    # statistics move by the positive pass alone
    first = reference.features[0](rms(put(x, y))).detach()
    torch.testing.assert_close(model.features[1].running_mean, 0.1 * first.mean((0, 2, 3)))
    assert model.features[1].num_batches_tracked == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet", "vit", "gcn"])
def test_models(name):
    """Every parameter learns, for several sizes; predictions have the model's shape; nothing is locked."""
    case = zoo.make(name)
    compiled = gr.compile(case.model, "ff", loss=case.loss)
    for size in case.sizes[:2]:
        x, y = case.batch(size)
        compiled.zero_grad()
        compiled.loss(x, y).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in case.model.parameters())
        predicted = compiled.predict(x)
        logits = predicted if isinstance(predicted, torch.Tensor) else predicted.logits
        assert logits.shape == (len(y), 5)
    certificates = compiled.report().certificates
    assert certificates.locality_radius == 0
    assert not certificates.update_locked
    assert not certificates.backward_locked
    assert not certificates.weight_transport
    assert not certificates.global_error
    assert certificates.forward_passes == 3


@pytest.mark.slow
def test_inputs_that_go_along_with_the_batch():
    """Edges cannot be repeated with the nodes: each wrong label gets a pass of its own."""
    case = zoo.make("gcn")
    (x, edges), y = case.batch(4)
    model = case.model.double()
    x = x.double()
    y[3:] = -100
    compiled = gr.compile(copy.deepcopy(model), "ff{negatives=all,readout=goodness,peer=0}")
    compiled.loss((x, edges), y).backward()
    assert compiled.report().certificates.forward_passes == 6  # one positive, four negatives, one neutral
    scores = []
    for c in range(5):
        h = rms(overlay(x, codes(torch.full((len(x),), c), 5, 1.0, x.dtype)))
        for conv in model.convs[:2]:
            h = F.relu(conv(rms(h), edges))
        scores.append(h.pow(2).mean(1))
    torch.testing.assert_close(compiled.predict((x, edges)), torch.stack(scores, 1).detach())


# --- locality --------------------------------------------------------------------------------------------------


def downstream_changes(rule: str) -> tuple[bool, bool]:
    """Whether the first and the second block's gradients change when all later parameters do."""
    seen = []
    for shift in (0.0, 1.0):
        model = mlp()
        compiled = gr.compile(model, rule)
        with torch.no_grad():
            model[4].weight.add_(shift)
            model[2].weight.add_(shift)
        compiled.loss(*batch()).backward()
        first = model[0].weight.grad
        fresh = mlp()
        compiled = gr.compile(fresh, rule)
        with torch.no_grad():
            fresh[4].weight.add_(shift)
        compiled.loss(*batch()).backward()
        seen.append((first, fresh[2].weight.grad))
    return not torch.equal(seen[0][0], seen[1][0]), not torch.equal(seen[0][1], seen[1][1])


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["ff", "ff{loss=symba}", "ff{collaboration=previous}"])
def test_no_later_parameter_enters_a_gradient(rule):
    assert downstream_changes(rule) == (False, False)


@pytest.mark.slow
def test_collaboration_of_all_layers_reads_later_blocks_and_the_certificate_says_so():
    assert downstream_changes("ff{collaboration=all}") == (True, False)
    certificates = gr.compile(mlp(), "ff{collaboration=all}").materialize(*batch()).report().certificates
    assert certificates["0"].update_locked
    assert certificates["0"].locality_radius == 1
    assert not certificates["2"].update_locked
    assert not certificates.backward_locked
    previous = gr.compile(mlp(), "ff{collaboration=previous}").materialize(*batch()).report().certificates
    assert not previous.update_locked


@pytest.mark.slow
@pytest.mark.parametrize("options", ["collaboration=all", "negatives=all"])
def test_an_empty_batch_teaches_nothing(options):
    model, (x, y) = mlp(), batch()
    compiled = gr.compile(model, f"ff{{peer=0,{options}}}", example_inputs=x, example_targets=y)
    compiled.loss(x[:0], y[:0]).backward()
    assert all(not p.grad.any() for p in model[:4].parameters())
    compiled.zero_grad()
    compiled.loss(x, y).backward()
    assert all(p.grad.any() for p in model[:4].parameters())
    assert compiled.predict(x[:0]).shape == (0, CLASSES)


# --- read-outs -------------------------------------------------------------------------------------------------


def test_neutral_readout():
    model, (x, _) = mlp(), batch()
    compiled = gr.compile(model, "ff")
    h = rms(put(x, None))
    expected = model[4](rms(torch.relu(model[2](rms(torch.relu(model[0](h)))))))
    torch.testing.assert_close(compiled.predict(x), expected.detach())


@pytest.mark.parametrize(
    "options",
    ["", pytest.param("collaboration=all", marks=pytest.mark.slow), "collaboration=previous,goodness=mean"],
)
def test_goodness_readout(options):
    """Blocks that learn together are read together, by what they learn from; else all but the first, by the mean."""
    model, (x, _) = mlp(), batch()
    compiled = gr.compile(model, f"ff{{readout=goodness,{options}}}")
    scores = []
    for c in range(CLASSES):
        h = rms(put(x, torch.full((BATCH,), c)))
        first = torch.relu(model[0](h))
        second = torch.relu(model[2](rms(first)))
        if options == "collaboration=all":
            scores.append(first.pow(2).sum(1) + second.pow(2).sum(1))
        elif options:
            scores.append(first.pow(2).mean(1) + second.pow(2).mean(1))
        else:
            scores.append(second.pow(2).mean(1))
    torch.testing.assert_close(compiled.predict(x), torch.stack(scores, 1).detach())


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["ff", "ff{readout=all,goodness=mean,loss=symba}", "counter_current"])
def test_autocast_after_a_compile_without_it(rule):
    """State stays in the parameters' type; goodness is summed in single precision, gradients are near the exact."""
    model = mlp().float()
    x, y = batch()
    compiled = gr.compile(model, rule, example_inputs=x.float(), example_targets=y)
    compiled.loss(x.float(), y).backward()
    exact = {n: p.grad.clone() for n, p in compiled.named_parameters() if p.grad is not None}
    again = gr.compile(mlp().float(), rule, example_inputs=x.float(), example_targets=y)
    with torch.autocast("cpu", torch.bfloat16):
        loss = again.loss(x.float(), y)
    loss.backward()
    assert all(p.dtype == torch.float32 for p in again.parameters())
    assert all(b.dtype == torch.float32 for b in again.buffers() if b.is_floating_point())
    found = {n: p.grad for n, p in again.named_parameters() if p.grad is not None}
    assert found.keys() == exact.keys()
    for name, grad in found.items():
        assert (grad - exact[name]).norm() <= 0.05 * exact[name].norm() + 1e-6, name


@pytest.mark.slow
def test_readout_of_all_layers():
    """A linear head without bias on the normalised layers 2 to L, zero at first, trained by the task loss."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, CLASSES)
    ).double()  # fmt: skip
    x, y = batch()
    compiled = gr.compile(model, "ff{readout=all}", example_inputs=x, example_targets=y)
    head = dict(compiled.named_parameters())["_graphrewrite.ff.readout.weight"]
    assert head.shape == (CLASSES, 11)
    assert not head.any()
    compiled.loss(x, y).backward()
    with torch.no_grad():
        outs = hidden_outputs([model[0:2], model[2:4], model[4:6]], put(x, None))
        features = torch.cat([rms(outs[1]), rms(outs[2])], 1)
        error = torch.full((BATCH, CLASSES), 1 / CLASSES, dtype=torch.float64) - F.one_hot(y, CLASSES)
    torch.testing.assert_close(head.grad, error.t() @ features / BATCH)
    with torch.no_grad():
        head.normal_()
    torch.testing.assert_close(compiled.predict(x), features @ head.detach().t())


@pytest.mark.slow
def test_peer_state_is_a_running_mean_of_positive_activity():
    model, (x, y) = mlp(), batch()
    compiled = gr.compile(model, "ff{peer_momentum=0.75}")
    h = torch.relu(model[0](rms(put(x, y)))).detach().mean(0)
    mean = torch.full((7,), 0.5, dtype=torch.float64)
    for _ in range(3):
        compiled.loss(x, y)
        mean = 0.75 * mean + 0.25 * h
    torch.testing.assert_close(compiled.rule_state["ff.activity.0"], mean)
    with torch.no_grad():
        compiled.loss(x, y)
    torch.testing.assert_close(compiled.rule_state["ff.activity.0"], mean)


def test_a_block_with_two_outputs_reports_their_sum():
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(12, 6), nn.Linear(6, CLASSES)

        def forward(self, x):
            h = self.a(x)
            return self.b(torch.relu(h)) + self.b(torch.tanh(h))

    model, (x, y) = Forked().double(), batch()
    compiled = gr.compile(model, ForwardForward(peer=0, negatives=next_label), blocks="layers")
    total = compiled.loss(x, y)
    torch.testing.assert_close(total.detach(), sum(compiled.losses.values()))


# --- modes and errors ------------------------------------------------------------------------------------------


def test_eval_and_no_grad_give_the_loss_and_no_gradient():
    model, (x, y) = shallow(), batch()
    compiled = gr.compile(model, ForwardForward(negatives=next_label))
    trained = compiled.loss(x, y)
    fresh = gr.compile(shallow(), ForwardForward(negatives=next_label))
    with torch.no_grad():
        under = fresh.loss(x, y)
    assert torch.equal(trained.detach(), under)
    assert not under.requires_grad
    judged = fresh.eval().loss(x, y)
    assert torch.equal(judged, under)
    assert fresh.losses["0"] == compiled.losses["0"]
    assert all(p.grad is None for p in fresh.module.parameters())


def test_the_plain_forward_warns_once():
    x, y = batch()
    compiled = gr.compile(shallow(), "ff{peer=0}")
    compiled.loss(x, y).backward()
    compiled.eval()
    with pytest.warns(UserWarning, match="predict"):
        compiled(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(x)


def test_a_loss_outside_the_graph_is_refused():
    x, y = batch()
    compiled = gr.compile(mlp(), "ff")
    with pytest.raises(gr.RuleError, match="no backward through compiled"):
        F.cross_entropy(compiled(x), y).backward()


class _Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 5), nn.Linear(5, 1)

    def forward(self, x):
        return self.b(self.a(x).relu())


class _Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.b((self.a(x) > 0).double())


def test_bad_input():
    x, y = batch()
    tokens = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 7))
    with pytest.raises(gr.RuleError, match="floating-point input"):
        gr.compile(tokens, "ff").loss(torch.randint(0, 7, (4,)), torch.randint(0, 7, (4,)))
    with pytest.raises(gr.RuleError, match="needs targets"):
        gr.compile(mlp(), "ff", example_inputs=x)
    with pytest.raises(gr.RuleError, match="one integer class per sample"):
        gr.compile(mlp(), "ff", loss=F.mse_loss).loss(x, torch.randn(BATCH, CLASSES).double())
    with pytest.raises(gr.RuleError, match="tells classes apart") as error:
        gr.compile(_Scalar().double(), "ff", loss=lambda out, y: out.sum()).loss(x, y)
    assert "num_classes" in error.value.remedy
    with pytest.raises(gr.RuleError, match="class dimension") as error:
        gr.compile(_Classless().double(), "ff", loss=lambda out, y: out).loss(x, y)
    assert "num_classes" in error.value.remedy
    with pytest.raises(gr.RuleError, match="block a has no floating-point output"):
        gr.compile(_Detached().double(), "ff", blocks="layers").loss(x, y)
    with pytest.raises(gr.RuleError, match="no room"):
        gr.compile(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, CLASSES)), "ff").loss(
            torch.randn(2, 3), y[:2]
        )
    with pytest.raises(gr.RuleError, match="hybrid negatives mix images"):
        gr.compile(mlp(), "ff{negatives=hybrid}").loss(x, y)
    with pytest.raises(gr.RuleError, match=r"negatives\(x, y\) gave samples"):
        gr.compile(mlp(), ForwardForward(negatives=lambda x, y: x[:, :3])).loss(x, y)
    with pytest.raises(gr.RuleError, match="at least one block before"):
        gr.compile(nn.Sequential(nn.Linear(12, CLASSES)).double(), "ff").loss(x, y)


class _Classless(_Scalar):
    def forward(self, x):
        return super().forward(x).sum()


@pytest.mark.parametrize("option", ["goodness", "loss", "collaboration", "negatives", "readout"])
def test_unknown_values(option):
    with pytest.raises(gr.RuleError, match=f"{option}='nothing' is unknown"):
        gr.compile(mlp(), f"ff{{{option}=nothing}}").loss(*batch())


def test_labels_out_of_range():
    x, y = batch()
    compiled = gr.compile(shallow(), "ff", example_inputs=x, example_targets=y)
    for label in (CLASSES, -1):
        y[1] = label
        with pytest.raises(gr.RuleError, match=f"label {label} is out of range"):
            compiled.loss(x, y)
    with pytest.raises(gr.RuleError, match="out of range"):
        gr.compile(shallow(), ForwardForward(negatives=lambda x, y: y + CLASSES)).loss(*batch())


def test_number_of_classes_may_be_given():
    x, y = batch()
    model = nn.Sequential(nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 9)).double()
    compiled = gr.compile(model, f"ff{{num_classes={CLASSES},negatives=all,readout=goodness}}")
    compiled.loss(x, y).backward()
    assert compiled.predict(x).shape == (BATCH, CLASSES)
