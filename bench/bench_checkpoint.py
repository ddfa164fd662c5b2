"""What `Trainer.save` costs: 100 MB of parameters against a plain `numpy.save` and fsync of the same, in turn.

Both replace a file that is there, in the folder for temporary files (TMPDIR). ``extra_info`` has the ratio of the
medians, which is to stay below 1.5: beyond what `numpy.save` does, a save writes a SHA-256 and lets nobody see half a
file.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest

import fastmb as mb

from .machine import environment, processor

N = 5000  # inputs and outputs: 25 million weights in float32


@pytest.mark.parametrize("n", [N])
def test_save(benchmark: Any, tmp_path: Path, n: int) -> None:
    n = 50 if benchmark.disabled else n
    trainer = mb.Trainer(mb.Sequential(mb.Linear(n, n, bias=False)), "mse", mb.SGD(lr=0.1))
    plain: list[float] = []

    def numpy_save() -> None:
        begin = time.perf_counter()
        with (tmp_path / "plain.npy").open("wb") as file:
            np.save(file, trainer.net.flat)
            file.flush()
            os.fsync(file.fileno())
        plain.append(time.perf_counter() - begin)

    benchmark.group = f"save {trainer.net.flat.nbytes / 1e6:.0f} MB"
    numpy_save()
    path = tmp_path / "trainer"
    benchmark.pedantic(trainer.save, args=(path,), setup=numpy_save, rounds=15, warmup_rounds=2)
    assert path.stat().st_size > trainer.net.flat.nbytes
    if benchmark.disabled:
        return
    benchmark.extra_info.update(
        numpy_save_seconds=median(plain[3:]),
        times_numpy_save=benchmark.stats.stats.median / median(plain[3:]),
        gigabytes_a_second=trainer.net.flat.nbytes / benchmark.stats.stats.median / 1e9,
        processor=processor(),
        environment=environment(),
    )
