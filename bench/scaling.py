"""``python -m bench.scaling``: how the cost of a step grows with batch, width, depth and rows of data; and a model.

Along each axis one number of one network changes (`AXES`). Batch, width and depth train random data in memory, in
rounds of whole epochs, the libraries in turn; the rows are a memory-mapped file of uint8 in a temporary folder, of
which fastmb trains one whole epoch, shuffling included. JSON has every figure, the PNG four panels on logarithmic axes
with a straight line through the largest size: what lies above it is a fixed cost a step, or memory that became slower.

``--model`` reckons instead what more cores would give, and shows it beside what the cores that there are do give. It
is a model, no measurement: see `Machine` and `modelled`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from .machine import environment, fma_peak, isa, processor
from .peer import Peer
from .peers import PEERS, missing, trainer, versions
from .workloads import WORKLOADS, Workload

DATA = 1 << 24  # numbers that a data set in memory may hold
MODELLED = ("tiny", "small", "mnist", "tab", "mid", "wide")
Point = dict[str, Any]


def workload(name: str, sizes: tuple[int, ...], batch: int) -> Workload:
    """Momentum and cross-entropy; from 2 to 64 steps an epoch, as the room for data allows."""
    steps = max(2, min(64, DATA // (batch * sizes[0])))
    return Workload(name, sizes, batch, "momentum", "cross_entropy", steps * batch)


AXES: dict[str, tuple[list[int], Callable[[int], Workload]]] = {
    "batch": ([2**k for k in range(14)], lambda n: workload(f"batch {n}", (64, 256, 256, 10), n)),
    "width": ([2**k for k in range(3, 13)], lambda n: workload(f"width {n}", (n, n, n), 128)),
    "depth": ([1, 2, 3, 4, 6, 8, 12, 16], lambda n: workload(f"depth {n}", (*[128] * n, 10), 128)),
    "rows": (
        [10**k for k in range(3, 8)],
        lambda n: Workload(f"{n} rows", (64, 128, 10), 125, "momentum", "cross_entropy", n),
    ),
}
TITLES = {
    "batch": "64-256-256-10",
    "width": "two layers as wide, batch 128",
    "depth": "so many layers, 128 wide, batch 128",
    "rows": "64-128-10, batch 125, uint8 memmap",
}


def time_steps(work: Workload, names: list[str], threads: int, rounds: int, seconds: float) -> dict[str, float]:
    """Microseconds a step of each library: medians of rounds."""
    peers: dict[str, Peer] = {}
    epochs: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        peer = peers[name] = PEERS[name](work, threads=threads)
        peer.tune()
        epochs[name] = peer.epochs_in(seconds)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            peers[name].train(1)
            times[name].append(1e6 * peers[name].seconds(epochs[name]) / (epochs[name] * work.steps))
    return {name: median(found) for name, found in times.items()}


def time_rows(work: Workload, folder: Path) -> dict[str, float]:
    """Microseconds a step of an epoch over a memory-mapped file: all of it, and the shuffle alone."""
    from fastmb.data import permutation

    path, rng, chunk = folder / "X", np.random.default_rng(0), 1 << 16
    with open(path, "wb") as file:
        for start in range(0, work.rows, chunk):
            rng.integers(0, 256, (min(chunk, work.rows - start), work.sizes[0]), np.uint8).tofile(file)
    X = np.memmap(path, np.uint8, "r", shape=(work.rows, work.sizes[0]))
    y = rng.integers(0, work.sizes[-1], work.rows, np.uint8)
    trained = trainer(work)
    trained.fit(X[: work.batch], y[: work.batch], max_epochs=2, verbose=0)
    begin = time.perf_counter()
    permutation(work.rows, 0, 1)
    shuffle = time.perf_counter() - begin
    repeats = max(1, 10**5 // work.rows)
    trained.fit(X, y, max_epochs=repeats, verbose=0)
    taken = median(trained.history["seconds"][-repeats:])
    path.unlink()
    return {"fastmb": 1e6 * taken / work.steps, "shuffle": 1e6 * shuffle / work.steps}


def measure(axis: str, args: argparse.Namespace) -> Iterator[Point]:
    """The points of an axis, from small to large."""
    values, make = AXES[axis]
    for value in values:
        if value > args.largest:
            break
        work = make(value)
        if axis == "rows":
            with tempfile.TemporaryDirectory(prefix="fastmb-scaling-") as folder:
                us = time_rows(work, Path(folder))
        else:
            us = time_steps(work, args.peers, args.threads, args.rounds, args.seconds)
        yield {axis: value, "shape": work.shape, "batch": work.batch, "rows": work.rows, "flops": work.flops, "us": us}


def table(axis: str, points: list[Point], peak: float | None) -> str:
    """A Markdown table of an axis."""
    names = list(points[0]["us"])
    lines = [
        f"### {axis}",
        "",
        f"| {axis} | layers | batch | {' | '.join(f'{name}, us a step' for name in names)} | GFLOP/s | of peak |",
        f"|---:|---|---:|{'---:|' * len(names)}---:|---:|",
    ]
    for point in points:
        gflops = point["flops"] / point["us"][names[0]] / 1e3
        shape = point["shape"] if len(point["shape"]) < 30 else point["shape"][:12] + "..."
        lines.append(
            f"| {point[axis]} | {shape} | {point['batch']} | {' | '.join(f'{us:.4g}' for us in point['us'].values())} "
            f"| {gflops:.3g} | {f'{gflops / peak:.0%}' if peak else '-'} |"
        )
    return "\n".join(lines) + "\n"


def draw(found: dict[str, list[Point]], path: str) -> None:
    """Four panels of time over size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7.5), layout="constrained")
    for axes, (axis, points) in zip(figure.subplots(2, 2).flat, found.items(), strict=False):
        x = np.array([point[axis] for point in points], np.float64)
        for i, name in enumerate(points[0]["us"]):
            us = np.array([point["us"][name] for point in points])
            axes.loglog(x, us, f"C{i}o-", ms=4, label=name)
            if axis != "rows" and name == "fastmb":
                flops = np.array([point["flops"] for point in points])
                axes.loglog(x, us[-1] * flops / flops[-1], "k:", lw=1, label="as the arithmetic grows")
        axes.set(xlabel=axis, ylabel="microseconds a step", title=TITLES[axis])
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


# ---- the model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What the model is fed, all of it measured here but for the last two, which are assumed."""

    barrier: float  # seconds of a barrier between two threads
    bandwidth: float  # bytes a second that one core copies, read and write counted
    cores: int  # that there are here
    bandwidth_all: float  # what all of them copy at once
    cache: float = 32e6  # bytes of state above which a step takes them from memory
    saturated: int = 8  # cores' worth of bandwidth that the memory has at the most


def machine(threads: int) -> Machine:
    """Measures the machine; where there is one core, the barrier is a guess of 0.3 us."""
    n = 1 << 24
    arrays = [(np.zeros(n, np.uint8), np.ones(n, np.uint8)) for _ in range(threads)]

    def copy(pair: tuple[np.ndarray, np.ndarray]) -> None:
        for _ in range(5):
            np.copyto(*pair)

    def bandwidth(count: int) -> float:
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(copy, arrays[:count]))
            begin = time.perf_counter()
            list(pool.map(copy, arrays[:count]))
            return 2 * 5 * n * count / (time.perf_counter() - begin)

    barrier = 0.3e-6
    if threads > 1:  # two barriers a step, and next to nothing between them; one thread has no barrier
        work = Workload("nothing", (1, 1), 64, "sgd", "mse", 64 * 256)
        barrier = max(0.05e-6, (step_seconds(work, 2) - step_seconds(work, 1) / 2) / 2)
    return Machine(barrier, bandwidth(1), threads, bandwidth(threads))


def step_seconds(work: Workload, threads: int, rounds: int = 5, seconds: float = 0.1) -> float:
    """A step of fastmb on so many threads: the median of rounds."""
    X, y = work.data()
    trained = trainer(work, n_threads=threads)
    trained.fit(X, y, max_epochs=1, verbose=0)
    for _ in range(rounds):
        trained.fit(X, y, max_epochs=10**6, max_seconds=seconds / rounds, verbose=0)
    epochs = [
        s * r / work.batch
        for s, r in zip(trained.history["seconds"], trained.history["examples_per_second"], strict=True)
    ]
    return median(s / n for s, n in zip(trained.history["seconds"][1:], epochs[1:], strict=True))


def modelled(work: Workload, alone: float, machine: Machine, cores: int) -> tuple[float, int]:
    """Seconds of a step on up to so many cores, and how many of them the model would use.

    ``T(p) = alone q(p) / p + 2 b ceil(log2 p)``, but not less than the parameters and states take from memory. `alone`
    is the step measured on one core, that is the FLOP at the rate at which one core does them; `b` the barrier,
    measured between two and taken to grow as a tree's; q >= 1 the uneven share: dealt out are blocks of 16 rows, or
    panels of 16 columns of the weights, whichever are more. Clocks that fall and shared caches are not in it.
    """
    widest = max(work.sizes[1:])
    pieces = max(math.ceil(work.batch / 16), math.ceil(widest / 16))  # few rows are cut by columns instead
    states = {"sgd": 0, "momentum": 1, "adam": 2}[work.optimizer]
    weights = 4 * sum((n_in + 1) * n_out for n_in, n_out in zip(work.sizes, work.sizes[1:], strict=False))
    traffic = 2 * weights * (1 + states) if weights * (1 + states) > machine.cache else 0

    def seconds(p: int) -> float:
        if p == 1:
            return alone
        idle = math.ceil(pieces / p) * p / pieces
        bandwidth = min(p, machine.saturated) * machine.bandwidth_all / machine.cores
        return max(alone * idle / p, traffic / bandwidth) + 2 * machine.barrier * math.ceil(math.log2(p))

    best = min(range(1, cores + 1), key=seconds)
    return seconds(best), best


def model(args: argparse.Namespace) -> dict[str, Any]:
    """Prints the model's table and returns its figures."""
    here = machine(args.threads)
    print(
        f"MODEL, not measured but for the columns that say so. Fed with: barrier {1e6 * here.barrier:.2f} us, "
        f"one core copies {here.bandwidth / 1e9:.1f} GB/s, {here.cores} copy {here.bandwidth_all / 1e9:.1f} GB/s; "
        f"assumed: memory for {here.saturated} cores, a cache of {here.cache / 1e6:.0f} MB\n"
    )
    counts = (8, 32, 64)
    heads = ["1 core, measured", f"{here.cores} measured", f"{here.cores} modelled", *(f"{n} modelled" for n in counts)]
    print(f"| workload, us a step | {' | '.join(heads)} | GFLOP/s on {counts[-1]} |")
    print(f"|---|{'---:|' * (len(heads) + 1)}")
    found = {}
    for name in args.workloads or MODELLED:
        work = WORKLOADS[name]
        alone = step_seconds(work, 1, args.rounds, args.seconds)
        both = step_seconds(work, here.cores, args.rounds, args.seconds)
        reckoned = {n: modelled(work, alone, here, n) for n in (here.cores, *counts)}
        shown = [f"{1e6 * alone:.4g}", f"{1e6 * both:.4g}"]
        shown += [f"{1e6 * seconds:.4g} (uses {used})" for seconds, used in reckoned.values()]
        print(f"| {name} | {' | '.join(shown)} | {work.flops / reckoned[counts[-1]][0] / 1e9:.3g} |", flush=True)
        found[name] = {"alone": alone, "measured": both, "modelled": reckoned}
    return {"machine": vars(here), "workloads": found}


# ---- the command line ------------------------------------------------------------------------------------------------


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description="How the cost of a step grows.")
    parser.add_argument("--axes", default=",".join(AXES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--largest", type=float, default=math.inf, help="leave sizes beyond this out")
    parser.add_argument("--peers", default="", help="beside fastmb, such as jax; comma-separated")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=0.1, help="of each library in a round (default: %(default)s)")
    parser.add_argument("--model", action="store_true", help="reckon what 8, 32 and 64 cores would give, instead")
    parser.add_argument("--workloads", help=f"of the model, comma-separated (default: {','.join(MODELLED)})")
    parser.add_argument("--out", metavar="PNG", help="draw the panels there, such as docs/scaling.png")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    args = parser.parse_args(argv)
    args.axes = args.axes.split(",")
    args.peers = ["fastmb", *(name for name in args.peers.split(",") if name)]
    args.workloads = args.workloads.split(",") if args.workloads else None
    known = (("axis", args.axes, AXES), ("peer", args.peers, PEERS), ("workload", args.workloads or [], WORKLOADS))
    for kind, asked, there in known:
        if unknown := [name for name in asked if name not in there]:
            parser.error(f"unknown {kind} {unknown[0]!r}; there are {', '.join(there)}")
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure or model, print, draw."""
    args = arguments(argv)
    for name in args.peers[1:]:
        if why := missing(PEERS[name]):
            args.peers.remove(name)
            print(why)
    setting: dict[str, Any] = {
        "processor": processor(),
        "isa": isa(),
        "versions": versions(PEERS[name] for name in args.peers),
        "environment": environment(),
        "peak_gflops": fma_peak("float32", args.threads),
    }
    peak = setting["peak_gflops"]
    print(f"{setting['processor']}; {setting['isa']}; FMA peak {peak:.0f} GFLOP/s; {setting['versions']}")
    for name, value in setting["environment"].items():
        print(f"NOTE: {name}={value} is set and may handicap a peer: unset it for figures to quote")
    print(flush=True)
    if args.model:
        results: dict[str, Any] = model(args)
    else:
        results = {}
        for axis in args.axes:
            results[axis] = list(measure(axis, args))
            print(table(axis, results[axis], peak), flush=True)
        if args.out:
            draw(results, args.out)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({**setting, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
