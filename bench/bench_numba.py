"""The same training steps by the Numba executor beside the native one, in turn: what going without a compiler costs."""

from __future__ import annotations

from typing import Any

import pytest

from .peers import trainer
from .turns import Contender, in_turn
from .workloads import WORKLOADS

ASKED = dict.fromkeys(("small", "mnist", "mid", "tab"), 1 / 0.9)


@pytest.mark.parametrize("case", ["tiny", *ASKED])
def test_step(benchmark: Any, case: str, threads: int) -> None:
    pytest.importorskip("numba")
    work = WORKLOADS[case]
    X, y = work.data()
    by = {name: trainer(work, n_threads=threads, executor=name) for name in ("numba", "native")}

    def fit(name: str) -> Contender:
        return Contender(lambda epochs: by[name].fit(X, y, max_epochs=epochs, verbose=0), work.steps)

    benchmark.group = "executor='numba'"
    in_turn(
        benchmark,
        {"fastmb": fit("numba"), "native": fit("native")},
        case=case,
        shape=f"{work.shape}, batch {work.batch}, {work.optimizer}",
        dtype="float32",
        threads=threads,
        flops=work.flops,
        baseline="native",
        asked=ASKED.get(case),
    )
