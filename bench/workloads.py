"""The work that is timed: networks, batches, optimisers and losses, by name.

A workload says all that a library needs in order to do the same mathematics as another: shapes, hyper-parameters, the
data and the initial weights, both made from fixed seeds. Nothing here is about any library.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class Workload:
    """A multi-layer perceptron trained on a data set: one step is one mini-batch, gather and update included."""

    name: str
    sizes: tuple[int, ...]  # features, hidden layers, outputs
    batch: int
    optimizer: str  # "sgd", "momentum" (of 0.9) or "adam"
    loss: str  # "mse" (mean over rows and outputs) or "cross_entropy" (of class indices)
    rows: int  # a multiple of the batch
    activation: str = "relu"  # or "tanh"; none after the last layer
    note: str = ""

    def __post_init__(self) -> None:
        if self.rows % self.batch:
            raise ValueError(f"rows must be a multiple of batch = {self.batch}; got {self.rows}")

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self.rows // self.batch

    @property
    def lr(self) -> float:
        """The learning rate: small enough that no workload diverges, however long it is timed."""
        return {"sgd": 1e-2, "momentum": 1e-3, "adam": 1e-4}[self.optimizer]

    @property
    def flops(self) -> int:
        """Floating-point operations of a step, products alone.

        A weight takes two for the forward pass and two for its gradient, for every row; two more for the gradient of
        the layer's input, which the first layer does not need.
        """
        first, *others = (n_in * n_out for n_in, n_out in pairwise(self.sizes))
        return self.batch * (4 * first + 6 * sum(others))

    @property
    def shape(self) -> str:
        """The layers, as 784-128-10."""
        return "-".join(map(str, self.sizes))

    def data(self, dtype: str = "float32") -> tuple[np.ndarray, np.ndarray]:
        """`X` (rows, features), normal; `y`, what a random linear map says of it: class indices, or (rows, outputs)."""
        rng = np.random.default_rng(1)
        X = rng.standard_normal((self.rows, self.sizes[0]), np.float32)
        scores = X @ (rng.standard_normal((self.sizes[0], self.sizes[-1]), np.float32) / np.sqrt(self.sizes[0]))
        if self.loss == "cross_entropy":
            return X.astype(dtype, copy=False), scores.argmax(1)
        return X.astype(dtype, copy=False), scores.astype(dtype, copy=False)

    def weights(self, dtype: str = "float32") -> list[tuple[np.ndarray, np.ndarray]]:
        """Initial weight [in, out] and bias [out] of every layer."""
        rng = np.random.default_rng(2)
        return [
            (
                (rng.uniform(-1, 1, (n_in, n_out)) * np.sqrt(6 / n_in)).astype(dtype),
                rng.uniform(-0.1, 0.1, n_out).astype(dtype),
            )
            for n_in, n_out in pairwise(self.sizes)
        ]

    def order(self, seed: int) -> np.ndarray:
        """A permutation of the rows, int64."""
        return np.random.default_rng(seed).permutation(self.rows)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("tiny", (8, 32, 32, 1), 32, "adam", "mse", 8192),
        Workload("small", (32, 64, 64, 10), 64, "momentum", "cross_entropy", 16384),
        Workload("mnist", (784, 128, 10), 64, "momentum", "cross_entropy", 16384),
        Workload("mnist1", (784, 128, 10), 1, "momentum", "cross_entropy", 2048, note="limited by memory"),
        Workload("mid", (784, 512, 512, 10), 128, "adam", "cross_entropy", 8192),
        Workload("tab", (64, 256, 256, 256, 1), 256, "adam", "mse", 16384),
        Workload("wide", (1024, 2048, 2048, 1000), 512, "momentum", "cross_entropy", 8192),
        Workload("xs-mid", (768, 512, 512, 32), 128, "sgd", "mse", 8192),
        Workload("xs-small", (64, 64, 64, 32), 64, "sgd", "mse", 8192),
        Workload("xs-wide", (1024, 1024, 1024, 1024), 512, "sgd", "mse", 8192),
        Workload("simplechains", (4, 32, 16, 4), 10_000, "adam", "mse", 10_000, "tanh", "the set as one batch"),
    )
}
