"""The verifier. `fx.Graph.lint` accepts nodes with wrong shapes; this does not.

Checked after every pass: order and use before definition; the fake value of every node recomputed and equal; the
signature; gradients have the shape and dtype of what they are gradients of; no forward node reads a cotangent unless
a rule declared it; provenance is present; no two inputs share a fake value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from graphrewrite._compat import statically_known_true
from graphrewrite.errors import GraphRewriteError, VerifyError
from graphrewrite.graph.nodes import Grad, NodeInfo, Role, hint, info, is_backward, is_fake, spec_of, value
from graphrewrite.graph.ops import VjpCall, call_operator, is_random, is_vjp
from graphrewrite.graph.tape import Tape

if TYPE_CHECKING:
    from graphrewrite.graph.joint import JointGraph


def verify(graph: JointGraph, *, recompute: bool = True) -> None:
    """Raise `VerifyError` at the first broken invariant.

    Args:
        graph: Any level.
        recompute: Also run every operator on fake values and compare; the slow part.
    """
    _check_structure(graph)
    _check_signature(graph)
    _check_roles(graph)
    if recompute:
        _check_values(graph)


def _fail(text: str, node: fx.Node | None = None) -> VerifyError:
    own: NodeInfo | None = node.meta.get("gr") if node is not None else None
    return VerifyError(
        text,
        node=node.name if node is not None else None,
        module=own.module if own else None,
        source=own.source if own else None,
    )


def _check_structure(graph: JointGraph) -> None:
    seen: set[fx.Node] = set()
    operators_started = False
    for node in graph.nodes:
        for source in node.all_input_nodes:
            if source not in seen:
                raise _fail(f"reads {source.name} before it is computed", node)
            if node not in source.users:
                raise _fail(f"is no user of {source.name} although it reads it", node)
        if node.op == "placeholder" and operators_started:
            raise _fail("an input stands behind an operator", node)
        operators_started |= node.op != "placeholder"
        if node.op not in ("placeholder", "call_function", "get_attr", "output"):
            raise _fail(f"nodes of kind {node.op} are not part of the representation", node)
        if node.op != "output":
            if not isinstance(node.meta.get("gr"), NodeInfo):
                raise _fail("has no NodeInfo: create nodes with graph.emit", node)
            if "val" not in node.meta:
                raise _fail("has no fake value: create nodes with graph.emit", node)
            if node.op == "call_function" and not info(node).made_by:
                raise _fail("has no provenance", node)
        seen.add(node)


def _check_signature(graph: JointGraph) -> None:
    specs = [spec_of(n) for n in graph.nodes if n.op == "placeholder"]
    if None in specs or len(set(specs)) != len(specs):
        raise _fail("inputs without a specification, or two with the same one")
    fakes: dict[int, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder" and isinstance(value(node), torch.Tensor):
            other = fakes.setdefault(id(value(node)), node)
            if other is not node:
                raise _fail(f"shares its fake value with input {other.name}: tracing would merge them", node)
    output = graph.output_node
    if len(output.meta.get("specs", ())) != len(output.args[0]):  # type: ignore[arg-type]
        raise _fail("results and their specifications differ in number")
    if len(set(output.meta["specs"])) != len(output.meta["specs"]):
        raise _fail("two results have the same specification")
    inputs = graph.inputs
    for spec, node in graph.outputs.items():
        if not isinstance(node, fx.Node):
            raise _fail(f"{spec} is no node but {node!r}")
        if not isinstance(spec, Grad):
            continue
        if spec.of not in inputs:
            raise _fail(f"{spec}: the graph has no such input", node)
        want, got = value(inputs[spec.of]), value(node)
        if not isinstance(got, torch.Tensor) or tuple(got.shape) != tuple(want.shape) or got.dtype != want.dtype:
            shown = f"{got.dtype} {tuple(got.shape)}" if isinstance(got, torch.Tensor) else type(got).__name__
            raise _fail(f"{spec} is {shown}, not {want.dtype} {tuple(want.shape)}", node)


def _check_roles(graph: JointGraph) -> None:
    allowed = graph.forward_may_read_cotangents
    names = {block.name for block in graph.blocks}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        own = info(node)
        if own.role in (Role.FORWARD, Role.LOSS) and not allowed:
            for source in node.all_input_nodes:
                if is_backward(source) or type(spec_of(source)).__name__ == "Tangent":
                    raise _fail(f"a forward node reads the cotangent {source.name}", node)
        if own.block and names and own.block not in names and own.block != "loss":
            raise _fail(f"belongs to block {own.block!r}, which does not exist", node)


def _check_values(graph: JointGraph) -> None:
    tapes: dict[fx.Node, Tape] = {}
    with graph.tracing(), torch.no_grad():
        for node in graph.nodes:
            if node.op != "call_function" or value(node) is None:
                continue
            try:
                computed = _recompute(node, tapes)
            except GraphRewriteError:
                raise
            except Exception as error:
                raise _fail(f"cannot run on the values of its inputs: {str(error).splitlines()[0]}", node) from error
            _same(node, value(node), computed)


def _recompute(node: fx.Node, tapes: dict[fx.Node, Tape]) -> Any:
    if not is_vjp(node):
        args, kwargs = fx.map_arg((node.args, node.kwargs), value)
        return call_operator(node.target, args, kwargs)  # type: ignore[arg-type]
    call = VjpCall.of(node)
    if call.replaced:
        tape = Tape(call.mirror, value, call.wrt, {p: value(n) for p, n in call.replaced.items()})
    else:
        if call.mirror not in tapes:
            siblings = [VjpCall.of(user) for user in call.mirror.users if is_vjp(user)]
            positions = {p for other in siblings if other.mirror is call.mirror for p in other.wrt}
            tapes[call.mirror] = Tape(call.mirror, value, sorted(positions))
        tape = tapes[call.mirror]
    grads = tape.vjp([None if c is None else value(c) for c in call.cotangents], call.wrt)
    return grads[0] if len(grads) == 1 else tuple(grads)


def _same(node: fx.Node, recorded: Any, computed: Any) -> None:
    if isinstance(recorded, (tuple, list)):
        if not isinstance(computed, (tuple, list)) or len(recorded) != len(computed):
            raise _fail("its recorded value has another structure than what it computes", node)
        for r, c in zip(recorded, computed, strict=True):
            _same(node, r, c)
        return
    if isinstance(recorded, torch.SymInt):
        if not _equal_size(recorded, computed):
            raise _fail(f"its recorded value is {recorded}, it computes {computed}", node)
        return
    if not isinstance(recorded, torch.Tensor):
        return
    if not is_fake(recorded):
        raise _fail("its recorded value is a real tensor", node)
    if not isinstance(computed, torch.Tensor):
        raise _fail(f"computes no tensor but {type(computed).__name__}", node)
    mine = (recorded.dtype, recorded.device, recorded.dim())
    theirs = (computed.dtype, computed.device, computed.dim())
    if mine != theirs or not _equal_sizes(recorded, computed):
        raise _fail(
            f"its recorded value is {recorded.dtype} {tuple(recorded.shape)}, it computes "
            f"{computed.dtype} {tuple(computed.shape)}",
            node,
        )


def _equal_sizes(left: torch.Tensor, right: torch.Tensor) -> bool:
    return all(_equal_size(a, b) for a, b in zip(left.shape, right.shape, strict=True))


def _equal_size(a: torch.SymInt | int, b: torch.SymInt | int) -> bool:
    """Equality of sizes, without adding a guard."""
    if str(a) == str(b):
        return True
    if isinstance(a, int) and isinstance(b, int):
        return False
    if any(isinstance(s, torch.SymInt) and s.node.hint is None for s in (a, b)):
        return True  # a size that depends on data is a new symbol each time it is computed
    if isinstance(a, int) or isinstance(b, int):
        return statically_known_true(a == b)  # the example's number in the place of a symbol is wrong for the next
    # symbolic sizes without a provable relation (floor divisions) are compared at the example's values
    return hint(a) == hint(b)


def has_random(graph: JointGraph) -> bool:
    """Whether the graph draws from torch's global generator."""
    return any(is_random(n) for n in graph.nodes)
