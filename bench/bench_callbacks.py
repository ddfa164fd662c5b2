"""What callbacks and schedules cost a step of `mnist`: fits with each against a plain fit, in turn, on one thread.

Times are of the processor, so that what else runs disturbs them less. ``extra_info`` has the cost in percent of the
plain fit, the median of the rounds; a schedule or early stopping is to cost at most 2 %. `batches` is what a callback
costs that asks to be called after every mini-batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest

import fastmb as mb

from .machine import environment, isa, processor
from .peers import trainer
from .workloads import WORKLOADS

WORK = WORKLOADS["mnist"]


class Batches(mb.Callback):
    """Asks for every mini-batch, and does nothing."""

    def on_batch_end(self, trainer: mb.Trainer, loss: float) -> None:
        pass


def schedule(steps: int) -> mb.OneCycleLR:
    return mb.OneCycleLR(max_lr=WORK.lr, total_steps=steps)


CASES: dict[str, Callable[[], mb.Callback] | None] = {
    "early_stopping": lambda: mb.EarlyStopping("loss", patience=10**6),
    "early_stopping, best weights": lambda: mb.EarlyStopping("loss", patience=10**6, restore_best=True),
    "schedule": None,
    "batches": Batches,
}


@pytest.mark.benchmark(timer=time.thread_time)
@pytest.mark.parametrize("case", CASES)
def test_cost(benchmark: Any, case: str) -> None:
    X, y = WORK.data()
    epochs, rounds = 4, 1 if benchmark.disabled else 25
    make = CASES[case]
    fit = {"max_epochs": epochs, "verbose": 0}
    plain, other = trainer(WORK, n_threads=1), trainer(WORK, n_threads=1)
    if make is None:
        steps = WORK.steps * epochs * (rounds + 2)
        other.optimizer = mb.SGD(lr=schedule(steps), momentum=0.9)
    callbacks = [] if make is None else [make()]
    times: list[float] = []

    def without() -> None:
        begin = time.thread_time()
        plain.fit(X, y, **fit)
        times.append(time.thread_time() - begin)

    benchmark.group = f"{WORK.name} {WORK.shape}, batch {WORK.batch}"
    benchmark.pedantic(other.fit, args=(X, y), kwargs=fit | {"callbacks": callbacks}, setup=without, rounds=rounds)
    if benchmark.disabled:
        return
    ratios = [mine / plainly for mine, plainly in zip(benchmark.stats.stats.data, times, strict=True)]
    benchmark.extra_info.update(
        us_a_step=1e6 * benchmark.stats.stats.median / (epochs * WORK.steps),
        plain_us_a_step=1e6 * median(times) / (epochs * WORK.steps),
        cost_percent=100 * (median(ratios) - 1),
        isa=isa(),
        processor=processor(),
        environment=environment(),
    )
