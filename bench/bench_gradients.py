"""What it costs to look at a mini-batch's gradients: each thing beside the plain step, in turn.

A pytest-benchmark suite, whose ``extra_info`` has the ratio; ``python -m bench.bench_gradients`` prints a table of all.
The median of the rounds' ratios counts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import pytest

import fastmb as mb

from .machine import environment, isa, processor
from .workloads import WORKLOADS, Workload

THREADS = len(os.sched_getaffinity(0))
CASES = ("small", "mnist", "mid")
LIMITS = {  # the ratio to the plain step that was asked for
    "gradient_stats": {"mid": 1.03, "mnist": 1.03, "small": 1.10},
    "clip_per_example": {"mid": 1.10, "mnist": 1.10, "small": 1.20},
    "max_grad_norm": {"mid": 1.25},
    "accumulate_steps=4": {"small": 1.15, "mnist": 1.15, "mid": 1.15},
    "noise": {},
    "per_example_norms": {},
    "per_example_gradients": {},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "gradient_stats": {"gradient_stats": True},
    "clip_per_example": {"clip_per_example": 0.5},
    "max_grad_norm": {"max_grad_norm": 0.5},
    "noise": {"clip_per_example": 0.5, "noise_multiplier": 1.0},
}
ROWS = 64  # of a call of per_example_gradients, as far as 256 MB hold them


def trainer(work: Workload, threads: int, **options: Any) -> mb.Trainer:
    """A trainer of the workload."""
    rules = {"sgd": mb.SGD(work.lr), "momentum": mb.SGD(work.lr, momentum=0.9), "adam": mb.Adam(work.lr)}
    options = {"batch_size": work.batch, "n_threads": threads} | options
    net = mb.mlp(work.sizes, activation=work.activation)
    return mb.Trainer(net, work.loss, rules[work.optimizer], **options)


def fits(work: Workload, one: mb.Trainer) -> Callable[[], None]:
    """Half a tenth of a second of training, or an epoch."""
    X, y = work.data()
    flops = 5e10  # a machine that makes so many a second
    epochs = max(1, round(0.05 * flops / (work.flops * work.steps)))

    def run() -> None:
        one.fit(X, y, max_epochs=epochs, verbose=0, check_finite=False)

    run()
    return run


def pair(case: str, what: str, threads: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """The plain thing, and the thing itself."""
    work = WORKLOADS[case]
    if what in OPTIONS:
        return fits(work, trainer(work, threads)), fits(work, trainer(work, threads, **OPTIONS[what]))
    if what == "accumulate_steps=4":
        plain = trainer(work, threads, batch_size=4 * work.batch)
        return fits(work, plain), fits(work, trainer(work, threads, accumulate_steps=4))
    one = trainer(work, threads)
    X, y = work.data()
    if what == "per_example_norms":  # of a mini-batch, beside a step of it
        xb, yb = X[: work.batch], y[: work.batch]
        return (lambda: void(one.step(xb, yb))), (lambda: void(one.per_example_norms(xb, yb)))
    rows = max(1, min(ROWS, 2**28 // (4 * one.net.plan.size)))
    bytes_ = 4 * one.net.plan.size * rows

    def write() -> None:  # as many bytes, each page touched for the first time as there
        np.empty(bytes_ // 4, np.float32).fill(1.0)

    return write, (lambda: void(one.per_example_gradients(X[:rows], y[:rows])))


def void(_: object) -> None:
    """Nothing."""


def ratios(
    plain: Callable[[], None], thing: Callable[[], None], rounds: int, seconds: float
) -> list[tuple[float, float]]:
    """Times of both, in turn, each repeated to fill `seconds`."""
    found = []
    begin = time.perf_counter()
    plain()
    thing()
    repeats = max(1, int(2 * seconds / (time.perf_counter() - begin)))
    for turn in range(rounds):
        times = [0.0, 0.0]
        for which in (0, 1) if turn % 2 else (1, 0):
            begin = time.perf_counter()
            for _ in range(repeats):
                (plain, thing)[which]()
            times[which] = (time.perf_counter() - begin) / repeats
        found.append((times[0], times[1]))
    return found


@pytest.mark.parametrize("what", LIMITS)
@pytest.mark.parametrize("case", CASES)
def test_gradients(benchmark: Any, case: str, what: str) -> None:
    plain, thing = pair(case, what, THREADS)
    benchmark.group = f"{what}, {case}"
    if benchmark.disabled:
        benchmark(thing)
        return
    found = ratios(plain, thing, 9, 0.05)
    benchmark.pedantic(thing, rounds=5, warmup_rounds=1)
    benchmark.extra_info.update(
        ratio=median(b / a for a, b in found),
        plain_us=1e6 * median(a for a, _ in found),
        asked=LIMITS[what].get(case),
        threads=THREADS,
        isa=isa(),
        processor=processor(),
        environment=environment(),
    )


def main() -> None:
    """Print the table."""
    print("| | threads | " + " | ".join(CASES) + " |\n|---|---:" + "|---:" * len(CASES) + "|")
    for what in LIMITS:
        for threads in sorted({1, THREADS}):
            cells = []
            for case in CASES:
                plain, thing = pair(case, what, threads)
                ratio = median(b / a for a, b in ratios(plain, thing, 15, 0.05))
                asked = LIMITS[what].get(case)
                cells.append(f"{ratio:.3f}" + (f" ({asked:.2f})" if asked else ""))
            print(f"| {what} | {threads} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
