"""What a library must do to be measured.

Every peer starts from the workload's own weights and does the same mathematics, which test_peers.py checks. An epoch
is what a user waits for: a new permutation, every mini-batch gathered from the data set, forward, backward, update.
Where a library has several documented ways (threads, fused optimisers, where to shuffle) they are its `variants`;
`tune` times each on the workload and keeps the fastest.
"""

from __future__ import annotations

import time
from typing import Any, ClassVar

import numpy as np

from .workloads import Workload


class Peer:
    """A library that trains a workload.

    `threads` is how many it may use. Building a peer makes its data, network and optimiser; `train` does the timed
    work; `replay` trains one epoch in a given order and returns the loss of every mini-batch before its update.
    """

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]  # to import; the first one's version is shown

    def __init__(self, work: Workload, dtype: str = "float32", threads: int = 1) -> None:
        self.work, self.dtype, self.threads = work, dtype, threads
        self.X, self.y = work.data(dtype)
        self.variant: dict[str, Any] = {}
        self.use(**self.variants()[0])

    def variants(self) -> list[dict[str, Any]]:
        """The ways to try."""
        return [{}]

    def use(self, **variant: Any) -> None:
        """Go on, in this way."""
        self.variant = variant

    def train(self, epochs: int) -> None:
        """Train, each epoch in a new random order."""
        raise NotImplementedError

    def replay(self, order: np.ndarray) -> np.ndarray:
        """Train one epoch in this order; the mean losses of its mini-batches, float64."""
        raise NotImplementedError

    def parameters(self) -> list[np.ndarray]:
        """Weight [in, out] and bias [out] of every layer, one after the other, as they are now."""
        raise NotImplementedError

    def seconds(self, epochs: int) -> float:
        """Wall time of so many epochs."""
        start = time.perf_counter()
        self.train(epochs)
        return time.perf_counter() - start

    def epochs_in(self, seconds: float) -> int:
        """How many epochs fill so much time, at least one; warms up, too."""
        self.train(1)
        epochs = 1
        while (taken := self.seconds(epochs)) < seconds / 2:
            epochs = max(2 * epochs, int(epochs * seconds / taken / 2))
        return max(1, round(epochs * seconds / taken))

    def tune(self) -> None:
        """Keep the fastest variant."""
        variants = self.variants()
        if len(variants) > 1:
            self.use(**min(variants, key=self._time_a_step))

    def _time_a_step(self, variant: dict[str, Any]) -> float:
        self.use(**variant)
        epochs = self.epochs_in(0.1)
        return min(self.seconds(epochs) for _ in range(2)) / epochs


def batches(order: np.ndarray, work: Workload) -> np.ndarray:
    """(steps, batch): the rows of every mini-batch."""
    return order.reshape(work.steps, work.batch)


def thread_counts(threads: int) -> list[int]:
    """One thread may be faster than all that are allowed."""
    return sorted({1, threads})
