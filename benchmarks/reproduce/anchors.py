"""Published figures that the benchmarks are held against, and where ours are.

    python -m benchmarks.reproduce.anchors          # which have a figure of ours, and which command makes the others

`docs/generate.py` makes the page `docs/results.md` from this list and from the files in `benchmarks/results`. An anchor
whose result file lacks its row shows as not run; a file's rows are what its script measured, backpropagation beside it
in the same run.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "results"
SEEDS = (1, 2)
"""Those besides 0 that have a file of their own, where there is one."""

BIOTORCH = "Sanfiz and Akrout 2021 (biotorch), MNIST, LeNet, 100 epochs; best model chosen on the test set"
MIRROR = "Akrout et al. 2019 (weight mirror), MNIST, 784-500-10, epoch 10"
FEWER = "10,000 training images and 10 epochs here, 60,000 and 100 there"
SCHEDULE = "the rate falls to zero over these 10 epochs; there, epoch 10 of 400 at a rate of its own for each rule"
LENET = "python -m benchmarks.reproduce.feedback_mnist --data FOLDER --nets lenet --samples 10000"
MLP = "python -m benchmarks.reproduce.feedback_mnist --data FOLDER --nets mlp"
CCL = "Kao and Hariharan 2024 (counter-current learning, table 1), MNIST, MLP of 6 hidden layers of 256, 100 epochs"
SIX = "10 epochs of Adam at a tuned rate here, layers with biases; SGD with clipping, no biases there"
UNSTABLE = {
    "drtp": "its signal never vanishes, and Adam's steps do not either: it learns at none of the rates tried; " + SIX,
    "target_propagation": "the rate chosen after 2 epochs (94.2 % right there) diverges in the third; " + SIX,
}
SIX_COMMAND = (
    "python -m benchmarks.reproduce.local_mnist --data FOLDER --hidden 6 --activation elu --rates 3e-4 1e-3 3e-3 "
    "--tune-epochs 2 --epochs 10 --rules bp counter_current fa dfa drtp target_propagation --name local_mnist_6x256"
)
MIXER = "Ren et al. 2023, table 3, MNIST, LocalMixer S/1/1 (272,000 weights)"
DENDRITIC = "Lv et al. 2025 (dendritic localized learning, table 1), MNIST, MLP"
SHORT = "a tanh MLP 196-32-32-10 on 14 x 14 pixels, 10 epochs here"
FORWARD = (
    "python -m benchmarks.reproduce.forward_mnist --data FOLDER --epochs 10 --samples 60000 --name forward_mnist_10"
)


@dataclass(frozen=True)
class Anchor:
    """One published figure.

    Attributes:
        rule: Registry name; ours is the first row of the file whose rule has this name, or is this text form.
        file: Result file, without `.json`.
        published: The figure, in percent of wrong answers.
        published_bp: That of backpropagation in the same publication; None: not given there.
        source: Publication and setting.
        gap: Why ours differs.
        command: What makes the file.
        where: Keys of the row besides the rule.
    """

    rule: str
    file: str
    published: float
    published_bp: float | None
    source: str
    gap: str
    command: str
    where: tuple[tuple[str, Any], ...] = ()

    def ours(self) -> tuple[list[float], list[float]]:
        """Test errors of the rule and of backpropagation in percent, at the end of the run, by seed; none: not run."""
        pairs = [self._of(file) for file in (self.file, *(f"{self.file}_seed{seed}" for seed in SEEDS))]
        return [ours for ours, _ in pairs if ours is not None], [bp for _, bp in pairs if bp is not None]

    def _of(self, file: str) -> tuple[float | None, float | None]:
        rows = [row for row in read(file) if all(row.get(key) == want for key, want in self.where)]
        names = [str(row.get("rule", row.get("arm", ""))) for row in rows]
        # a row of just these options, or else one of the rule with others
        found = next((row for row, name in zip(rows, names, strict=True) if name == self.rule), None) or next(
            (row for row, name in zip(rows, names, strict=True) if name.partition("{")[0] == self.rule), None
        )
        beside = next((row for row in rows if row.get("rule", row.get("arm")) == "bp"), None)
        return test_error(found), test_error(beside)


def read(file: str) -> list[dict[str, Any]]:
    """The rows of a result file; none if there is no such file."""
    path = RESULTS / f"{file}.json"
    if not path.is_file():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def test_error(row: dict[str, Any] | None) -> float | None:
    """Percent of wrong answers on the test set after the last epoch, whatever the script calls it."""
    for key, held in (row or {}).items():
        last = held[-1] if isinstance(held, list) and held else held
        if not isinstance(last, (int, float)) or not key.startswith("test"):
            continue
        if "accuracy" in key:
            return 100 - last if "percent" in key or "%" in key else 100 * (1 - last)
        if "error" in key:
            return float(last)
    return None


def shown(errors: list[float]) -> str:
    """The mean over seeds and, of more than one, the standard deviation."""
    if len(errors) < 2:
        return f"{errors[0]:.2f}" if errors else ""
    return f"{statistics.mean(errors):.2f} ± {statistics.stdev(errors):.2f}"


ANCHORS = (
    *(
        Anchor(rule, "feedback_mnist_lenet_10000", error, 0.91, BIOTORCH, FEWER, LENET)
        for rule, error in (("usf", 0.94), ("brsf", 0.91), ("frsf", 0.97), ("fa", 1.70), ("dfa", 1.61))
    ),
    *(
        Anchor(rule, "feedback_mnist_mlp", error, 5.88, MIRROR, SCHEDULE, MLP)
        for rule, error in (("fa", 9.14), ("weight_mirror", 9.51), ("kp", 4.59))
    ),
    Anchor(
        "ff{threshold=0.3}",
        "learning",
        1.45,
        1.4,
        "Hinton 2022 in loeweX/Forward-Forward, MNIST, 784-1000x3, SGD, 100 epochs",
        "784-500-500-10 and 20 epochs of Adam here; `--setting full` is the published net",
        "python -m benchmarks.reproduce.learning --data FOLDER",
    ),
    Anchor(
        "ff",
        "learning_full",
        1.45,
        1.4,
        "Hinton 2022 in loeweX/Forward-Forward, MNIST, 784-1000x3, SGD, 100 epochs",
        "the published setting",
        "python -m benchmarks.reproduce.learning --data FOLDER --setting full --rules bp ff",
    ),
    Anchor(
        "mono_forward",
        "local_mnist",
        0.68,
        0.75,
        "Nokland and Eidnes 2019 (`pred` losses), MNIST, 3x1024, batch-norm, dropout, 2 pixels of jitter",
        "3x256 without batch-norm, dropout and jitter, 4 epochs here",
        "python -m benchmarks.reproduce.local_mnist --data FOLDER --epochs 4 --rates 0.001 0.002 --tune-epochs 2",
    ),
    Anchor(
        "local_loss",
        "local_mnist",
        0.62,
        0.75,
        "Nokland and Eidnes 2019 (`predsim` losses), MNIST, 3x1024, batch-norm, dropout, 2 pixels of jitter",
        "3x256 without batch-norm, dropout and jitter, 4 epochs here",
        "python -m benchmarks.reproduce.local_mnist --data FOLDER --epochs 4 --rates 0.001 0.002 --tune-epochs 2",
    ),
    *(
        Anchor(rule, "local_mnist_6x256", error, 1.81, CCL, UNSTABLE.get(rule, SIX), SIX_COMMAND)
        for rule, error in (
            *(("counter_current", 1.87), ("fa", 3.04), ("dfa", 2.73), ("drtp", 7.84), ("target_propagation", 6.71)),
        )
    ),
    *(
        Anchor(f"forward_gradient{options}", "forward_mnist_10", error, 2.66, MIXER, SHORT, FORWARD)
        for options, error in (("{perturb=weights}", 9.25), ("", 3.24))
    ),
    *(
        Anchor(rule, "forward_mnist_10", error, 1.38, DENDRITIC, SHORT, FORWARD)
        for rule, error in (("predictive_coding", 1.58), ("target_propagation", 5.99), ("zeroth_order", 8.56))
    ),
    Anchor(
        "forward_gnn",
        "forward_gnn",
        12.05,
        13.16,
        "Park et al. 2024 (ForwardGNN-SF), CoraML, 2-layer GCN",
        "Cora's public split (140 labelled nodes, 40 epochs) here, CitationFull's CoraML there: another data set",
        "python -m benchmarks.reproduce.ff_variants --data FOLDER",
        (("model", "GCNConv 1433-64-7"),),
    ),
)


def others() -> Iterator[tuple[str, str, str]]:
    """Comparisons whose file has the published course beside ours: what, ours, published."""
    course = [row for row in read("pepita_cifar") if row.get("published %") is not None]
    if course:
        last = course[-1]
        oracle = last["oracle's %"]
        yield (
            f"`pepita` on CIFAR-10, epoch {last['epoch']}: test accuracy",
            f"{last['test accuracy %']:.2f} %, the published script's formula in plain PyTorch: {oracle:.2f} %",
            f"{last['published %']:.2f} % (Dellaferrera and Kreiman 2022, their notebook)",
        )


def main() -> None:
    """Print what there is."""
    for anchor in ANCHORS:
        found, beside = anchor.ours()
        ours = f"{shown(found)} % (bp {shown(beside)} %)" if found else "not run: " + anchor.command
        print(f"{anchor.rule:20} {anchor.file:28} published {anchor.published:5.2f} %  ours {ours}")


if __name__ == "__main__":
    main()
