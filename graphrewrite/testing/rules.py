"""What the author of a rule or pass tests with: oracles, identities, locality, gradients, memory, golden graphs.

All helpers work on copies: the model that is handed in keeps its weights and gets no gradients.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphrewrite import api
from graphrewrite.graph.joint import JointGraph
from graphrewrite.runtime.module import CompiledModule
from graphrewrite.testing.compare import Loss, assert_same, call, gradients

Gradients = dict[str, torch.Tensor | None]
Oracle = Callable[[nn.Module, Any, Any, dict[str, torch.Tensor]], Mapping[str, torch.Tensor | None]]

UPDATE_VARIABLE = "GRAPHREWRITE_UPDATE_GOLDEN"


def compile_copy(model: nn.Module, rule: Any, x: Any, y: Any, **options: Any) -> CompiledModule:
    """A compiled copy of a model, captured for `(x, y)`; `options` are those of `graphrewrite.compile`."""
    return api.compile(copy.deepcopy(model), rule, example_inputs=x, example_targets=y, **options)


def rule_gradients(model: nn.Module, rule: Any, x: Any, y: Any, **options: Any) -> Gradients:
    """The gradients that a rule leaves on a copy of the model."""
    compiled = compile_copy(model, rule, x, y, **options)
    compiled.zero_grad(set_to_none=True)
    compiled.loss(x, y).backward()
    return gradients(compiled.module)


def eager_gradients(model: nn.Module, x: Any, y: Any, loss: Loss | None = None) -> Gradients:
    """The gradients of backpropagation in eager mode, on a copy of the model."""
    reference = copy.deepcopy(model)
    reference.zero_grad(set_to_none=True)
    (loss or api.default_loss)(call(reference, x), y).backward()
    return gradients(reference)


def assert_matches_oracle(
    model: nn.Module, rule: Any, x: Any, y: Any, oracle: Oracle, *, exact: bool = False, **options: Any
) -> None:
    """Compare a rule with its formula, written out, gradient by gradient.

    Args:
        model: In float64 the comparison is to 9 digits, in float32 to 5.
        rule: As for `compile`.
        x: Inputs.
        y: Targets.
        oracle: `oracle(model, x, y, state) -> {parameter: gradient}`, plain PyTorch on a copy of the model; `state` is
            the rule's state (feedback weights and the like) by name, before the step.
        exact: Bitwise.
        options: For `compile`.
    """
    compiled = compile_copy(model, rule, x, y, **options)
    state = {name: held.detach().clone() for name, held in compiled.rule_state.items()}
    expected = dict(oracle(copy.deepcopy(model), x, y, state))
    compiled.loss(x, y).backward()
    actual = gradients(compiled.module)
    assert set(expected) == set(actual), f"the oracle tells gradients of {sorted(expected)}, there are {sorted(actual)}"
    for name, gradient in actual.items():
        assert_same(gradient, expected[name], f"gradient of {name}", exact=exact)


def assert_is_backpropagation(
    model: nn.Module, rule: Any, x: Any, y: Any, *, exact: bool = True, **options: Any
) -> None:
    """An identity: with these options the rule is backpropagation. Bitwise, or close in the dtype's precision."""
    actual, expected = rule_gradients(model, rule, x, y, **options), eager_gradients(model, x, y, options.get("loss"))
    for name, gradient in actual.items():
        assert_same(gradient, expected[name], f"gradient of {name}", exact=exact)


# --- locality --------------------------------------------------------------------------------------------------------


def downstream_reads(model: nn.Module, rule: Any, x: Any, y: Any, **options: Any) -> dict[str, set[str]]:
    """Block -> the later blocks whose parameters its gradient depends on, found by perturbing them one by one."""
    compiled = compile_copy(model, rule, x, y, **options)
    owned = compiled.parameters_by_block()
    order = [block.name for block in compiled.graph("operator").blocks]
    start = {name: held.detach().clone() for name, held in compiled.state_dict().items() if torch.is_tensor(held)}
    base = _step(compiled, start, x, y)
    named = dict(compiled.module.named_parameters())
    found: dict[str, set[str]] = {block: set() for block in owned}
    for perturbed in owned:
        changed = _step(compiled, start, x, y, [named[n] for n in owned[perturbed]])
        for block in owned:
            if order.index(block) >= order.index(perturbed):
                continue
            if any(not _equal(base[n], changed[n]) for n in owned[block]):
                found[block].add(perturbed)
    return found


def assert_locality_is_certified(model: nn.Module, rule: Any, x: Any, y: Any, **options: Any) -> None:
    """The locality perturbation test: no gradient depends on more later blocks than the certificate says."""
    compiled = compile_copy(model, rule, x, y, **options)
    radius = {b.block: b.locality_radius for b in compiled.report().certificates.blocks}
    for block, reads in downstream_reads(model, rule, x, y, **options).items():
        allowed = radius.get(block, 0)
        assert len(reads) <= allowed, f"block {block}: certified radius {allowed}, but its gradient moved with {reads}"


def _step(
    compiled: CompiledModule,
    start: dict[str, torch.Tensor],
    x: Any,
    y: Any,
    perturbed: list[nn.Parameter] | None = None,
) -> Gradients:
    with torch.no_grad():
        for name, held in compiled.state_dict().items():
            if name in start:
                held.copy_(start[name])
        # not by a constant: a softmax does not notice when all logits move together
        generator = torch.Generator().manual_seed(1)
        for parameter in perturbed or ():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.1 * noise.to(parameter))
    compiled.set_extra_state({"step": 0})
    compiled.zero_grad(set_to_none=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        compiled.loss(x, y).backward()
    return gradients(compiled.module)


def _equal(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    return torch.equal(left, right)


# --- gradients by differences ----------------------------------------------------------------------------------------


def numeric_gradients(
    model: nn.Module, objective: Callable[[nn.Module], torch.Tensor], *, step: float = 1e-5
) -> dict[str, torch.Tensor]:
    """Central differences of a scalar function of a float64 model, parameter by parameter."""
    reference = copy.deepcopy(model)
    found = {}
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            assert parameter.dtype == torch.float64, f"{name} is {parameter.dtype}: differences need float64"
            gradient = torch.zeros_like(parameter)
            flat, out = parameter.view(-1), gradient.view(-1)
            for i in range(flat.numel()):
                kept = flat[i].item()
                flat[i] = kept + step
                above = objective(reference)
                flat[i] = kept - step
                out[i] = (above - objective(reference)) / (2 * step)
                flat[i] = kept
            found[name] = gradient
    return found


# --- memory and golden graphs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step; parameters, buffers and the batch are not counted.

    Attributes:
        saved: Held between the forward and the backward.
        predicted_peak: The most alive at once, as the graph predicts it.
        measured_peak: The most alive at once, measured.
    """

    saved: int
    predicted_peak: int
    measured_peak: int


def measure_memory(model: nn.Module, rule: Any, x: Any, y: Any, **options: Any) -> Memory:
    """What a step of a rule saves and keeps alive, on a copy of the model."""
    from graphrewrite.analysis.liveness import backward_curve, forward_curve
    from graphrewrite.cli.memory import measured_peak
    from graphrewrite.cli.targets import Target

    compiled = compile_copy(model, rule, x, y, **options)
    part = compiled.program().partition
    peak = max(forward_curve(part).peak, backward_curve(part).peak)
    return Memory(part.saved_bytes, peak, measured_peak(compiled, Target("", compiled.module, x, y)))


def assert_golden(graph: JointGraph, file: str | Path) -> None:
    """Compare the printed graph with a file; with GRAPHREWRITE_UPDATE_GOLDEN=1 the file is written instead."""
    path, text = Path(file), str(graph)
    if os.environ.get(UPDATE_VARIABLE) == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return
    assert path.is_file(), f"there is no {path}; write it with {UPDATE_VARIABLE}=1 and look at it"
    expected = path.read_text(encoding="utf-8")
    assert text == expected, f"the graph is not that of {path}; if it should not be, write it with {UPDATE_VARIABLE}=1"
