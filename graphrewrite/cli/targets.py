"""Reading a target: what the user wants to look at or to train."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from graphrewrite import api
from graphrewrite._compat import quiet_export
from graphrewrite.analysis.blocks import assign_blocks
from graphrewrite.capture import capture
from graphrewrite.cli.options import blocks_of
from graphrewrite.cli.show import working
from graphrewrite.errors import GraphRewriteError
from graphrewrite.graph.joint import JointGraph
from graphrewrite.inputs import Inputs, as_inputs, as_targets
from graphrewrite.rule import RuleMap
from graphrewrite.runtime.module import CompiledModule

FORMS = "write package.module:factory, path.py:factory, or the path of an exported .pt2 file"
RETURNS = "return (model, example_inputs) or (model, example_inputs, example_targets)"

RuleText = str | dict[str, str]


@dataclass(frozen=True)
class Target:
    """A model with an example batch.

    Attributes:
        name: What the user typed.
        model: The model.
        inputs: Example inputs, as `compile` takes them.
        targets: Example targets; None if the factory returns none.
        blocks: How to cut it into blocks.
        loss: The user's loss; None: the default one.
        seed: Seed for `compile`.
    """

    name: str
    model: nn.Module
    inputs: Any
    targets: Any = None
    blocks: str | list[str] = "auto"
    loss: Callable[[Any, Any], torch.Tensor] | None = None
    seed: int = 0

    def compile(
        self,
        rule: RuleText,
        compress: Any = None,
        memory_budget: float | None = None,
        *,
        split_backward: bool = False,
    ) -> CompiledModule:
        """The model, compiled under a rule and captured for the example batch."""
        rules = RuleMap.of(rule)
        needy = [one.name for one in rules.rules if one.needs_loss]
        if needy and self.targets is None:
            raise GraphRewriteError(
                f"rule {needy[0]} needs targets, and {self.name} gives none",
                remedy="let the factory return (model, example_inputs, example_targets)",
            )
        with working(f"compiling {self.name} under {rules}"):
            return api.compile(
                self.model,
                rule,
                example_inputs=self.inputs,
                example_targets=self.targets,
                blocks=self.blocks,
                compress=compress,
                memory_budget=memory_budget,
                loss=self.loss,
                seed=self.seed,
                split_backward=split_backward,
            )

    def forward_graph(self, rule: RuleText) -> JointGraph:
        """The captured forward graph with its blocks, before any rule has touched it."""
        with working(f"capturing {self.name}"):
            graph = capture(
                self.model,
                as_inputs(self.inputs),
                loss=None if self.targets is None else self.loss or api.default_loss,
                targets=as_targets(self.targets),
            ).graph
        assign_blocks(graph, self.model, self.blocks)
        RuleMap.of(rule).assign(graph)
        return graph


def load_target(text: str, *, blocks: str = "auto", loss: str | None = None, seed: int = 0) -> Target:
    """Read a target.

    Args:
        text: `package.module:factory`, `path.py:factory`, or the path of a `.pt2` file.
        blocks: The text of `--blocks`.
        loss: The text of `--loss`.
        seed: Torch is seeded with it before the factory runs.

    Raises:
        GraphRewriteError: It cannot be found, or is not what it should be.
    """
    if seed < 0:
        raise GraphRewriteError(f"seed {seed} is negative", remedy="use 0 or more")
    with working(f"loading {text}"):
        loss_fn = None if loss is None else find_object(loss, "function")
        if text.endswith(".pt2"):
            return Target(text, *_load_exported(Path(text)), None, blocks_of(blocks), loss_fn, seed)
        factory = find_object(text, "factory")
        torch.manual_seed(seed)
        try:
            made = factory()
        except Exception as error:  # the factory is the user's code: it may raise anything
            raise GraphRewriteError(
                f"{text} raised {_in_short(error)}", remedy="run again with --debug for the traceback"
            ) from error
    model, inputs, targets = _check(text, made)
    return Target(text, model, inputs, targets, blocks_of(blocks), loss_fn, seed)


def find_object(text: str, what: str) -> Callable[..., Any]:
    """The callable behind `package.module:name` or `path.py:name`."""
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name:
        raise GraphRewriteError(f"{text!r} names no {what}", remedy=FORMS)
    held: Any = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    for part in name.split("."):
        if not hasattr(held, part):
            own = [n for n, v in vars(held).items() if getattr(v, "__module__", "") == getattr(held, "__name__", None)]
            known = ", ".join(n for n in own if not n.startswith("_"))
            raise GraphRewriteError(f"{place} has no {part!r}", remedy=f"it defines: {known or 'nothing to call'}")
        held = getattr(held, part)
    if not callable(held):
        raise GraphRewriteError(
            f"{text} cannot be called, it is of type {type(held).__name__}", remedy=f"name a {what}"
        )
    return held  # type: ignore[no-any-return]


@contextlib.contextmanager
def _importing(text: str, folder: Path) -> Iterator[None]:
    """Imports find what lies in `folder`; what goes wrong in the user's module is told in one line."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        yield
    except Exception as error:  # importing runs the user's code: it may raise anything
        raise GraphRewriteError(
            f"importing {text} failed: {_in_short(error)}", remedy="run again with --debug for the traceback"
        ) from error


def _import_module(name: str) -> ModuleType:
    with _importing(name, Path.cwd()):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
                raise
            missing = error.name
    raise GraphRewriteError(
        f"there is no module {missing!r}",
        remedy="check its name; modules are looked for in the working directory and among installed packages",
    )


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise GraphRewriteError(f"there is no file {path}", remedy=FORMS)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses and pickling look a class's module up by name
    sys.modules.setdefault(path.stem, module)
    with _importing(str(path), path.parent.resolve()):
        spec.loader.exec_module(module)
    return module


def _load_exported(path: Path) -> tuple[nn.Module, Inputs]:
    if not path.is_file():
        raise GraphRewriteError(f"there is no file {path}", remedy=FORMS)
    with warnings.catch_warnings(), quiet_export(), _logged("torch.export") as logged:
        # torch warns and logs about its own file format while it reads it
        warnings.simplefilter("ignore")
        try:
            program = torch.export.load(path)
            # with the modules of the model it was exported from, so that blocks and paths are the user's own
            model = torch.export.unflatten(program)
        except Exception as error:  # the reader of the format raises whatever a damaged file leads it to
            raise _unreadable(path, logged[-1] if logged else error) from error
    if program.example_inputs is None:
        raise GraphRewriteError(f"{path} holds no example inputs", remedy="export the model again with example inputs")
    args, kwargs = program.example_inputs
    return model, Inputs(*args, **kwargs)


@contextlib.contextmanager
def _logged(name: str) -> Iterator[list[BaseException]]:
    """The exceptions that a logger is told of meanwhile, instead of its printing them."""
    logger, held = logging.getLogger(name), list[BaseException]()

    def keep(record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None:
            held.append(record.exc_info[1])
        return False

    level = logger.level
    logger.setLevel(logging.WARNING)
    logger.addFilter(keep)
    try:
        yield held
    finally:
        logger.removeFilter(keep)
        logger.setLevel(level)


def _unreadable(path: Path, error: BaseException) -> GraphRewriteError:
    unregistered = re.search(r"Deserializing (\S+) in pytree is not registered", str(error))
    if unregistered:
        return GraphRewriteError(
            f"{path} takes or returns {unregistered[1]}, which torch cannot rebuild from a file",
            remedy="export it again with plain tuples and dicts, or name a factory that builds the model",
        )
    return GraphRewriteError(
        f"{path} cannot be read as an exported program: {_in_short(error)}",
        remedy="write it with torch.export.save, by the same version of torch",
    )


def _check(text: str, made: Any) -> tuple[nn.Module, Any, Any]:
    if not isinstance(made, (tuple, list)) or len(made) not in (2, 3):
        got = f"{len(made)} values" if isinstance(made, (tuple, list)) else f"one {type(made).__name__}"
        raise GraphRewriteError(f"{text} returned {got}", remedy=RETURNS)
    model, inputs, *targets = made
    if not isinstance(model, nn.Module):
        raise GraphRewriteError(f"{text} returned a {type(model).__name__} in the place of the model", remedy=RETURNS)
    as_inputs(inputs)
    return model, inputs, as_targets(targets[0]) if targets else None


def _in_short(error: BaseException) -> str:
    line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
