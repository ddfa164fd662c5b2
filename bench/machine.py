"""What a figure depends on besides the code: the processor, its peak, the environment."""

from __future__ import annotations

import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

PREFIXES = ("GOTO_", "MKL_", "OMP_", "GOMP_", "OPENBLAS_", "XLA_", "ONEDNN_", "DNNL_", "FASTMB_")


def environment() -> dict[str, str]:
    """Variables that choose a library's kernels or threads. Those that are set handicap someone."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(PREFIXES)}


def processor() -> str:
    """The processor's name and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def isa() -> str | None:
    """The instruction set that fastmb uses; None without fastmb."""
    try:
        from fastmb.executors import native
    except ImportError:
        return None
    return str(native.isa())


def fma_peak(dtype: str, threads: int, seconds: float = 0.1) -> float | None:
    """GFLOP/s of nothing but fused multiply-adds, on so many threads, now; None without fastmb."""
    try:
        from fastmb.executors import native
    except ImportError:
        return None
    return float(native.fma_peak(dtype, threads, seconds))


def copy_bandwidth(threads: int, size: int = 1 << 27, rounds: int = 5) -> float:
    """GB/s, read and written, of copying arrays of `size` bytes together, each thread its part, now: the median."""
    parts = [(np.ones(size // threads, np.uint8), np.zeros(size // threads, np.uint8)) for _ in range(threads)]
    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            start = time.perf_counter()
            list(pool.map(lambda part: np.copyto(part[1], part[0]), parts))
            rates.append(2 * size / (time.perf_counter() - start) / 1e9)
    return float(np.median(rates))
