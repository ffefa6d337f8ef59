"""Threads, data loaders, long runs, what stays alive, and what is done with files and names that are not ours."""

from __future__ import annotations

import ast
import copy
import gc
import itertools
import pathlib
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import graphrewrite as gr
from cli_run import run_fixture as run_fixture

PACKAGE = pathlib.Path(gr.__file__).parent
FOLDERS = [PACKAGE, PACKAGE.parent / "passes", PACKAGE.parent / "backends"]


def net(*widths: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def train(compiled: gr.CompiledModule, batches, rate: float = 0.05) -> dict[str, torch.Tensor]:
    """The parameters after a step of SGD per batch."""
    compiled.materialize(*batches[0])
    optimizer = torch.optim.SGD(compiled.parameters(), lr=rate)
    for x, y in batches:
        optimizer.zero_grad()
        compiled.loss(x, y).backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in compiled.named_parameters()}


def batches(count: int, inputs: int = 6, classes: int = 4, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)

    def one():
        return torch.randn(5, inputs, generator=draw), torch.randint(0, classes, (5,), generator=draw)

    return [one() for _ in range(count)]


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, held in left.items():
        assert torch.equal(held, right[name]), name


# --- threads ---------------------------------------------------------------------------------------------------------


def together(*jobs) -> list:
    """Results of functions that are started at the same time, a thread each."""
    results, errors = [None] * len(jobs), []
    barrier = threading.Barrier(len(jobs))

    def work(i: int, job) -> None:
        try:
            barrier.wait()
            results[i] = job()
        except BaseException as error:  # noqa: BLE001 - raised again below, in the thread that asserts
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i, job)) for i, job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def test_two_threads_train_as_one_after_the_other():
    """Capture included: both compile at the same time, and one trains while the other captures again."""

    jobs = ("dfa", 1, (6, 8, 4)), ("fa", 2, (6, 8, 8, 4))
    models = [net(*widths, seed=seed) for _, seed, widths in jobs]

    def trained(which: int):
        rule, seed, _ = jobs[which]
        data = [*batches(6, seed=seed), *[(x[:1], y[:1]) for x, y in batches(1, seed=seed)], *batches(3, seed=seed + 7)]
        return lambda: train(gr.compile(copy.deepcopy(models[which]), rule, seed=seed), data)

    alone = [trained(0)(), trained(1)()]
    for left, right in zip(together(trained(0), trained(1)), alone, strict=True):
        assert_equal(left, right)


class Squared(torch.autograd.Function):
    """A derivative of the user's own."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x * g  # not the derivative: who calls it can be told


def test_custom_functions_of_other_threads_are_theirs_during_capture():
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 4)

        def forward(self, x):
            return Squared.apply(self.linear(x))

    done = threading.Event()

    def capture():
        try:
            for n in (1, 2):
                gr.compile(Custom()).loss(*batches(n)[0]).backward()
        finally:
            done.set()

    def eager():
        steps = 0
        while not done.is_set() or steps < 3:
            x = torch.randn(3, requires_grad=True)
            Squared.apply(x).sum().backward()
            assert torch.equal(x.grad, 3 * x.detach())
            steps += 1
        return steps

    _, steps = together(capture, eager)
    assert steps >= 3


def test_a_signature_that_two_threads_meet_at_once_is_captured_once():
    compiled = gr.compile(net(6, 8, 4))
    (x, y), *_ = batches(1)
    losses = together(*[lambda: compiled.loss(x, y).item()] * 3)
    assert len(set(losses)) == 1
    assert compiled._captures == {"loss": 1}


# --- processes -------------------------------------------------------------------------------------------------------


def train_elsewhere(compiled: gr.CompiledModule, data) -> dict[str, torch.Tensor]:
    """In a copy: tensors that are sent to another process are shared with it."""
    torch.set_num_threads(1)
    return train(copy.deepcopy(compiled), data)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["dfa", "ff"])
def test_a_compiled_module_sent_to_a_spawned_process_trains_there(rule):
    """After a step here; rule state, step counter and seed go along."""
    compiled = gr.compile(net(6, 8, 4), rule, seed=3)
    first, *rest = batches(5)
    start = train(compiled, [first])
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(train_elsewhere, (compiled, rest))
    assert_equal({name: p.detach() for name, p in compiled.named_parameters()}, start)
    for name, held in train(compiled, rest).items():
        assert not torch.equal(held, start[name]), name
        torch.testing.assert_close(found[name], held)


# --- data loaders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "start", [pytest.param("fork", marks=pytest.mark.slow), pytest.param("spawn", marks=pytest.mark.slow)]
)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_batches_of_data_loader_workers(start):
    """Workers start after the capture; what they send (shared memory) trains like the same batches from here."""
    x, y = torch.randn(20, 6), torch.randint(0, 4, (20,))
    here = [(x[i : i + 5], y[i : i + 5]) for i in range(0, 20, 5)]
    expected = train(gr.compile(net(6, 8, 4), "dfa"), here)
    compiled = gr.compile(net(6, 8, 4), "dfa", example_inputs=here[0][0], example_targets=here[0][1])
    loader = DataLoader(TensorDataset(x, y), batch_size=5, num_workers=2, multiprocessing_context=start)
    found = train(compiled, list(loader))
    for name, held in expected.items():
        # not bitwise: BLAS rounds by where a matrix starts in memory
        torch.testing.assert_close(found[name], held)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("bp", {}),
        pytest.param("kp", {"split_backward": True}, marks=pytest.mark.slow),
        pytest.param("mono_forward", {"compress": "int4"}, marks=pytest.mark.slow),
    ],
)
def test_the_batch_dies_with_the_step(rule, options):
    """Also that of the capture, without the garbage collector, and while the loss is still held."""
    compiled = gr.compile(net(6, 8, 4), rule, **options)
    gc.disable()
    try:
        for size in (5, 4):
            x, y = torch.randn(size, 6), torch.randint(0, 4, (size,))
            held = [weakref.ref(x), weakref.ref(y)]
            loss = compiled.loss(x, y)
            loss.backward()
            if options.get("split_backward"):
                compiled.backward_weight()
            del x, y
            assert [one() for one in held] == [None, None]
    finally:
        gc.enable()


LONG_RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    **{rule: (rule, {}) for rule in ("bp", "dfa", "ff", "mono_forward", "predictive_coding", "forward_gradient", "kp")},
    "zo_step": ("zeroth_order", {}),
    "int4": ("bp", {"compress": "int4{rounding=stochastic}"}),
    "two stages": ("dfa", {"split_backward": True}),
    "inductor": ("bp", {"backend": "inductor"}),
}
"""What keeps state, draws random numbers, holds cotangents for later or runs in compiled code."""


@pytest.mark.slow
@pytest.mark.parametrize("way", LONG_RUNS)
def test_memory_does_not_grow_over_ten_thousand_steps(way):
    rule, options = LONG_RUNS[way]
    data = batches(16)
    compiled = gr.compile(net(6, 8, 4), rule, example_inputs=data[0][0], example_targets=data[0][1], **options)
    optimizer = torch.optim.SGD(compiled.parameters(), lr=1e-3)

    def steps(count: int) -> tuple[int, int]:
        for i in range(count):
            x, y = data[i % len(data)]
            if way == "zo_step":
                compiled.zo_step(x.clone(), y.clone(), lr=1e-4)
                continue
            optimizer.zero_grad()
            compiled.loss(x.clone(), y.clone()).backward()
            if options.get("split_backward"):
                compiled.backward_weight()
            optimizer.step()
        gc.collect()
        return len(gc.get_objects()), sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    early, late = steps(500), steps(9500)
    assert late[1] <= early[1], "tensors are left behind"
    assert late[0] <= early[0] + 200, "objects are left behind"


# --- files and names that are not ours -------------------------------------------------------------------------------


def sources():
    for folder in FOLDERS:
        for path in sorted(folder.rglob("*.py")):
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def calls(tree: ast.AST):
    """`(name, call)` of every call, the name dotted."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


EVALUATED = {"_compat.py": 1}
"""Shape guards: text that torch writes from sizes."""


def test_nothing_evaluates_text_or_unpickles():
    found: dict[str, int] = {}
    for path, tree in sources():
        for name, call in calls(tree):
            if name in ("eval", "exec", "compile", "builtins.eval", "builtins.exec", "__import__"):
                found[path.name] = found.get(path.name, 0) + 1
            assert not name.startswith(("pickle.", "marshal.", "shelve.", "dill.")), f"{path}: {name}"
            if name == "torch.load":
                safe = [k.value for k in call.keywords if k.arg == "weights_only"]
                assert safe, f"{path}:{call.lineno}"
                assert ast.unparse(safe[0]) == "True", f"{path}:{call.lineno}"
        imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        imported |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        assert not imported & {"pickle", "marshal", "shelve", "dill", "cloudpickle"}, path
    assert found == EVALUATED


def test_state_is_loadable_with_weights_only(tmp_path):
    compiled = gr.compile(net(6, 8, 4), "kp")
    expected = train(compiled, batches(2))
    torch.save(compiled.state_dict(), tmp_path / "state.pt")
    other = gr.compile(net(6, 8, 4, seed=5), "kp").materialize(*batches(1)[0])
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_equal(dict(other.named_parameters()), expected)


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("inspect", "html"),
        *(
            pytest.param(command, kind, marks=pytest.mark.slow)
            for command, kind in (
                ("inspect", "svg"),
                ("diff", "html"),
                ("memory", "html"),
                ("memory", "svg"),
                ("schedule", "html"),
                ("schedule", "svg"),
            )
        ),
    ],
)
def test_what_is_written_escapes_every_name(run, command, kind, tmp_path):
    """`:hostile` has a module named `<script>alert(1)</script>[bold]`; a page of ours has scripts of its own only."""
    file = tmp_path / f"out.{kind}"
    outcome = run(command, ":hostile", "--rule", "dfa", f"--{kind}", str(file))
    assert outcome.code == 0, outcome.err
    text = file.read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "alert(1)</script" not in text
    assert "alert(1)" in text, "the name is not there: this looks at the wrong file"
