"""What an import loads: NumPy, this package's own modules, and nothing that is optional or slow."""

from __future__ import annotations

import subprocess
import sys

import pytest

OPTIONAL = {"torch", "jax", "matplotlib", "pandas", "tqdm", "numba", "llvmlite", "scipy", "sklearn", "threadpoolctl"}
OPTIONAL |= {"tensorboardX", "mlflow", "optuna", "safetensors"}
SLOW = {"argparse", "asyncio", "difflib", "gzip", "multiprocessing", "tempfile", "numpy.ma", "numpy.random"}


def loaded(program: str) -> set[str]:
    """Modules that a program has loaded and that NumPy alone would not have."""
    program = f"import sys, numpy; before = set(sys.modules)\n{program}\nprint(*set(sys.modules) - before)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_an_import_takes_numpy_alone_and_nothing_slow():
    modules = loaded("import fastmb")
    assert "fastmb.trainer" in modules
    assert modules.isdisjoint(OPTIONAL)
    assert modules.isdisjoint(SLOW)


@pytest.mark.parametrize("option", ["verbose=0", "verbose=0, X_val=X, y_val=y"])
def test_a_silent_fit_loads_nothing_optional_either(option):
    modules = loaded(f"""
import fastmb as mb
X, y = numpy.ones((8, 2)), numpy.zeros(8, int)
mb.Trainer(mb.mlp([2, 2])).fit(X, y, max_epochs=2, {option})""")
    assert "fastmb.executors.native" in modules
    assert modules.isdisjoint(OPTIONAL)
    assert modules.isdisjoint({"numpy.ma", "tempfile"})
