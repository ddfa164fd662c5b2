"""``python -m bench.threads``: what the count that fastmb picks by itself costs against the best fixed one.

Every case, from 4-8-2 with mini-batches of 8 up to `wide`, is trained with ``n_threads=None`` and with every count from
1 to the processors there are, in rounds whose order turns by one. The medians of the rounds make a Markdown table.
"""

from __future__ import annotations

import argparse
import os
from statistics import median

from .machine import environment, processor
from .peers import trainer
from .workloads import WORKLOADS, Workload

CASES = [
    Workload("4-8-2", (4, 8, 2), 8, "sgd", "cross_entropy", 4096),
    Workload("8-16-4", (8, 16, 4), 16, "momentum", "cross_entropy", 8192),
    WORKLOADS["tiny"],
    Workload("16-48-48-4", (16, 48, 48, 4), 32, "adam", "cross_entropy", 8192),
    Workload("20-64-64-5", (20, 64, 64, 5), 32, "adam", "cross_entropy", 8192),
    *(WORKLOADS[name] for name in ("small", "mnist1", "mnist", "tab", "mid", "wide")),
]
Case = dict[int | None, float]  # microseconds a step, by threads


def measure(work: Workload, counts: list[int | None], rounds: int, seconds: float) -> Case:
    """The medians of so many rounds, each of `seconds` for every count."""
    X, y = work.data()
    trainers = {count: trainer(work, n_threads=count) for count in counts}

    def us(count: int | None, epochs: int) -> float:
        trained = trainers[count]
        before = len(trained.history["seconds"])
        trained.fit(X, y, max_epochs=epochs, verbose=0)
        return 1e6 * sum(trained.history["seconds"][before:]) / (epochs * work.steps)

    epochs = {count: max(1, round(1e6 * seconds / (us(count, 1) * work.steps))) for count in counts}
    times: dict[int | None, list[float]] = {count: [] for count in counts}
    for turn in range(rounds):
        first = turn % len(counts)
        for count in counts[first:] + counts[:first]:
            us(count, 1)  # the threads of the one before it go to sleep
            times[count].append(us(count, epochs[count]))
    return {count: median(found) for count, found in times.items()}


def row(work: Workload, found: Case) -> str:
    """A line of the table."""
    fixed = {count: us for count, us in found.items() if count is not None}
    best = min(fixed, key=lambda count: fixed[count])
    loss = found[None] / fixed[best] - 1
    cells = [f"{us:.4g}" for us in (found[None], *fixed.values())]
    return f"| {work.name} | {work.shape} | {work.batch} | {' | '.join(cells)} | {best} | {loss:+.1%} |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.threads", description="n_threads=None against fixed counts.")
    names = [case.name for case in CASES]
    parser.add_argument("cases", nargs="*", metavar="case", help=f"of {', '.join(names)} (default: all)")
    parser.add_argument("--max-threads", type=int, default=len(os.sched_getaffinity(0)), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=0.2, help="of each count in a round (default: %(default)s)")
    args = parser.parse_args(argv)
    if unknown := set(args.cases) - set(names):
        parser.error(f"unknown case {', '.join(unknown)}; there are {', '.join(names)}")
    fixed = list(range(1, args.max_threads + 1))
    print(f"{processor()}; microseconds a step")
    for name, value in environment().items():
        print(f"NOTE: {name}={value} is set")
    heads = ["case", "layers", "batch", "None", *map(str, fixed), "best", "None loses"]
    print(f"\n| {' | '.join(heads)} |\n|---|---|{'---:|' * (len(heads) - 2)}")
    for case in CASES:
        if case.name in (args.cases or names):
            print(row(case, measure(case, [None, *fixed], args.rounds, args.seconds)), flush=True)


if __name__ == "__main__":
    main()
