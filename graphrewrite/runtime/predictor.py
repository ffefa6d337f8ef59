"""What a rule trained, as a plain module: for export, for serving, for other tools."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from graphrewrite.graph.nodes import Buffer, Constant, InputSpec, Param, State, UserInput, UserOutput
from graphrewrite.runtime.program import Program


class Predictor(nn.Module):
    """Computes what `compiled.predict` computes, called as the user's model is called.

    It holds the same parameters, buffers and rule state as the compiled model, so it follows further training. Its
    graph is the one captured in the mode and for the input ranks and dtypes of the call that made it.
    """

    def __init__(self, program: Program, fetch: Callable[[InputSpec], torch.Tensor]) -> None:
        super().__init__()
        part = program.partition
        self.graph = fx.GraphModule(part.forward, part.forward.graph)
        self._captured = program.captured
        self._results = [index for spec, index in part.forward_outputs.items() if isinstance(spec, UserOutput)]
        self._feeds: list[tuple[str, Any]] = []
        for number, spec in enumerate(part.forward_inputs):
            if isinstance(spec, UserInput):
                self._feeds.append(("", spec.index))
                continue
            assert isinstance(spec, (Param, Buffer, State, Constant)), spec
            name = f"{type(spec).__name__.lower()}_{spec.name.replace('.', '_')}_{number}"
            held = part.graph.constants[spec.name] if isinstance(spec, Constant) else fetch(spec)
            if isinstance(held, nn.Parameter):
                self.register_parameter(name, held)
            else:
                self.register_buffer(name, held)
            self._feeds.append((name, None))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The rule's prediction, in the structure of the model's output."""
        leaves = pytree.tree_leaves((args, kwargs))
        values = [getattr(self, name) if name else leaves[index] for name, index in self._feeds]
        with torch.no_grad():
            results = self.graph(*values)
        return self._captured.rebuild([results[i] for i in self._results])
