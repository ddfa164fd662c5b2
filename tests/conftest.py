"""What all tests share: the executors that load here."""

from __future__ import annotations

import signal

import pytest

from fastmb import executors, threads

EXECUTORS = [name for name in executors.NAMES if executors.available(name)]
MISSING = [name for name in executors.NAMES if name not in EXECUTORS]
for _name in EXECUTORS:
    executors.load(_name)  # one that is there but broken is an error

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, if a shell started pytest in the background


def pytest_report_header() -> list[str]:
    """Says what isn't tested, too."""
    lines = [f"fastmb executors: {', '.join(EXECUTORS)}"]
    return lines + [f"fastmb executors NOT TESTED: {', '.join(MISSING)}"] * bool(MISSING)


@pytest.fixture(autouse=True)
def _three_threads_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that asks for 3 threads gets them, whatever the machine has."""
    limit = threads.limit
    monkeypatch.setattr(threads, "limit", lambda: max(3, limit()))


@pytest.fixture(params=EXECUTORS)
def executor(request: pytest.FixtureRequest) -> str:
    """The name of each executor that loads here, in turn."""
    return request.param


@pytest.fixture
def executors_here() -> list[str]:
    """The names of all executors that load here, the default one first."""
    return EXECUTORS
