"""Every code block of the pages and every example of the gallery runs."""

from __future__ import annotations

import re
import runpy
from importlib.util import find_spec
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import fastmb as mb

HERE = Path(__file__).parent.parent
PAGES = [HERE / "README.md", *sorted((HERE / "docs").glob("*.md"))]
EXAMPLES = sorted((HERE / "examples").glob("*.py"))
HEAVY = ("dp_accounting", "sklearn", "torch")  # not in the extra `test`: what needs them runs where they are installed
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def test_they_are_here():
    assert {"getting_started", "loop", "from_scikit_learn", "from_pytorch", "threads"} <= {page.stem for page in PAGES}
    assert len(EXAMPLES) >= 5


def test_every_public_name_is_in_the_reference():
    listed = (HERE / "docs" / "api.md").read_text(encoding="utf-8").split()
    assert not set(mb.__all__) - {"__version__", "datasets"} - set(listed)
    assert not {f"datasets.{name}" for name in mb.datasets.__all__} - set(listed)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """In a folder of its own, without windows."""
    plt.switch_backend("agg")
    monkeypatch.chdir(tmp_path)
    yield
    plt.close("all")


def missing(code: str) -> list[str]:
    """The packages that the code needs and that aren't installed and needn't be."""
    needed = [package for package in HEAVY if re.search(rf"^(import|from) {package}\b", code, re.MULTILINE)]
    return [package for package in needed if find_spec(package) is None]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_blocks_run(page):
    """The blocks of a page are one program; it may take for granted that the package is imported, and some data."""
    text = page.read_text(encoding="utf-8")
    X, y = mb.datasets.load_digits()
    names: dict[str, object] = {"__name__": page.stem, "mb": mb, "X": X, "y": y}
    for block in BLOCK.finditer(text):
        if missing(block[1]):
            continue
        lines = text.count("\n", 0, block.start(1))
        exec(compile("\n" * lines + block[1], page, "exec"), names)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_examples_run(example):
    if packages := missing(example.read_text(encoding="utf-8")):
        pytest.skip(f"needs {', '.join(packages)}; the build of the documentation runs it")
    runpy.run_path(str(example), run_name="__main__")
