"""Which nodes share storage: views fold to the node that owns the memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from graphrewrite.graph.nodes import is_backward, is_getitem, runs_last, value

aten = torch.ops.aten

_ALWAYS_VIEWS = {
    aten.detach.default,
    aten.alias.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.lift_fresh.default,
}


def is_view(node: fx.Node) -> bool:
    """Whether a node only looks at its first input's memory in another way."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    target = node.target
    if target in _ALWAYS_VIEWS:
        return True
    if target is aten.reshape.default:
        return _shares_storage(value(node), value(node.args[0]))
    if target is aten.contiguous.default or target is aten._to_copy.default:
        return False
    return bool(getattr(target, "is_view", False))


def _shares_storage(a: object, b: object) -> bool:
    """Whether a reshape is a view at the example's strides."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    if a.untyped_storage()._cdata == b.untyped_storage()._cdata:
        return True
    return b.is_contiguous()


def owns_no_memory(node: fx.Node) -> bool:
    """Whether a node is a view, or an element of a multi-view operator (split, unbind)."""
    return is_view(node) or (is_getitem(node) and is_view(node.args[0]))  # type: ignore[arg-type]


def base_of(node: fx.Node) -> fx.Node:
    """The node that owns the memory a value lives in."""
    while True:
        if is_view(node):
            node = node.args[0]  # type: ignore[assignment]
        elif is_getitem(node) and is_view(node.args[0]):  # type: ignore[arg-type]
            # an element of a multi-view operator (split, unbind)
            node = node.args[0].args[0]  # type: ignore[union-attr,assignment]
        else:
            return node


def view_chain(node: fx.Node) -> list[fx.Node]:
    """The views between `base_of(node)` and `node`, outermost last."""
    base = base_of(node)
    chain: list[fx.Node] = []
    while node is not base:
        chain.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return chain[::-1]


def views_of(node: fx.Node, *, held: bool = False) -> list[fx.Node]:
    """The forward's views of a value, and their views, each behind what it looks at.

    With `held`: those of both first stages of a split backward.
    """
    later = runs_last if held else is_backward
    found: list[fx.Node] = []
    stack = [node]
    while stack:
        for user in stack.pop().users:
            if owns_no_memory(user) and not later(user) and user not in found:
                found.append(user)
                stack.append(user)
    return found


def mutated_bases(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Owners of memory that an in-place operator writes to."""
    return {base for node in nodes for base in written_bases(node)}


def written_bases(node: fx.Node) -> list[fx.Node]:
    """Owners of the memory that one operator writes to."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    return [
        base_of(given)
        for argument, given in zip(schema.arguments, node.args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(given, fx.Node)
    ]


def drop_mutation(graph: fx.Graph) -> None:
    """Let operators that work in place on what a traced function has just made return new values instead.

    Derivatives are written like that (a mean divides its sum in place). What mutates an input, or a value that a view
    looks at, is left as it is.
    """
    for node in list(graph.nodes):
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        held = node.args[0] if node.args else None
        name = schema.name.partition("::")[2]
        if not isinstance(held, fx.Node) or held.op != "call_function" or not name.endswith("_"):
            continue
        if is_view(held) or any(is_view(user) for user in held.users):
            continue
        packet = getattr(aten, name.removesuffix("_"), None)
        target = getattr(packet, schema.overload_name or "default", None)
        if target is None:
            continue
        with graph.inserting_before(node):
            new = graph.call_function(target, node.args, node.kwargs)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        later = set()
        following = node.next
        while following.op != "root":
            later.add(following)
            following = following.next
        held.replace_all_uses_with(new, delete_user_cb=later.__contains__)
        graph.erase_node(node)
