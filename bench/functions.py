"""What the suites of `fastmb.ops` share: who takes part, on how many threads, and how far from float64."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import numpy as np

from .turns import Contender, in_turn, looped

PEERS = {"fastmb": ("fastmb",), "numpy": ("numpy",), "torch": ("torch",), "jax": ("jax", "jaxlib")}
ROUNDS, SECONDS = 7, 0.02
Call = Callable[[], Any]


def missing(peer: str, threads: int) -> str | None:
    """What keeps a peer from taking part, or None."""
    try:
        import_module(PEERS[peer][0])
    except ImportError as error:
        return f"{peer} left out: {error}"
    everything = len(os.sched_getaffinity(0))
    if peer == "jax" and threads != everything:
        return f"jax left out: it takes {everything} threads, not {threads}"
    return None


def compare(
    benchmark: Any,
    make: Callable[[str], Call | None],
    exact: np.ndarray,
    *,
    case: str,
    dtype: str,
    threads: int,
    without: Mapping[str, str] | None = None,
    flops: float | None = None,
    moved: float | None = None,
) -> None:
    """Everybody's calls, as `make` gives them, in turn; each returns its result, or as much of it as `exact` has."""
    from threadpoolctl import threadpool_limits

    contenders, errors = {}, {}
    left_out = list((without or {}).values())
    with threadpool_limits(threads):
        for peer, packages in PEERS.items():
            if why := missing(peer, threads):
                left_out.append(why)
            elif peer not in (without or {}) and (call := make(peer)):
                if peer == "torch":
                    import_module("torch").set_num_threads(threads)
                found = np.asarray(call(), np.float64).ravel()[: exact.size]
                scale = max(np.abs(exact).max(initial=0), np.finfo(dtype).tiny)
                errors[peer] = float(np.abs(found - exact.ravel()).max(initial=0) / scale)
                assert errors[peer] < 1e3 * np.finfo(dtype).eps, f"{peer}: {errors[peer]}"
                contenders[peer] = Contender(looped(call), packages=packages)
        in_turn(
            benchmark,
            contenders,
            case=case,
            shape=case,
            dtype=dtype,
            threads=threads,
            errors=errors,
            left_out=left_out,
            rounds=ROUNDS,
            seconds=SECONDS,
            flops=flops,
            moved=moved,
        )
