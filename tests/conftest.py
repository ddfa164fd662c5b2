"""What all tests share: the executors that load here."""

from __future__ import annotations

import pytest

from fastmb import executors

EXECUTORS = [name for name in executors.NAMES if executors.available(name)]
MISSING = [name for name in executors.NAMES if name not in EXECUTORS]
for _name in EXECUTORS:
    executors.load(_name)  # one that is there but broken is an error


def pytest_report_header() -> list[str]:
    """Says what isn't tested, too."""
    lines = [f"fastmb executors: {', '.join(EXECUTORS)}"]
    return lines + [f"fastmb executors NOT TESTED: {', '.join(MISSING)}"] * bool(MISSING)


@pytest.fixture(params=EXECUTORS)
def executor(request: pytest.FixtureRequest) -> str:
    """The name of each executor that loads here, in turn."""
    return request.param


@pytest.fixture
def executors_here() -> list[str]:
    """The names of all executors that load here, the default one first."""
    return EXECUTORS
