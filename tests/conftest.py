"""What all tests share: the executors that load here."""

from __future__ import annotations

import pytest

from fastmb import executors


def _loadable() -> tuple[list[str], list[str]]:
    """Executors that load, and those that this build was made without; one that is there but broken is an error."""
    here, missing = [], []
    for name in executors.NAMES:
        try:
            executors.load(name)
        except ModuleNotFoundError as error:
            missing.append(f"{name} ({error})")
        else:
            here.append(name)
    return here, missing


EXECUTORS, MISSING = _loadable()


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
