"""The textual form of a graph: one line per node, the same on every run, fit for golden tests.

Names are made from operators in order (`linear`, `linear_1`, `d_linear_1`), symbolic sizes from their first
appearance (`s0`, `s1`), so that neither depends on the torch version or on edits that were undone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from graphrewrite.graph.loop import LoopCall, is_loop
from graphrewrite.graph.nodes import Role, hint, info, is_backward, is_getitem, spec_of, value
from graphrewrite.graph.ops import VjpCall, is_vjp

if TYPE_CHECKING:
    from graphrewrite.graph.joint import JointGraph

_DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b8",
    torch.complex64: "c64",
    torch.complex128: "c128",
}

_DIVISIONS = {"FloorDiv": "//", "CleanDiv": "//", "IntTrueDiv": "/", "Mod": "%", "PythonMod": "%"}

LONG_SIZE = 16
"""A symbolic size of more characters is shown as the example's number in types."""


@dataclass(frozen=True)
class Line:
    """One node of the printed graph."""

    name: str
    type: str
    expression: str
    role: str
    block: str
    module: str
    section: str
    node: fx.Node


class Names:
    """Stable display names of nodes and symbolic sizes."""

    def __init__(self, graph: JointGraph) -> None:
        self._nodes: dict[fx.Node, str] = {}
        self._used: dict[str, int] = {}
        self._symbols: dict[str, str] = {}
        self.loops = [node for node in graph.nodes if is_loop(node)]
        for node in graph.nodes:
            if node.op != "output":
                self._nodes[node] = self._name(node)
        for number, loop in enumerate(self.loops):
            call = LoopCall.of(loop)
            for i, node in enumerate(call.body.placeholders):
                kind, position = ("state", i) if i < call.body.states else ("input", i - call.body.states)
                self._nodes[node] = f"body{number}.{kind}{position}"
            for node in call.body.nodes:
                self._nodes[node] = self._name(node)

    def _name(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            return self._unique(_tidy(str(spec_of(node)).rpartition(" ")[2]))
        if node.op == "get_attr":
            return self._unique(str(node.target))
        if is_getitem(node):
            source = node.args[0]
            if isinstance(source, fx.Node) and source in self._nodes:
                return f"{self._nodes[source]}.{node.args[1]}"
        own = info(node)
        mirror = own.mirrors
        if is_vjp(node) and mirror in self._nodes:
            return self._unique(f"{_prefix(node)}_{self._nodes[mirror]}")
        if own.role is Role.ACCUMULATE and own.cotangent_of in self._nodes:
            return self._unique(f"sum_{self._nodes[own.cotangent_of]}")
        return self._unique(operator_name(node) + (f"_{own.copy}" if own.copy else ""))

    def _unique(self, wish: str) -> str:
        count = self._used.get(wish, 0)
        self._used[wish] = count + 1
        return wish if count == 0 else f"{wish}_{count}"

    def __getitem__(self, node: fx.Node) -> str:
        return self._nodes.get(node, node.name)

    def size(self, size: Any) -> str:
        """A size as text, `s0·784`; symbols are renamed by first appearance."""
        if isinstance(size, int):
            return str(size)
        expr = size.node.expr
        for symbol in sorted(expr.free_symbols, key=str):
            self._symbols.setdefault(str(symbol), f"s{len(self._symbols)}")
        return _formula(expr, self._symbols)

    def _short_size(self, size: Any) -> str:
        """A size as text; where that is long, the example's number: `~784`."""
        text = self.size(size)
        return text if len(text) <= LONG_SIZE else f"~{hint(size)}"

    def type(self, val: Any) -> str:
        """A value's dtype and shape: `f32[s0, 64]`."""
        if isinstance(val, torch.Tensor):
            dtype = _DTYPES.get(val.dtype, str(val.dtype).removeprefix("torch."))
            return f"{dtype}[{', '.join(self._short_size(s) for s in val.shape)}]"
        if isinstance(val, (tuple, list)):
            return f"({', '.join(self.type(v) for v in val)})"
        if isinstance(val, torch.SymInt):
            return f"size {self._short_size(val)}"
        return "" if val is None else type(val).__name__


def _formula(expr: Any, symbols: dict[str, str]) -> str:
    """A symbolic size as a person writes it: `s0·784`, `s0//2 + 1`."""
    if expr.is_Symbol:
        return symbols.get(str(expr), str(expr))
    if expr.is_Add:
        terms = sorted(
            (_formula(term, symbols) for term in expr.args), key=lambda text: (text.lstrip("-").isdigit(), text)
        )
        return " + ".join(terms).replace("+ -", "- ")
    if expr.is_Mul:
        number, rest = expr.as_coeff_mul()
        factors = sorted(_operand(factor, symbols) for factor in rest)
        sign = "-" if number < 0 else ""
        return sign + "·".join([*factors, *([str(abs(number))] if abs(number) != 1 else [])])
    if expr.is_Pow:
        return f"{_operand(expr.base, symbols)}^{_operand(expr.exp, symbols)}"
    name = type(expr).__name__
    if name in _DIVISIONS:
        return _DIVISIONS[name].join(_operand(arg, symbols) for arg in expr.args)
    if expr.args:
        return f"{name.lower()}({', '.join(_formula(arg, symbols) for arg in expr.args)})"
    return str(expr)


def _operand(expr: Any, symbols: dict[str, str]) -> str:
    text = _formula(expr, symbols)
    return text if text.isalnum() or (text.endswith(")") and text.startswith(("max(", "min("))) else f"({text})"


def operator_name(node: fx.Node) -> str:
    """`linear` for `aten.linear.default`."""
    target: Any = node.target
    name = getattr(target, "__name__", str(target))
    return str(name).split(".")[0]


def _prefix(node: fx.Node) -> str:
    return "w" if info(node).role is Role.GRADIENT else "d"


def _tidy(text: str) -> str:
    return "".join(c if c.isalnum() or c in "._" else "_" for c in text).strip("_") or "x"


def lines(graph: JointGraph, names: Names | None = None) -> list[Line]:
    """The printed lines of a graph, in order."""
    names = names or Names(graph)
    return [_line(node, names) for node in graph.nodes if node.op != "output"]


def _line(node: fx.Node, names: Names) -> Line:
    own = info(node)
    if node.op == "placeholder":
        section, expression = "inputs", str(own.spec)
    else:
        section = "backward" if is_backward(node) else "forward"
        expression = _expression(node, names)
    return Line(
        f"%{names[node]}",
        names.type(value(node)),
        expression,
        str(own.role),
        own.block,
        own.module,
        section,
        node,
    )


def _expression(node: fx.Node, names: Names) -> str:
    if node.op == "get_attr":
        return f"attribute {node.target}"
    if is_vjp(node):
        call = VjpCall.of(node)
        shown = ["0" if c is None else f"%{names[c]}" for c in call.cotangents]
        text = f"{_prefix(node)}[%{names[call.mirror]}]({', '.join(shown)}"
        if call.replaced:
            text += "; " + ", ".join(f"input {p} read as %{names[n]}" for p, n in call.replaced.items())
        return text + ")"
    if is_loop(node):
        loop = LoopCall.of(node)
        state, inputs = (_argument(nodes, names) for nodes in (loop.state, loop.inputs))
        return f"repeat(body{names.loops.index(node)}, steps={loop.steps}, state={state}, inputs={inputs})"
    args = [_argument(a, names) for a in node.args]
    args += [f"{k}={_argument(v, names)}" for k, v in node.kwargs.items()]
    return f"{operator_name(node)}({', '.join(args)})"


def _argument(arg: Any, names: Names) -> str:
    if isinstance(arg, fx.Node):
        return f"%{names[arg]}"
    if isinstance(arg, (list, tuple)):
        return f"[{', '.join(_argument(a, names) for a in arg)}]"
    if isinstance(arg, float):
        return f"{arg:g}"
    if isinstance(arg, int) and arg == 9223372036854775807:
        return "end"
    return str(arg).removeprefix("torch.")


def to_text(graph: JointGraph) -> str:
    """The whole graph as aligned text."""
    names = Names(graph)
    rows = lines(graph, names)
    blocks = ", ".join(f"{b.name}:{b.rule}" for b in graph.blocks) or "not assigned"
    out = [f"graph at the {graph.level} level; blocks {blocks}"]
    width = max((len(row.name) for row in rows), default=0)
    types = min(max((len(row.type) for row in rows), default=0), 28)
    section = ""
    for row in rows:
        if row.section != section:
            section = row.section
            out.append(section)
        where = f"{row.role} {row.block}".strip() if row.section != "inputs" else ""
        text = f"  {row.name:<{width}} {row.type:<{types}} {row.expression}"
        out.append(f"{text}    # {where}" if where else text)
    for number, loop in enumerate(names.loops):
        out.append(f"body{number}")
        out += _body(loop, names)
    out.append("outputs")
    out += [f"  %{names[node]:<{width - 1}} {spec}" for spec, node in graph.outputs.items()]
    return "\n".join(line.rstrip() for line in out) + "\n"


def _body(loop: fx.Node, names: Names) -> list[str]:
    """The lines of a loop's body."""
    body = LoopCall.of(loop).body
    rows = []
    for node in body.nodes:
        own = info(node)
        text = f"  %{names[node]} {names.type(value(node))} {_expression(node, names)}"
        rows.append(f"{text}    # {own.role} {own.block}".rstrip())
    return [*rows, f"  next state {_argument(body.results, names)}"]


def count_operators(nodes: Iterable[fx.Node]) -> dict[str, int]:
    """How often each operator occurs, most frequent first."""
    counts: dict[str, int] = {}
    for node in nodes:
        if node.op == "call_function" and not is_getitem(node):
            name = operator_name(node)
            if is_vjp(node):
                mirror = info(node).mirrors
                name = f"{_prefix(node)}_{operator_name(mirror) if mirror is not None else 'op'}"
            counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
