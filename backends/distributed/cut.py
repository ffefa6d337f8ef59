"""Cutting a model into pipeline stages at block boundaries, balanced by counted cost.

The model is captured once. Each stage is a module that runs its part of the forward graph on the model's own
parameters, under the model's own names: training the stages trains the model. What a later stage reads of an earlier
one than its neighbour is handed through by the stages in between, since neighbours are all that a pipeline connects.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from graphrewrite.backends.distributed.simulate import StageCost
from torch import fx, nn
from torch.func import functional_call

from graphrewrite._compat import FakeTensorMode
from graphrewrite.analysis.blocks import Blocks
from graphrewrite.analysis.cost import flops
from graphrewrite.api import compile as compile_model
from graphrewrite.capture import Captured
from graphrewrite.errors import RuleError
from graphrewrite.graph.nodes import (
    Buffer,
    BufferUpdate,
    Constant,
    InputUpdate,
    UserInput,
    UserOutput,
    info,
    is_getitem,
    nbytes,
    producer,
    spec_of,
    value,
)
from graphrewrite.graph.partition import Partition
from graphrewrite.inputs import as_inputs


@dataclass
class Part:
    """One stage of a cut model.

    Attributes:
        module: Runs it.
        blocks: The blocks of the model in it.
        cost: What one micro-batch costs, in counted operations and bytes.
        inputs: Outlines of what it takes, on the meta device.
        outputs: Outlines of what it returns.
    """

    module: nn.Module
    blocks: tuple[str, ...]
    cost: StageCost
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]


@dataclass
class Cut:
    """A model in stages.

    Attributes:
        parts: In order.
        tied: Parameters that several stages use, each with a copy of its own: name -> the stages.
    """

    parts: list[Part]
    tied: dict[str, tuple[int, ...]]

    def __len__(self) -> int:
        return len(self.parts)


def cut(
    model: nn.Module,
    example_inputs: Any,
    stages: int,
    *,
    blocks: Blocks = "auto",
    tied: str = "refuse",
) -> Cut:
    """Cut a model into stages of consecutive blocks, such that the most expensive stage is as cheap as possible.

    Among cuts of the same cost, the one that hands the fewest bytes from stage to stage is taken.

    Args:
        model: Takes tensors by position and returns a tensor or a tuple of tensors.
        example_inputs: One micro-batch: a tensor or a tuple. Stages hold for its sizes.
        stages: How many.
        blocks: As for `compile`.
        tied: What to do with a parameter that several stages use: `"refuse"`, or `"replicate"` it and let
            `Pipeline` add the gradients of the copies.

    Raises:
        RuleError: There are more stages than blocks, a parameter is tied across stages, or the model's inputs or
            outputs cannot be handed from stage to stage.
    """
    if tied not in ("refuse", "replicate"):
        raise RuleError(f"tied={tied!r} is unknown", remedy="use 'refuse' or 'replicate'")
    inputs = as_inputs(example_inputs)
    if inputs.kwargs or not all(isinstance(a, torch.Tensor) for a in inputs.args):
        raise RuleError("a pipeline's first stage takes tensors by position", remedy="wrap the model")
    # what a step runs, with gradients
    probe = compile_model(model, "bp", blocks=blocks, dynamic=None, split_backward=True)
    program = probe.materialize(inputs).program()
    captured = program.captured
    costs = _count(program.partition)
    names = list(costs)
    if not 1 <= stages <= len(names):
        raise RuleError(
            f"{stages} stages of a model with {len(names)} blocks",
            remedy=f"use at most {len(names)} stages, or finer blocks=",
        )
    slicer = _Slicer(captured, model, names)
    bounds = _balance([round(costs[n].total) for n in names], stages, slicer.crossing_bytes())
    slicer.assign(bounds)
    shared = slicer.shared_parameters()
    if shared and tied == "refuse":
        name, where = next(iter(shared.items()))
        raise RuleError(
            f"parameter {name} is used by stages {' and '.join(map(str, where))}",
            module=name.rpartition(".")[0],
            remedy="cut elsewhere (blocks=), untie it, or pass tied='replicate': copies whose gradients are added",
        )
    modules = [slicer.stage(k) for k in range(stages)]
    outlines = _outlines(modules, inputs.args)
    parts = [
        Part(module, tuple(names[a:b]), _added(costs[n] for n in names[a:b]), outlines[k], outlines[k + 1])
        for k, (module, a, b) in enumerate(zip(modules, bounds[:-1], bounds[1:], strict=True))
    ]
    return Cut(parts, shared)


def _count(part: Partition) -> dict[str, StageCost]:
    """What each block costs. What moves bytes only counts as well: a normalisation is not free."""
    found = {
        block.name: dict.fromkeys(("forward", "backward", "weight", "saved", "held"), 0) for block in part.graph.blocks
    }
    for node, stage in part.stages.items():
        block = found.get(info(node).block)
        if block is not None:
            block[stage] += flops(node) + nbytes(node.meta.get("val")) // 4
    for kind, values in (("saved", part.saved), ("held", part.held)):
        for one in values:
            block = found.get(info(one.node).block)
            if block is not None:
                block[kind] += one.nbytes
    return {name: StageCost(**held) for name, held in found.items()}


def _added(costs: Iterable[StageCost]) -> StageCost:
    """Several blocks as one stage."""
    rows = [dataclasses.astuple(one) for one in costs]
    return StageCost(*(sum(column) for column in zip(*rows, strict=True)))


def _balance(costs: Sequence[int], stages: int, crossing: Sequence[int]) -> list[int]:
    """Where to cut: the first block of each stage, and the end.

    The cheapest bound on a stage's cost is found first, then the shortest path among cuts that keep it, where an edge
    from block a to block b is a stage of blocks a to b - 1 and its length the bytes that it hands on.
    """
    count = len(costs)
    before = [0]
    for cost in costs:
        before.append(before[-1] + cost)
    spans = sorted({before[b] - before[a] for a in range(count) for b in range(a + 1, count + 1)})

    def graph(bound: int) -> nx.DiGraph:
        made = nx.DiGraph()
        made.add_nodes_from([(0, 0), (stages, count)])
        for k in range(stages):
            for a in range(k, count):
                for b in range(a + 1, count + 1):
                    if before[b] - before[a] <= bound:
                        made.add_edge((k, a), (k + 1, b), weight=crossing[b - 1] if b < count else 0)
        return made

    low, high = 0, len(spans) - 1
    while low < high:
        middle = (low + high) // 2
        if nx.has_path(graph(spans[middle]), (0, 0), (stages, count)):
            high = middle
        else:
            low = middle + 1
    path = nx.shortest_path(graph(spans[low]), (0, 0), (stages, count), weight="weight")
    return [block for _, block in path]


class _Slicer:
    """Takes a captured forward graph apart."""

    def __init__(self, captured: Captured, model: nn.Module, blocks: Sequence[str]) -> None:
        self.captured = captured
        self.graph = captured.graph
        self.model = model
        self._rank = {name: i for i, name in enumerate(blocks)}
        self._block: dict[fx.Node, int] = {}
        """The first block behind which a value can be had; -1 for what every stage can make for itself."""
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self._block[node] = 0 if isinstance(spec_of(node), UserInput) else -1
            elif node.op == "call_function":
                before = max((self._block[s] for s in node.all_input_nodes), default=-1)
                own = self._rank.get(info(node).block, -1)
                # a value made of parameters and constants alone is made wherever it is read
                free = before == -1 and not isinstance(producer(node).target, str) and self._cheap(node)
                self._block[node] = -1 if free else max(before, 0 if is_getitem(node) else own)
            elif node.op == "get_attr":
                self._block[node] = -1
        for spec in self.graph.outputs:
            if isinstance(spec, InputUpdate):
                raise RuleError("the model changes an input in place: no other stage would see it")
        self._stage: dict[fx.Node, int] = {}
        self._stages = 0

    @staticmethod
    def _cheap(node: fx.Node) -> bool:
        return not any(isinstance(spec_of(s) if s.op == "placeholder" else None, Buffer) for s in node.all_input_nodes)

    def crossing_bytes(self) -> list[int]:
        """Bytes of the values that are handed on, if the model is cut behind each block."""
        return [sum(nbytes(value(n)) for n in self._crossing(self._block, i)) for i in range(len(self._rank))]

    def assign(self, bounds: Sequence[int]) -> None:
        """Tell which stage computes what."""
        of_block = {i: k for k in range(len(bounds) - 1) for i in range(bounds[k], bounds[k + 1])}
        self._stage = {node: of_block.get(block, -1) for node, block in self._block.items()}
        self._stages = len(bounds) - 1

    def _crossing(self, place: dict[fx.Node, int], cut_behind: int) -> list[fx.Node]:
        """Values from this place or before it that later ones, or the caller, read."""
        outputs = {n for spec, n in self.graph.outputs.items() if isinstance(spec, UserOutput)}
        found = []
        for node, at in place.items():
            if not 0 <= at <= cut_behind:
                continue
            later = any(place.get(user, -1) > cut_behind for user in node.users) or node in outputs
            if later and isinstance(value(node), torch.Tensor):
                found.append(node)
        return found

    def shared_parameters(self) -> dict[str, tuple[int, ...]]:
        """Parameters that several stages read."""
        found = {}
        for name, node in self.graph.parameters().items():
            stages = {k for k in range(self._stages) if node in self._reads(k)}
            if len(stages) > 1:
                found[name] = tuple(sorted(stages))
        return found

    def _nodes(self, stage: int) -> list[fx.Node]:
        """What a stage computes: its own operators, and what it needs that every stage can make."""
        own = [n for n in self.graph.nodes if n.op == "call_function" and self._stage[n] == stage]
        needed, stack = set(own), list(own)
        while stack:
            for source in stack.pop().all_input_nodes:
                if source.op != "placeholder" and self._stage.get(source) == -1 and source not in needed:
                    needed.add(source)
                    stack.append(source)
        return [n for n in self.graph.nodes if n in needed]

    def _reads(self, stage: int) -> list[fx.Node]:
        """Parameters, buffers and constants of a stage."""
        read = {s for n in self._nodes(stage) for s in n.all_input_nodes}
        return [n for n in self.graph.nodes if n in read and n.op == "placeholder" and self._stage[n] == -1]

    def stage(self, index: int) -> nn.Module:
        """One stage as a module."""
        last = index == self._stages - 1
        if index:
            given = self._crossing(self._stage, index - 1)
        else:
            given = [
                n for n in self.graph.nodes if isinstance(spec_of(n) if n.op == "placeholder" else None, UserInput)
            ]
        held = self._reads(index)
        returned = (
            [n for spec, n in self.graph.outputs.items() if isinstance(spec, UserOutput)]
            if last
            else self._crossing(self._stage, index)
        )
        updates = {
            spec.name: n
            for spec, n in self.graph.outputs.items()
            if isinstance(spec, BufferUpdate) and self._stage.get(n) == index
        }
        new = fx.Graph()
        env: dict[fx.Node, fx.Node] = {n: new.placeholder(n.name) for n in (*given, *held)}
        for node in self._nodes(index):
            env[node] = new.node_copy(node, env.__getitem__)
        results = []
        for node in returned:
            # what is sent lies in one piece, and what is handed through is no alias of what came
            want = torch.ops.aten.clone.default
            results.append(
                env[node] if last else new.call_function(want, (env[node],), {"memory_format": torch.contiguous_format})
            )
        new.output((tuple(results), tuple(env[n] for n in updates.values())))
        return Stage(
            fx.GraphModule(self.graph.module, new),
            self.model,
            [spec_of(n) for n in held],
            {spec.name: self.graph.constants[spec.name] for n in held if isinstance(spec := spec_of(n), Constant)},
            list(updates),
            self.captured if last else None,
        )


class Stage(nn.Module):
    """Runs a part of a captured model on the model's own parameters and buffers."""

    def __init__(
        self,
        code: fx.GraphModule,
        model: nn.Module,
        reads: Sequence[Any],
        constants: dict[str, torch.Tensor],
        updates: Sequence[str],
        captured: Captured | None,
    ) -> None:
        super().__init__()
        # not as submodules: they hold no state of their own
        self._code = (code,)
        self._captured = (captured,)
        self._updates = tuple(updates)
        self._reads = tuple((type(spec) is Constant, spec.name) for spec in reads)
        for name in dict.fromkeys([*(n for constant, n in self._reads if not constant), *updates]):
            owner = self._owner(name)
            leaf = name.rpartition(".")[2]
            held = _held(model, name)
            if isinstance(held, nn.Parameter):
                owner.register_parameter(leaf, held)
            else:
                owner.register_buffer(leaf, held)
        self._constants = constants

    def _owner(self, name: str) -> nn.Module:
        owner: nn.Module = self
        for step in name.split(".")[:-1]:
            if step not in owner._modules:
                owner.add_module(step, nn.Module())
            owner = owner._modules[step]  # type: ignore[assignment]
        return owner

    def forward(self, *inputs: torch.Tensor) -> Any:
        """What the next stage takes; for the last one, what the model returns."""
        held = [self._constants[name] if constant else _held(self, name) for constant, name in self._reads]
        # autograd may keep a buffer that is written to below
        held = [h.clone() if name in self._updates else h for h, (_, name) in zip(held, self._reads, strict=True)]
        results, updates = self._code[0](*inputs, *held)
        with torch.no_grad():
            for name, new in zip(self._updates, updates, strict=True):
                _held(self, name).copy_(new)
        if self._captured[0] is not None:
            return self._captured[0].rebuild(results)
        return results[0] if len(results) == 1 else results


def _held(module: nn.Module, name: str) -> Any:
    """A parameter or buffer by its path."""
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)


def replicate_tied(made: Cut) -> None:
    """Give every stage but the first a copy of the parameters that it shares with an earlier one."""
    for name, stages in made.tied.items():
        for k in stages[1:]:
            owner, _, leaf = name.rpartition(".")
            holder = made.parts[k].module.get_submodule(owner)
            setattr(holder, leaf, copy.deepcopy(getattr(holder, leaf)))


def _outlines(modules: Sequence[nn.Module], inputs: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
    """What the stages hand on, on the meta device: found out on fake tensors."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    values: tuple[torch.Tensor, ...] = tuple(mode.from_tensor(t) for t in inputs)
    found = [values]
    for i, module in enumerate(modules):
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        fakes: dict[str, torch.Tensor] = {name: mode.from_tensor(held) for name, held in state.items()}
        with mode, torch.enable_grad(), torch.random.fork_rng(devices=[]):
            outputs = functional_call(module, fakes, values)
        values = outputs if isinstance(outputs, tuple) else (outputs,)
        if not all(isinstance(v, torch.Tensor) for v in values):
            raise RuleError(
                f"stage {i} returns a {type(outputs).__name__}: a pipeline hands on tensors",
                remedy="let the model return a tensor or a tuple of tensors",
            )
        values = tuple(v.detach().requires_grad_(v.requires_grad) for v in values)
        found.append(values)
    return [
        tuple(
            torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="meta").requires_grad_(v.requires_grad)
            for v in one
        )
        for one in found
    ]
