"""Blocks: `"auto"`, `"layers"`, globs, and maps from glob to rule."""

from __future__ import annotations

import functools

import networkx as nx
import pytest
import torch
from torch import nn

import graphrewrite as gr
from graphrewrite.analysis.blocks import quotient_graph
from graphrewrite.graph.differentiate import differentiate
from graphrewrite.graph.nodes import Param, Role, UserInput, info, is_backward, is_float
from graphrewrite.rule import RuleMap
from graphrewrite.testing import zoo
from helpers import forward_graph


@functools.cache
def zoo_graph(name: str):
    case = zoo.make(name)
    return differentiate(forward_graph(case.model, case.batch(4)[0], blocks="auto"))


def names(graph) -> list[str]:
    return [block.name for block in graph.blocks]


def members(graph, block: str) -> set[str]:
    """Module paths of the operators of a block."""
    return {info(n).module for n in graph.forward_nodes() if info(n).block == block}


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, growth, 3, padding=1)

    def forward(self, xs: list[torch.Tensor]) -> torch.Tensor:
        return self.conv(torch.relu(self.norm(torch.cat(xs, 1))))


class DenseNet(nn.Module):
    """Every layer reads what all layers before it wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.layers = nn.ModuleList([DenseLayer(4 + 2 * i, 2) for i in range(3)])
        self.head = nn.Linear(10, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = [self.stem(x)]
        for layer in self.layers:
            found.append(layer(found))
        return self.head(torch.cat(found, 1).mean((2, 3)))


@functools.cache
def dense_graph():
    return differentiate(forward_graph(DenseNet(), torch.randn(4, 1, 6, 6), blocks="auto"))


# --- auto ------------------------------------------------------------------------------------------------------------

AUTO = {
    "mlp": ["0", "2", "4"],
    "cnn": ["features.0", "features.4", "classifier"],
    "resnet": ["conv", "stage1.0", "stage1.1", "stage2.0", "stage2.1", "fc"],
    "unet": ["down1", "down2", "middle", "up2", "up1", "head"],
    "moe": ["0", "1", "2"],
    "gcn": ["convs.0", "convs.1", "convs.2"],
    "gpt": ["token", "layers.0", "layers.1", "norm"],
    "gpt2": ["transformer.wte", "transformer.h.0", "transformer.h.1", "transformer.ln_f"],
    "llama": ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"],
    "bert": ["bert.embeddings.word_embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1", "bert.pooler.dense"],
    "vit": ["vit.embeddings.patch_embeddings.projection", "vit.layers.0", "vit.layers.1", "vit.layernorm"],
    "hf_resnet": [
        "resnet.embedder.embedder.convolution",
        "resnet.encoder.stages.0",
        "resnet.encoder.stages.1.layers.0",
        "resnet.encoder.stages.1.layers.1",
        "classifier.1",
    ],
    "t5": [
        "encoder.embed_tokens",
        "encoder.block.0",
        "encoder.block.1",
        "encoder.final_layer_norm",
        "decoder.block.0",
        "decoder.block.1",
        "decoder.final_layer_norm",
    ],
}
"""One block per layer, per residual block, per child of an `nn.Sequential`; stem and head are one each."""


@pytest.mark.parametrize("name", AUTO)
def test_auto_finds_the_repeated_modules(name):
    assert names(zoo_graph(name)) == AUTO[name]


@pytest.mark.parametrize(
    ("name", "layer"), [("gpt2", "transformer.h.1"), ("vit", "vit.layers.1"), ("t5", "decoder.block.1")]
)
def test_a_layer_is_whole(name, layer):
    """All operators of the layer's modules are in its block, its residual additions too."""
    graph = zoo_graph(name)
    inside = {p for p in (info(n).module for n in graph.forward_nodes()) if p == layer or p.startswith(layer + ".")}
    assert inside
    assert inside <= members(graph, layer)
    for other in names(graph):
        assert other == layer or not inside & {info(n).module for n in graph.forward_nodes() if info(n).block == other}


def test_stages_that_are_sequences_of_layers_are_blocks():
    class Stages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
            self.second = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
            self.third = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.third(self.second(self.first(x)))

    assert names(forward_graph(Stages(), torch.randn(4, 4), blocks="auto")) == ["first", "second", "third"]


def test_child_without_weights_joins_the_block_before_it():
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Dropout(0.1), nn.Linear(6, 3), nn.LogSoftmax(1)
    )
    graph = forward_graph(model, torch.randn(4, 2, 2), blocks="auto")
    assert names(graph) == ["1", "5"]
    assert members(graph, "1") >= {"1", "2", "3", "4"}
    assert members(graph, "5") == {"5", "6"}


def test_model_that_is_one_operator_is_one_block():
    assert len(names(forward_graph(nn.Linear(4, 3), torch.randn(4, 4), blocks="auto"))) == 1


def test_a_module_called_twice_is_two_blocks():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
            self.head = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(2):
                for layer in self.layers:
                    x = torch.relu(layer(x))
            return self.head(x)

    graph = forward_graph(Twice(), torch.randn(4, 4), blocks="auto")
    assert names(graph) == ["layers.0", "layers.1", "layers.0@1", "layers.1@1", "head"]


# --- layers ----------------------------------------------------------------------------------------------------------


def test_layers_is_one_block_per_operator_with_parameters():
    graph = forward_graph(zoo.make("cnn").model, torch.randn(4, 1, 8, 8), blocks="layers")
    assert names(graph) == ["features.0", "features.1", "features.4", "features.5", "classifier"]
    # the non-linearity, the pooling and the dropout belong to the operator before them
    assert members(graph, "features.1") == {"features.1", "features.2", "features.3"}


def test_layers_inside_a_transformer_layer():
    graph = forward_graph(zoo.make("gpt").model, zoo.make("gpt").batch(4)[0], blocks="layers")
    inside = [n.removeprefix("layers.0.") for n in names(graph) if n.startswith("layers.0.")]
    assert inside == ["norm1", "attention.qkv", "attention.out", "norm2", "mlp.0", "mlp.2"]
    assert len(names(graph)) == len(set(names(graph)))


def test_bare_parameters_make_layers_too():
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x @ self.first) @ self.second

    graph = forward_graph(Bare(), torch.randn(5, 4), blocks="layers")
    assert names(graph) == ["first", "second"]


# --- globs -----------------------------------------------------------------------------------------------------------


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.body = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(2)])
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.stem(x))
        for part in self.body:
            x = x + part(x)
        return self.head(x)


def nested(*globs: str):
    return forward_graph(Nested(), torch.randn(4, 4), blocks=list(globs))


def test_each_match_is_a_block():
    graph = nested("stem", "body.?", "head")
    assert names(graph) == ["stem", "body.0", "body.1", "head"]
    assert members(graph, "body.0") >= {"body.0.0", "body.0.1", "body.0.2"}


def test_a_star_crosses_dots():
    assert names(nested("*.2", "stem", "head")) == ["stem", "body.0.2", "body.1.2", "head"]


def test_what_no_glob_matches_joins_its_first_consumer():
    graph = nested("body.*", "head")
    assert names(graph) == ["body.0", "body.1", "head"]
    assert "stem" in members(graph, "body.0")


def test_the_first_glob_wins():
    assert names(nested("stem", "body.0", "body.0.*", "body.1.*", "head")) == [
        "stem",
        "body.0",
        "body.1.0",
        "body.1.1",
        "body.1.2",
        "head",
    ]


@pytest.mark.parametrize("globs", [["layer.*"], ["stem", "body.7", "head"]])
def test_glob_that_matches_nothing_is_an_error(globs):
    with pytest.raises(gr.RuleError, match="no module matches") as error:
        nested(*globs)
    assert "stem" in str(error.value)


def test_unknown_name_is_an_error():
    with pytest.raises(gr.RuleError, match="unknown"):
        forward_graph(Nested(), torch.randn(4, 4), blocks="layer")


# --- boundaries ------------------------------------------------------------------------------------------------------


def graphs():
    return {**{name: functools.partial(zoo_graph, name) for name in AUTO}, "dense": dense_graph}


@pytest.mark.parametrize("name", ["mlp", "resnet", "unet", "gpt", "gpt2", "moe", "t5", "dense"])
def test_every_tensor_that_leaves_a_block_is_a_boundary(name):
    graph = graphs()[name]()
    for block in names(graph):
        leaving = {
            n
            for n in graph.forward_nodes()
            if info(n).block == block
            and info(n).role is Role.FORWARD
            and is_float(n)
            and any(u.op != "output" and not is_backward(u) and info(u).block != block for u in n.users)
        }
        found = set(graph.boundaries(block))
        assert found <= leaving
        # a mask learns nothing, a weight that is shared is no activation: neither is a boundary
        assert not {n for n in leaving - found if depends_on(n, UserInput) and depends_on(n, Param)}


def depends_on(node, kind: type) -> bool:
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if current.op == "placeholder" and isinstance(info(current).spec, kind):
            return True
        new = [s for s in current.all_input_nodes if s not in seen and isinstance(s.meta.get("val"), torch.Tensor)]
        seen.update(new)
        stack += new
    return False


@pytest.mark.parametrize("name", [*AUTO, "dense"])
def test_blocks_are_convex_and_in_order(name):
    graph = graphs()[name]()
    quotient = quotient_graph(graph)
    assert nx.is_directed_acyclic_graph(quotient)
    rank = {block: i for i, block in enumerate(names(graph))}
    assert all(rank.get(a, -1) < rank.get(b, len(rank)) for a, b in quotient.edges)
    assert {info(n).block for n in graph.forward_nodes()} == set(rank)


def consumers(graph, block: str) -> set[str]:
    return {info(u).block for b in graph.boundaries(block) for u in graph.crossing(b, loss=False)}


def test_skips_of_a_unet_cross_blocks():
    """A concatenation belongs to the block before it, so the skip ends there."""
    graph = zoo_graph("unet")
    assert consumers(graph, "down1") == {"down2", "up2"}
    assert consumers(graph, "down2") == {"middle"}
    assert len(graph.boundaries("down2")) == 2  # the pooled map and the skip
    assert consumers(graph, "middle") == {"up2"}
    assert consumers(graph, "up2") == {"up1"}


def test_skips_of_a_densenet_cross_blocks():
    graph = dense_graph()
    assert names(graph) == ["stem", "layers.0", "layers.1", "layers.2", "head"]
    assert consumers(graph, "stem") == {"layers.0", "layers.1", "layers.2"}
    assert consumers(graph, "layers.0") == {"layers.1", "layers.2"}
    assert consumers(graph, "layers.1") == {"layers.2"}
    assert consumers(graph, "layers.2") == {"head"}


# --- rules by block --------------------------------------------------------------------------------------------------


def rules_of(mapping: dict[str, str]) -> dict[str, str]:
    graph = nested("stem", "body.?", "head")
    RuleMap.of(mapping).assign(graph)
    return {block.name: block.rule for block in graph.blocks}


def test_map_from_glob_to_rule():
    assert rules_of({"body.*": "dfa"}) == {"stem": "bp", "body.0": "dfa", "body.1": "dfa", "head": "bp"}
    assert rules_of({"body.1": "dfa{shared=true}", "*": "dfa"})["body.1"] == "dfa{shared=true}"
    assert rules_of({"body": "dfa"}) == {"stem": "bp", "body.0": "dfa", "body.1": "dfa", "head": "bp"}


def test_map_with_a_glob_that_matches_nothing_is_an_error():
    with pytest.raises(gr.RuleError, match="matches no block") as error:
        rules_of({"tail": "dfa"})
    assert "body.0" in str(error.value)


def test_mapped_rules_edit_their_blocks_only():
    """The head and what feeds it learn by bp; the cut is in front of the blocks that dfa trains."""
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    model = Nested()
    compiled = gr.compile(model, {"body.0": "dfa"}, blocks=["stem", "body.?", "head"])
    compiled.loss(x, y).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    gr.default_loss(model(x), y).backward()
    same = {n.rpartition(".")[0] for n, p in model.named_parameters() if torch.equal(p.grad, found[n])}
    assert same == {"body.1.0", "body.1.2", "head"}
