"""``python -m bench.steps``: fastmb and its peers in turn on the same training steps, and who is faster by how much.

For each workload and number of threads every library first finds its own fastest variant. Then come rounds: in a round
the machine's FMA peak is measured, and each library trains whole epochs for a fifth of a second or more, after an
untimed one that lets the threads of the one before it go to sleep. The order turns by one from round to round. The
median of the rounds counts; of the peak, the largest.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from statistics import median
from typing import Any

from .machine import environment, fma_peak, isa, processor
from .peer import Peer
from .peers import PEERS, missing, versions
from .workloads import WORKLOADS, Workload


def measure(work: Workload, names: list[str], dtype: str, threads: int, rounds: int, seconds: float) -> dict[str, Any]:
    """One workload on so many threads: microseconds a step of each peer in every round, and what follows from them."""
    peers = {name: PEERS[name](work, dtype, threads) for name in names}
    epochs = {}
    for name, peer in peers.items():
        peer.tune()
        epochs[name] = peer.epochs_in(seconds)
    times: dict[str, list[float]] = {name: [] for name in names}
    peaks = []
    for turn in range(rounds):
        peaks.append(fma_peak(dtype, threads))
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            gc.collect()
            peers[name].train(1)
            times[name].append(1e6 * peers[name].seconds(epochs[name]) / (epochs[name] * work.steps))
    peak = max((peak for peak in peaks if peak is not None), default=None)  # what the machine can, not what it did
    return {
        "workload": work.name,
        "shape": work.shape,
        "batch": work.batch,
        "optimizer": work.optimizer,
        "loss": work.loss,
        "rows": work.rows,
        "dtype": dtype,
        "threads": threads,
        "flops": work.flops,
        "peak_gflops": peak,
        "peers": {name: result(peers[name], times[name], peak) for name in names},
    }


def result(peer: Peer, times: list[float], peak: float | None) -> dict[str, Any]:
    """The figures of one peer."""
    us = median(times)
    gflops = peer.work.flops / us / 1e3
    return {
        "us": us,
        "us_rounds": times,
        "gflops": gflops,
        "share_of_peak": gflops / peak if peak else None,
        "variant": peer.variant,
    }


def table(found: dict[str, Any]) -> str:
    """A Markdown table of one measurement, and who won."""
    peak = found["peak_gflops"]
    lines = [
        f"### {found['workload']}: {found['shape']}, batch {found['batch']}, {found['optimizer']}, {found['loss']}, "
        f"{found['dtype']}, threads: {found['threads']}" + (f"; FMA peak {peak:.0f} GFLOP/s" if peak else ""),
        "",
        "| | us a step | fastest, slowest round | GFLOP/s | share of peak | how |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for name, row in found["peers"].items():
        rounds, share = row["us_rounds"], row["share_of_peak"]
        how = ", ".join(f"{key}: {value}" for key, value in row["variant"].items())
        lines.append(
            f"| {name} | {row['us']:.4g} | {min(rounds):.4g}, {max(rounds):.4g} | {row['gflops']:.3g} | "
            f"{f'{share:.0%}' if share else '-'} | {how} |"
        )
    if ratio := ratio_to_best(found):
        lines += ["", ratio]
    return "\n".join(lines) + "\n"


def ratio_to_best(found: dict[str, Any]) -> str | None:
    """How fastmb compares with the best of the others, in words."""
    others = {name: row["us"] for name, row in found["peers"].items() if name != "fastmb"}
    if not others or "fastmb" not in found["peers"]:
        return None
    best = min(others, key=lambda name: others[name])
    ratio = others[best] / found["peers"]["fastmb"]["us"]
    found["best_peer"], found["ratio"] = best, ratio
    return f"fastmb against the best peer, {best}: {ratio:.2f} times as fast" + (" (SLOWER)" if ratio < 1 else "")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.steps", description="Times training steps, peers in turn.")
    parser.add_argument("workloads", nargs="*", metavar="workload", help=f"of {', '.join(WORKLOADS)} (default: all)")
    parser.add_argument("--peers", default=",".join(PEERS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--threads", default="2,1", help="comma-separated counts (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=0.2, help="of each peer in a round (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write everything, every round, there")
    args = parser.parse_args(argv)
    args.peers = args.peers.split(",")
    args.threads = [int(count) for count in args.threads.split(",")]
    for kind, asked, known in (("workload", args.workloads, WORKLOADS), ("peer", args.peers, PEERS)):
        for name in asked:
            if name not in known:
                parser.error(f"unknown {kind} {name!r}; there are {', '.join(known)}")
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    args = arguments(argv)
    names = []
    for name in args.peers:
        if why := missing(PEERS[name]):
            print(why)
        else:
            names.append(name)
    if not names:
        sys.exit("nobody to measure")
    setting: dict[str, Any] = {
        "processor": processor(),
        "isa": isa(),
        "versions": versions(PEERS[name] for name in names),
        "environment": environment(),
    }
    print(f"{setting['processor']}; fastmb's instruction set: {setting['isa'] or '-'}")
    print(", ".join(f"{name} {version}" for name, version in setting["versions"].items()))
    for name, value in setting["environment"].items():
        print(f"NOTE: {name}={value} is set and may handicap a peer: unset it for figures to quote")
    print(flush=True)
    results = []
    for name in args.workloads or WORKLOADS:
        for threads in args.threads:
            found = measure(WORKLOADS[name], names, args.dtype, threads, args.rounds, args.seconds)
            print(table(found), flush=True)
            results.append(found)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({**setting, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
