"""Calls of several libraries in turn, as results of pytest-benchmark.

A case's calls are timed together, round after round, when the first of its tests asks for one; each test then hands its
own rounds to pytest-benchmark, which reads a clock that goes forward by what was measured. So the numbers of a case are
from the same seconds, and each peer has its own entry, with median, spread and ``extra_info``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np

from .machine import copy_bandwidth, environment, fma_peak, isa, processor

PEERS = ("fastmb", "numpy", "torch", "jax")
ROUNDS, SECONDS = 9, 0.02  # rounds of a case; how long each call's part of a round is to take
Call = Callable[[], Any]


class Clock:
    """A timer that goes forward when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


clock = Clock()


@dataclass
class Case:
    """One piece of work: its calls by peer, each returning its result, and what they should give."""

    name: str
    dtype: str
    threads: int
    calls: dict[str, Call]
    exact: np.ndarray  # float64
    flops: float = 0.0  # of a call, or
    bytes: float = 0.0  # read and written
    times: dict[str, list[float]] = field(default_factory=dict)
    yardstick: float | None = None  # GFLOP/s or GB/s of the machine, measured beside


def missing(peer: str) -> str | None:
    """What keeps a peer from running, or None."""
    package = "fastmb.ops._native" if peer == "fastmb" else peer
    try:
        import_module(package)
    except ImportError as error:
        return f"{peer} left out: {error}"
    return None


def unfit(peer: str, threads: int, all_threads: int) -> str | None:
    """Why a peer can't run on so many threads, or None."""
    if peer == "jax" and threads != all_threads:
        return f"jax left out: it takes {all_threads} threads, not {threads}"
    return missing(peer)


@contextmanager
def limits(threads: int) -> Iterator[None]:
    """Every library that can be told takes so many threads."""
    from threadpoolctl import threadpool_limits

    try:
        import torch
    except ImportError:
        with threadpool_limits(threads):
            yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads):
            yield
    finally:
        torch.set_num_threads(before)


def measure(case: Case) -> None:
    """`ROUNDS` rounds of all calls, one after the other, beginning with another one each time."""
    names = list(case.calls)
    repeats = {}
    for name, call in case.calls.items():
        call()
        taken, n = 0.0, 1
        while (taken := _seconds(call, n)) < SECONDS / 4 and n < 1 << 20:
            n *= 2
        repeats[name] = max(1, round(n * SECONDS / taken))
    case.times = {name: [] for name in names}
    for turn in range(ROUNDS):
        at = turn % len(names)
        for name in names[at:] + names[:at]:
            case.calls[name]()
            case.times[name].append(_seconds(case.calls[name], repeats[name]) / repeats[name])
    if case.flops:
        case.yardstick = fma_peak(case.dtype, case.threads)
    else:
        case.yardstick = copy_bandwidth(case.threads)


def _seconds(call: Call, n: int) -> float:
    start = time.perf_counter()
    for _ in range(n):
        call()
    return time.perf_counter() - start


def run(benchmark: Any, case: Case, peer: str) -> None:
    """One entry: this peer's rounds of the case, and what they come to."""
    found = np.asarray(case.calls[peer](), np.float64)
    error = float(np.abs(found - case.exact).max(initial=0) / max(np.abs(case.exact).max(initial=0), 1e-300))
    assert error < 1e3 * np.finfo(case.dtype).eps, f"{peer}: error {error}"
    if benchmark.disabled:
        benchmark(case.calls[peer])
        return
    if not case.times:
        measure(case)
    durations = iter(case.times[peer])

    def replay() -> None:
        clock.now += next(durations)

    benchmark.group = f"{case.name}, {case.dtype}, {case.threads} threads"
    benchmark.pedantic(replay, rounds=len(case.times[peer]), iterations=1)
    seconds = float(np.median(case.times[peer]))
    rate = (case.flops or case.bytes) / seconds / 1e9
    kind = ("gflops", "peak_gflops", "share_of_peak") if case.flops else ("gb_s", "copy_gb_s", "share_of_copy")
    others = [float(np.median(t)) for name, t in case.times.items() if name != "fastmb"]
    benchmark.extra_info.update(
        {kind[0]: rate, kind[1]: case.yardstick, kind[2]: rate / case.yardstick if case.yardstick else None},
        case=case.name,
        peer=peer,
        shape=case.name,
        dtype=case.dtype,
        threads=case.threads,
        us=1e6 * seconds,
        times_best_peer=min(others) / seconds if peer == "fastmb" and others else None,
        error=error,
        isa=isa(),
        processor=processor(),
        versions={name: str(import_module(name.split(".")[0]).__version__) for name in case.calls},
        environment=environment(),
    )
