"""More than one process, on PyTorch's own distributed engine: pipelines, their simulation, local rules in them."""

from graphrewrite.backends.distributed import checkpoint
from graphrewrite.backends.distributed.cut import Cut, Part, cut
from graphrewrite.backends.distributed.failures import LostProcessError
from graphrewrite.backends.distributed.local import DFAPipeline, LocalPipeline
from graphrewrite.backends.distributed.optimise import Optimised, optimise
from graphrewrite.backends.distributed.pipeline import SCHEDULES, Pipeline
from graphrewrite.backends.distributed.simulate import Timeline, actions_of, simulate

__all__ = [
    "SCHEDULES",
    "Cut",
    "DFAPipeline",
    "LocalPipeline",
    "LostProcessError",
    "Optimised",
    "Part",
    "Pipeline",
    "Timeline",
    "actions_of",
    "checkpoint",
    "cut",
    "optimise",
    "simulate",
]
