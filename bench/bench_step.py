"""The pytest-benchmark suite of training steps: every workload of `workloads`, every peer in its fastest variant.

A result's time is of whole epochs; ``extra_info`` has what it comes to: microseconds a step, GFLOP/s, the share of the
FMA peak measured just before. Entries run one after the other, so compare commits with this, not libraries: for that,
``python -m bench.steps`` alternates them.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from .machine import environment, fma_peak, isa, processor
from .peers import PEERS, missing, versions
from .workloads import WORKLOADS

THREADS = len(os.sched_getaffinity(0))


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("case", WORKLOADS)
def test_step(benchmark: Any, case: str, name: str) -> None:
    if name != "fastmb" and (why := missing(PEERS[name])):
        pytest.skip(why)
    work = WORKLOADS[case]
    benchmark.group = f"{case} {work.shape}, batch {work.batch}, {work.optimizer}, {work.loss}"
    peer = PEERS[name](work, threads=THREADS)
    if benchmark.disabled:
        benchmark(peer.train, 1)
        return
    peer.tune()
    epochs = peer.epochs_in(0.1)
    peak = fma_peak(peer.dtype, THREADS)
    benchmark.pedantic(peer.train, args=(epochs,), rounds=7, warmup_rounds=1)
    us = 1e6 * benchmark.stats.stats.median / (epochs * work.steps)
    gflops = work.flops / us / 1e3
    benchmark.extra_info.update(
        us_a_step=us,
        gflops=gflops,
        peak_gflops=peak,
        share_of_peak=gflops / peak if peak else None,
        dtype=peer.dtype,
        threads=THREADS,
        variant=peer.variant,
        isa=isa(),
        processor=processor(),
        versions=versions([PEERS[name]]),
        environment=environment(),
    )
