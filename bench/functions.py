"""What the suites of `fastmb.ops` share: who takes part, on how many threads, and how far from float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

from .machine import on_processors
from .peer import thread_counts
from .turns import Contender, Run, fastest, in_turn, looped

PEERS = {"fastmb": ("fastmb",), "numpy": ("numpy",), "torch": ("torch",), "jax": ("jax", "jaxlib")}
SECONDS = 0.02  # of a turn: thousands of calls if they are tiny
Call = Callable[[], Any]


def missing(peer: str) -> str | None:
    """What keeps a peer from taking part, or None."""
    try:
        import_module(PEERS[peer][0])
    except ImportError as error:
        return f"{peer} left out: {error}"
    return None


@cache
def _blas() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


@contextmanager
def _on_threads(peer: str, threads: int) -> Iterator[None]:
    """Lets NumPy's products, or PyTorch, take so many threads."""
    with ExitStack() as stack:
        if peer == "numpy":
            stack.enter_context(_blas().limit(limits=threads, user_api="blas"))
        if peer == "torch":
            torch = import_module("torch")
            stack.callback(torch.set_num_threads, torch.get_num_threads())  # OpenMP's count, which fastmb respects
            torch.set_num_threads(threads)
            stack.enter_context(torch.inference_mode())
        yield


def _contender(peer: str, ways: list[Call], threads: int, tune: bool) -> Contender:
    """The fastest of several ways, on one thread or on all that are allowed."""

    def run(call: Call, count: int) -> Run:
        repeated = looped(call)

        def on_threads(times: int) -> None:
            with _on_threads(peer, count):
                repeated(times)

        return on_threads

    counts = thread_counts(threads) if peer in ("numpy", "torch") else [threads]
    variants = [
        Contender(run(call, n), 1, {"way": i, "threads": n}, PEERS[peer]) for i, call in enumerate(ways) for n in counts
    ]
    return fastest(variants, SECONDS) if tune else variants[0]


def compare(
    benchmark: Any,
    make: Callable[[str], list[Call]],
    exact: np.ndarray,
    *,
    case: str,
    shape: str,
    dtype: str,
    threads: int,
    without: Mapping[str, str] | None = None,
    flops: float | None = None,
    moved: float | None = None,
) -> None:
    """Everybody's calls in turn. `make` gives the ways in which a peer does the work, each of which returns the result;
    `exact` is the result in float64, or the first values of it. `without` says who can't do it, and why."""
    from threadpoolctl import threadpool_limits

    contenders, errors = {}, {}
    left_out = list((without or {}).values())
    scale = max(np.abs(exact).max(initial=0), np.finfo(dtype).tiny)

    def error(call: Call) -> float:
        found = np.asarray(call()).ravel()[: exact.size].astype(np.float64)
        return float(np.abs(found - exact.ravel()).max(initial=0) / scale)

    with threadpool_limits(threads):
        for peer in PEERS:
            if peer in (without or {}):
                continue
            if why := missing(peer):
                left_out.append(why)
                continue
            ways = make(peer)
            errors[peer] = max(error(call) for call in ways)
            assert errors[peer] < 1e3 * np.finfo(dtype).eps, f"{peer}: {errors[peer]}"
            with on_processors(threads):
                contenders[peer] = _contender(peer, ways, threads, tune=not benchmark.disabled)
        in_turn(
            benchmark,
            contenders,
            case=case,
            shape=shape,
            dtype=dtype,
            threads=threads,
            errors=errors,
            left_out=left_out,
            seconds=SECONDS,
            flops=flops,
            moved=moved,
        )
