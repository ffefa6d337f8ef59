"""Settings for all tests: threads, what is slow, a fixed seed, and the data folder."""

from __future__ import annotations

import gc
import os
import pathlib
from collections.abc import Iterator

import pytest
import torch

# Inductor's pool of compiler processes costs more than it saves on small graphs
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
if not torch.cuda.is_available():
    # kernels run in Triton's interpreter; it must be chosen before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    # side by side with another worker, one thread each is faster than two
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_sessionfinish() -> None:
    gc.unfreeze()


HEAVY = {
    *("gpt2", "llama", "bert", "vit", "mamba", "t5", "hf_resnet", "convnext", "lenet"),
    *("resnet", "unet", "lstm", "gru", "moe", "gat", "sage"),
}
"""Models of the zoo whose capture takes seconds."""
HEAVIEST = {"llama", "bert", "mamba", "t5", "hf_resnet", "unet", "gru", "gat", "convnext", "lenet"}
"""Those that even backpropagation is not held to by default."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests over the zoo take its small models by default, backpropagation larger ones, `-m slow` all of them."""
    for item in items:
        given = getattr(item, "callspec", None)
        if given is None:
            continue
        heavy = HEAVIEST if item.path.stem == "test_bp_matrix" else HEAVY
        if any(isinstance(value, str) and value in heavy for value in given.params.values()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="module")
def _freeze() -> Iterator[None]:
    """What is alive after a file (modules, torch's caches) is not looked through by every later collection."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def data_folder() -> pathlib.Path:
    """The folder of real data sets; tests that need it are skipped without it."""
    named = os.environ.get("GRAPHREWRITE_DATA")
    if not named or not pathlib.Path(named).is_dir():
        pytest.skip("GRAPHREWRITE_DATA names no data folder")
    return pathlib.Path(named)
