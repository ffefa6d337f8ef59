"""Parameters, buffers and state dictionary of a compiled module: the model's under their own names, then rule state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from graphrewrite.errors import RuleError
from graphrewrite.graph.nodes import State, info
from graphrewrite.runtime.state import RuleState

if TYPE_CHECKING:
    from graphrewrite.compiler import Options
    from graphrewrite.runtime.program import Program

_STATE_PREFIX = "_graphrewrite."
_MODULE_PREFIX = "module."
_EXTRA = "_extra_state"
_COUNTER = _STATE_PREFIX + _EXTRA
"""Our own extra state; under its plain name stands that of the user's model, if it has one."""


class StatefulModule(nn.Module):
    """The part of `CompiledModule` that names parameters and state."""

    module: nn.Module
    _graphrewrite: RuleState
    _options: Options
    _latest: dict[str, Program]
    _step: int
    _calls: int

    def settle(self) -> None:
        """Do to parameters what the rule does after an optimizer step, if there was one."""

    @property
    def captured(self) -> bool:
        """Whether there is a program to look at: `materialize`, or a call that records a gradient, makes one."""
        return bool(self._latest)

    def program(self, kind: str | None = None) -> Program:
        """The most recent program, preferably one that trains."""
        for wanted in (kind,) if kind else ("loss", "forward", "evaluate", "predict"):
            if wanted in self._latest:
                return self._latest[wanted]
        raise RuleError(
            "nothing is captured yet", remedy="give example_inputs to compile, or call materialize(x, y) or loss(x, y)"
        )

    def name_entries_as_the_model_does(self) -> None:
        """Let `state_dict` and `load_state_dict` use the model's own names."""
        self._register_state_dict_hook(_strip_module_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_add_module_prefix)  # type: ignore[no-untyped-call]

    def parameters_by_block(self) -> dict[str, list[str]]:
        """Names of the parameters by the block that reads them first."""
        graph = self.program().captured.graph
        found: dict[str, list[str]] = {block.name: [] for block in graph.blocks}
        for name, node in graph.parameters().items():
            block = next((info(u).block for u in node.users if info(u).block in found), None)
            if block is not None:
                found[block].append(name)
        return {block: names for block, names in found.items() if names}

    def param_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups, one per block, each with a `"name"`: its parameters, then the learned state it reads.

        What no block reads forms a last group named `"rest"`.
        """
        named = dict(self.module.named_parameters())
        params = {block: [named[n] for n in names] for block, names in self.parameters_by_block().items()}
        graph = self.program().operator
        for spec, node in graph.inputs.items():
            if isinstance(spec, State) and spec.trainable:
                held = self._graphrewrite.find(spec.name)
                block = next((info(u).block for u in node.users if u.op == "call_function"), "")
                if isinstance(held, nn.Parameter) and any(block == b.name for b in graph.blocks):
                    params.setdefault(block, []).append(held)
        groups = [{"name": b.name, "params": params[b.name]} for b in graph.blocks if params.get(b.name)]
        grouped = {id(p) for group in groups for p in group["params"]}
        rest = [p for p in self.parameters() if id(p) not in grouped]
        return [*groups, {"name": "rest", "params": rest}] if rest else groups

    @property
    def rule_state(self) -> dict[str, torch.Tensor]:
        """Rule state by name: feedback weights, heads, statistics."""
        return dict(self._graphrewrite.items())

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The model's parameters under their own names, then learned rule state."""
        self._require_state("parameters()")
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            yield _own_name(name, prefix), parameter

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The model's buffers under their own names, then fixed rule state."""
        for name, buffer in super().named_buffers(prefix, recurse, remove_duplicate):
            yield _own_name(name, prefix), buffer

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's entries under their own names, plus `_graphrewrite.<rule>.<name>`."""
        self._require_state("state_dict()")
        self.settle()
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state of this module, or of the bare model (then the present rule state is kept)."""
        own = dict(state_dict)
        if _is_counter(self, own.get(_EXTRA)):
            own[_COUNTER] = own.pop(_EXTRA)
        if not any(key.startswith(_STATE_PREFIX) for key in own):
            # the state of a bare model: the present rule state and counter stay
            kept = self.state_dict().items()
            own.update({key: held for key, held in kept if key.startswith(_STATE_PREFIX) and key not in own})
        return super().load_state_dict(own, strict=strict, assign=assign)

    def get_extra_state(self) -> dict[str, int]:
        """The counters of the random operators and of the schedule of feedback phases."""
        return {"seed": self._options.seed, "step": self._step, "calls": self._calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Continue the random streams where they were."""
        self._step = int(state["step"])
        self._calls = int(state.get("calls", 0))

    def _require_state(self, what: str) -> None:
        learns = [rule.name for rule in self._options.rules.rules if rule.learns_state]
        if learns and not self._latest and not any(True for _ in self._graphrewrite.items()):
            raise RuleError(
                f"{what} of rule {learns[0]} is incomplete: its learned state is not created yet",
                remedy="give example_inputs and example_targets to compile, or call materialize(x, y) first",
            )


def _own_name(name: str, prefix: str) -> str:
    start = f"{prefix}." if prefix else ""
    rest = name[len(start) :]
    return start + rest.removeprefix(_MODULE_PREFIX)


def _is_counter(module: StatefulModule, held: Any) -> bool:
    """Whether what stands under the plain name is the counter: earlier versions wrote it there."""
    models = type(module.module).get_extra_state is not nn.Module.get_extra_state
    return isinstance(held, dict) and "step" in held and not models


def _strip_module_prefix(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    if prefix + _EXTRA in state:
        state[prefix + _COUNTER] = state.pop(prefix + _EXTRA)
    for key in [k for k in state if k.startswith(prefix + _MODULE_PREFIX)]:
        state[prefix + key[len(prefix + _MODULE_PREFIX) :]] = state.pop(key)


def _add_module_prefix(module: StatefulModule, state: dict[str, Any], prefix: str, *_args: Any) -> None:
    earlier = state.pop(prefix + _EXTRA) if _is_counter(module, state.get(prefix + _EXTRA)) else None
    for key in [k for k in state if k.startswith(prefix)]:
        rest = key[len(prefix) :]
        if not rest.startswith(_STATE_PREFIX):
            state[prefix + _MODULE_PREFIX + rest] = state.pop(key)
    counter = state.pop(prefix + _COUNTER, earlier)
    if counter is not None:
        state[prefix + _EXTRA] = counter
