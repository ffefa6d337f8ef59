"""Operators one by one against eager mode: a branch each, behind a weight of its own, so that an error has a name."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from graphrewrite.testing.compare import assert_trains_like_eager


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_scales_as_eager_mode_does(dtype):
    """1 / (1 - p) is rounded to the activation's dtype before it multiplies."""

    class Dropouts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict({f"p{int(100 * p)}": nn.Linear(8, 8) for p in (0.04, 0.1, 0.15, 0.45, 0.5)})

        def forward(self, x):
            parts = [torch.dropout(layer(x), int(name[1:]) / 100, True) for name, layer in self.layers.items()]
            return torch.cat(parts, 1)

    x = torch.randn(6, 8, dtype=dtype)
    assert_trains_like_eager(Dropouts().to(dtype), [(x, None)] * 2, loss=lambda o, _: o.float().square().sum())


VECTORS = {
    "relu": F.relu,
    "leaky": F.leaky_relu,
    "prelu": nn.PReLU(),
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
    "softshrink": F.softshrink,
    "hardtanh": F.hardtanh,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "logsigmoid": F.logsigmoid,
    "glu": F.glu,
    "rrelu": lambda h: F.rrelu(h, training=True),
    "alpha_dropout": lambda h: F.alpha_dropout(h, 0.3, True),
    "softmax": lambda h: h.softmax(-1),
    "log_softmax": lambda h: h.log_softmax(0),
    "normalize": F.normalize,
    "layer_norm": lambda h: F.layer_norm(h, (8,)),
    "rms_norm": lambda h: F.rms_norm(h, (8,)),
    "batch_norm": nn.BatchNorm1d(8),
    "batch_norm_fixed": nn.BatchNorm1d(8, track_running_stats=False),
    "logsumexp": lambda h: h.logsumexp(1),
    "norm": lambda h: h.norm(dim=1),
    "var": lambda h: h.var(0),
    "std_mean": lambda h: torch.stack(torch.std_mean(h, 1)),
    "amax": lambda h: h.amax(1),
    "median": lambda h: h.median(1).values,
    "topk": lambda h: h.topk(3)[0],
    "sort": lambda h: h.sort(1)[0],
    "cumprod": lambda h: h.cumprod(1),
    "einsum": lambda h: torch.einsum("bi,bj->ij", h, h),
    "outer": lambda h: (h[:, :, None] * h[:, None, :]).sum((1, 2)),
    "cdist": lambda h: torch.cdist(h, h + 1),
    "bilinear": nn.Bilinear(4, 4, 3),
    "lerp": lambda h: torch.lerp(h[:, :4], h[:, 4:], 0.3),
    "where": lambda h: torch.where(h > 0, h, h * h),
    "atan2": lambda h: torch.atan2(h[:, :4], h[:, 4:]),
    "clamp": lambda h: h.clamp(-0.3, 0.4),
    "pow": lambda h: (h.abs() + 0.1).pow(1.7),
    "roll": lambda h: h.roll(2, 1) * h,
    "flip": lambda h: h.flip(1) * h,
    "scatter": lambda h: torch.zeros_like(h).scatter_add(1, h.argsort(1), h),
    "index_select": lambda h: h.index_select(1, torch.tensor([3, 3, 0])),
    "masked_fill": lambda h: h.masked_fill(h > 0.5, 0.0),
    "unfold": lambda h: h.unfold(1, 3, 2),
    "repeat": lambda h: h.repeat(1, 2).repeat_interleave(2, 1),
    "diag": lambda h: torch.diag_embed(h) @ h.t()[None, :, :1],
    "inplace": lambda h: h.clone().mul_(2).add_(1).relu_(),
    "assign": lambda h: _assigned(h),
    "linalg": lambda h: torch.linalg.solve(h.t() @ h + torch.eye(8, dtype=h.dtype), h.t()),
    "rfft": lambda h: torch.view_as_real(torch.fft.rfft(h, dim=1)),
    "irfft": lambda h: torch.fft.irfft(torch.complex(h[:, :4], h[:, 4:]), dim=1),
    "trace": lambda h: (h.t() @ h).trace().reshape(1),
    "kthvalue": lambda h: h.kthvalue(3, 1).values,
    "cummax": lambda h: h.cummax(1).values,
    "logcumsumexp": lambda h: h.logcumsumexp(1),
    "renorm": lambda h: h.renorm(2, 0, 0.7),
    "take": lambda h: h.take(torch.tensor([0, 3, 3, 5])),
    "index_put": lambda h: h.index_put((torch.tensor([0, 0, 2]),), h[:3], accumulate=True),
    "index_add": lambda h: h.index_add(1, torch.tensor([1, 1]), h[:, :2]),
    "inverse": lambda h: torch.linalg.inv(h.t() @ h + torch.eye(8, dtype=h.dtype)),
    "logdet": lambda h: torch.logdet(h.t() @ h + torch.eye(8, dtype=h.dtype)).reshape(1),
    "svdvals": lambda h: torch.linalg.svdvals(h),
    "cholesky": lambda h: torch.linalg.cholesky(h.t() @ h + torch.eye(8, dtype=h.dtype)),
    "cross": lambda h: torch.linalg.cross(h[:, :3], h[:, 3:6]),
    "kron": lambda h: torch.kron(h[:1], h[1:2]),
    "embedding_bag": lambda h: F.embedding_bag(torch.tensor([[0, 2], [1, 1]]), h.t()),
    "embedding_padding": lambda h: F.embedding(torch.tensor([0, 2, 2]), h.t(), padding_idx=2),
    "cosine": lambda h: F.cosine_similarity(h[:, :4], h[:, 4:]),
    "smooth_l1": lambda h: F.smooth_l1_loss(h[:, :4], h[:, 4:], reduction="none"),
    "huber": lambda h: F.huber_loss(h[:, :4], h[:, 4:], reduction="sum").reshape(1),
    "bce": lambda h: F.binary_cross_entropy_with_logits(h, (h > 0).to(h.dtype)).reshape(1),
    "margin": lambda h: F.multi_margin_loss(h, h.argmin(1)).reshape(1),
    "kl": lambda h: F.kl_div(h.log_softmax(1), h.softmax(1), reduction="batchmean").reshape(1),
    "nll": lambda h: F.cross_entropy(h, h.argmax(1), label_smoothing=0.1, weight=torch.ones(8, dtype=h.dtype))[None],
    "spectral": lambda h: torch.linalg.matrix_norm(h).reshape(1),
    "checkpointed": lambda h: checkpoint(lambda t: t.tanh().sin(), h, use_reentrant=False),
}
NOT_IN_BF16 = {
    "margin",
    "cdist",
    "linalg",
    "rfft",
    "irfft",
    "inverse",
    "logdet",
    "svdvals",
    "cholesky",
    "local_response",
}
ONE_BATCH_SIZE = {
    "as_strided": lambda h: h.as_strided((4, 3), (2, 2)),
    "take_along": lambda h: h.take_along_dim(h.argsort(1)[:, :2], 1),
}
"""What torch traces with the sizes it sees."""
CLOSE = {"prod": lambda h: h.prod(1)}
"""Their eager backward looks at the values (are there zeros?), which a graph cannot: equal up to rounding."""
CLOSE_IMAGES = {
    "bilinear": lambda h: F.interpolate(h, size=(7, 5), mode="bilinear", align_corners=False),
    "bicubic": lambda h: F.interpolate(h, scale_factor=1.5, mode="bicubic"),
}
"""Traced, torch writes these out: its own operators have no form with symbolic sizes."""
IMAGES = {
    "conv": nn.Conv2d(4, 4, 3, padding=1),
    "conv_same": nn.Conv2d(4, 4, 2, padding="same"),
    "conv_reflect": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    "depthwise": nn.Conv2d(4, 8, 3, groups=4),
    "dilated": nn.Conv2d(4, 4, 3, dilation=2, padding=2, stride=2, bias=False),
    "transposed": nn.ConvTranspose2d(4, 3, 3, stride=2, output_padding=1),
    "conv1d": lambda h: F.conv1d(h.flatten(2), torch.ones(2, 4, 3, dtype=h.dtype)),
    "conv3d": lambda h: F.conv3d(h.unsqueeze(1), torch.ones(2, 1, 2, 2, 2, dtype=h.dtype)),
    "max_pool": lambda h: F.max_pool2d(h, 2),
    "avg_pool": lambda h: F.avg_pool2d(h, 3, 1, 1),
    "lp_pool": lambda h: F.lp_pool2d(h.abs() + 0.1, 2, 2),
    "adaptive": lambda h: F.adaptive_avg_pool2d(h, 3),
    "adaptive_max": lambda h: F.adaptive_max_pool2d(h, 3),
    "group_norm": nn.GroupNorm(2, 4),
    "instance_norm": nn.InstanceNorm2d(4, affine=True),
    "batch_norm": nn.BatchNorm2d(4),
    "dropout2d": lambda h: F.dropout2d(h, 0.3, True),
    "nearest": lambda h: F.interpolate(h, scale_factor=2.0),
    "pixel_shuffle": lambda h: F.pixel_shuffle(h, 2),
    "unfold": lambda h: F.unfold(h, 3),
    "pad": lambda h: F.pad(h, (1, 2, 0, 1), mode="replicate"),
    "grid_sample": lambda h: F.grid_sample(h, h[:, :2].movedim(1, -1).tanh(), align_corners=False),
    "local_response": lambda h: F.local_response_norm(h, 3),
    "attention": lambda h: F.scaled_dot_product_attention(h, h, h, is_causal=True),
    "attention_mask": lambda h: F.scaled_dot_product_attention(h, h, h, attn_mask=h > 0),
    "attention_dropout": lambda h: F.scaled_dot_product_attention(h, h, h, dropout_p=0.2),
    "multi_head": nn.MultiheadAttention(6, 2, batch_first=True),
}


def _assigned(h: torch.Tensor) -> torch.Tensor:
    out = h * 2
    out[:, ::2] = h[:, 1::2] ** 2
    out[h < 0] = 0.1
    return out


class Branches(nn.Module):
    """One branch per operator, each behind a weight of its own, so that a wrong gradient says whose it is."""

    def __init__(self, operators: dict, image: bool) -> None:
        super().__init__()
        self.image = image
        self.before = nn.ModuleDict({name: nn.Linear(8, 144 if image else 8) for name in operators})
        self.modules_used = nn.ModuleDict(
            {name: copy.deepcopy(op) for name, op in operators.items() if isinstance(op, nn.Module)}
        )
        self.functions = {name: op for name, op in operators.items() if not isinstance(op, nn.Module)}

    def forward(self, x):
        return [self.branch(name, linear(x)).flatten() for name, linear in self.before.items()]

    def branch(self, name, h):
        h = h.view(-1, 4, 6, 6) if self.image else h
        if name not in self.modules_used:
            return self.functions[name](h)
        if name == "multi_head":
            h = h[:, 0]
            return self.modules_used[name](h, h, h)[0]
        return self.modules_used[name](h[:, :4], h[:, 4:]) if name == "bilinear" else self.modules_used[name](h)


def weighted_sum(outputs, _):
    """Another weight for each number; a `linspace` would fix the batch size in the capture."""
    return sum((o.float().flatten() * (torch.arange(o.numel()) % 7 - 2.5)).sum() for o in outputs)


def steps(dtype, *sizes):
    return [(torch.randn(n, 8, dtype=dtype), None) for n in sizes or (5, 5, 3)]


def shares():
    """A share of the operators and a way to train: by default the shares take one way each, in turn."""
    for kind, operators, number in (("vectors", VECTORS, 6), ("images", IMAGES, 2)):
        for i in range(number):
            for way, through in enumerate(("loss", "forward")):
                marks = () if way == i % 2 else (pytest.mark.slow,)
                yield pytest.param(kind, list(operators)[i::number], through, marks=marks, id=f"{kind}-{i}-{through}")


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(("kind", "names", "through"), shares())
def test_bitwise(kind, names, through, dtype):
    """One capture of many operators serves both batch sizes."""
    all_of_kind = VECTORS if kind == "vectors" else IMAGES
    operators = {name: all_of_kind[name] for name in names if dtype is torch.float32 or name not in NOT_IN_BF16}
    model = Branches(operators, kind == "images").to(dtype)
    compiled = assert_trains_like_eager(model, steps(dtype), loss=weighted_sum, through=through)
    assert not any(guard.startswith("x.shape[0] ==") for guard in compiled.report().guards)


def test_bitwise_at_one_batch_size():
    model = Branches(ONE_BATCH_SIZE, image=False)
    assert_trains_like_eager(model, steps(torch.float32), loss=weighted_sum, through="loss", dynamic=None)


@pytest.mark.parametrize(("operators", "image"), [(CLOSE, False), (CLOSE_IMAGES, True)])
def test_close(operators, image):
    model = Branches(operators, image)
    assert_trains_like_eager(model, steps(torch.float32, 5, 3), loss=weighted_sum, exact=False, through="loss")
