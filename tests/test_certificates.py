"""Certificates against what really happens: proofs are paths in the graph, and perturbed parameters agree with them."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

import graphrewrite as gr
from graphrewrite.analysis.certificates import certify
from graphrewrite.graph.nodes import info
from graphrewrite.graph.text import Names
from graphrewrite.testing import zoo
from graphrewrite.testing.compare import gradients

CASES = [
    (rule, name) for rule in ("bp", "dfa", "ff") for name in ("mlp", "cnn", "gpt") if (rule, name) != ("ff", "gpt")
]
"""ff refuses integer inputs."""
PROPERTIES = ("weight_transport", "backward_locked", "update_locked", "global_error")


@functools.cache
def compiled(rule: str, name: str) -> tuple[gr.CompiledModule, zoo.Case]:
    case = zoo.make(name)
    torch.manual_seed(0)
    return gr.compile(case.model, rule, loss=case.loss).materialize(*case.batch(4)), case


def certificates(rule: str, name: str):
    return compiled(rule, name)[0].report().certificates


# --- what is proved --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt"])
def test_backpropagation_is_locked_and_transports_weights(name):
    found = certificates("bp", name)
    count = len(found.blocks)
    for i, block in enumerate(found.blocks):
        last = i == count - 1
        assert block.rule == "bp"
        assert bool(block.backward_locked) is not last
        assert bool(block.update_locked) is not last
        assert bool(block.global_error)
        assert block.locality_radius == count - 1 - i
    # the block in front of the last one gets its cotangent through the last one's weight, and so on
    assert all(block.weight_transport for block in found.blocks[:-1])
    assert found.forward_passes == 1


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_dfa_transports_no_weight_but_waits_for_the_error(name):
    found = certificates("dfa", name)
    for block in found.blocks:
        assert not block.weight_transport
        assert block.global_error
    for block in found.blocks[:-1]:
        assert not block.backward_locked
        assert block.update_locked
    assert found.forward_passes == 1


def test_dfa_on_a_gpt_keeps_transport_inside_blocks():
    found = certificates("dfa", "gpt")
    for block in found.blocks:
        assert not block.weight_transport
    layer = found["layers.0"]
    assert {"layers.0.attention.out.weight", "layers.0.mlp.2.weight"} <= set(layer.local_reads)
    assert layer.global_error


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_forward_forward_is_local(name):
    found = certificates("ff", name)
    for block in found.blocks[:-1]:
        assert not any(getattr(block, p) for p in PROPERTIES), block
        assert block.locality_radius == 0
    assert found.forward_passes == 3
    assert not found.weight_transport
    assert not found.global_error
    assert not found.update_locked


def test_summary_is_that_of_the_blocks():
    for rule, name in CASES:
        found = certificates(rule, name)
        for p in ("weight_transport", "backward_locked", "update_locked"):
            assert getattr(found, p) is any(bool(getattr(b, p)) for b in found.blocks)
        assert found.locality_radius == max(b.locality_radius for b in found.blocks)
        with pytest.raises(KeyError):
            found["nothing"]


@pytest.mark.parametrize(("rule", "name"), CASES)
def test_saved_bytes_are_those_of_the_partition(rule, name):
    one = compiled(rule, name)[0]
    assert sum(certificates(rule, name).saved_bytes.values()) == one.report().saved_bytes


# --- the proofs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "name"), CASES)
def test_every_path_is_a_path_of_the_graph(rule, name):
    part = compiled(rule, name)[0].program().partition
    names = Names(part.graph)
    nodes = {names[n]: n for n in part.graph.nodes if n.op == "call_function"}
    specs = {str(info(n).spec): n for n in part.graph.nodes if n.op == "placeholder"}
    count = 0
    for block in certify(part).blocks:
        for finding in (getattr(block, p) for p in PROPERTIES):
            assert bool(finding) == bool(finding.path)
            chain = []
            for step in finding.path:
                if step.startswith("%"):
                    chain.append(nodes[step[1:].partition(" = ")[0]])
                else:
                    chain.append(specs.get(step) or specs[step.removeprefix("parameter ")])
            for reader, source in itertools.pairwise(chain):
                read = set(reader.all_input_nodes)
                # the last step of weight transport may skip a transpose or a cast of the weight
                assert source in read or (source.op == "placeholder" and any(source in r.all_input_nodes for r in read))
                count += 1
            if chain:
                assert info(chain[0]).block == block.block
    assert count or rule == "ff"


# --- perturbation ----------------------------------------------------------------------------------------------------


def cotangent_of(one: gr.CompiledModule, x, fixed: torch.Tensor) -> dict[str, torch.Tensor | None]:
    one.zero_grad()
    torch.manual_seed(3)
    one(x).backward(fixed)
    return gradients(one.module)


def loss_gradients(one: gr.CompiledModule, x, y) -> dict[str, torch.Tensor | None]:
    one.zero_grad()
    one._step = 0
    torch.manual_seed(3)
    one.loss(x, y).backward()
    return gradients(one.module)


def changed_by_what_is_behind(one: gr.CompiledModule, measure, block: str) -> bool:
    """Whether a block's gradient changes, bitwise, with the parameters of the blocks behind it."""
    blocks = one.parameters_by_block()
    order = [b.name for b in one.program().captured.graph.blocks]
    behind = [n for name in order[order.index(block) + 1 :] for n in blocks.get(name, ())]
    state = {n: t.clone() for n, t in one.state_dict().items() if isinstance(t, torch.Tensor)}
    before = measure()
    one.load_state_dict({**one.state_dict(), **state})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name in behind:
            p = one.module.get_parameter(name)
            p.mul_(1 + 0.5 * torch.rand(p.shape, generator=generator))
    after = measure()
    one.load_state_dict({**one.state_dict(), **state})
    return any(not torch.equal(before[n], after[n]) for n in blocks[block])


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize("rule", ["bp", "ff"])
def test_gradients_change_exactly_where_the_certificate_says(rule, name):
    one, case = compiled(rule, name)
    x, y = case.batch(4)
    for block in certificates(rule, name).blocks[:-1]:
        changed = changed_by_what_is_behind(one, lambda: loss_gradients(one, x, y), block.block)
        assert changed == (block.locality_radius > 0) == (rule == "bp")


@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt"])
@pytest.mark.parametrize("rule", ["bp", "dfa"])
def test_given_the_error_only_weight_transport_makes_a_difference(rule, name):
    """The same cotangent at the output: what is behind enters through its weights, or not at all."""
    one, case = compiled(rule, name)
    x, _ = case.batch(4)
    generator = torch.Generator().manual_seed(4)
    fixed = torch.randn(one(x).shape, generator=generator)
    for block in certificates(rule, name).blocks[:-1]:
        if name == "gpt" and block.block == "token":
            continue  # tied to the head: it is behind itself
        changed = changed_by_what_is_behind(one, lambda: cotangent_of(one, x, fixed), block.block)
        assert changed == bool(block.weight_transport) == (rule == "bp")
