"""Every intermediate graph of a compilation, written into a folder as runnable Python with its metadata as JSON.

The folder holds one folder per program, `001_loss` and so on. In it:

* `00_capture.py`, `01_differentiate.py`, then one file for each pass that changed the graph, in order; `operator.py`,
  the operator-level graph after everything; `forward.py` and `backward.py`, the stages that run;
* beside each a `.json` with the graph's document (`graphrewrite.report.graph`);
* `constants.pt`, the values of constant inputs, if there are any;
* `program.json`: what ran, in which order, which file shows the graph after it, what is saved, and what the program is
  specialised on.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from graphrewrite.errors import GraphRewriteError
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.stages import stage_graph
from graphrewrite.graph.text import Names
from graphrewrite.observe import Observer
from graphrewrite.pipeline import PassEvent
from graphrewrite.report.graph import describe
from graphrewrite.report.source import to_python
from graphrewrite.runtime.program import Program


class Dumper(Observer):
    """Writes the programs that are built while it looks on.

    Attributes:
        folder: Where to.
        written: The folder of each program, in order.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.written: list[Path] = []
        self._steps: list[dict[str, Any]] = []
        self._kind = ""

    def begin(self, kind: str) -> None:
        """Make the program's folder, under the first number that is free."""
        self._steps, self._kind = [], kind
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.written.append(_fresh(self.folder, kind))
        except OSError as error:
            raise GraphRewriteError(
                f"cannot write into {self.folder}: {error.strerror}", remedy="name another folder"
            ) from error

    def stage(self, name: str, graph: JointGraph) -> None:
        """Write the graph after a stage."""
        self._step(name, graph, f"after {name}")

    def passed(self, event: PassEvent) -> None:
        """Write the graph after a pass that changed it."""
        if event.modified:
            self._step(str(event.ran), event.graph, f"after {event.ran} ({event.seconds * 1e3:.1f} ms)")
        else:
            self._steps.append({"step": str(event.ran), "modified": False, "file": self._steps[-1]["file"]})

    def finish(self, program: Program) -> None:
        """Write the stages that run, and what holds for all of it."""
        part = program.partition
        folder = self.written[-1]
        self._write("operator", program.operator, "the operator-level graph after all rules and passes")
        for stage in ("forward", "backward"):
            self._write(stage, stage_graph(part, stage), f"the {stage} stage, as it runs")
        if part.graph.constants:
            torch.save(dict(part.graph.constants), folder / "constants.pt")
        names = Names(part.graph)
        about = {
            "kind": self._kind,
            "torch": torch.__version__,
            "blocks": [{"name": b.name, "rule": b.rule} for b in part.graph.blocks],
            "steps": self._steps,
            "stages": ["forward.py", "backward.py"],
            "saved": [
                {"name": names[one.node], "bytes": one.nbytes, "input": one.is_input, "gradient": one.carried}
                for one in part.saved
            ],
            "guards": list(program.guard_text),
        }
        self._file("program.json", json.dumps(about, indent=1, ensure_ascii=False))

    def _step(self, text: str, graph: JointGraph, title: str) -> None:
        name = re.sub(r"\W+", "_", text.partition("{")[0]) or "pass"
        stem = f"{sum(1 for s in self._steps if s['modified']):02d}_{name}"
        self._write(stem, graph, title)
        self._steps.append({"step": text, "modified": True, "file": f"{stem}.py"})

    def _write(self, stem: str, graph: JointGraph, title: str) -> None:
        self._file(f"{stem}.py", to_python(graph, f"{self._kind} program: {title}"))
        self._file(f"{stem}.json", json.dumps(describe(graph), indent=1, allow_nan=False, ensure_ascii=False))

    def _file(self, name: str, text: str) -> None:
        try:
            (self.written[-1] / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise GraphRewriteError(
                f"cannot write {self.written[-1] / name}: {error.strerror}", remedy="name another folder"
            ) from error


def _fresh(folder: Path, kind: str) -> Path:
    """A new folder; other processes may be making theirs."""
    number = 1 + max((int(p.name[:3]) for p in folder.iterdir() if re.match(r"\d{3}_", p.name)), default=0)
    while True:
        made = folder / f"{number:03d}_{kind}"
        try:
            made.mkdir()
        except FileExistsError:
            number += 1
        else:
            return made
