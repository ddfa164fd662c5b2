"""What this installation is and does: for bug reports, and for those who wonder."""

from __future__ import annotations

import importlib
import os
import platform

import numpy as np

from . import threads
from ._version import __version__
from .executors import default_name


class Config(dict[str, str]):
    """A dict that shows itself as a table of two columns."""

    def __repr__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in self.items())

    __str__ = __repr__


def show_config() -> Config:
    """What is installed and what it would use: executor, instruction set, threads, compiler, versions.

    Returns
    -------
    Config
        A dict of strings, whose repr is a table.

    Examples
    --------
    >>> import fastmb
    >>> fastmb.show_config()["fastmb"] == fastmb.__version__
    True
    """
    versions = {"Python": f"{platform.python_implementation()} {platform.python_version()}", "NumPy": np.__version__}
    system = f"{platform.system()} {platform.machine()}"
    return Config({"fastmb": __version__, **_native(), **versions, "system": system})


def _native() -> dict[str, str]:
    try:
        native = importlib.import_module(".executors.native", __package__)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        extension = "left out (FASTMB_PURE=1, or not built)" if missing else f"not loaded: {error}"
        return {"extension": extension, **(_without_extension() if missing else {})}
    chosen, available = native.isa(), native.available_isas()
    isa = f"{chosen} of {', '.join(available)}"
    if os.environ.get("FASTMB_ISA"):
        isa += " (FASTMB_ISA)"
    if chosen == "v2":
        isa += "; no fused multiply-add: results differ in their last bits from those of the other sets"
    compiler = getattr(native, "compiler", None)
    return {
        "executor": "native",
        "extension": getattr(native, "__file__", None) or "built in",
        "instruction set": isa,
        "threads": _threads(),
        "compiler": compiler() if callable(compiler) else "unknown",
    }


def _without_extension() -> dict[str, str]:
    if default_name() != "numba":
        numpy = {"executor": "numpy, the slow reference (pip install 'fastmb[numba]')"}
        return {**numpy, "threads": "those of NumPy's matrix product"}
    numba = importlib.import_module(".executors.numba", __package__)
    isa = f"{numba.isa()} of {', '.join(numba.available_isas())}"
    version = importlib.import_module("numba").__version__
    return {"executor": "numba", "instruction set": isa, "threads": _threads(), "compiler": f"Numba {version}"}


def _threads() -> str:
    openmp, quota = threads.openmp_limit(), threads.cgroup_limit()
    limits = {
        f"OpenMP {openmp}" + (" (OMP_NUM_THREADS)" if os.environ.get("OMP_NUM_THREADS") else ""): openmp,
        f"machine {threads.machine_limit()} of {os.cpu_count()} processors"
        + (f" (control group: {quota})" if quota < (os.cpu_count() or 1) else ""): threads.machine_limit(),
    }
    return f"at most {min(limits.values())}, the least of: {'; '.join(limits)}"
