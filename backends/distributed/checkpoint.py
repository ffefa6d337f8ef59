"""Checkpoints of distributed training, by `torch.distributed.checkpoint`: whole ones or none.

All processes write their parts into a folder of another name, which is renamed once everything is on disk. What a
process that died in between leaves behind is never taken for a checkpoint, and is removed by the next attempt.
"""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Mapping

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import save as save_parts
from torch.optim import Optimizer

from graphrewrite._compat import load_checkpoint
from graphrewrite.errors import RuleError

_PREFIX, _UNFINISHED = "step_", ".part"


def save(
    folder: str | os.PathLike[str],
    step: int,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    *,
    group: dist.ProcessGroup | None = None,
) -> pathlib.Path:
    """Write a checkpoint; every process of the group calls this, and returns once it is whole.

    Args:
        folder: Where the checkpoints of this training are.
        step: The number of the step; must not be there yet.
        modules: Compiled modules, with the state of their rules, or others. Processes that hold the same (data
            parallel) use the same names, processes that hold different ones (stages) different names.
        optimizers: The same for optimizers.
        group: The processes that take part.

    Returns:
        The folder of the checkpoint.
    """
    target = pathlib.Path(folder) / f"{_PREFIX}{step}"
    part = target.with_name(target.name + _UNFINISHED)
    if target.exists():
        raise RuleError(f"there is a checkpoint {target} already", remedy="use another folder, or remove it")
    first = dist.get_rank(group) == 0
    if first:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    dist.barrier(group)
    state = {
        "modules": {name: module.state_dict() for name, module in modules.items()},
        "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
    }
    save_parts(state, checkpoint_id=part, process_group=group)
    dist.barrier(group)
    if first:
        part.rename(target)
    dist.barrier(group)
    return target


def latest(folder: str | os.PathLike[str]) -> int | None:
    """The step of the newest whole checkpoint; None if there is none."""
    names = [p.name.removeprefix(_PREFIX) for p in pathlib.Path(folder).glob(f"{_PREFIX}*") if p.is_dir()]
    return max((int(name) for name in names if name.isdecimal()), default=None)


def load(
    folder: str | os.PathLike[str],
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    *,
    step: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> int:
    """Read a checkpoint into modules and optimizers; every process of the group calls this.

    A compiled module whose rule has state must be materialised.

    Args:
        folder: Where the checkpoints of this training are.
        modules: As for `save`; those that are named here are read.
        optimizers: As for `save`.
        step: Which checkpoint; None: the newest.
        group: The processes that take part.

    Returns:
        The step of the checkpoint.

    Raises:
        RuleError: There is no such checkpoint, or it does not hold what is named.
    """
    found = latest(folder) if step is None else step
    path = pathlib.Path(folder) / f"{_PREFIX}{found}"
    if found is None or not path.is_dir():
        what = "whole checkpoint" if step is None else f"whole checkpoint of step {step}"
        raise RuleError(f"{os.fspath(folder)} holds no {what}")
    keys = {f"modules.{name}" for name in modules} | {f"optimizers.{name}" for name in optimizers}
    held = load_checkpoint(path, keys, group)
    for kind, objects in (("modules", modules), ("optimizers", optimizers)):
        for name, one in objects.items():
            if name not in held.get(kind, {}):
                raise RuleError(f"the checkpoint {path} holds no {kind[:-1]} {name!r}")
            state = held[kind][name]
            if kind == "optimizers":
                # the format has no numbers as keys
                state = {**state, "state": {int(key): entry for key, entry in state.get("state", {}).items()}}
            one.load_state_dict(state)
    return found
