"""Training steps: every workload of `workloads`, every library in its fastest documented form.

A unit is a step: its rows are gathered in a new random order, go forward and back, and the weights are updated. The
error is that of the parameters after a few steps, against the same steps in float64, relative to how far the steps
have moved any of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from .machine import on_processors
from .peer import Peer
from .peers import PEERS, NumPy, missing
from .turns import Contender, fastest, in_turn
from .workloads import WORKLOADS, Workload

STEPS = 3  # after which errors are looked at


@pytest.mark.parametrize("case", WORKLOADS)
def test_step(benchmark: Any, case: str, threads: int) -> None:
    work = WORKLOADS[case]
    if benchmark.disabled:  # once, quickly: one mini-batch
        work = replace(work, rows=work.batch)
    why = {name: missing(peer) for name, peer in PEERS.items()}
    peers = [peer for name, peer in PEERS.items() if name == "fastmb" or not why[name]]
    benchmark.group = "training steps"
    in_turn(
        benchmark,
        {peer.name: contender(peer(work, threads=threads), tune=not benchmark.disabled) for peer in peers},
        case=case,
        shape=f"{work.shape}, batch {work.batch}, {work.optimizer}, {work.loss}",
        dtype="float32",
        threads=threads,
        flops=work.flops,
        errors=None if benchmark.disabled else errors(work, peers, threads),
        left_out=[text for text in why.values() if text],
    )


def contender(peer: Peer, tune: bool = True) -> Contender:
    """The fastest variant of a library."""

    def variant(how: dict[str, Any]) -> Contender:
        def run(epochs: int) -> None:
            peer.use(**how)
            peer.train(epochs)

        return Contender(run, peer.work.steps, how, tuple(p for p in peer.packages if "." not in p))

    variants = [variant(how) for how in peer.variants()]
    with on_processors(peer.threads):
        return fastest(variants if tune else variants[:1])


def errors(work: Workload, peers: list[type[Peer]], threads: int) -> dict[str, float]:
    """Largest differences from the parameters of NumPy in float64 after a few steps, relative to the largest change."""
    work = replace(work, rows=STEPS * work.batch)
    order = work.order(seed=3)

    def parameters(peer: Peer) -> np.ndarray:
        return np.concatenate([array.ravel() for array in peer.parameters()]).astype(np.float64)

    def trained(peer: Peer) -> np.ndarray:
        peer.replay(order)
        return parameters(peer)

    reference = NumPy(work, "float64", threads)
    for array, start in zip(reference.params, NumPy(work, "float32", threads).params, strict=True):
        array[...] = start  # the same rounded weights as everyone
    before = parameters(reference)
    exact = trained(reference)
    size = np.abs(exact - before).max()
    return {peer.name: float(np.abs(trained(peer(work, "float32", threads)) - exact).max() / size) for peer in peers}
