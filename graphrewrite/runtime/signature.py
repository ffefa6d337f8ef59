"""Input signatures: what must be equal for a captured graph to be used again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphrewrite._compat import compile_guards
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import Target, UserInput, fixed, info, is_backward, value
from graphrewrite.graph.ops import reads_strides
from graphrewrite.inputs import Inputs


@dataclass(frozen=True)
class Call:
    """One call, flattened."""

    kind: str
    leaves: list[Any]
    targets: list[Any]
    key: tuple[Any, ...]


def flatten_call(kind: str, inputs: Inputs, targets: Any, dynamic: Any, model_key: tuple[Any, ...]) -> Call:
    """Flatten a call's inputs and targets and compute its signature."""
    leaves, spec = pytree.tree_flatten((inputs.args, inputs.kwargs))
    target_leaves, target_spec = pytree.tree_flatten(targets)
    static = dynamic is None
    key = (
        kind,
        spec,
        target_spec,
        tuple(_leaf_key(leaf, static) for leaf in leaves),
        tuple(_leaf_key(leaf, static) for leaf in target_leaves),
        _autocast_key(),
        model_key,
    )
    return Call(kind, leaves, target_leaves, key)


def _leaf_key(leaf: Any, static: bool) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf if isinstance(leaf, (bool, int, float, str, type(None))) else id(leaf)
    shape = leaf.shape
    # sizes 0 and 1 broadcast and vanish: graphs are specialised on them, so they are part of the signature
    pattern = tuple(shape) if static else tuple([s if s < 2 else -1 for s in shape])
    return (leaf.dtype, leaf.device, leaf.requires_grad, pattern, leaf.is_contiguous() or _order(leaf))


def _order(leaf: torch.Tensor) -> Any:
    """The dimensions by the steps they take in memory (channels-last, transposed); gaps between them do not matter."""
    if leaf.layout is not torch.strided:
        return leaf.layout
    strides = leaf.stride()
    return tuple(sorted(range(len(strides)), key=lambda dim: -strides[dim]))


def _autocast_key() -> tuple[Any, ...]:
    enabled = [d for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]
    return tuple((d, torch.get_autocast_dtype(d)) for d in enabled)


class ModelWatch:
    """Fast access to a model's modules, parameters and buffers by name, noticing every kind of change.

    Parameters are looked up in their module's dictionary at every call, so that reassignment, `load_state_dict` and
    `.to()` work; replaced submodules are noticed and found again.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.refresh()

    def refresh(self) -> None:
        """Walk the module tree again."""
        self._modules: list[tuple[dict[str, Any], str, nn.Module]] = []
        self._named: dict[str, nn.Module] = {}
        self._params: list[tuple[dict[str, Any], str]] = []
        self._slots: dict[str, tuple[dict[str, Any], str]] = {}
        self._tied: dict[int, str] = {}
        for path, module in self.model.named_modules(remove_duplicate=False):
            self._named[path] = module
            prefix = f"{path}." if path else ""
            for name, child in module._modules.items():
                if child is not None:
                    self._modules.append((module._modules, name, child))
            for name, held in module._parameters.items():
                self._slots[prefix + name] = (module._parameters, name)
                if held is not None:
                    self._params.append((module._parameters, name))
            for name in module._buffers:
                self._slots[prefix + name] = (module._buffers, name)

    def hooks(self) -> dict[str, int]:
        """How many hooks each module has."""
        return {path: n for path, m in self._named.items() if (n := _hook_count(m))}

    def key(self) -> tuple[Any, ...]:
        """What of the model a captured graph depends on: training flags and the parameters' metadata."""
        for siblings, name, module in self._modules:
            if siblings.get(name) is not module:
                self.refresh()
                break
        flags = tuple([(module.training, _hook_count(module)) for _, _, module in self._modules])
        params = tuple(
            [(p.requires_grad, p.dtype, p.device, p.shape) for d, n in self._params if (p := d[n]) is not None]
        )
        return (self.model.training, _hook_count(self.model), flags, params, self._identities())

    def _identities(self) -> tuple[int, ...]:
        """Which parameters are tied to which: the position of each one's first occurrence."""
        seen: dict[int, int] = {}
        return tuple([seen.setdefault(id(d[n]), i) for i, (d, n) in enumerate(self._params)])

    def slot(self, name: str) -> tuple[dict[str, Any], str]:
        """Where the parameter or buffer of that name lives."""
        return self._slots[name]


def _hook_count(module: nn.Module) -> int:
    return (
        len(module._forward_hooks)
        + len(module._forward_pre_hooks)
        + len(module._backward_hooks)
        + len(module._backward_pre_hooks)
    )


Guards = Callable[[Sequence[Any], Sequence[Any]], bool]


def make_guards(graph: JointGraph) -> tuple[list[str], Guards]:
    """What export and expansion had to specialise, as text and as a predicate over input and target leaves."""
    nodes = [n for n in graph.nodes if n.op == "placeholder" and isinstance(value(n), torch.Tensor)]
    fed = [n for n in nodes if isinstance(info(n).spec, (UserInput, Target))]
    shape_env = graph.fake_mode.shape_env
    names = [_path(n) for n in fed]
    text: list[str] = []
    # views that name steps in memory are right for one layout only
    strided = reads_strides(n for n in graph.nodes if not is_backward(n))
    symbolic: Callable[[Sequence[torch.Tensor]], bool] = lambda _tensors: True  # noqa: E731
    if shape_env is not None and fed:
        code, symbolic = compile_guards(shape_env, [value(n) for n in fed], names, strides=strided)
        text += [code] if code else []
    where = [(isinstance(info(n).spec, Target), info(n).spec.index) for n in fed]  # type: ignore[union-attr]
    static = [
        (number, dim, known)
        for number, n in enumerate(fed)
        for dim, size in enumerate(value(n).shape)
        if (known := fixed(size)) is not None
    ]
    text += [f"{names[number]}.shape[{dim}] == {size}" for number, dim, size in static]
    steps = [
        (number, dim, known)
        for number, n in enumerate(fed)
        for dim, step in enumerate(value(n).stride())
        if strided and (known := fixed(step)) is not None
    ]
    text += [f"{names[number]}.stride({dim}) == {step}" for number, dim, step in steps]

    def holds(leaves: Sequence[Any], targets: Sequence[Any]) -> bool:
        tensors = [(targets if is_target else leaves)[index] for is_target, index in where]
        return (
            all(tensors[number].shape[dim] == size for number, dim, size in static)
            and all(tensors[number].stride(dim) == step for number, dim, step in steps)
            and symbolic(tensors)
        )

    return text, holds


def _path(node: Any) -> str:
    spec = info(node).spec
    assert isinstance(spec, (UserInput, Target))
    return spec.path
