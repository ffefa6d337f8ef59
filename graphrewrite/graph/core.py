"""The data of a joint graph: one editable graph that holds the forward and the backward.

At the *operator level* the backward has one VJP node per forward operator (two where the parameter's gradient is
separable); at the *ATen level* every node is an ATen call. Both are executable: the operator level by the reference
interpreter (`graphrewrite.graph.interpret`), the ATen level also as plain Python.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import fx

from graphrewrite._compat import FakeTensorMode, enable_python_dispatcher, make_fx, native_kernels, symbolic_forms
from graphrewrite.errors import RuleError
from graphrewrite.graph.aliasing import base_of, drop_mutation, written_bases
from graphrewrite.graph.nodes import (
    BACKWARD_ROLES,
    Constant,
    Counter,
    Grad,
    InputSpec,
    Loss,
    NodeInfo,
    OutputSpec,
    Param,
    Role,
    State,
    Tangent,
    UserInput,
    info,
    is_backward,
    value,
)
from graphrewrite.graph.ops import call_operator, is_impure

if TYPE_CHECKING:
    from graphrewrite.graph.codec import Treatment
    from graphrewrite.graph.differentiate import Backward

Level = Literal["forward", "operator", "aten"]


NO_RULE = -1
"""The rule key of passes that are no rule."""


@dataclass(frozen=True)
class Block:
    """The unit of locality: a connected set of forward nodes.

    Attributes:
        name: Module path of the block's root, unique.
        index: Position in topological order.
        rule: Registry name of the rule that trains the block.
        rule_key: Which entry of the rule map claimed it; several blocks share one rule object through this.
    """

    name: str
    index: int
    rule: str = "bp"
    rule_key: int = NO_RULE


@dataclass(frozen=True)
class StateInit:
    """How a piece of rule state is created: `fill(tensor, generator)` on an empty tensor of this shape."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    fill: Callable[[torch.Tensor, torch.Generator], Any]
    trainable: bool


@dataclass
class Context:
    """What rules may know about the compilation beside the graph.

    Attributes:
        loss: The user's loss, `loss(outputs, targets)`.
        outputs: Rebuilds the model's output structure from its tensor leaves, so that `loss` can be traced again.
        targets: Rebuilds the target structure from its leaves; None when the graph holds no loss.
        training: Whether the graph was captured in training mode.
        seed: The user's seed.
        label_classes: Set by rules that read the targets as class indices: how many classes there are.
        example: Example values of a graph's placeholders, for passes that measure; None while no pass runs.
        bp_bytes: What backpropagation saves between forward and backward; None where this graph is backpropagation.
        coder: What encodes and decodes in the place of a codec, to the same bits: a backend's kernels.
        fuses: Whether the backend computes neighbouring element-wise operators in one pass over the memory.
        stand_ins: Functions of passes and rules whose work a backend has one operator for -> what calls it instead.
    """

    loss: Callable[[Any, Any], torch.Tensor] | None = None
    outputs: Callable[[Sequence[Any]], Any] | None = None
    targets: Callable[[Sequence[Any]], Any] | None = None
    training: bool = True
    seed: int = 0
    label_classes: int | None = None
    example: Callable[[Any], list[Any]] | None = None
    bp_bytes: int | None = None
    coder: Callable[[Any], Any] | None = None
    fuses: bool = False
    stand_ins: Mapping[Callable[..., Any], Callable[..., Any]] = field(default_factory=dict)

    def form(self, steps: Callable[..., Any]) -> Callable[..., Any]:
        """What does the work of a function in this graph: one operator of the backend's, or the function itself."""
        return self.stand_ins.get(steps, steps)


@dataclass
class Log:
    """What passes did and what they declined to do, with the reason, for `explain`."""

    entries: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, made_by: str, node: str, text: str) -> None:
        """Note `text` about `node` on behalf of a pass."""
        self.entries.append((made_by, node, text))


class GraphCore:
    """Nodes, signature and order of a joint graph. `JointGraph` adds the edit verbs."""

    def __init__(self, module: fx.GraphModule, *, level: Level, fake_mode: FakeTensorMode) -> None:
        self.module = module
        self.level: Level = level
        self.fake_mode = fake_mode
        self.blocks: list[Block] = []
        self.leaves: dict[fx.Node, None] = {}
        """Placeholders that require grad: their total cotangents are the gradients."""
        self.model_outputs: list[fx.Node] = []
        """The model's floating-point output values: the boundary between the model and the loss."""
        self.constants: dict[str, torch.Tensor] = {}
        self.state_inits: dict[str, StateInit] = {}
        self.aliases: dict[str, str] = {}
        """Second names of tied parameters -> the first."""
        self.backward: Backward | None = None
        self.context = Context()
        self.log = Log()
        self.treatments: list[Treatment] = []
        """What compression did to the values that the backward reads."""
        self.current_pass = "capture"
        self.streams = 0
        """How many random streams are in use; see `stream()`."""
        self.passes: list[str] = []
        """Labels of the forward passes beside the first one."""
        self.current_rule = 0
        """Key of the rule that is running: `rule_blocks()` are its blocks."""
        self.forward_may_read_cotangents = False
        """Set by rules whose second forward pass starts from an error (PEPITA, FOTON)."""

    # --- reading -------------------------------------------------------------------------------------------------

    @property
    def graph(self) -> fx.Graph:
        """The fx graph."""
        return self.module.graph

    @property
    def nodes(self) -> Iterable[fx.Node]:
        """All nodes in execution order."""
        return self.module.graph.nodes

    @property
    def output_node(self) -> fx.Node:
        """The fx output node."""
        return self.module.graph.output_node()

    @property
    def inputs(self) -> dict[InputSpec, fx.Node]:
        """Placeholders by specification, in order."""
        return {info(n).spec: n for n in self.nodes if n.op == "placeholder"}  # type: ignore[misc]

    @property
    def outputs(self) -> dict[OutputSpec, fx.Node]:
        """Results by specification, in order."""
        node = self.output_node
        return dict(zip(node.meta["specs"], node.args[0], strict=True))  # type: ignore[arg-type]

    def input(self, spec: InputSpec) -> fx.Node:
        """The placeholder of a specification."""
        for node in self.nodes:
            if node.op == "placeholder" and info(node).spec == spec:
                return node
        raise RuleError(f"the graph has no {spec}")

    def forward_nodes(self) -> list[fx.Node]:
        """Operators of the forward (and of losses), in order."""
        return [n for n in self.nodes if n.op == "call_function" and info(n).role in (Role.FORWARD, Role.LOSS)]

    def backward_nodes(self) -> list[fx.Node]:
        """Operators of the backward, in order."""
        return [n for n in self.nodes if is_backward(n)]

    def parameters(self) -> dict[str, fx.Node]:
        """Parameter placeholders by name."""
        return {spec.name: n for spec, n in self.inputs.items() if isinstance(spec, Param)}

    def block(self, name: str) -> Block:
        """The block of that name."""
        for block in self.blocks:
            if block.name == name:
                return block
        raise RuleError(f"no block is named {name!r}", remedy=f"blocks: {', '.join(b.name for b in self.blocks)}")

    def rule_blocks(self) -> list[Block]:
        """The blocks of the rule that is running; all blocks where none is."""
        if self.current_rule == NO_RULE:
            return list(self.blocks)
        return [block for block in self.blocks if block.rule_key == self.current_rule]

    @property
    def has_loss(self) -> bool:
        """Whether the task loss is part of the graph."""
        return self.context.targets is not None

    # --- writing -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def tracing(self, *, keep_new_symbols: bool = False) -> Iterator[None]:
        """Everything that runs operators on fake values runs in here.

        Args:
            keep_new_symbols: Whether sizes that depend on data (`nonzero`) and are met inside become part of the
                graph being traced; else the operator is only run again to see what it gives.
        """
        shape_env = self.fake_mode.shape_env
        forget = shape_env is not None and not keep_new_symbols
        with (
            shape_env.ignore_fresh_unbacked_symbols() if forget else contextlib.nullcontext(),  # type: ignore[union-attr]
            self.fake_mode,
            native_kernels(),
            symbolic_forms(),
            enable_python_dispatcher(),
            torch.amp.autocast("cpu", enabled=False),
            torch.amp.autocast("cuda", enabled=False),
        ):
            yield

    def emit(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        like: NodeInfo,
        name: str | None = None,
        val: Any = None,
    ) -> fx.Node:
        """Add one operator call at the end of the graph; the only way a node comes into being.

        Args:
            target: The operator.
            args: Its arguments; nodes stand for values.
            kwargs: Its keyword arguments.
            like: Role, block, module and provenance of the new node; `made_by` is filled in.
            name: A wish for the node's name.
            val: The fake value where the caller knows it; computed from the arguments otherwise.
        """
        node = self._new_node("call_function", target, args, kwargs or {}, like.but(made_by=self.current_pass), name)
        if val is None:
            fake_args, fake_kwargs = fx.map_arg((node.args, node.kwargs), value)
            with torch.no_grad(), self.tracing():
                val = call_operator(target, fake_args, fake_kwargs)
        node.meta["val"] = val
        return node

    def _new_node(
        self,
        op: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        node_info: NodeInfo,
        name: str | None,
    ) -> fx.Node:
        with self.graph.inserting_before(self.output_node):
            node = self.graph.create_node(op, target, args, kwargs, name=name)
        node.meta["gr"] = node_info
        return node

    def placeholder(self, spec: InputSpec, val: Any, name: str) -> fx.Node:
        """Add an input. Each has a fake value of its own: two inputs that share one would be merged when traced."""
        last = None
        for node in self.nodes:
            if node.op == "placeholder":
                last = node
        anchor = last.next if last is not None else next(iter(self.nodes))
        with self.graph.inserting_before(anchor):
            node = self.graph.create_node("placeholder", name, (), {}, name=name)
        node.target = node.name  # fx made it a valid and unique identifier
        node.meta["gr"] = NodeInfo(role=Role.INPUT, spec=spec, made_by=self.current_pass)
        node.meta["val"] = val
        return node

    def fresh_fake(self, val: torch.Tensor, **changes: Any) -> torch.Tensor:
        """A new fake tensor with the layout of `val`."""
        with self.tracing(), torch.no_grad():
            return torch.empty_like(val, **changes)

    def counter(self) -> fx.Node:
        """The (seed, step, rank) input of counter-based random operators, added at first use."""
        for node in self.nodes:
            if node.op == "placeholder" and isinstance(info(node).spec, Counter):
                return node
        with self.tracing():
            val = torch.empty(3, dtype=torch.int64, device=self.device)
        return self.placeholder(Counter(), val, "counter")

    def stream(self) -> int:
        """A fresh stream number for a counter-based random operator (`graphrewrite.random`)."""
        self.streams += 1
        return self.streams

    @property
    def device(self) -> torch.device:
        """The device of the first parameter, else of the first tensor input."""
        for node in self.nodes:
            if node.op == "placeholder" and isinstance(node.meta.get("val"), torch.Tensor):
                return node.meta["val"].device  # type: ignore[no-any-return]
        return torch.device("cpu")

    def set_outputs(self, outputs: dict[OutputSpec, fx.Node]) -> None:
        """Replace the results of the graph."""
        node = self.output_node
        node.args = (tuple(outputs.values()),)
        node.meta["specs"] = tuple(outputs)

    def add_output(self, spec: OutputSpec, node: fx.Node) -> None:
        """Add or replace one result."""
        outputs = self.outputs
        outputs[spec] = node
        self.set_outputs(outputs)

    def remove_output(self, spec: OutputSpec) -> None:
        """Drop one result; absent ones are fine."""
        outputs = self.outputs
        if outputs.pop(spec, None) is not None:
            self.set_outputs(outputs)

    def remove_outputs(self, *kinds: type) -> None:
        """Drop all results of some kinds of specification."""
        self.set_outputs({spec: node for spec, node in self.outputs.items() if not isinstance(spec, kinds)})

    def splice(
        self,
        fn: Callable[..., Any],
        inputs: Sequence[fx.Node | None],
        *,
        like: NodeInfo,
        whole: bool = True,
    ) -> Any:
        """Trace `fn` on the fake values of `inputs` and add its operators to the graph.

        Args:
            fn: An ordinary PyTorch function; it must not mutate its inputs.
            inputs: Nodes for its positional arguments; None is passed on as None.
            like: Role, block and module of the new nodes.
            whole: Keep composite operators (`linear`, `layer_norm`) in one piece, so that they can be
                differentiated as operators; False gives ATen calls and allows `torch.autograd.grad` inside `fn`.

        Returns:
            What `fn` returns, with nodes in the place of tensors; constants stay constants.
        """
        slots = [n for n in inputs if n is not None]
        fakes = [self._alias_free(value(n)) for n in slots]
        structure: list[Any] = []

        def flat(*tensors: Any) -> list[Any]:
            given = iter(tensors)
            out = fn(*[None if n is None else next(given) for n in inputs])
            leaves, spec = torch.utils._pytree.tree_flatten(out)
            structure.append((spec, [(_is_traced(leaf), leaf) for leaf in leaves]))
            return [leaf for leaf in leaves if _is_traced(leaf)]

        with self.tracing(), contextlib.nullcontext() if not whole else torch.no_grad():
            traced = make_fx(flat, tracing_mode="real", pre_dispatch=whole, _allow_non_fake_inputs=True)(*fakes)
        drop_mutation(traced.graph)
        results = self.inline(traced, slots, like=like)
        spec, made = structure[-1]
        given = iter(results)
        return torch.utils._pytree.tree_unflatten([next(given) if traced else held for traced, held in made], spec)

    def _alias_free(self, val: Any) -> Any:
        """Fresh fakes for tensors: one object twice would be one placeholder in the trace."""
        return self.fresh_fake(val) if isinstance(val, torch.Tensor) else val

    def inline(
        self,
        traced: fx.GraphModule,
        inputs: Sequence[fx.Node],
        *,
        like: NodeInfo | Callable[[fx.Node], NodeInfo],
    ) -> list[Any]:
        """Copy the operators of a traced graph to the end of this one and return its results."""
        env: dict[fx.Node, Any] = {}
        given = iter(inputs)
        results: list[Any] = []
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(given)
            elif node.op == "output":
                results = list(fx.map_arg(node.args[0], env.__getitem__))
            elif node.op == "get_attr":
                env[node] = self._attribute(traced, node, like)
            elif node.target in _NO_OPS and not callable(like) and like.role in (*BACKWARD_ROLES, Role.TANGENT):
                env[node] = env[node.args[0]]
            else:
                self._refuse_mutation(node)
                args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
                node_info = like(node) if callable(like) else like
                if "gr" in node.meta:  # `labelled` says what this part is for
                    node_info = node.meta["gr"].but(stage=node.meta["gr"].stage or node_info.stage)
                env[node] = self.emit(
                    node.target, args, kwargs, like=node_info, name=node.name, val=node.meta.get("val")
                )
        return results

    def _attribute(self, traced: fx.GraphModule, node: fx.Node, like: Any) -> fx.Node:
        held = getattr(traced, str(node.target))
        if isinstance(held, torch.Tensor):
            return self.constant(held, str(node.target).strip("_"))
        name = self._free_attribute(str(node.target))
        setattr(self.module, name, held)
        node_info = like(node) if callable(like) else like
        created = self._new_node("get_attr", name, (), {}, node_info, None)
        created.meta["val"] = None
        return created

    def _free_attribute(self, wish: str) -> str:
        name, i = wish, 0
        while hasattr(self.module, name):
            i += 1
            name = f"{wish}_{i}"
        return name

    def constant(self, tensor: torch.Tensor, name: str) -> fx.Node:
        """A tensor that is fixed for the life of the graph."""
        unique, i = name, 0
        while unique in self.constants:
            i += 1
            unique = f"{name}_{i}"
        self.constants[unique] = tensor.detach()
        with self.tracing(), torch.no_grad():
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        return self.placeholder(Constant(unique), fake, unique.replace(".", "_"))

    @staticmethod
    def _refuse_mutation(node: fx.Node) -> None:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            raise RuleError(
                f"a function given to an edit verb mutates a tensor in place ({node.target})",
                remedy="write it without in-place operators",
            )

    def substitute(self, old: fx.Node, new: fx.Node) -> None:
        """Let everything that reads `old` read `new`, and erase `old`."""
        old.replace_all_uses_with(new)
        self.model_outputs = [new if node is old else node for node in self.model_outputs]
        self._forget(old)
        self.graph.erase_node(old)

    # --- keeping order -------------------------------------------------------------------------------------------

    def prune(self, *, backward_only: bool = False, impure: bool = False) -> int:
        """Remove operators that nothing reads; returns how many. Random operators of the forward stay.

        Args:
            backward_only: Leave the forward alone: a verb may still be about to read what nothing reads yet.
            impure: Remove random and checking operators of the forward too: the graph no longer stands for the model.
        """
        removed = 0
        read_later: set[fx.Node] = set()
        for node in reversed(list(self.nodes)):
            if node.op == "output":
                read_later.update(base_of(source) for source in node.all_input_nodes)
            if node.op not in ("call_function", "get_attr"):
                continue
            kept = bool(node.users) or (not is_backward(node) and (backward_only or (is_impure(node) and not impure)))
            # an in-place operator is read through the memory that it writes to
            if kept or not read_later.isdisjoint(written_bases(node)):
                read_later.update(base_of(source) for source in node.all_input_nodes)
                continue
            self._forget(node)
            self.graph.erase_node(node)
            removed += 1
        return removed

    def _forget(self, node: fx.Node) -> None:
        if node in self.model_outputs:
            self.model_outputs.remove(node)
        if self.backward is not None:
            self.backward.forget(node)

    def sort(self) -> None:
        """Put the nodes in an order in which each comes after what it reads, moving as few as possible."""
        seen: set[fx.Node] = set()
        nodes = list(self.nodes)
        if all(_ready(node, seen) and not seen.add(node) for node in nodes):  # type: ignore[func-returns-value]
            return
        position = {node: i for i, node in enumerate(nodes)}
        order = _stable_topological_order(nodes, position)
        cursor = order[0]
        for node in order[1:]:
            cursor.append(node)
            cursor = node

    def forward_first(self) -> None:
        """Move operators of the forward in front of the backward, where they do not read it.

        Sizes are named after the first value that has them: a forward operator behind the backward would take its
        sizes from a cotangent once the graph is expanded.
        """
        first: fx.Node | None = None
        late: set[fx.Node] = set()
        for node in list(self.nodes):
            if node.op not in ("call_function", "get_attr"):
                continue
            if is_backward(node):
                first = first or node
                late.add(node)
            elif any(source in late for source in node.all_input_nodes):
                late.add(node)
            elif first is not None:
                first.prepend(node)

    def recompile(self) -> fx.GraphModule:
        """The graph module, with its Python code up to date."""
        self.graph.lint()
        self.module.recompile()
        return self.module

    def grads(self) -> dict[Param | State | UserInput, fx.Node]:
        """Gradient results by what they are the gradient of."""
        return {spec.of: node for spec, node in self.outputs.items() if isinstance(spec, Grad)}

    def tangents(self) -> dict[OutputSpec, fx.Node]:
        """Cotangent inputs by output."""
        return {spec.output: n for spec, n in self.inputs.items() if isinstance(spec, Tangent)}

    def loss_node(self) -> fx.Node:
        """The task loss, or the sum of losses a rule put in its place."""
        outputs = self.outputs
        if Loss() not in outputs:
            raise RuleError("this graph holds no loss", remedy="use compiled.loss(x, y) and give example_targets")
        return outputs[Loss()]

    # --- copying -------------------------------------------------------------------------------------------------

    def copy(self) -> Self:
        """An independent copy; node names are kept."""
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        for node in self.nodes:
            new = graph.node_copy(node, env.__getitem__)
            new.meta = dict(node.meta)
            env[node] = new
        for new in env.values():
            if "gr" in new.meta:
                old = new.meta["gr"]
                new.meta["gr"] = old.but(
                    mirrors=env.get(old.mirrors),
                    cotangent_of=env.get(old.cotangent_of),
                    encodes=env.get(old.encodes),
                )
        other = type(self)(fx.GraphModule(self.module, graph), level=self.level, fake_mode=self.fake_mode)
        other.blocks = list(self.blocks)
        other.leaves = {env[n]: None for n in self.leaves}
        other.model_outputs = [env[n] for n in self.model_outputs]
        other.constants = dict(self.constants)
        other.state_inits = dict(self.state_inits)
        other.aliases = dict(self.aliases)
        other.context = self.context
        other.log = Log(list(self.log.entries))
        other.treatments = list(self.treatments)
        other.current_pass = self.current_pass
        other.streams = self.streams
        other.passes = list(self.passes)
        other.forward_may_read_cotangents = self.forward_may_read_cotangents
        if self.backward is not None:
            other.backward = self.backward.copy(other, env)  # type: ignore[arg-type]
        return other

    def __str__(self) -> str:
        from graphrewrite.graph.text import to_text

        return to_text(self)  # type: ignore[arg-type]

    def _repr_html_(self) -> str:
        """The interactive page of the graph, for notebooks."""
        from graphrewrite.report.explorer import graph_frame

        return graph_frame(self)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        ops = sum(1 for n in self.nodes if n.op == "call_function")
        return f"<{type(self).__name__} level={self.level} operators={ops} blocks={len(self.blocks)}>"


def _is_traced(leaf: Any) -> bool:
    return isinstance(leaf, (torch.Tensor, torch.SymInt))


_NO_OPS = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


def _ready(node: fx.Node, seen: set[fx.Node]) -> bool:
    return all(source in seen for source in node.all_input_nodes)


def _stable_topological_order(nodes: list[fx.Node], position: dict[fx.Node, int]) -> list[fx.Node]:
    """The order that always takes the ready node that stood first; random operators keep theirs where they can."""
    order = _take_first_ready(nodes, position, [n for n in nodes if n.op == "call_function" and is_impure(n)])
    if len(order) != len(nodes):
        order = _take_first_ready(nodes, position, [])
    if len(order) != len(nodes):
        stuck = next(node for node in nodes if node not in set(order))
        raise RuleError("the graph has a cycle", node=stuck.name)
    return order


def _take_first_ready(nodes: list[fx.Node], position: dict[fx.Node, int], chain: list[fx.Node]) -> list[fx.Node]:
    """Kahn's algorithm; the nodes of `chain` stay in their order. Shorter than `nodes` if there is a cycle."""
    waiting = {node: len(node.all_input_nodes) for node in nodes}
    following = dict(itertools.pairwise(chain))
    for node in following.values():
        waiting[node] += 1
    heap = [position[node] for node in nodes if waiting[node] == 0]
    heapq.heapify(heap)
    order: list[fx.Node] = []
    while heap:
        node = nodes[heapq.heappop(heap)]
        order.append(node)
        for user in (*node.users, *([following[node]] if node in following else [])):
            waiting[user] -= 1
            if waiting[user] == 0:
                heapq.heappush(heap, position[user])
    return order
