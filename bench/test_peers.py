"""All peers do the same mathematics: from the same weights, in the same order, they see the same losses."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from .machine import on_processors
from .peers import PEERS, NumPy, missing
from .workloads import WORKLOADS, Workload

# Every pair of optimiser and loss of the suite, in float64, so that what differs is mathematics, not rounding.
CASES = ["tiny", "small", "xs-small", "simplechains", "mnist1"]
STEPS = 20
# scikit-learn's Adam adds its epsilon before the bias correction.
TOLERANCE = {"sklearn": 1e-5}


def shortened(name: str) -> Workload:
    """`STEPS` steps an epoch, in batches of 64 at the most; learning rates at which the loss moves."""
    batch = min(WORKLOADS[name].batch, 64)
    return replace(WORKLOADS[name], batch=batch, rows=STEPS * batch)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", [name for name in PEERS if name != "numpy"])
def test_same_losses_as_numpy(name: str, case: str) -> None:
    if name != "fastmb" and (why := missing(PEERS[name])):
        pytest.skip(why)
    work = shortened(case)
    order = work.order(seed=3)
    losses = PEERS[name](work, "float64", 1).replay(order)
    expected = NumPy(work, "float64", 1).replay(order)
    assert len(losses) == STEPS
    assert abs(expected[-1] - expected[0]) > 1e-3 * abs(expected[0])  # something was learned, or can't be compared
    np.testing.assert_allclose(losses, expected, rtol=TOLERANCE.get(name, 1e-9))


@pytest.mark.parametrize("name", PEERS)
def test_every_variant_lowers_the_loss(name: str) -> None:
    if name != "fastmb" and (why := missing(PEERS[name])):
        pytest.skip(why)
    work = WORKLOADS["tiny"]
    peer = PEERS[name](work)
    first = peer.replay(work.order(seed=4)).mean()
    for variant in peer.variants():
        peer.use(**variant)
        peer.train(1)
        last = peer.replay(work.order(seed=4)).mean()
        assert last < first
        first = last


def test_one_processor_is_all_that_anybody_has() -> None:
    """Threads that were there before, and those that are started meanwhile; afterwards all is as it was."""
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("one processor is all there is")
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda _: os.sched_getaffinity(0), range(2))) == [allowed] * 2
        with on_processors(1), ThreadPoolExecutor(1) as late:
            found = [pool.submit(os.sched_getaffinity, 0).result(), late.submit(os.sched_getaffinity, 0).result()]
            assert found == [{min(allowed)}] * 2
        assert pool.submit(os.sched_getaffinity, 0).result() == allowed
