"""What callbacks and schedules cost a step of `mnist`: fits with each beside a plain fit, in turn, on one thread.

A schedule or early stopping is to cost at most 2 %. `batches` is what a callback costs that asks to be called after
every mini-batch.
"""

from __future__ import annotations

from typing import Any

import pytest

import fastmb as mb

from .peers import trainer
from .turns import Contender, in_turn
from .workloads import WORKLOADS

WORK = WORKLOADS["mnist"]


class Batches(mb.Callback):
    """Asks for every mini-batch, and does nothing."""

    def on_batch_end(self, trainer: mb.Trainer, loss: float) -> None:
        pass


ASKED = {"early_stopping": 1.02, "early_stopping, best weights": 1.02, "schedule": 1.02, "EMA": 1.02, "batches": None}


def callbacks(case: str) -> list[mb.Callback]:
    if case == "batches":
        return [Batches()]
    if case in ("schedule", "EMA"):
        return []
    return [mb.EarlyStopping("loss", patience=10**6, restore_best="best" in case)]


@pytest.mark.parametrize("case", ASKED)
def test_cost(benchmark: Any, case: str) -> None:
    X, y = WORK.data()
    plain = trainer(WORK, n_threads=1)
    other = trainer(WORK, n_threads=1, average=mb.EMA(0.999) if case == "EMA" else None)
    if case == "schedule":  # longer than anything here trains
        other.optimizer = mb.SGD(lr=mb.OneCycleLR(max_lr=WORK.lr, total_steps=10**7), momentum=0.9)
    called = callbacks(case)

    def run_plain(epochs: int) -> None:
        plain.fit(X, y, max_epochs=epochs, verbose=0)

    def run(epochs: int) -> None:
        other.fit(X, y, max_epochs=epochs, verbose=0, callbacks=called)

    benchmark.group = "callbacks and schedules"
    in_turn(
        benchmark,
        {"fastmb": Contender(run, WORK.steps), "plain step": Contender(run_plain, WORK.steps)},
        case=case,
        shape=f"{WORK.shape}, batch {WORK.batch}",
        dtype="float32",
        threads=1,
        flops=WORK.flops,
        baseline="plain step",
        asked=ASKED[case],
        rounds=15,
        seconds=0.1,
    )
