"""fastmb and its peers in turn, as one result of pytest-benchmark: what all suites here time with.

A round of a result lets everyone work, one after the other, for the same time; pytest-benchmark's own figures are
fastmb's. ``extra_info`` has the rest, in the form that ``bench.report`` reads: the shape, the dtype, the threads, the
instruction set, the versions, the machine's peak measured in the same rounds, and for everyone the median time, the
rate it comes to, its share of the peak and its largest error against float64. The median counts, the error is shown
beside it, and who was missing is named.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from statistics import median
from typing import Any

from .machine import allowed_threads, copy_bandwidth, environment, fma_peak, isa, on_processors, processor
from .peers import version

SETTLED = 0.06  # seconds after which nobody's idle threads spin: OpenBLAS lets them for 2^26 cycles, some 30 ms
Run = Callable[[int], Any]


@dataclass
class Contender:
    """Somebody who does the work."""

    run: Run  # does it so many times
    units: int = 1  # pieces of work, such as steps, in one of these times
    how: Mapping[str, Any] = field(default_factory=dict)  # the variant that was found the fastest
    packages: tuple[str, ...] = ()  # whose versions count


def looped(call: Callable[[], Any]) -> Run:
    """`run` for a call that does the work once."""

    def run(times: int) -> None:
        for _ in range(times):
            call()

    return run


def seconds_of(run: Run, times: int) -> float:
    """Wall time of so many times."""
    start = time.perf_counter()
    run(times)
    return time.perf_counter() - start


def times_in(run: Run, seconds: float) -> int:
    """How many times fill so much time, at least one; warms up, too."""
    run(1)
    times = 1
    while (taken := seconds_of(run, times)) < seconds / 4:
        times = max(2 * times, int(times * seconds / max(taken, 1e-9) / 2))
    return max(1, round(times * seconds / taken))


def fastest(variants: Iterable[Contender], seconds: float = 0.05) -> Contender:
    """The one of several ways to do the same work that is done soonest."""
    variants = list(variants)
    if len(variants) == 1:
        return variants[0]

    def cost(contender: Contender) -> float:
        times = times_in(contender.run, seconds)
        tries = 2 if times > 1 else 1  # something slow is told apart by one
        return min(seconds_of(contender.run, times) for _ in range(tries)) / (times * contender.units)

    return min(variants, key=cost)


def in_turn(
    benchmark: Any,
    contenders: Mapping[str, Contender],
    *,
    case: str,
    shape: str,
    dtype: str,
    threads: int,
    flops: float | None = None,
    moved: float | None = None,
    errors: Mapping[str, float] | None = None,
    left_out: Iterable[str] = (),
    baseline: str | None = None,
    asked: float | None = None,
    rounds: int = 7,
    seconds: float = 0.05,
    settle: bool = True,
) -> None:
    """Times `contenders`, of which "fastmb" is one, and notes all that a result has.

    A unit of the work is so many floating-point operations (`flops`) or moves so many bytes (`moved`); with neither,
    only times are told. `left_out` says who is missing and why. `baseline` is the contender that is no peer, but the
    same work without the thing that is timed; the ratio to it is to be at most `asked`. A turn takes `seconds`, or one
    time if that is longer. Before it, to `settle`, the threads of whoever was before go to sleep, and work that is
    shorter than a turn is done once. Beside peers everybody is kept on `threads` processors: not all of them
    can be told how many threads to take. With ``--benchmark-disable`` everyone works once.
    """
    ours = contenders["fastmb"]
    others = {name: contender for name, contender in contenders.items() if name != "fastmb"}
    if benchmark.disabled:
        for contender in others.values():
            contender.run(1)
        benchmark(ours.run, 1)
        return
    times: dict[str, int] = {}
    found: dict[str, list[float]] = {name: [] for name in contenders}
    peaks = []

    def prepare(name: str) -> None:
        gc.collect()  # of what the round has made, not of whole libraries: those are frozen
        if settle:
            time.sleep(SETTLED)
            if times[name] > 1:
                contenders[name].run(1)

    def before_a_round() -> None:
        for name, contender in others.items():
            prepare(name)
            found[name].append(seconds_of(contender.run, times[name]) / (times[name] * contender.units))
        peaks.append(_peak(dtype, threads, flops, moved))
        prepare("fastmb")

    gc.collect()
    gc.freeze()
    try:
        with on_processors(allowed_threads() if baseline else threads):
            times.update({name: times_in(contender.run, seconds) for name, contender in contenders.items()})
            benchmark.pedantic(ours.run, args=(times["fastmb"],), setup=before_a_round, rounds=rounds)
    finally:
        gc.unfreeze()
    found["fastmb"] = [taken / (times["fastmb"] * ours.units) for taken in benchmark.stats.stats.data]
    peak = max((peak for peak in peaks if peak is not None), default=None)
    work = flops if flops is not None else moved
    if baseline:
        ratio = median(mine / plain for mine, plain in zip(found["fastmb"], found[baseline], strict=True))
        benchmark.extra_info["baseline"] = {"name": baseline, "ratio": ratio, "asked": asked}
    benchmark.extra_info.update(
        case=case,
        shape=shape,
        dtype=dtype,
        threads=threads,
        work=work,
        unit=None if work is None else "GFLOP/s" if flops is not None else "GB/s",
        peak=peak,
        contenders={
            name: _result(contenders[name], found[name], work, peak, (errors or {}).get(name)) for name in contenders
        },
        left_out=list(left_out),
        isa=isa(),
        processor=_processor(),
        environment=environment(),
        versions={p: version(p) for p in ("python", "numpy", *(p for c in contenders.values() for p in c.packages))},
    )


def _peak(dtype: str, threads: int, flops: float | None, moved: float | None) -> float | None:
    if flops is not None:
        return fma_peak(dtype, threads, 0.02)
    return None if moved is None else copy_bandwidth(threads, 0.02)


def _result(
    contender: Contender, times: list[float], work: float | None, peak: float | None, error: float | None
) -> dict[str, Any]:
    taken = median(times)
    rate = None if work is None else 1e-9 * work / taken
    return {
        "seconds": taken,
        "fastest": min(times),
        "slowest": max(times),
        "rate": rate,
        "share": rate / peak if rate and peak else None,
        "error": error,
        "how": dict(contender.how),
    }


_processor = cache(processor)
