"""The edit verbs: everything a rule does to a graph is one of these methods of `JointGraph`.

A verb takes ordinary differentiable PyTorch functions where it needs computation, traces them and splices the result
in, with fake values, roles and provenance filled in. After a verb the graph is consistent and can run.

| verb | meaning |
|---|---|
| `replace_vjp` | another input cotangent or weight gradient for one operator, as `jax.custom_vjp` |
| `replace_primal` | the derivative of one operator reads another value in the place of an input |
| `cut` | no cotangent crosses a boundary |
| `redirect` | the cotangent at a boundary becomes a function of other values |
| `teach` | a local loss on boundaries; its own backward joins the graph |
| `map_value` | consumers read a function of a value instead of the value |
| `clone_forward` | a second forward pass on other inputs, same parameters |
| `pull_back` | one operator's derivative, applied to another cotangent beside the backward |
| `drop_backward` | delete the backward |
| `repeat` | an inner loop with state, kept as one callable sub-graph |
| `push_forward` | a JVP beside the forward: tangents of what depends on perturbed values |
| `add_state`, `update_state` | feedback weights, heads, running statistics |
| `update_parameter` | a phase between steps writes a parameter |
| `encode_saved` | store a saved tensor in another form |
| `map_gradient` | the gradient of a leaf becomes a function of a gradient and other values |
| `recompute` | compute a saved tensor again in the backward |
| `split_backward` | weight gradients run in a stage of their own, behind the input cotangents |
| `tap` | expose a value as an output |
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from graphrewrite.errors import RuleError
from graphrewrite.graph.aliasing import views_of
from graphrewrite.graph.core import GraphCore, StateInit
from graphrewrite.graph.differentiate import Backward, MappedGradient, Part, Pullback
from graphrewrite.graph.loop import OPERATOR, trace_body
from graphrewrite.graph.nodes import (
    LOSS_BLOCK,
    BufferUpdate,
    Loss,
    LossTerm,
    NodeInfo,
    ParameterUpdate,
    Role,
    State,
    StateUpdate,
    Tangent,
    Tap,
    dense_order,
    fixed,
    flat_inputs,
    info,
    is_backward,
    is_float,
    is_getitem,
    producer,
    runs_last,
    runs_later,
    value,
)
from graphrewrite.graph.ops import is_impure
from graphrewrite.graph.pushforward import push_forward
from graphrewrite.random import Uniform
from graphrewrite.textform import to_text

if TYPE_CHECKING:
    from graphrewrite.graph.codec import Codec
    from graphrewrite.graph.split import Split


class JointGraph(GraphCore):
    """A forward graph and its backward, with a typed signature and the edit verbs of the module docstring."""

    # --- boundaries ------------------------------------------------------------------------------------------------

    def boundaries(self, block: str, *, copy: str = "") -> list[fx.Node]:
        """The differentiable activations that leave a block, in order.

        Values computed from parameters alone (a normalised weight, a cast one) are no activations: they are not
        listed and never cut.
        """
        backward = self._table()
        found = []
        for node in self.forward_nodes():
            own = info(node)
            if own.block != block or own.copy != copy or own.role is not Role.FORWARD or not is_float(node):
                continue
            if not self.crossing(node) or not backward.requires_grad(node) or backward.is_weightlike(node):
                continue
            found.append(node)
        return found

    def crossing(self, boundary: fx.Node, *, loss: bool = True) -> list[fx.Node]:
        """The consumers of a value in other blocks; with `loss`, the task loss counts as one."""
        block = info(boundary).block
        return [
            user
            for user in boundary.users
            if user.op == "call_function"
            and not is_backward(user)
            and info(user).block != block
            and (loss or info(user).block != LOSS_BLOCK)
        ]

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Bring the backward in line once, at the end, after several verbs."""
        table = self._table()
        table.deferred += 1
        try:
            yield
        finally:
            table.deferred -= 1
        table.propagate()

    @property
    def table(self) -> Backward:
        """The backward table: facts about the forward (`requires_grad`, `is_weightlike`) and the rows."""
        return self._table()

    def _table(self) -> Backward:
        if self.backward is None:
            raise RuleError(
                f"the graph is at the {self.level} level, edit verbs need the operator level",
                remedy="declare `level = 'operator'` in the pass",
            )
        return self.backward

    # --- cotangents ------------------------------------------------------------------------------------------------

    def cotangent(self, node: fx.Node) -> fx.Node | None:
        """The cotangent of a forward value; None if none reaches it."""
        return self._table().total(node)

    def cut(self, boundary: fx.Node, consumers: Iterable[fx.Node] | None = None) -> None:
        """No cotangent comes back to `boundary` from its consumers in other blocks (or from `consumers`)."""
        table = self._table()
        edges = self.crossing(boundary) if consumers is None else list(consumers)
        table.cuts.update((boundary, consumer) for consumer in edges)
        table.propagate()

    def redirect(
        self,
        boundary: fx.Node,
        signal: Callable[..., torch.Tensor],
        inputs: Sequence[fx.Node],
        *,
        consumers: Iterable[fx.Node] | None = None,
    ) -> fx.Node:
        """Cut `boundary` and let `signal(*inputs)` be its cotangent.

        From the boundary down to the previous cut the derivative stays exact. For a leaf, whose cotangent is its
        gradient, the signal is the gradient.

        Args:
            boundary: A forward value, or a leaf.
            signal: Returns a tensor with the shape and dtype of the boundary.
            inputs: Its arguments: an output error, targets, state.
            consumers: Where to cut; default: all consumers in other blocks.

        Returns:
            The node of the signal.
        """
        table = self._table()
        if boundary in self.leaves:
            like = NodeInfo(role=Role.GRADIENT, block=table.block_of(boundary), cotangent_of=boundary)
        else:
            like = info(boundary).but(role=Role.SIGNAL, mirrors=None, cotangent_of=boundary)
        node: fx.Node = self.splice(signal, inputs, like=like, whole=False)
        want, got = value(boundary), value(node)
        if tuple(got.shape) != tuple(want.shape) or got.dtype != want.dtype:
            raise RuleError(
                f"a teaching signal of {got.dtype} {tuple(got.shape)} was made for a boundary of "
                f"{want.dtype} {tuple(want.shape)}",
                node=boundary.name,
                module=info(boundary).module,
                remedy="the signal must have the shape and dtype of the boundary",
            )
        edges = self.crossing(boundary) if consumers is None else consumers
        table.cuts.update((boundary, consumer) for consumer in edges)
        table.seed(boundary, node)
        table.propagate()
        return node

    def teach(
        self,
        block: str,
        loss: Callable[..., torch.Tensor],
        inputs: Sequence[fx.Node],
        *,
        module: str = "",
    ) -> fx.Node:
        """Add a local loss; its backward joins the graph and its value joins the loss the graph returns.

        Args:
            block: The block that learns from it; the loss is reported under this name.
            loss: Returns a scalar: the mean over the batch.
            inputs: Its arguments: boundaries, targets, state. Cotangents go back to all that require grad.
            module: Module path noted on the new nodes.

        Returns:
            The node of the loss.
        """
        node: fx.Node = self.splice(loss, inputs, like=NodeInfo(role=Role.LOSS, block=block, module=module or block))
        if not isinstance(value(node), torch.Tensor) or value(node).dim() != 0:
            raise RuleError("a local loss must be a scalar tensor", module=block, remedy="reduce it, e.g. with .mean()")
        self.add_loss(LossTerm(block), node)
        self.seed_loss(node)
        return node

    def seed_loss(self, node: fx.Node) -> None:
        """Let the cotangent of the loss that the graph returns enter at one of its summands."""
        table = self._table()
        table.seed(node, self.loss_tangent(value(node).dtype))
        table.propagate()

    def loss_tangent(self, dtype: torch.dtype) -> fx.Node:
        """The cotangent of the loss that the graph returns, in the wanted dtype."""
        spec = Tangent(Loss())
        tangent = self.inputs.get(spec)
        if tangent is None:
            loss = value(self.loss_node())
            tangent = self.placeholder(spec, self.fresh_fake(loss), "tangent_loss")
        if value(tangent).dtype == dtype:
            return tangent
        like = NodeInfo(role=Role.COTANGENT, block=LOSS_BLOCK)
        return self.emit(torch.ops.aten._to_copy.default, (tangent,), {"dtype": dtype}, like=like)

    def add_loss(self, term: LossTerm, node: fx.Node) -> None:
        """Report a loss and add it to the sum that the graph returns."""
        outputs = self.outputs
        previous = outputs.get(Loss())
        have_terms = any(isinstance(spec, LossTerm) for spec in outputs)
        reported = outputs.get(term)
        like = NodeInfo(role=Role.LOSS, block=LOSS_BLOCK)
        if reported is None:
            outputs[term] = node
        else:
            outputs[term] = self.emit(torch.ops.aten.add.Tensor, (reported, node), like=like)
        if previous is None or not have_terms:
            outputs[Loss()] = node
        else:
            wanted, dtype = value(previous).dtype, value(node).dtype
            if dtype != wanted:
                node = self.emit(torch.ops.aten._to_copy.default, (node,), {"dtype": wanted}, like=like)
            outputs[Loss()] = self.emit(torch.ops.aten.add.Tensor, (previous, node), like=like, name="loss_sum")
        self.set_outputs(outputs)
        self.sort()

    def drop_backward(self) -> None:
        """Delete every seed, and with them all cotangents and gradients; the loss stays."""
        table = self._table()
        table.seeds.clear()
        table.propagate()

    # --- loops -----------------------------------------------------------------------------------------------------

    def repeat(
        self,
        body: Callable[..., Sequence[torch.Tensor]],
        state: Sequence[fx.Node],
        steps: int,
        *,
        inputs: Sequence[fx.Node] = (),
        like: NodeInfo,
    ) -> list[fx.Node]:
        """An inner loop, kept as one callable sub-graph: the graph is as large for many steps as for one.

        Args:
            body: `body(*state, *inputs) -> next state`, an ordinary PyTorch function; it may call
                `torch.autograd.grad`. Parts of it may say what they are for, by `graphrewrite.graph.loop.labelled`.
            state: The initial state; it keeps its shapes and dtypes.
            steps: How often the body runs.
            inputs: What every step reads.
            like: Role, block and module of the loop, and of what its body does not label.

        Returns:
            The nodes of the final state.
        """
        if steps < 0:
            raise RuleError(f"a loop of {steps} steps", module=like.module)
        traced = trace_body(self, body, state, inputs, like)
        node = self.emit(OPERATOR, (list(state), list(inputs), steps, traced.number), like=like, name="repeat")
        return [self.emit(operator.getitem, (node, i), like=like) for i in range(len(state))]

    def push_forward(self, tangents: Mapping[fx.Node, fx.Node], *, copy: str = "") -> dict[fx.Node, fx.Node]:
        """Add a forward-mode pass: the JVP of every operator that depends on a perturbed value.

        Args:
            tangents: Value -> its tangent: a parameter, an input, or the result of an operator, where it is added to
                the tangent that arrives there.
            copy: The forward pass (`clone_forward`) whose operators are differentiated.

        Returns:
            Value -> its tangent, for all values that have one.

        Raises:
            RuleError: An operator on the way has neither a JVP nor a VJP that can be differentiated again.
        """
        return push_forward(self, tangents, copy=copy)

    # --- derivatives of single operators ---------------------------------------------------------------------------

    def pullback(self, node: fx.Node, part: Part | None = None) -> Pullback:
        """The row of the backward table for `node`: its `"d"`, `"w"` or joint (`"vjp"`) part."""
        rows = self._table().rows(node)
        for row in rows:
            if part is None or row.part == part or row.part == "vjp":
                return row
        raise RuleError(f"operator {node.target} has no {part!r} part here", node=node.name, module=info(node).module)

    def replace_vjp(
        self,
        node: fx.Node,
        bwd: Callable[..., Any],
        *,
        fwd: Callable[..., Any] | None = None,
        residuals: Sequence[fx.Node] | None = None,
        part: Part | None = None,
        inputs: Sequence[fx.Node] | None = None,
    ) -> None:
        """Give one operator, or several at once, another derivative, as `jax.custom_vjp`.

        Args:
            node: A forward operator.
            bwd: `bwd(residuals, *cotangents)`: the cotangents of the inputs of `part`, in order; a tensor if there
                is one, a tuple otherwise. `residuals` is a tuple of tensors, `cotangents` one per output (None where
                none arrives).
            fwd: `fwd(*inputs) -> residuals` computes what `bwd` needs, in the forward; `inputs` are the operator's
                tensor inputs. Only what it returns is saved.
            residuals: Instead of `fwd`: existing nodes. Default: the operator's inputs, then its outputs.
            part: `"d"` (activations), `"w"` (parameters); None: whatever the operator has as one row.
            inputs: `node` is the last of several operators, and these are the values that all of them together are a
                function of: `bwd` returns a cotangent for each. What lies between gets none through `node` any more.
        """
        if inputs is None:
            row = self.pullback(node, part)
        else:
            row = Pullback(node, "vjp", tuple(range(len(inputs))), inputs=tuple(inputs))
            self._table().pullbacks[node] = [row]
        if fwd is not None:
            like = info(node).but(mirrors=None)
            made = self.splice(fwd, flat_inputs(node), like=like, whole=False)
            kept = tuple(made) if isinstance(made, (tuple, list)) else (made,)
            self._check_cheap(node, kept)
        elif residuals is not None:
            kept = tuple(residuals)
        else:
            kept = (*flat_inputs(node), *(n for n in [node] if not isinstance(value(n), (tuple, list))))
        row.bwd, row.residuals, row.replaced = bwd, kept, {}
        row.reset()
        self._table().propagate()

    @staticmethod
    def _check_cheap(node: fx.Node, kept: Sequence[Any]) -> None:
        for residual in kept:
            if not isinstance(residual, fx.Node):
                raise RuleError("residuals of replace_vjp must be tensors", node=node.name, module=info(node).module)

    def pull_back(
        self, node: fx.Node, cotangents: Mapping[fx.Node, fx.Node], inputs: Collection[fx.Node] | None = None
    ) -> dict[fx.Node, list[fx.Node]]:
        """Apply an operator's derivative to other cotangents, beside the backward that is there.

        The nodes are new and not part of the backward: they live as long as something (a `redirect`) reads them.

        Args:
            node: A forward operator.
            cotangents: A cotangent for each of its outputs, or for some of them.
            inputs: The activations whose cotangents are wanted; default: all of its inputs that require grad and are
                no weights.

        Returns:
            For each activation its cotangents, one for each time the operator reads it.
        """
        return self._table().apply(node, cotangents, inputs)

    def returned(self, node: fx.Node, consumers: Iterable[fx.Node]) -> list[fx.Node]:
        """The cotangents that come back to a forward value from some of its consumers, and those seeded there."""
        table = self._table()
        found = list(table.seeds.get(node, ()))
        for consumer in consumers:
            for row in table.rows(consumer):
                sources = row.sources
                found += [held for position, held in row.results.items() if sources[position] is node]
        return found

    def replace_primal(
        self, node: fx.Node, position: int, by: fx.Node, *, part: Part = "d", propagate: bool = True
    ) -> None:
        """Let the derivative of `node` read `by` in the place of its input number `position`.

        This is feedback alignment's edit: the input cotangent of a linear map, computed with another weight.
        """
        row = self.pullback(node, part)
        old, new = value(flat_inputs(node)[position]), value(by)
        if tuple(old.shape) != tuple(new.shape):
            raise RuleError(
                f"{by.name} of shape {tuple(new.shape)} cannot stand for an input of shape {tuple(old.shape)}",
                node=node.name,
                module=info(node).module,
            )
        row.replaced = {**row.replaced, position: by}
        row.bwd = None
        row.reset()
        if propagate:
            self._table().propagate()

    def map_gradient(
        self,
        leaf: fx.Node,
        fn: Callable[..., torch.Tensor] | None = None,
        inputs: Sequence[fx.Node] = (),
        *,
        of: fx.Node | None = None,
    ) -> None:
        """Let the gradient of `leaf` be `fn(gradient, *inputs)`.

        This is how feedback weights learn from the gradient of the weights they stand for.

        Args:
            leaf: A parameter, an input or learned state.
            fn: Returns a tensor with the shape and dtype of the leaf; None: the gradient itself.
            inputs: Further arguments of `fn`.
            of: The leaf whose gradient `fn` gets; default: `leaf` itself. Without a gradient there, `leaf` has none.
        """
        table = self._table()
        if leaf not in self.leaves or (of is not None and of not in self.leaves):
            raise RuleError(f"{(of or leaf).name} is no leaf: it has no gradient", node=leaf.name)
        table.mapped[leaf] = MappedGradient(leaf if of is None else of, fn, tuple(inputs))
        table.propagate()

    # --- the forward -----------------------------------------------------------------------------------------------

    def map_value(
        self,
        node: fx.Node,
        fn: Callable[..., torch.Tensor],
        *,
        consumers: Collection[fx.Node] | None = None,
        inputs: Sequence[fx.Node] = (),
        block: str | None = None,
    ) -> fx.Node:
        """Let consumers read `fn(value, *inputs)` instead of a value.

        Args:
            node: A value of the forward, or an input.
            fn: Keeps shape and dtype.
            consumers: The operators that read the new value; None: those in other blocks.
            inputs: Further arguments of `fn`.
            block: Block of the new nodes; None: that of the first consumer.

        Returns:
            The new value.
        """
        users = list(self.crossing(node) if consumers is None else consumers)
        if not users:
            return node
        own = info(users[0]).but(mirrors=None, role=Role.FORWARD)
        if block is not None:
            own = own.but(block=block)
        new: fx.Node = self.splice(fn, [node, *inputs], like=own)
        if new is node:
            return node
        for user in users:
            user.replace_input_with(node, new)
        self.sort()
        if self.backward is not None:
            table = self.backward
            cut = {edge for edge in table.cuts if edge[0] is node and edge[1] in users}
            table.cuts = table.cuts - cut | {(new, user) for _, user in cut}
            if table.requires_grad(new) != table.requires_grad(node):
                table.invalidate(new)
            table.propagate()
        return new

    def clone_forward(
        self, substitute: Mapping[fx.Node, fx.Node], label: str, *, loss: bool = True
    ) -> dict[fx.Node, fx.Node]:
        """A second forward pass: copies of all forward operators that depend on the substituted values.

        The copies read the same parameters; what does not depend on a substituted value is shared, not copied, and
        neither is what belongs to a pass already (`NodeInfo.copy`), such as the nodes that make the new input: give
        them the label of the pass. Buffers are updated by the first pass only (see `move_updates`).

        Args:
            substitute: value -> the value the copy reads in its place.
            label: Name of the pass; must be new.
            loss: Whether the task loss is copied, too; it cannot be where the pass has samples of its own.

        Returns:
            Original node -> node of the copy, for everything that was copied or substituted.
        """
        if label in self.passes:
            raise RuleError(f"the graph already holds a forward pass named {label!r}")
        self.passes.append(label)
        mapping: dict[fx.Node, fx.Node] = dict(substitute)
        for node in self.forward_nodes():
            own = info(node)
            if node in mapping or own.copy or not any(n in mapping for n in node.all_input_nodes):
                continue
            if own.role is Role.LOSS and not loss:
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: mapping.get(n, n))
            target: Any = node.target
            mapping[node] = self.emit(target, args, kwargs, like=own.but(copy=label), name=f"{node.name}_{label}")
            mapping[node].meta["gr"] = own.but(copy=label, made_by=self.current_pass)
        self.sort()
        return mapping

    def drop_originals(self, mapping: Mapping[fx.Node, fx.Node]) -> None:
        """Delete what `clone_forward` copied and nothing reads any more, random operators included.

        For rules that run the model on other inputs only. Call it when the backward is in line.
        """
        for node in reversed(list(self.nodes)):
            if node in mapping and node.op == "call_function" and not node.users:
                self._forget(node)
                self.graph.erase_node(node)

    def move_updates(self, mapping: Mapping[fx.Node, fx.Node]) -> None:
        """Let buffers be updated by the pass that `mapping` (of `clone_forward`) leads to."""
        self.set_outputs(
            {
                spec: mapping.get(node, node) if isinstance(spec, BufferUpdate) else node
                for spec, node in self.outputs.items()
            }
        )

    # --- state -----------------------------------------------------------------------------------------------------

    def add_state(
        self,
        name: str,
        shape: Sequence[int],
        fill: Callable[[torch.Tensor, torch.Generator], Any],
        *,
        trainable: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> fx.Node:
        """Rule state as an input of the graph: created once, kept in `state_dict()`.

        Args:
            name: `"<rule>.<name>"`; the same name again gives the same input.
            shape: Fixed sizes.
            fill: Writes the initial value into an empty tensor; draws from the generator it is given.
            trainable: Make it an `nn.Parameter`, which an optimizer updates.
            dtype: Default: that of the first floating-point parameter.
            device: Default: that of the model.
        """
        spec = State(name, trainable)
        existing = self.inputs.get(spec)
        if State(name, not trainable) in self.inputs:
            raise RuleError(
                f"state {name} exists and is {'fixed' if trainable else 'learned'}: it cannot be both",
                remedy="use another name",
            )
        sizes = tuple(shape)
        if any(not isinstance(s, int) for s in sizes):
            raise RuleError(
                f"state {name} would have a size that changes with the input: {sizes}",
                remedy="compile with dynamic=None, or let the rule share the state over that dimension",
            )
        if existing is not None:
            if tuple(value(existing).shape) != sizes:
                raise RuleError(f"state {name} exists with shape {tuple(value(existing).shape)}, not {sizes}")
            return existing
        dtype = dtype or self.float_dtype
        device = device or self.device
        self.state_inits[name] = StateInit(sizes, dtype, device, fill, trainable)
        with self.tracing():
            val = torch.empty(sizes, dtype=dtype, device=device)
        node = self.placeholder(spec, val, "state_" + name.replace(".", "_"))
        if trainable:
            self.leaves[node] = None
        return node

    def update_state(self, name: str, fn: Callable[..., torch.Tensor], inputs: Sequence[fx.Node]) -> fx.Node:
        """Write `fn(state, *inputs)` back into a piece of state once the call that computes it is over."""
        node = next((n for s, n in self.inputs.items() if isinstance(s, State) and s.name == name), None)
        if node is None:
            raise RuleError(f"there is no state {name}", remedy="add_state comes first")
        new: fx.Node = self.splice(fn, [node, *inputs], like=NodeInfo(role=Role.STATE, module=name), whole=False)
        if tuple(value(new).shape) != tuple(value(node).shape):
            raise RuleError(f"the update of state {name} has another shape than the state")
        self.add_output(StateUpdate(name), new)
        self.sort()
        return new

    def update_parameter(self, name: str, fn: Callable[..., torch.Tensor], inputs: Sequence[fx.Node]) -> fx.Node:
        """Write `fn(parameter, *inputs)` into a parameter of the model; for phases between steps only."""
        node = self.parameters()[name]
        new: fx.Node = self.splice(fn, [node, *inputs], like=NodeInfo(role=Role.STATE, module=name), whole=False)
        if tuple(value(new).shape) != tuple(value(node).shape) or value(new).dtype != value(node).dtype:
            raise RuleError(f"the update of parameter {name} has another shape or dtype than the parameter")
        self.add_output(ParameterUpdate(name), new)
        self.sort()
        return new

    @property
    def float_dtype(self) -> torch.dtype:
        """The dtype of the first floating-point parameter, else float32."""
        for node in self.parameters().values():
            if is_float(node):
                return value(node).dtype  # type: ignore[no-any-return]
        return torch.float32

    # --- saved values, taps ----------------------------------------------------------------------------------------

    def encode_saved(
        self,
        node: fx.Node,
        codec: Codec,
        readers: Collection[fx.Node] | None = None,
        *,
        held: bool = False,
        prune: bool = True,
    ) -> list[fx.Node]:
        """Let the backward read a value, and views of it, from `codec`'s encoding; the forward reads it as it is.

        ATen level only: there every value that the backward reads is visible. The value is encoded right behind the
        operator that computes it, and decoded right before its first reader.

        Args:
            node: A value that owns its memory.
            codec: Gets the elements in the order in which they lie in memory.
            readers: Which operators of the backward read the encoding; None: all that read the value or a view of it.
            held: The value is one of the first stage of a split backward, and its weight stage reads the encoding.
            prune: Remove what nothing reads any more; a pass that encodes many values does it once, at the end.

        Returns:
            The nodes that are saved in the place of the value.
        """
        if self.level != "aten":
            raise RuleError("encode_saved works on the expanded graph", remedy="declare `level = 'aten'` in the pass")
        reads = runs_last if held else runs_later
        aliases = [node, *views_of(node, held=held)]
        wanted = {
            alias: [user for user in alias.users if reads(user) and (readers is None or user in readers)]
            for alias in aliases
        }
        if not any(wanted.values()):
            return []
        first = min(user for users in wanted.values() for user in users)
        own, val = info(node), value(node)
        order = dense_order(val)
        if order is None:
            raise RuleError(
                "a value whose elements leave gaps in memory cannot be encoded", node=node.name, module=own.module
            )
        if getattr(codec, "positional", False):
            order = tuple(range(val.ndim))
        straight = order == tuple(range(val.ndim))
        sizes = [self._size(of, dim) for of, dim in getattr(codec, "sizes", ())]
        symbols = [s for s in sizes if isinstance(s, fx.Node)]
        stream = self.stream() if getattr(codec, "random", False) else 0
        coder: Any = codec if self.context.coder is None else self.context.coder(codec)
        shape = [self._size(node, dim) for dim in order]
        mark = self.output_node.prev

        def with_sizes(given: Iterator[Any]) -> list[Any]:
            return [next(given) if isinstance(s, fx.Node) else s for s in sizes]

        def store(tensor: torch.Tensor, *rest: Any) -> Any:
            given = iter(rest)
            numbers = with_sizes(given)
            laid_out = tensor if straight else tensor.permute(order)
            if not stream:
                return coder.encode(laid_out, *numbers)
            return coder.encode(laid_out, *numbers, draw=Uniform(next(given), stream))

        role = Role.COTANGENT if held and not is_backward(node) else own.role
        like = own.but(mirrors=None, codec=to_text(codec), encodes=node, role=role)
        made = self.splice(store, [node, *symbols, *([self.counter()] if stream else [])], like=like, whole=False)
        residuals: list[fx.Node] = list(made) if isinstance(made, (tuple, list)) else [made]
        self._move(mark, max([node, *symbols, self._last_input()]).next)

        def restore(*given: Any) -> torch.Tensor:
            stored, rest = given[: len(residuals)], iter(given[len(residuals) :])
            numbers = with_sizes(rest)
            dims = [next(rest) if isinstance(s, fx.Node) else s for s in shape]
            decoded: torch.Tensor = coder.decode(
                stored, torch.empty(dims, dtype=val.dtype, device=val.device), *numbers
            )
            return decoded if straight else decoded.permute([order.index(d) for d in range(len(order))])

        stage = "weight" if held else ""
        back = own.but(role=Role.COTANGENT, mirrors=info(first).mirrors, stage=stage, block=info(first).block)
        mark = self.output_node.prev
        dynamic = [s for s in shape if isinstance(s, fx.Node)]
        decoded = self.splice(restore, [*residuals, *symbols, *dynamic], like=back, whole=False)
        if tuple(value(decoded).shape) != tuple(val.shape) or value(decoded).dtype != val.dtype:
            raise RuleError(f"{codec} decodes to another shape or dtype", node=node.name, module=own.module)
        standing = {node: decoded}
        for alias in aliases[1:]:
            args, kwargs = fx.map_arg((alias.args, alias.kwargs), lambda n: standing.get(n, n))
            standing[alias] = self.emit(alias.target, args, kwargs, like=back, val=alias.meta["val"])  # type: ignore[arg-type]
        self._move(mark, first)
        for alias, users in wanted.items():
            for user in users:
                user.replace_input_with(alias, standing[alias])
        if prune:
            self.prune(backward_only=True)
        return residuals

    def _size(self, node: fx.Node, dim: int) -> fx.Node | int:
        """A size of a value as a number, or as a node of the forward."""
        known = fixed(value(node).shape[dim])
        if known is not None:
            return known
        target = torch.ops.aten.sym_size.int
        for user in node.users:
            if user.target is target and user.args == (node, dim) and not is_backward(user):
                return user
        made = self.emit(target, (node, dim), like=info(node).but(mirrors=None))
        (node if node.op != "placeholder" else self._last_input()).append(made)
        return made

    def _last_input(self) -> fx.Node:
        return max(node for node in self.nodes if node.op == "placeholder")

    def _move(self, mark: fx.Node, anchor: fx.Node) -> None:
        """Move the operators behind `mark` in front of `anchor`."""
        made = []
        node = mark.next
        while node is not self.output_node:
            if node.op != "placeholder":
                made.append(node)
            node = node.next
        for node in made:
            anchor.prepend(node)

    def recompute(self, nodes: Collection[fx.Node], *, keep_blocks: bool = False, each_block: bool = False) -> int:
        """Let the backward compute forward values again instead of reading saved ones.

        ATen level only. Random and mutating operators are not repeated: what the backward needs of them stays saved.
        What is repeated runs right before its first reader.

        Args:
            nodes: Forward operators; those of them that the backward needs, directly or for others, are repeated.
            keep_blocks: Label what is repeated with its own block, and not with its reader's: for a backward that
                passes nothing from block to block and may run in the order of the forward.
            each_block: Repeat an operator anew for every block whose backward needs it, so that nothing that is
                repeated lives on from block to block; otherwise once for all.

        Returns:
            How many operators were repeated.
        """
        if self.level != "aten":
            raise RuleError("recompute works on the expanded graph", remedy="declare `level = 'aten'` in the pass")
        allowed = {n for n in nodes if not is_backward(n) and not is_impure(producer(n))}
        position = {node: i for i, node in enumerate(self.nodes)}

        def place(reader: fx.Node) -> str:
            return info(reader).block if each_block else ""

        # what each reader is given again, and what that needs, each in the graph's order
        reader_of: dict[tuple[str, fx.Node], fx.Node] = {}
        readers = [n for n in reversed(self.backward_nodes()) if runs_later(n)]
        for reader in readers:
            stack = [s for s in reader.all_input_nodes if isinstance(value(s), (torch.Tensor, tuple, list))]
            while stack:
                source = stack.pop()
                if source in allowed:
                    if (place(reader), source) not in reader_of:
                        stack += source.all_input_nodes
                    reader_of[place(reader), source] = reader
        repeated: dict[str, dict[fx.Node, fx.Node]] = {}
        for there, node in sorted(reader_of, key=lambda key: position[key[1]]):
            own = info(reader_of[there, node])
            block = info(node).block if keep_blocks else own.block
            like = info(node).but(role=Role.COTANGENT, copy=own.copy, block=block, stage="")
            mine = repeated.setdefault(there, {})
            mine[node] = self._again(node, mine, like)
        for reader in readers:
            mine = repeated.get(place(reader), {})
            for source in reader.all_input_nodes:
                if source in mine and isinstance(value(source), (torch.Tensor, tuple, list)):
                    reader.replace_input_with(source, mine[source])
        for mine in repeated.values():
            for again in reversed(mine.values()):
                if again.users:
                    min(again.users).prepend(again)
        self.prune(backward_only=True)
        return sum(map(len, repeated.values()))

    def _again(self, node: fx.Node, repeated: Mapping[fx.Node, fx.Node], like: NodeInfo) -> fx.Node:
        """An operator once more, on what was repeated of its inputs."""
        target: Any = node.target
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: repeated.get(n, n))
        return self.emit(target, args, kwargs, like=like, name=f"{node.name}_again", val=node.meta["val"])

    def split_backward(self, budget: float | None = None) -> Split:
        """Let weight gradients, and what only they read or feed, run in a stage behind the input cotangents.

        ATen level only. Call it last: nodes that are added later belong to the first stage.

        Args:
            budget: What may be held between the stages: a float in (0, 1] is a fraction of what would be held, an int
                is bytes. The weight stage computes the rest again. None: it repeats nothing that is costly.

        Returns:
            The nodes of the weight stage, and the gradients that stay in the first one, with the reason.
        """
        from graphrewrite.graph.split import find_weight_stage

        if self.level != "aten":
            raise RuleError("split_backward works on the expanded graph", remedy="declare `level = 'aten'` in the pass")
        found = find_weight_stage(self, budget)
        repeated: dict[fx.Node, fx.Node] = {}
        for node in found.again:
            repeated[node] = self._again(node, repeated, info(node).but(stage="weight"))
        for node in found.nodes:
            node.meta["gr"] = info(node).but(stage="weight")
            for source in node.all_input_nodes:
                if source in repeated:
                    node.replace_input_with(source, repeated[source])
        if repeated:
            self.sort()
        return found

    def tap(self, node: fx.Node, name: str) -> None:
        """Expose a value (an activation, a cotangent) as an output named `name`."""
        self.add_output(Tap(name), node)

    def elements(self, node: fx.Node) -> list[fx.Node]:
        """The `getitem` values of a tuple-valued operator."""
        return [user for user in node.users if is_getitem(user)]
