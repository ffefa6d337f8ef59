"""Small models of every family, with example batches: what rules and passes are tested on.

Each entry is a factory: `zoo.make("resnet")` gives a `Case` with a fresh model and a `batch(size)` function. Models
of `transformers` and `torch_geometric` are built from small configurations; nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Batch = tuple[Any, Any]


@dataclass(frozen=True)
class Case:
    """A model to test on.

    Attributes:
        name: Name in the zoo.
        model: A fresh model in training mode.
        batch: `batch(size)` gives `(x, y)` for `compiled.loss(x, y)`; `size` is the batch (or node, or graph) count.
        loss: `loss(outputs, targets)`; None: the default loss.
        sizes: Batch sizes worth trying; the first is the one to capture with.
        exact: Whether gradients are bitwise those of eager mode (recurrent nets are decomposed, so sums differ).
        classes: Number of classes of the targets; 0 if they are no classes.
    """

    name: str
    model: nn.Module
    batch: Callable[[int], Batch]
    loss: Callable[[Any, Any], torch.Tensor] | None = None
    sizes: tuple[int, ...] = (4, 7, 1)
    exact: bool = True
    classes: int = 5


_FACTORIES: dict[str, Callable[[], Case]] = {}


def _entry(function: Callable[[], Case]) -> Callable[[], Case]:
    _FACTORIES[function.__name__] = function
    return function


def names() -> list[str]:
    """All entries of the zoo."""
    return list(_FACTORIES)


def factory(name: str) -> Callable[[], Case]:
    """What makes a case; its docstring says what the model is."""
    return _FACTORIES[name]


def make(name: str, seed: int = 0) -> Case:
    """A fresh case; the same seed gives the same weights."""
    with torch.random.fork_rng(), _quiet():
        torch.manual_seed(seed)
        return _FACTORIES[name]()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    with contextlib.redirect_stderr(io.StringIO()):
        yield
    logger.setLevel(level)


def _labels(shape: int | tuple[int, ...], classes: int = 5) -> torch.Tensor:
    return torch.randint(0, classes, (shape,) if isinstance(shape, int) else shape)


# --- plain torch ---------------------------------------------------------------------------------------------------


@_entry
def mlp() -> Case:
    """Three linear layers, ReLU."""
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))
    return Case("mlp", model, lambda n: (torch.randn(n, 12), _labels(n)))


class _LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 8, 3)
        self.fc1 = nn.Linear(8, 16)
        self.fc2 = nn.Linear(16, 12)
        self.fc3 = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.avg_pool2d(torch.tanh(self.conv1(x)), 2)
        x = F.avg_pool2d(torch.tanh(self.conv2(x)), 2)
        x = torch.tanh(self.fc1(torch.flatten(x, 1)))
        return self.fc3(torch.tanh(self.fc2(x)))  # type: ignore[no-any-return]


@_entry
def lenet() -> Case:
    """LeNet-5, small: two convolutions with tanh and average pooling, three linear layers."""
    return Case("lenet", _LeNet(), lambda n: (torch.randn(n, 1, 8, 8), _labels(n)))


class _ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.2),
        )
        self.classifier = nn.Linear(8 * 2 * 2, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).flatten(1))  # type: ignore[no-any-return]


@_entry
def cnn() -> Case:
    """Convolutions with batch-norm and dropout."""
    return Case("cnn", _ConvNet(), lambda n: (torch.randn(n, 1, 8, 8), _labels(n)))


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(h)) + self.skip(x), inplace=True)


class _ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.stage1 = nn.Sequential(_Residual(8, 8), _Residual(8, 8))
        self.stage2 = nn.Sequential(_Residual(8, 12, 2), _Residual(12, 12))
        self.fc = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.stage2(self.stage1(F.relu(self.bn(self.conv(x)))))
        return self.fc(h.mean((2, 3)))  # type: ignore[no-any-return]


@_entry
def resnet() -> Case:
    """A residual network with two stages of two blocks."""
    return Case("resnet", _ResNet(), lambda n: (torch.randn(n, 3, 8, 8), _labels(n)))


def _double_conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(2, outputs), nn.SiLU())


class _UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1 = _double_conv(1, 4)
        self.down2 = _double_conv(4, 8)
        self.middle = _double_conv(8, 8)
        self.up2 = _double_conv(16, 4)
        self.up1 = _double_conv(8, 4)
        self.head = nn.Conv2d(4, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.down1(x)
        b = self.down2(F.avg_pool2d(a, 2))
        c = self.middle(F.avg_pool2d(b, 2))
        c = self.up2(torch.cat([F.interpolate(c, scale_factor=2.0), b], 1))
        c = self.up1(torch.cat([F.interpolate(c, scale_factor=2.0), a], 1))
        return self.head(c).movedim(1, -1)  # type: ignore[no-any-return]


@_entry
def unet() -> Case:
    """A U-Net: skips that cross blocks; one class per pixel."""
    return Case("unet", _UNet(), lambda n: (torch.randn(n, 1, 8, 8), _labels((n, 8, 8))))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(h.transpose(1, 2).reshape(b, t, d))  # type: ignore[no-any-return]


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class _GPT(nn.Module):
    def __init__(self, vocabulary: int = 11, width: int = 16, layers: int = 2, context: int = 12) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.layers = nn.ModuleList([_Layer(width, 2) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.token.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.layers:
            h = layer(h)
        return self.head(self.norm(h))  # type: ignore[no-any-return]


@_entry
def gpt() -> Case:
    """A GPT whose head is tied to its embedding."""
    return Case("gpt", _GPT(), lambda n: (_labels((n, 7), 11), _labels((n, 7), 11)), classes=11)


class _Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.rnn = kind(6, 8, num_layers=2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, _ = self.rnn(x)
        return self.head(h[:, -1])  # type: ignore[no-any-return]


@_entry
def lstm() -> Case:
    """Two LSTM layers."""
    return Case("lstm", _Recurrent(nn.LSTM), lambda n: (torch.randn(n, 5, 6), _labels(n)), exact=False)


@_entry
def gru() -> Case:
    """Two GRU layers."""
    return Case("gru", _Recurrent(nn.GRU), lambda n: (torch.randn(n, 5, 6), _labels(n)), exact=False)


class _Expert(nn.Sequential):
    pass


class _Mixture(nn.Module):
    def __init__(self, width: int = 12, experts: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            [_Expert(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, width)) for _ in range(experts)]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.router(x).softmax(-1)
        return x + sum(weight[..., i : i + 1] * e(x) for i, e in enumerate(self.experts))  # type: ignore[no-any-return]


@_entry
def moe() -> Case:
    """Two layers of a densely routed mixture of experts, and a head."""
    model = nn.Sequential(_Mixture(), _Mixture(), nn.Linear(12, 5))
    return Case("moe", model, lambda n: (torch.randn(n, 12), _labels(n)))


# --- transformers --------------------------------------------------------------------------------------------------


def _tokens(n: int, length: int = 9, vocabulary: int = 40) -> torch.Tensor:
    return torch.randint(0, vocabulary, (n, length))


@_entry
def gpt2() -> Case:
    """`transformers` GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, use_cache=False
    )
    return Case("gpt2", GPT2LMHeadModel(config).train(), lambda n: (_tokens(n), _tokens(n)), classes=40)


@_entry
def llama() -> Case:
    """`transformers` Llama with grouped-query attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    return Case("llama", LlamaForCausalLM(config).train(), lambda n: (_tokens(n), _tokens(n)), classes=40)


@_entry
def bert() -> Case:
    """`transformers` BERT for sequence classification, with an attention mask."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=5,
    )

    def batch(n: int) -> Batch:
        mask = torch.ones(n, 9, dtype=torch.long)
        mask[:, 7:] = 0
        return {"input_ids": _tokens(n), "attention_mask": mask}, _labels(n)

    return Case("bert", BertForSequenceClassification(config).train(), batch)


@_entry
def vit() -> Case:
    """`transformers` ViT for image classification."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=5,
    )
    return Case("vit", ViTForImageClassification(config).train(), lambda n: (torch.randn(n, 1, 8, 8), _labels(n)))


@_entry
def hf_resnet() -> Case:
    """`transformers` ResNet for image classification."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 2], layer_type="basic", num_labels=5
    )
    return Case(
        "hf_resnet", ResNetForImageClassification(config).train(), lambda n: (torch.randn(n, 3, 16, 16), _labels(n))
    )


@_entry
def convnext() -> Case:
    """`transformers` ConvNeXt for image classification, its branches not scaled down to 1e-6 at the start."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(
        num_channels=3, patch_size=2, num_stages=2, hidden_sizes=[8, 12], depths=[1, 2], num_labels=5,
        layer_scale_init_value=0.5,
    )  # fmt: skip
    return Case(
        "convnext", ConvNextForImageClassification(config).train(), lambda n: (torch.randn(n, 3, 8, 8), _labels(n))
    )


@_entry
def mamba() -> Case:
    """`transformers` Mamba."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=4, pad_token_id=0,
        bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    return Case("mamba", MambaForCausalLM(config).train(), lambda n: (_tokens(n), _tokens(n)), classes=40)


@_entry
def t5() -> Case:
    """`transformers` T5, encoder and decoder."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, pad_token_id=0,
        decoder_start_token_id=0, eos_token_id=1, use_cache=False,
    )  # fmt: skip

    def batch(n: int) -> Batch:
        return {"input_ids": _tokens(n), "decoder_input_ids": _tokens(n, 6)}, _tokens(n, 6)

    return Case("t5", T5ForConditionalGeneration(config).train(), batch, classes=40)


# --- torch_geometric -----------------------------------------------------------------------------------------------


class _GraphNet(nn.Module):
    def __init__(self, layer: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.convs = nn.ModuleList([layer(6, 8), layer(8, 8), layer(8, 5)])

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        for conv in self.convs[:-1]:
            x = F.relu(conv(x, edge_index))
        return self.convs[-1](x, edge_index)  # type: ignore[no-any-return]


def _graph_batch(n: int) -> Batch:
    nodes = 3 * n + 1
    edges = torch.randint(0, nodes, (2, 5 * n + 2))
    return (torch.randn(nodes, 6), edges), _labels(nodes)


@_entry
def gcn() -> Case:
    """`torch_geometric` GCN on random graphs of different sizes."""
    from torch_geometric.nn import GCNConv

    return Case("gcn", _GraphNet(GCNConv), _graph_batch)


@_entry
def gat() -> Case:
    """`torch_geometric` GAT."""
    from torch_geometric.nn import GATConv

    return Case("gat", _GraphNet(GATConv), _graph_batch)


@_entry
def sage() -> Case:
    """`torch_geometric` GraphSAGE."""
    from torch_geometric.nn import SAGEConv

    return Case("sage", _GraphNet(SAGEConv), _graph_batch)
