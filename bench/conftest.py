"""What the suites share: how many threads everyone may use.

XLA sizes its pool by the processors it finds when it starts, and has no way to use less of it later. So the process has
no more processors than the highest count that is asked for. Lower counts of the same run are kept on fewer
(`machine.on_processors`); there JAX pays for a pool that is too large, and a run for each count is fairer.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from .machine import allowed_threads, bind


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--threads", default=str(allowed_threads()), help="counts to measure with, such as 2,1")


def pytest_configure(config: Any) -> None:
    bind(set(sorted(os.sched_getaffinity(0))[: max(_counts(config))]))


def _counts(config: Any) -> list[int]:
    return [int(count) for count in config.getoption("--threads").split(",")]


def pytest_generate_tests(metafunc: Any) -> None:
    if "threads" in metafunc.fixturenames:
        metafunc.parametrize("threads", _counts(metafunc.config), ids=lambda n: f"{n} threads" if n > 1 else "1 thread")


@pytest.fixture(autouse=True)
def openmp_as_it_was() -> Iterator[None]:
    """No test leaves PyTorch's number of threads behind: it is OpenMP's, and fastmb takes no more than that."""
    yield
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(allowed_threads())
