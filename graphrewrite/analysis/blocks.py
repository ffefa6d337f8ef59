"""Cutting a forward graph into blocks, the units of locality.

* `"layers"`: one block per operator with parameters, with the parameter-free operators after it up to the next one.
* `"auto"`: one block per repeated module: transformer layer, residual block, child of an `nn.Sequential`; a child
  without a weight matrix (activation, normalisation) joins the block before it. What lies between repeated modules (a
  stem, a head) is one block per run. Without repeated modules: one block per child of the model.
* a list of module-path globs: one block per module that a glob matches; `*` crosses dots, the first glob wins.

Blocks are convex: a path that leaves a block never comes back into it. A module that is called several times is
split into as many blocks (`layer`, `layer@1`, ...).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import networkx as nx
import torch
from torch import fx, nn

from graphrewrite.errors import RuleError
from graphrewrite.graph.aliasing import base_of
from graphrewrite.graph.core import Block
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import (
    LOSS_BLOCK,
    Buffer,
    Constant,
    Param,
    Role,
    UserInput,
    info,
    is_float,
    spec_of,
    value,
)
from graphrewrite.graph.ops import is_random

Blocks = str | Sequence[str]


def assign_blocks(graph: JointGraph, model: nn.Module, blocks: Blocks = "auto") -> None:
    """Give every forward node of a forward-level graph its block, and list the blocks in topological order."""
    facts = _Facts(graph)
    if isinstance(blocks, str):
        if blocks == "layers":
            labels = _by_operator(facts)
        elif blocks == "auto":
            labels = _by_module(facts, _auto_roots(model, facts), strays="run")
        else:
            raise RuleError(f"blocks={blocks!r} is unknown", remedy="use 'auto', 'layers' or a list of module globs")
    else:
        labels = _by_module(facts, _glob_roots(model, blocks), strays="consumer")
    labels = _fill(facts, labels)
    labels = _convex(facts, labels)
    _write(graph, facts, labels)


@dataclass
class _Facts:
    """The forward nodes of the model proper (the loss is its own block) and what each of them is."""

    graph: JointGraph
    nodes: list[fx.Node] = field(init=False)
    with_params: set[fx.Node] = field(init=False)
    """Operators that read a parameter, directly or through values computed from parameters alone."""
    params_only: set[fx.Node] = field(init=False)
    """Parameters and what is computed from parameters, buffers, constants and sizes alone."""

    def __post_init__(self) -> None:
        self.nodes = [n for n in self.graph.forward_nodes() if info(n).role is Role.FORWARD]
        self.params_only = {n for n in self.graph.nodes if n.op == "placeholder" and isinstance(spec_of(n), Param)}
        fixed = {
            n
            for n in self.graph.nodes
            if n.op == "get_attr" or isinstance(spec_of(n) if n.op == "placeholder" else None, (Buffer, Constant))
        }
        self.with_params = set()
        for node in self.nodes:
            sources = node.all_input_nodes
            reads_param = any(s in self.params_only for s in sources)
            if isinstance(value(node), torch.SymInt) or (
                all(s in self.params_only or s in fixed for s in sources) and not is_random(node)
            ):
                (self.params_only if reads_param else fixed).add(node)
            elif reads_param:
                self.with_params.add(node)


Labels = dict[fx.Node, str]


# --- "layers" ------------------------------------------------------------------------------------------------------


def _by_operator(facts: _Facts) -> Labels:
    labels: Labels = {}
    used: dict[str, int] = {}
    for node in facts.nodes:
        if node not in facts.with_params:
            continue
        name = info(node).module or _parameter_owner(node)
        count = used.get(name, 0)
        used[name] = count + 1
        labels[node] = name if count == 0 else f"{name}#{count}"
    return labels


def _parameter_owner(node: fx.Node) -> str:
    for source in node.all_input_nodes:
        spec = spec_of(source) if source.op == "placeholder" else None
        if isinstance(spec, Param):
            return spec.name
    return node.name


# --- modules -------------------------------------------------------------------------------------------------------


def _by_module(facts: _Facts, roots: Mapping[str, str], *, strays: str) -> Labels:
    """Label nodes under a root with its block; operators with parameters outside of all roots form runs."""
    labels: Labels = {}
    run = ""
    for node in facts.nodes:
        root = _enclosing(info(node).module, roots)
        if root is not None:
            labels[node] = roots[root]
            if node in facts.with_params:
                run = ""
        elif node in facts.with_params and strays == "run":
            run = run or info(node).module or _parameter_owner(node)
            labels[node] = run
    return labels


def _enclosing(path: str, roots: Mapping[str, str]) -> str | None:
    while path:
        if path in roots:
            return path
        path = path.rpartition(".")[0]
    return None


def _glob_roots(model: nn.Module, globs: Sequence[str]) -> dict[str, str]:
    paths = [name for name, _ in model.named_modules() if name]
    roots: dict[str, str] = {}
    for glob in globs:
        matched = [p for p in paths if fnmatch.fnmatchcase(p, glob)]
        if not matched:
            raise RuleError(
                f"no module matches the block glob {glob!r}", remedy=f"modules: {', '.join(paths[:12])}, ..."
            )
        for path in matched:
            if _enclosing(path, roots) is None:
                roots[path] = path
    return roots


def _auto_roots(model: nn.Module, facts: _Facts) -> dict[str, str]:
    roots = _repeated(model, "", _Flow(facts))
    if roots:
        return roots
    children = [name for name, child in model.named_children() if not _is_thin(child)]
    return dict(zip(children, children, strict=True)) if len(children) > 1 else {}


def _repeated(module: nn.Module, path: str, flow: _Flow) -> dict[str, str]:
    """Module path -> block, for the repeated modules below `module`, which itself is none."""
    roots: dict[str, str] = {}
    stages = _leaf_stages(module)
    waiting: list[str] = []
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        if name in stages:
            roots[inner] = inner
        elif not _is_list(module):
            roots.update(_repeated(child, inner, flow))
        elif not _is_thin(child):
            found = _repeated(child, inner, flow) if _is_stage(child, inner, flow) else {}
            roots.update(found or {inner: inner})
            roots.update(dict.fromkeys(waiting, next(iter(found.values()), inner)))
            waiting = []
        elif roots:
            roots[inner] = list(roots.values())[-1]
        else:
            waiting.append(inner)
    return roots


def _is_list(module: nn.Module) -> bool:
    """A container of repeated modules: at least two of its children have weights."""
    return isinstance(module, (nn.Sequential, nn.ModuleList)) and sum(not _is_thin(c) for c in module.children()) > 1


def _leaf_stages(module: nn.Module) -> set[str]:
    """Three or more `nn.Sequential`s of leaf modules side by side are stages (U-Net), not lists of layers."""
    found = {
        name
        for name, child in module.named_children()
        if isinstance(child, nn.Sequential) and _is_list(child) and not any(any(c.children()) for c in child)
    }
    return found if len(found) > 2 and not _is_list(module) else set()


def _is_stage(module: nn.Module, path: str, flow: _Flow) -> bool:
    """Whether a repeated module is itself a plain chain of equal composite modules (a Swin or ResNet stage).

    The parts of a residual block or of a transformer layer are no such chain: a skip runs past them. The experts of
    a mixture are none either: they stand side by side.
    """
    for name, child in module.named_modules():
        if not _is_list(child):
            continue
        members = [(n, m) for n, m in child.named_children() if not _is_thin(m) and any(m.children())]
        if len(members) < 2 or len({type(m) for _, m in members}) > 1:
            continue
        prefix = ".".join(p for p in (path, name) if p)
        if flow.is_chain(f"{prefix}.{members[0][0]}", f"{prefix}.{members[1][0]}"):
            return True
    return False


def _is_thin(module: nn.Module) -> bool:
    """Whether a module has no weight matrix: activations, normalisations, scales."""
    return all(p.dim() < 2 for p in module.parameters())


class _Flow:
    """How activations run between modules."""

    def __init__(self, facts: _Facts) -> None:
        self._nodes = facts.nodes
        self._rank = {node: i for i, node in enumerate(facts.nodes)}
        self._active: set[fx.Node] = set()
        sources = facts.params_only | {
            n for n in facts.graph.nodes if n.op == "placeholder" and isinstance(spec_of(n), UserInput) and is_float(n)
        }
        for node in facts.nodes:
            if node not in facts.params_only and any(s in sources or s in self._active for s in node.all_input_nodes):
                self._active.add(node)

    def is_chain(self, first: str, second: str) -> bool:
        """Whether exactly one activation runs from `first` on, and it runs into `second`."""
        inside = [n for n in self._nodes if _under(info(n).module, first)]
        if not inside:
            return False
        last = max(self._rank[n] for n in inside)
        crossing = {
            base_of(n)
            for n in self._nodes[: last + 1]
            if n in self._active and is_float(n) and any(self._rank.get(u, -1) > last for u in n.users)
        }
        return len(crossing) == 1 and self._reaches(crossing, second)

    def _reaches(self, starts: Iterable[fx.Node], second: str) -> bool:
        reached, stack = set(starts), list(starts)
        while stack:
            for user in stack.pop().users:
                if user not in reached and user in self._rank:
                    reached.add(user)
                    stack.append(user)
        return any(_under(info(n).module, second) for n in reached)


def _under(path: str, root: str) -> bool:
    return path == root or path.startswith(root + ".")


# --- the rest of the nodes -----------------------------------------------------------------------------------------


def _fill(facts: _Facts, labels: Labels) -> Labels:
    """Unlabelled nodes join the block before them; with none before, and for weights' own maths, the first consumer."""
    labels = dict(labels)
    rank = {node: i for i, node in enumerate(facts.nodes)}
    latest: dict[str, int] = {}
    for node in facts.nodes:
        if node not in labels and node not in facts.params_only:
            before = [s for s in node.all_input_nodes if s in labels]
            if before:
                # the producer whose block started last: skips are added into the later block
                labels[node] = labels[max(before, key=lambda s: (latest[labels[s]], rank[s]))]
        if node in labels:
            latest.setdefault(labels[node], rank[node])
    for node in reversed(facts.nodes):
        if node not in labels:
            after = [u for u in node.users if u in labels]
            if after:
                labels[node] = labels[min(after, key=rank.__getitem__)]
    fallback = next(iter(labels.values()), "model")
    for node in facts.nodes:
        labels.setdefault(node, fallback)
    return labels


def _convex(facts: _Facts, labels: Labels) -> Labels:
    """Split blocks that a path leaves and enters again."""
    tangled = _tangled(facts, labels)
    if not tangled:
        return labels
    piece: dict[fx.Node, int] = {}
    # for each value: the highest piece of each tangled block that it depends on
    seen: dict[fx.Node, dict[str, int]] = {}
    for node in facts.nodes:
        own = labels[node]
        depends: dict[str, int] = {}
        number = 0
        for source in node.all_input_nodes:
            for block, highest in seen.get(source, {}).items():
                depends[block] = max(depends.get(block, -1), highest)
            if own in tangled and source in labels:
                if labels[source] == own:
                    number = max(number, piece[source])
                else:
                    number = max(number, seen[source].get(own, -1) + 1)
        piece[node] = number
        if own in tangled:
            depends[own] = max(depends.get(own, -1), number)
        seen[node] = depends
    split = {n: labels[n] if piece[n] == 0 else f"{labels[n]}@{piece[n]}" for n in facts.nodes}
    return split if not _tangled(facts, split) else _in_runs(facts, labels, tangled)


def _tangled(facts: _Facts, labels: Labels) -> set[str]:
    """Blocks that need each other's values."""
    quotient = nx.DiGraph()
    for node in facts.nodes:
        for source in node.all_input_nodes:
            if source in labels and labels[source] != labels[node]:
                quotient.add_edge(labels[source], labels[node])
    return {name for part in nx.strongly_connected_components(quotient) if len(part) > 1 for name in part}


def _in_runs(facts: _Facts, labels: Labels, tangled: set[str]) -> Labels:
    """Cut tangled blocks wherever another one of them comes in between: for pairs that no single path ties."""
    runs: dict[str, int] = {}
    found: Labels = {}
    last = ""
    for node in facts.nodes:
        own = labels[node]
        if own in tangled:
            if own != last:
                runs[own] = runs.get(own, -1) + 1
            last = own
        found[node] = own if not runs.get(own) else f"{own}@{runs[own]}"
    return found


def _write(graph: JointGraph, facts: _Facts, labels: Labels) -> None:
    order: dict[str, int] = {}
    quotient = nx.DiGraph()
    for i, node in enumerate(facts.nodes):
        order.setdefault(labels[node], i)
        quotient.add_node(labels[node])
        for source in node.all_input_nodes:
            if source in labels and labels[source] != labels[node]:
                quotient.add_edge(labels[source], labels[node])
    names = list(nx.lexicographical_topological_sort(quotient, key=order.__getitem__))
    graph.blocks = [Block(name, i) for i, name in enumerate(names)]
    for node in facts.nodes:
        node.meta["gr"] = info(node).but(block=labels[node])
    for node in graph.forward_nodes():
        if info(node).role is Role.LOSS:
            node.meta["gr"] = info(node).but(block=LOSS_BLOCK)


def quotient_graph(graph: JointGraph) -> nx.DiGraph:
    """Blocks as nodes, an edge where a value of one is read by another (first forward pass only)."""
    found = nx.DiGraph()
    found.add_nodes_from(block.name for block in graph.blocks)
    for node in graph.forward_nodes():
        own = info(node)
        for source in node.all_input_nodes:
            if source.op == "call_function" and info(source).block != own.block and not own.copy:
                found.add_edge(info(source).block, own.block)
    return found
