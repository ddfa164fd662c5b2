"""What a figure depends on besides the code: the processor, its peak, the environment."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from statistics import median

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


@cache
def _arrays(count: int, size: int) -> list[np.ndarray]:
    return [np.ones(size, np.uint8) for _ in range(count)]


def copy_bandwidth(threads: int, seconds: float = 0.1, size: int = 1 << 26) -> float:
    """GB/s read and written by `threads` threads that copy `size` bytes each, far more than caches hold, now."""
    arrays = _arrays(2 * threads, size)
    pairs = list(zip(arrays[::2], arrays[1::2], strict=True))
    rates: list[float] = []
    with ThreadPoolExecutor(threads) as pool:
        end = time.perf_counter() + seconds
        while not rates or time.perf_counter() < end:
            start = time.perf_counter()
            list(pool.map(lambda pair: np.copyto(*pair), pairs))  # copyto lets go of the GIL
            rates.append(2e-9 * size * threads / (time.perf_counter() - start))
    return median(rates)


def allowed_threads() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0))


@contextmanager
def on_processors(count: int) -> Iterator[None]:
    """Keeps this process on `count` of its processors, with all threads that libraries have, or start within."""
    allowed = os.sched_getaffinity(0)
    bind(set(sorted(allowed)[:count]))
    try:
        yield
    finally:
        bind(allowed)


def bind(processors: set[int]) -> None:
    """Gives all threads of this process these processors; those that they start later have them, too."""
    for task in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(task.name), processors)
