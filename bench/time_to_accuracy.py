"""``python -m bench.time_to_accuracy``: how long until a network is good, which is what people wait for.

Two goals: 97 % of the digits that nobody trained on, and 88 % of Fashion-MNIST's test set. Every library looks for its
own best batch size and learning rate, by trying the same ones in the same order on the same network (`--budget` of
them), and is judged by the seconds until an epoch's end finds the goal reached. With what it found it runs once for
each of `--seeds` other seeds, the libraries in turn. The medians count. Adam everywhere.

Only training is timed: the test images go through the network in NumPy, by the same function for all, off the clock.
Compiling, which is in the first epoch, is told apart as that epoch's time less the median of the others; the ratio to
the best peer leaves it out for all, and so is the peers' best case. The curves have it in.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np

from .machine import environment, isa, processor
from .peer import Peer
from .peers import PEERS, FastMB, missing, versions
from .workloads import Workload

LIBRARIES = [name for name in PEERS if name != "numpy"]
Setting = tuple[int, float]  # batch size, learning rate


@dataclass(frozen=True)
class Goal:
    """Data, a network, and how good it is to be."""

    name: str
    hidden: tuple[int, ...]
    accuracy: float
    settings: tuple[Setting, ...]  # to try, in this order
    X: np.ndarray
    y: np.ndarray
    X_test: np.ndarray
    y_test: np.ndarray


def settings(batches: tuple[int, ...], lrs: tuple[float, ...]) -> tuple[Setting, ...]:
    """All pairs, those that are in the middle of both lists first."""
    pairs = [(i, j) for i in range(len(batches)) for j in range(len(lrs))]
    middle = len(batches) // 2, len(lrs) // 2
    pairs.sort(key=lambda pair: (abs(pair[0] - middle[0]) + abs(pair[1] - middle[1]), pair))
    return tuple((batches[i], lrs[j]) for i, j in pairs)


def digits() -> Goal:
    from fastmb.datasets import load_digits

    X, y = load_digits()
    X = X.astype(np.float32) / 16
    test = np.arange(len(X)) % 5 == 4
    tried = settings((8, 16, 32, 64, 128), (1e-3, 3e-3, 1e-2))
    return Goal("digits", (128,), 0.97, tried, X[~test], y[~test], X[test], y[test])


def fashion_mnist(directory: str) -> Goal:
    from fastmb.datasets import load_fashion_mnist

    X, y, X_test, y_test = load_fashion_mnist(directory)
    tried = settings((32, 64, 128, 256, 512), (5e-4, 1e-3, 2e-3, 4e-3))
    scaled = (images.astype(np.float32) / 255 for images in (X, X_test))
    return Goal("Fashion-MNIST", (256,), 0.88, tried, next(scaled), y, next(scaled), y_test)


@dataclass(frozen=True)
class Attempt(Workload):
    """A goal's data with a batch size, a learning rate and a seed; rows beyond whole mini-batches are left out."""

    goal: Goal | None = None
    rate: float = 1e-3
    seed: int = 0

    @property
    def lr(self) -> float:
        return self.rate

    def data(self, dtype: str = "float32") -> tuple[np.ndarray, np.ndarray]:
        assert self.goal is not None
        return self.goal.X[: self.rows].astype(dtype, copy=False), self.goal.y[: self.rows]

    def weights(self, dtype: str = "float32") -> list[tuple[np.ndarray, np.ndarray]]:
        """He's uniform distribution, biases of zero."""
        rng = np.random.default_rng(self.seed)
        return [
            ((rng.uniform(-1, 1, (n_in, n_out)) * np.sqrt(6 / n_in)).astype(dtype), np.zeros(n_out, dtype))
            for n_in, n_out in pairwise(self.sizes)
        ]


def attempt(goal: Goal, setting: Setting, seed: int) -> Attempt:
    batch, lr = setting
    sizes = (goal.X.shape[1], *goal.hidden, int(goal.y.max()) + 1)
    rows = len(goal.X) // batch * batch
    return Attempt(goal.name, sizes, batch, "adam", "cross_entropy", rows, goal=goal, rate=lr, seed=seed)


@dataclass
class Curve:
    """What one training gave: an entry an epoch."""

    library: str
    setting: Setting
    variant: dict[str, Any]
    seconds: list[float]  # of each epoch
    accuracy: list[float]  # after it
    reached: bool

    @property
    def start_up(self) -> float:
        """What the first epoch took longer than the others."""
        return max(0.0, self.seconds[0] - median(self.seconds[1:])) if len(self.seconds) > 1 else 0.0

    @property
    def running(self) -> float:
        """Seconds of training so far, without the start-up, which shows from the second epoch on."""
        return sum(self.seconds) - self.start_up if len(self.seconds) > 1 else 0.0

    @property
    def cost(self) -> float:
        """Seconds of training until the goal, without the start-up; infinite if it wasn't reached."""
        return sum(self.seconds) - self.start_up if self.reached else math.inf


def run(name: str, work: Attempt, variant: dict[str, Any], threads: int, limit: float, epochs: int) -> Curve:
    """Train until the goal is reached, the epochs are over, or `limit` seconds of training are."""
    peer = PEERS[name](work, threads=threads)
    peer.use(**variant)
    curve = Curve(name, (work.batch, work.rate), variant, [], [], False)
    while not curve.reached and len(curve.seconds) < epochs and curve.running < limit:
        begin = time.perf_counter()
        train_an_epoch(peer, first=not curve.seconds)
        curve.seconds.append(time.perf_counter() - begin)
        assert work.goal is not None
        curve.accuracy.append(accuracy(peer.parameters(), work.goal))
        curve.reached = curve.accuracy[-1] >= work.goal.accuracy
    return curve


def train_an_epoch(peer: Peer, first: bool) -> None:
    """As in one long call: data are looked at for NaN at its beginning only."""
    if isinstance(peer, FastMB):
        peer.trainer.fit(peer.X, peer.y, max_epochs=1, verbose=0, check_finite=first)
    else:
        peer.train(1)


def accuracy(parameters: list[np.ndarray], goal: Goal) -> float:
    """The share of test images that a ReLU network gets right. One BLAS thread: others would disturb what follows."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"):
        a = goal.X_test
        for i in range(0, len(parameters), 2):
            a = np.maximum(a, 0) if i else a
            a = a @ parameters[i] + parameters[i + 1]
    return float((a.argmax(axis=1) == goal.y_test).mean())


def search(goal: Goal, name: str, args: argparse.Namespace) -> Curve:
    """The best of the settings tried with seed 0. Each gets as long as the best took so far, and no longer."""
    best: Curve | None = None
    variants: dict[int, dict[str, Any]] = {}
    for setting in goal.settings[: args.budget]:
        work = attempt(goal, setting, 0)
        if work.batch not in variants:  # ways such as a fused optimiser: their speed hangs on the batch alone
            peer = PEERS[name](work, threads=args.threads)
            peer.tune()
            variants[work.batch] = peer.variant
        limit = args.limit if best is None else min(args.limit, best.cost)
        curve = run(name, work, variants[work.batch], args.threads, limit, args.epochs)
        if best is None or curve.cost < best.cost:
            best = curve
    assert best is not None
    return best


def measure(goal: Goal, names: list[str], args: argparse.Namespace) -> dict[str, list[Curve]]:
    """The curves of every library, one a seed."""
    best = {name: search(goal, name, args) for name in names}
    curves: dict[str, list[Curve]] = {name: [] for name in names}
    for seed in range(1, args.seeds + 1):
        first = seed % len(names)
        for name in names[first:] + names[:first]:
            work = attempt(goal, best[name].setting, seed)
            curves[name].append(run(name, work, best[name].variant, args.threads, args.limit, args.epochs))
    return curves


def table(goal: Goal, curves: dict[str, list[Curve]]) -> str:
    """A Markdown table, and how fastmb compares with the best of the others."""
    shape = attempt(goal, goal.settings[0], 0).shape
    lines = [
        f"### {goal.accuracy:.0%} of {goal.name}: {len(goal.X)} images, network {shape}, Adam",
        "",
        "| | seconds | fastest, slowest seed | start-up | epochs | batch | lr | how | reached |",
        "|---|---:|---:|---:|---:|---:|---:|---|---:|",
    ]
    costs = {name: median(curve.cost for curve in found) for name, found in curves.items()}
    for name, found in curves.items():
        each = [curve.cost for curve in found]
        batch, lr = found[0].setting
        how = ", ".join(f"{key}: {value}" for key, value in found[0].variant.items())
        lines.append(
            f"| {name} | {costs[name]:.3g} | {min(each):.3g}, {max(each):.3g} | "
            f"{median(curve.start_up for curve in found):.2g} | {median(len(curve.seconds) for curve in found):g} | "
            f"{batch} | {lr:g} | {how} | {sum(curve.reached for curve in found)} of {len(found)} |"
        )
    others = {name: cost for name, cost in costs.items() if name != "fastmb"}
    if others and math.isfinite(costs.get("fastmb", math.inf)):
        best = min(others, key=lambda name: others[name])
        lines += ["", f"fastmb against the best peer, {best}: {others[best] / costs['fastmb']:.2f} times as fast"]
    return "\n".join(lines) + "\n"


def draw(found: list[tuple[Goal, dict[str, list[Curve]]]], path: str) -> None:
    """One panel a goal: test accuracy over seconds of training, start-up included, a line a seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(found), 4.2), layout="constrained")
    for axes, (goal, curves) in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        for i, (name, lines) in enumerate(curves.items()):
            for j, curve in enumerate(lines):
                label = None if j else name
                axes.plot(np.cumsum(curve.seconds), curve.accuracy, f"C{i}.-", lw=1, alpha=0.8, label=label)
        axes.axhline(goal.accuracy, color="gray", ls="--", lw=1)
        low = min(value for lines in curves.values() for curve in lines for value in curve.accuracy)
        axes.set(xscale="log", xlabel="seconds of training", ylabel="test accuracy", title=goal.name)
        axes.set_ylim(max(low, 2 * goal.accuracy - 1), None)  # what is as far below the goal as perfection is above
        axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.time_to_accuracy", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--fashion-mnist", metavar="DIR", help="its four IDX files; without, the digits alone")
    parser.add_argument("--no-digits", action="store_true", help="leave the digits out")
    parser.add_argument("--peers", default=",".join(LIBRARIES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--budget", type=int, default=10, help="settings that each may try (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="runs of the best one (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=100, help="at most, of a run (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=120, help="seconds of a run, at most (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: %(default)s")
    parser.add_argument("--out", metavar="PNG", help="draw the curves there, such as docs/time_to_accuracy.png")
    parser.add_argument("--json", metavar="FILE", help="write every epoch of every run there")
    args = parser.parse_args(argv)
    args.peers = args.peers.split(",")
    if unknown := set(args.peers) - set(LIBRARIES):
        parser.error(f"unknown peer {', '.join(unknown)}; there are {', '.join(LIBRARIES)}")
    if args.no_digits and not args.fashion_mnist:
        parser.error("nothing to reach: --no-digits without --fashion-mnist")
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure, print, draw."""
    args = arguments(argv)
    why = {name: missing(PEERS[name]) for name in args.peers}
    print(*filter(None, why.values()), sep="\n", end="")
    names = [name for name in args.peers if not why[name]]
    setting = {
        "processor": processor(),
        "isa": isa(),
        "versions": versions(PEERS[name] for name in names),
        "environment": environment(),
    }
    print(f"{setting['processor']}; threads: {args.threads}; {setting['versions']}")
    for name, value in environment().items():
        print(f"NOTE: {name}={value} is set and may handicap a peer: unset it for figures to quote")
    goals = [] if args.no_digits else [digits()]
    if args.fashion_mnist:
        goals.append(fashion_mnist(args.fashion_mnist))
    found = []
    for goal in goals:
        found.append((goal, measure(goal, names, args)))
        print("\n" + table(*found[-1]), flush=True)
    if args.out:
        draw(found, args.out)
    if args.json:
        results = {
            goal.name: {name: [vars(curve) for curve in lines] for name, lines in curves.items()}
            for goal, curves in found
        }
        with open(args.json, "w") as file:
            json.dump({**setting, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
