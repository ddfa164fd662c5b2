"""``python -m bench.neighbours``: what a step takes in company, as a multiple of what it takes alone.

Every workload is trained alone and then, in turn, beside: a busy foreign process on each core; more threads than
cores; a second trainer in another Python thread; and a NumPy, a PyTorch or a scikit-learn that is busy in another
thread of the same process (which is timed, too: its pieces of work alone and beside the trainer). The median of the
rounds counts.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

from .peers import FastMB
from .workloads import WORKLOADS, Workload

CASES = ("tiny", "small", "mnist", "mnist1", "mid", "tab", "xs-small", "wide")
COMPANY = ("numpy", "torch", "sklearn")
CORES = sorted(os.sched_getaffinity(0))
BURN = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"


class Trainer(FastMB):
    """fastmb as its user has it: threads are its own business, or `n_threads`."""

    def __init__(self, work: Workload, n_threads: int | None = None) -> None:
        super().__init__(work, threads=len(CORES))
        self.trainer.n_threads = n_threads

    def us(self, seconds: float) -> float:
        """Microseconds a step, over epochs that fill so much time."""
        steps, start = 0, time.perf_counter()
        while (now := time.perf_counter()) < start + seconds:
            self.train(1)
            steps += self.work.steps
        return 1e6 * (time.perf_counter() - start) / steps if steps else 1e6 * (now - start)


class Busy:
    """Somebody who works in a thread of his own until told to stop, and counts."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.work, self.count, self._stop = work, 0, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.is_set():
            self.work()
            self.count += 1

    def __enter__(self) -> Busy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def alone(work: Callable[[], Any], seconds: float) -> float:
    """Times a second."""
    count, start = 0, time.perf_counter()
    while time.perf_counter() < start + seconds:
        work()
        count += 1
    return count / (time.perf_counter() - start)


def company(name: str) -> Callable[[], Any]:
    """A piece of work of another library: products of 400 a side, or an epoch of a small perceptron."""
    if name == "sklearn":
        from sklearn.neural_network import MLPClassifier

        X, y = WORKLOADS["small"].data()
        net = MLPClassifier((64, 64), batch_size=64, max_iter=1)
        net.partial_fit(X[:2048], y[:2048], classes=np.arange(10))
        return lambda: net.partial_fit(X[:2048], y[:2048])
    a = np.random.default_rng(0).random((400, 400), np.float32)
    if name == "numpy":
        return lambda: a @ a
    import torch

    t = torch.from_numpy(a)
    return lambda: t @ t


def row(case: str, seconds: float, rounds: int, others: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Multiples of the time alone, by company."""
    work = WORKLOADS[case]
    one, crowd, second = Trainer(work), Trainer(work, 2 * len(CORES)), Trainer(work)
    for each in (one, crowd, second):
        each.us(seconds)
    rates = {name: alone(call, seconds) for name, call in others.items()}
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    for _ in range(rounds):
        one.us(seconds)  # who has been in company takes a moment to find how many threads are the fastest alone
        quiet = one.us(seconds)
        note("us alone", quiet)
        note(f"{2 * len(CORES)} threads", crowd.us(seconds) / quiet)
        hogs = [subprocess.Popen([sys.executable, "-c", BURN, str(core)]) for core in CORES]
        time.sleep(0.2)
        note("a busy process a core", one.us(2 * seconds) / quiet)
        for hog in hogs:
            hog.kill()
            hog.wait()
        with Busy(lambda: second.train(1)) as other:
            note("a second trainer", one.us(2 * seconds) / quiet)
            other.count = 0
        for name, call in others.items():
            with Busy(call) as other:
                start = time.perf_counter()
                note(f"beside {name}", one.us(2 * seconds) / quiet)
                rate = other.count / (time.perf_counter() - start)
            note(f"{name} beside it", rates[name] / rate if rate else float("inf"))
    return {name: median(values) for name, values in found.items()}


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.neighbours", description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=CASES, help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    others = {}
    for name in COMPANY:
        try:
            others[name] = company(name)
        except ImportError as error:
            print(f"{name} left out: {error}")
    head: list[str] = []
    for case in options.cases:
        values = row(case, options.seconds, options.rounds, others)
        if not head:
            head = list(values)
            print("| | " + " | ".join(head) + " |\n|---|" + "---:|" * len(head))
        print(f"| {case} | " + " | ".join(f"{values[name]:.2f}" for name in head) + " |", flush=True)


if __name__ == "__main__":
    main()
