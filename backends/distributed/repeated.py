"""Orders of forwards and input cotangents that repeat one block, for two stages per process, folded back.

All micro-batches take the same way through the processes, one every six slots: a forward, input cotangents and weight
gradients of two stages. How many slots lie between one process and the next, down and up, forwards and back, decides
how long a micro-batch is held, and so how many are: with three for each of the two stages, there and back, half of what
1F1B holds (V-Half), with two a third (V-Min), with six as much (V-ZB).

Qi, Wan, Amar, Lin 2024, https://arxiv.org/abs/2405.15362.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from graphrewrite.backends.distributed.simulate import Action, Kind

_SLOTS = 6


def orders(
    place: Sequence[int], micro_batches: int, there_and_back: Sequence[int] = range(2, _SLOTS + 1)
) -> Iterator[list[list[Action]]]:
    """Per process the forwards and input cotangents in order, without weight gradients, for each block that is legal.

    Args:
        place: The process of each stage. Blocks are known for stages folded back only; else there are none.
        micro_batches: How many per step.
        there_and_back: Slots from a process to the next and back again; 3 is V-Half.
    """
    ranks = max(place) + 1
    if list(place) != [*range(ranks), *reversed(range(ranks))]:
        return
    for both in there_and_back:
        for first, second in itertools.product(range(1, both), repeat=2):
            slots = _block(ranks, (first, second, both - second, both - first))
            if slots is None:
                continue
            found: list[list[tuple[int, Action]]] = [[] for _ in range(ranks)]
            for (kind, stage), slot in slots.items():
                found[place[stage]] += [(slot + _SLOTS * i, Action(kind, stage, i)) for i in range(micro_batches)]
            yield [[action for _, action in sorted(own, key=lambda one: one[0])] for own in found]


def _block(ranks: int, steps: tuple[int, int, int, int]) -> dict[tuple[Kind, int], int] | None:
    """The slots of one micro-batch: the first whose passes meet on no process; None if they always do.

    `steps`: from process to process, down and up, forwards and back.
    """
    for pauses in sorted(itertools.product(range(_SLOTS), repeat=3), key=sum):
        slots: dict[tuple[Kind, int], int] = {}
        at = 0
        way: list[tuple[Kind, int]] = [("F", s) for s in range(2 * ranks)]
        way += [("I", s) for s in reversed(range(2 * ranks))]
        for i, one in enumerate(way):
            if i:
                leg, new = divmod(i, ranks)
                at += steps[leg] if new else 1 + pauses[leg - 1]
            slots[one] = at
        used = {(min(stage, 2 * ranks - 1 - stage), slot % _SLOTS) for (_, stage), slot in slots.items()}
        if len(used) == len(slots):
            return slots
    return None
