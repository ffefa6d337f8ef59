"""A graph as a Python file: one line per operator, with the user's modules and lines as comments.

The file needs torch alone (and graphrewrite where the model has a `torch.autograd.Function` of its own). `run(...)`
takes the graph's inputs in the order of `INPUTS` and returns its results in the order of `OUTPUTS`; executed as a
script it runs on random values of the sizes the graph was captured with. At the operator level a forward operator
that the backward differentiates is recorded on a tape, and its VJP is taken from there, as the interpreter does it.
"""

from __future__ import annotations

import keyword
import linecache
import re
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import LOSS_BLOCK, hint, info, is_backward, is_getitem, spec_of, value
from graphrewrite.graph.ops import VjpCall, is_custom, is_vjp
from graphrewrite.graph.text import Names

_TAPES = '''

def record(operator, args, kwargs, leaves):
    """Run an operator under autograd, on detached inputs: its result, and the tape its VJP is taken from."""
    flat, spec = pytree.tree_flatten((args, kwargs))
    tape = {"leaves": {}}
    for i in leaves:
        if isinstance(flat[i], torch.Tensor) and (flat[i].is_floating_point() or flat[i].is_complex()):
            flat[i] = tape["leaves"][i] = flat[i].detach().requires_grad_()
    args, kwargs = pytree.tree_unflatten(flat, spec)
    with torch.enable_grad():
        raw = operator(*args, **kwargs)
    tape["outputs"] = list(raw) if isinstance(raw, (tuple, list)) else [raw]
    return pytree.tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, raw), tape


def vjp(tape, cotangents, wrt):
    """Cotangents of the inputs at the flat positions `wrt`: one, or a tuple."""
    pairs = [(o, c) for o, c in zip(tape["outputs"], cotangents) if c is not None and o.requires_grad]
    inputs = [tape["leaves"][i] for i in wrt if i in tape["leaves"]]
    outs, cots = zip(*pairs)
    found = iter(torch.autograd.grad(outs, inputs, cots, retain_graph=True, allow_unused=True))
    grads = [next(found) if i in tape["leaves"] else None for i in wrt]
    return grads[0] if len(grads) == 1 else tuple(grads)
'''

_RESERVED = {"torch", "aten", "ops", "operator", "math", "pytree", "run", "record", "vjp", "example", "call_operator"}


def to_python(graph: JointGraph, title: str) -> str:
    """The Python file of a graph; `title` is the first line of its docstring."""
    return _Writer(graph, title).text()


class _Writer:
    def __init__(self, graph: JointGraph, title: str) -> None:
        self.graph = graph
        self.title = title
        self.names = Names(graph)
        self.rules = {block.name: block.rule for block in graph.blocks}
        self.identifiers: dict[fx.Node, str] = {}
        self.leaves: dict[fx.Node, list[int]] = {}
        self.attributes: list[str] = []
        used = set(_RESERVED)
        for node in graph.nodes:
            if node.op == "output":
                continue
            self.identifiers[node] = _identifier(self.names[node], used)
            if is_vjp(node) and not (call := VjpCall.of(node)).replaced:
                wanted = self.leaves.setdefault(call.mirror, [])
                wanted += [p for p in call.wrt if p not in wanted]

    def text(self) -> str:
        body = self._body()
        inputs = [n for n in self.graph.nodes if n.op == "placeholder"]
        imports = ["import math", "import operator", "", "import torch", "from torch.utils import _pytree as pytree"]
        targets = [n.target for n in self.graph.nodes if n.op == "call_function"]
        if any(isinstance(t, torch._ops.OpOverload) and t.namespace == "graphrewrite" for t in targets):
            imports += ["", "import graphrewrite.random  # registers its operators"]
        if any(is_custom(t) for t in targets):
            imports += ["", "from graphrewrite.graph.ops import call_operator"]
        blocks = ", ".join(f"{name} learns by {rule}" for name, rule in self.rules.items())
        head = [
            f'"""{_comment(self.title)}',
            "",
            f"Level: {self.graph.level}. Blocks: {_comment(blocks) or 'none'}.",
            f"{len(self.identifiers) - len(inputs)} operators. Sizes named s0, s1 may change from call to call.",
            '"""',
        ]
        attributes = [
            f"# {name!r}: a sub-graph that has no Python text; set it before run()" for name in self.attributes
        ]
        parts = [
            *head,
            "",
            *imports,
            "",
            "aten = torch.ops.aten",
            "inf, nan = math.inf, math.nan",
            *(["ATTRIBUTES = {}", *attributes] if self.attributes else []),
            "",
            *self._listing("INPUTS", [str(spec_of(n)) for n in inputs]),
            "",
            *self._listing("OUTPUTS", [str(spec) for spec in self.graph.outputs]),
        ]
        if any(is_vjp(n) for n in self.graph.nodes):
            parts.append(_TAPES.rstrip("\n"))
        parts += ["", "", *body, "", "", *self._example(inputs), "", "", 'if __name__ == "__main__":']
        parts += ["    for what, result in zip(OUTPUTS, run(*example())):"]
        parts += ['        print(f"{what}: {tuple(result.shape) if isinstance(result, torch.Tensor) else result}")', ""]
        return "\n".join(parts)

    @staticmethod
    def _listing(name: str, held: list[str]) -> list[str]:
        return [f"{name} = [", *[f"    {one!r}," for one in held], "]"]

    # --- the function ----------------------------------------------------------------------------------------------

    def _body(self) -> list[str]:
        arguments = [
            f"    {self.identifiers[n]},  # {_comment(f'{self.names.type(value(n))} {spec_of(n)}')}"
            for n in self.graph.nodes
            if n.op == "placeholder"
        ]
        lines = ["@torch.no_grad()", "def run(", *arguments, "):", f'    """{_comment(self.title)}"""']
        place: Any = None
        for node in self.graph.nodes:
            if node.op not in ("call_function", "get_attr"):
                continue
            own = info(node)
            here = (is_backward(node), own.block, own.module, own.copy, own.source)
            if here != place:
                lines += ["", *self._place(node, new_block=place is None or here[:2] != place[:2])]
                place = here
            lines.append(f"    {self._statement(node)}  # {self._about(node)}")
        results = [f"        {self.identifiers[n]},  # {_comment(str(spec))}" for spec, n in self.graph.outputs.items()]
        return [*lines, "", *(["    return (", *results, "    )"] if results else ["    return ()"])]

    def _place(self, node: fx.Node, *, new_block: bool) -> list[str]:
        own = info(node)
        out = []
        if new_block:
            rule = f", learns by {self.rules[own.block]}" if own.block in self.rules else ""
            half = "backward" if is_backward(node) else "forward"
            name = "the task loss" if own.block == LOSS_BLOCK else f"block {own.block}" if own.block else "no block"
            out.append(f"    # {f'--- {half} of {name}{rule} '.ljust(100, '-')}")
        where = [
            f"module {own.module}" if own.module else "",
            f"forward pass {own.copy}" if own.copy else "",
            own.source,
        ]
        if any(where):
            out.append(f"    # {_comment(', '.join(w for w in where if w))}")
        line = _users_line(own.source)
        return [*out, f"    #   {_comment(line)}"] if line else out

    def _about(self, node: fx.Node) -> str:
        own = info(node)
        made = "" if own.made_by in ("capture", "differentiate") else f", made by {own.made_by}"
        return _comment(f"{self.names.type(value(node))} {own.role}{made}".strip())

    def _statement(self, node: fx.Node) -> str:
        name = self.identifiers[node]
        if node.op == "get_attr":
            self.attributes.append(str(node.target))
            return f"{name} = ATTRIBUTES[{str(node.target)!r}]"
        if is_vjp(node):
            return f"{name} = {self._vjp(node)}"
        if node in self.leaves:
            target, args, kwargs = self._target(node), self._write(node.args), self._write(dict(node.kwargs))
            positions = tuple(sorted(_flat_positions(node)[p] for p in self.leaves[node]))
            return f"{name}, {name}_tape = record({target}, {args}, {kwargs}, {positions})"
        return f"{name} = {self._call(node)}"

    def _call(self, node: fx.Node) -> str:
        if is_getitem(node):
            return f"{self._write(node.args[0])}[{self._write(node.args[1])}]"
        args = [self._write(a) for a in node.args] + [f"{k}={self._write(v)}" for k, v in node.kwargs.items()]
        if is_custom(node.target):
            return f"call_operator({_target(node.target)}, {self._write(node.args)}, {self._write(dict(node.kwargs))})"
        return f"{_target(node.target)}({', '.join(args)})"

    def _target(self, node: fx.Node) -> str:
        target = _target(node.target)
        return f"lambda *a, **k: call_operator({target}, a, k)" if is_custom(node.target) else target

    def _vjp(self, node: fx.Node) -> str:
        call = VjpCall.of(node)
        flat = _flat_positions(call.mirror)
        wrt = tuple(flat[p] for p in call.wrt)
        tape = f"{self.identifiers[call.mirror]}_tape"
        if call.replaced:
            leaves, spec = pytree.tree_flatten((call.mirror.args, dict(call.mirror.kwargs)))
            for position, by in call.replaced.items():
                leaves[flat[position]] = by
            args, kwargs = pytree.tree_unflatten(leaves, spec)
            tape = f"record({self._target(call.mirror)}, {self._write(args)}, {self._write(kwargs)}, {wrt})[1]"
        return f"vjp({tape}, {self._write(tuple(call.cotangents))}, {wrt})"

    def _write(self, held: Any) -> str:
        if isinstance(held, fx.Node):
            return self.identifiers[held]
        if isinstance(held, tuple):
            return f"({', '.join(self._write(h) for h in held)}{',' if len(held) == 1 else ''})"
        if isinstance(held, list):
            return f"[{', '.join(self._write(h) for h in held)}]"
        if isinstance(held, dict):
            return f"{{{', '.join(f'{k!r}: {self._write(v)}' for k, v in held.items())}}}"
        if isinstance(held, slice):
            return f"slice({self._write(held.start)}, {self._write(held.stop)}, {self._write(held.step)})"
        if isinstance(held, torch.device):
            return f"torch.{held!r}"
        return repr(held)  # dtypes, layouts and memory formats are written as torch.float32

    # --- example values --------------------------------------------------------------------------------------------

    def _example(self, inputs: list[fx.Node]) -> list[str]:
        rows = [f"        {_random(value(n))},  # {_comment(str(spec_of(n)))}" for n in inputs]
        doc = '    """Random values of the captured sizes; integers are zeros."""'
        return ["def example():", doc, "    return [", *rows, "    ]"]


def _random(val: Any) -> str:
    if not isinstance(val, torch.Tensor):
        return str(hint(val)) if isinstance(val, (int, torch.SymInt)) else repr(val)
    shape = tuple(hint(size) for size in val.shape)
    device = "" if val.device.type == "cpu" else f", device={str(val.device)!r}"
    make = "randn" if val.is_floating_point() or val.is_complex() else "zeros"
    return f"torch.{make}({shape}, dtype={val.dtype}{device})"


def _target(target: Any) -> str:
    text = str(target)
    if isinstance(target, torch._ops.OpOverload):
        return text if text.startswith("aten.") else f"torch.ops.{text}"
    module = str(getattr(target, "__module__", "")).removeprefix("_")
    return f"{module}.{getattr(target, '__qualname__', text)}"


def _flat_positions(node: fx.Node) -> list[int]:
    """Position among the input nodes of a call -> position among all its flattened arguments."""
    flat, _ = pytree.tree_flatten((node.args, dict(node.kwargs)))
    return [i for i, leaf in enumerate(flat) if isinstance(leaf, fx.Node)]


def _identifier(name: str, used: set[str]) -> str:
    wish = re.sub(r"\W", "_", name)
    if not wish or wish[0].isdigit():
        wish = f"p_{wish}"
    if keyword.iskeyword(wish) or wish in used:
        wish += "_"
    found, i = wish, 0
    while found in used or f"{found}_tape" in used:
        i += 1
        found = f"{wish}{i}"
    used.update((found, f"{found}_tape"))
    return found


def _users_line(source: str) -> str:
    file, _, number = source.rpartition(":")
    return linecache.getline(file, int(number)).strip() if file and number.isdigit() else ""


def _comment(text: str) -> str:
    """Text that can stand in a comment or a docstring, whatever the model's names are."""
    return text.replace("\\", "/").replace('"""', "'''").replace("\r", " ").replace("\n", " ")
