"""Settings for all tests: two threads, a fixed seed, and the data folder."""

from __future__ import annotations

import os
import pathlib

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(2)


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
