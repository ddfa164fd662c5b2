"""What it costs to look at a mini-batch's gradients: each thing beside the plain step, in turn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastmb as mb

from .peers import trainer
from .turns import Contender, in_turn, looped
from .workloads import WORKLOADS, Workload

CASES = ("small", "mnist", "mid")
OPTIONS: dict[str, dict[str, Any]] = {
    "gradient_stats": {"gradient_stats": True},
    "clip_per_example": {"clip_per_example": 0.5},
    "max_grad_norm": {"max_grad_norm": 0.5},
    "accumulate_steps": {"accumulate_steps": 4},  # beside a plain step of four mini-batches at once
    "noise": {"clip_per_example": 0.5, "noise_multiplier": 1.0},
}
ASKED = {  # of the ratio to the plain step, at the most
    "gradient_stats": {"mid": 1.03, "mnist": 1.03, "small": 1.10},
    "clip_per_example": {"mid": 1.10, "mnist": 1.10, "small": 1.20},
    "max_grad_norm": {"mid": 1.25},
    "accumulate_steps": {"small": 1.15, "mnist": 1.15, "mid": 1.15},
}
ROUNDS = 21  # what is asked for is less than rounds differ by
ROWS = 64  # of a call of per_example_gradients, as far as 256 MB hold them


def fit(work: Workload, trained: mb.Trainer) -> Contender:
    """Epochs; a unit is a mini-batch."""
    X, y = work.data()

    def run(epochs: int) -> None:
        trained.fit(X, y, max_epochs=epochs, verbose=0, check_finite=False)

    return Contender(run, work.steps)


@pytest.mark.parametrize("what", OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_step(benchmark: Any, case: str, what: str, threads: int) -> None:
    work = WORKLOADS[case]
    options, batch = OPTIONS[what], work.batch * OPTIONS[what].get("accumulate_steps", 1)
    benchmark.group = "a step that looks at its gradients"
    in_turn(
        benchmark,
        {
            "fastmb": fit(work, trainer(work, n_threads=threads, **options)),
            "plain step": fit(work, trainer(work, n_threads=threads, batch_size=batch)),
        },
        case=f"{what}, {case}",
        shape=f"{work.shape}, batch {work.batch}, {work.optimizer}",
        dtype="float32",
        threads=threads,
        flops=work.flops,
        baseline="plain step",
        asked=ASKED.get(what, {}).get(case),
        rounds=ROUNDS,
    )


@pytest.mark.parametrize("case", CASES)
def test_per_example_norms(benchmark: Any, case: str, threads: int) -> None:
    work = WORKLOADS[case]
    trained = trainer(work, n_threads=threads)
    X, y = (array[: work.batch] for array in work.data())
    benchmark.group = "norms of every row's gradient"
    in_turn(
        benchmark,
        {
            "fastmb": Contender(looped(lambda: trained.per_example_norms(X, y))),
            "plain step": Contender(looped(lambda: trained.step(X, y))),
        },
        case=case,
        shape=f"{work.shape}, {work.batch} rows",
        dtype="float32",
        threads=threads,
        baseline="plain step",
    )


@pytest.mark.parametrize("case", CASES)
def test_per_example_gradients(benchmark: Any, case: str, threads: int) -> None:
    """Beside writing as many bytes, each page touched for the first time as there."""
    work = WORKLOADS[case]
    trained = trainer(work, n_threads=threads)
    size = trained.net.plan.size
    rows = max(1, min(ROWS, 2**28 // (4 * size)))
    X, y = (array[:rows] for array in work.data())
    benchmark.group = "every row's gradient"
    in_turn(
        benchmark,
        {
            "fastmb": Contender(looped(lambda: trained.per_example_gradients(X, y))),
            "plain write": Contender(looped(lambda: np.empty(size * rows, np.float32).fill(1.0))),
        },
        case=case,
        shape=f"{work.shape}, {rows} rows",
        dtype="float32",
        threads=threads,
        baseline="plain write",
        asked=1 / 0.9,
        rounds=ROUNDS,
        seconds=0.2,  # a system that has taken pages back gives them slowly: not in every call
    )
