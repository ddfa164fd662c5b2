"""What it costs to have a library: the time that its import takes over NumPy's, and its size on disk.

Every import is a new Python process that finds compiled bytecode, as after an installation. The size of fastmb's wheel
is that of its files compressed as in a wheel; peers are told with what they need beside NumPy.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import zipfile
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np

from .machine import environment, isa, processor
from .turns import Contender, in_turn, looped

MODULES = {"fastmb": "fastmb", "numpy": "numpy", "torch": "torch", "jax": "jax", "sklearn": "sklearn.neural_network"}
DISTRIBUTIONS = {"torch": ("torch",), "jax": ("jax", "jaxlib"), "sklearn": ("scikit-learn", "scipy")}
IN_A_WHEEL = (".py", ".pyi", ".so", ".npz", ".txt", ".typed")


def imported(module: str, bytecode: Path) -> None:
    """Import a module; the first time, its bytecode is written."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    variables["PYTHONPYCACHEPREFIX"] = str(bytecode)
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True, env=variables)


def test_import(benchmark: Any, tmp_path: Path) -> None:
    benchmark.group = "import"
    contenders, left_out = {}, []
    for name, module in MODULES.items():
        try:
            imported(module, tmp_path)
        except subprocess.CalledProcessError:
            left_out.append(f"{name} left out: it can't be imported")
            continue
        contenders[name] = Contender(looped(partial(imported, module, tmp_path)), packages=(module.split(".")[0],))
    in_turn(
        benchmark,
        contenders,
        case="import, Python's own start included",
        shape="-",
        dtype="-",
        threads=1,
        left_out=left_out,
        seconds=0.01,
        settle=False,
        rounds=5,
        baseline="numpy",  # which all of them import
    )


def test_size(benchmark: Any) -> None:
    benchmark.group = "size"
    files = package_files()
    wheel = benchmark.pedantic(compressed, args=(files,), rounds=1)
    assert wheel > 0
    benchmark.extra_info.update(
        wheel_bytes=wheel,
        installed_bytes={"fastmb": sum(path.stat().st_size for path in files), **peers_on_disk()},
        isa=isa(),
        processor=processor(),
        environment=environment(),
        versions={"numpy": np.__version__},
    )


def package_files() -> list[Path]:
    """What a wheel of fastmb holds."""
    import fastmb

    folder = Path(str(fastmb.__file__)).parent
    return sorted(path for path in folder.rglob("*") if path.suffix in IN_A_WHEEL or path.name == "py.typed")


def compressed(files: list[Path]) -> int:
    """The bytes of an archive of these."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            archive.write(path)
    return buffer.tell()


def peers_on_disk() -> dict[str, int]:
    """Bytes of the installed files of every peer that is there."""
    sizes = {}
    for name, parts in DISTRIBUTIONS.items():
        try:
            files = [file for part in parts for file in distribution(part).files or ()]
        except PackageNotFoundError:
            continue
        located = (Path(str(file.locate())) for file in files)
        sizes[name] = sum(path.stat().st_size for path in located if path.is_file())
    return sizes
