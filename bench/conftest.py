"""What the suites share: how many threads everyone may use."""

from __future__ import annotations

from typing import Any

from .machine import allowed_threads


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--threads", default=str(allowed_threads()), help="counts to measure with, such as 2,1")


def pytest_generate_tests(metafunc: Any) -> None:
    if "threads" in metafunc.fixturenames:
        counts = [int(count) for count in metafunc.config.getoption("--threads").split(",")]
        metafunc.parametrize("threads", counts, ids=lambda n: f"{n} threads" if n > 1 else "1 thread")
