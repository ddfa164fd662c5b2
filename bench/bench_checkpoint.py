"""What `Trainer.save` costs: 100 MB of parameters beside a plain `numpy.save` and fsync of the same, in turn.

Both replace a file that is there, in the folder for temporary files (TMPDIR). The ratio is to stay below 1.5: beyond
what `numpy.save` does, a save writes a SHA-256 and lets nobody see half a file.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import fastmb as mb

from .turns import Contender, in_turn, looped

N = 5000  # inputs and outputs: 25 million weights in float32


def test_save(benchmark: Any, tmp_path: Path) -> None:
    n = 50 if benchmark.disabled else N
    trainer = mb.Trainer(mb.Sequential(mb.Linear(n, n, bias=False)), "mse", mb.SGD(lr=0.1))
    path = tmp_path / "trainer"

    def numpy_save() -> None:
        with (tmp_path / "plain.npy").open("wb") as file:
            np.save(file, trainer.net.flat)
            file.flush()
            os.fsync(file.fileno())

    benchmark.group = "saving"
    in_turn(
        benchmark,
        {
            "fastmb": Contender(looped(partial(trainer.save, path))),
            "np.save + fsync": Contender(looped(numpy_save)),
        },
        case="Trainer.save",
        shape=f"{trainer.net.flat.nbytes / 1e6:.0f} MB",
        dtype="float32",
        threads=1,
        baseline="np.save + fsync",
        asked=1.5,
        rounds=15,
    )
    assert path.stat().st_size > trainer.net.flat.nbytes
