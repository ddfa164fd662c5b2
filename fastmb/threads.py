"""The one place where a thread count is decided, and which instruction set is used.

A count is never more than what the caller asked for, what OpenMP would use in this thread now (`OMP_NUM_THREADS`, a
live `omp_set_num_threads`, `threadpoolctl`), the processors this process may run on, and the processors' worth of time
that its control group gives it. Where nobody asked, it is also no more than the work of a step can feed. None of these
limits is changed.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ._errors import unknown_name
from ._extension import compiled

#: Operations of a training step that make a further thread worth its two barriers.
FLOPS_PER_THREAD = 60_000.0
#: Operations of a single call that make a further thread worth waking.
CALL_FLOPS_PER_THREAD = 400_000.0

Folder = str | os.PathLike[str]

_at_most: ContextVar[int | None] = ContextVar("fastmb_at_most", default=None)
_looked: tuple[float, int] = (-math.inf, 1)  # when the machine was last looked at, and what it allows


def resolve(asked: int | None, flops: float, flops_per_thread: float = FLOPS_PER_THREAD) -> int:
    """The threads for steps, or a call, of `flops` operations."""
    wanted = int(flops / flops_per_thread) if asked is None else asked
    if wanted <= 1:
        return 1
    allowed, most = limit(), _at_most.get()  # each call of `step` comes here, and `min` takes longer
    allowed = allowed if most is None or allowed < most else most
    return wanted if wanted < allowed else allowed


@contextmanager
def at_most(n: int | None) -> Iterator[None]:
    """Calls within, in this Python thread, take no more than `n` threads."""
    token = _at_most.set(n)
    try:
        yield
    finally:
        _at_most.reset(token)


def limit() -> int:
    """The most threads that may run: OpenMP's live count for this thread, and what the machine allows."""
    live = openmp_limit()
    return live if live == 1 else min(live, machine_limit())


def openmp_limit() -> int:
    """What OpenMP would use in this thread now; without the extension, what the environment tells OpenMP."""
    if (max_threads := compiled("max_threads")) is not None:
        live: int = max_threads()
        return live
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return max(1, int(first)) if first.isdecimal() else machine_limit()


def machine_limit() -> int:
    """Processors that this process may use: affinity and control group, looked at anew every second at the most."""
    global _looked
    now = time.monotonic()
    if now - _looked[0] > 1.0:
        affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        _looked = (now, max(1, min(affinity, cgroup_limit())))
    return _looked[1]


def cgroup_limit(root: Folder = "/sys/fs/cgroup", self_file: Folder = "/proc/self/cgroup") -> int:
    """Processors' worth of time that the control groups of this process allow (versions 1 and 2), rounded up."""
    limit = 1 << 30
    try:
        lines = _read(self_file).splitlines()
    except OSError:
        return limit
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            bases, quota = [os.path.join(root, "unified"), root], _v2_quota
        elif "cpu" in controllers.split(","):
            bases, quota = [os.path.join(root, controllers), os.path.join(root, "cpu")], _v1_quota
        else:
            continue
        groups = [group for group in path.split("/") if group]
        for base in bases:
            for depth in range(len(groups) + 1):  # this group and all above it
                try:
                    limit = min(limit, quota(os.path.join(base, *groups[:depth])) or limit)
                except (OSError, ValueError):
                    continue
    return limit


def _v2_quota(folder: Folder) -> int | None:
    """cpu.max holds "quota period" or "max period"."""
    quota, period = _read(folder, "cpu.max").split()
    return None if quota == "max" else math.ceil(int(quota) / int(period))


def _v1_quota(folder: Folder) -> int | None:
    quota = int(_read(folder, "cpu.cfs_quota_us"))
    return None if quota < 0 else math.ceil(quota / int(_read(folder, "cpu.cfs_period_us")))


def _read(*path: Folder) -> str:
    with open(os.path.join(*path)) as file:
        return file.read()


def choose_isa(available: list[str]) -> str:
    """The widest instruction set, or the one that the environment's FASTMB_ISA names."""
    forced = os.environ.get("FASTMB_ISA")
    if not forced:
        return available[-1]
    if forced not in available:
        raise unknown_name("FASTMB_ISA", forced, available)
    return forced
