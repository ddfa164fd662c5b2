"""What the compiled module offers to Python."""

from typing import Any

import numpy as np

from ..data import Batches
from ..plan import Plan
from . import Training

ISAS: tuple[str, ...]

def available_isas() -> list[str]: ...
def isa() -> str: ...
def max_threads() -> int: ...
def permutation(n: int, key: int, isa: str | None = None) -> np.ndarray: ...
def first_nonfinite(a: np.ndarray) -> int: ...
def first_outside(labels: np.ndarray, n_classes: int) -> int: ...
def empty_arrays(n: int, shapes: dict[str, tuple[int, ...]], dtype: np.dtype) -> dict[str, np.ndarray]: ...
def fma_peak(dtype: Any = ..., n_threads: int = ..., seconds: float = ...) -> float: ...
def __getattr__(name: str) -> Any: ...  # hooks for tests

class NativeExecutor:
    plan: Plan
    training: Training | None
    isa: str
    @property
    def made(self) -> int: ...
    def __init__(
        self,
        plan: Plan,
        params: np.ndarray,
        training: Training | None = None,
        n_threads: int | None = None,
        isa: str | None = None,
        *,
        buffers: np.ndarray | None = None,
    ) -> None: ...
    def run(
        self,
        batches: Batches,
        first: int,
        t: int,
        coefficients: np.ndarray,
        sums: np.ndarray,
        seconds: float,
        stats: np.ndarray | None = None,
        norms: np.ndarray | None = None,
    ) -> int: ...
    def gradients(self, batches: Batches, t: int, out: np.ndarray, sums: np.ndarray) -> bool: ...
    def accumulate(
        self,
        batches: Batches,
        t: int,
        row: int,
        out: np.ndarray,
        sums: np.ndarray,
        inputs: np.ndarray | None = None,
    ) -> bool: ...
    def apply(self, gradient: np.ndarray, weight: float, t: int, coefficients: np.ndarray) -> None: ...
    def per_example(
        self,
        batches: Batches,
        t: int,
        sums: np.ndarray,
        norms: np.ndarray | None = None,
        gradients: list[np.ndarray | None] | None = None,
        inputs: np.ndarray | None = None,
    ) -> bool: ...
    def forward(self, X: np.ndarray, scale: float, out: np.ndarray) -> None: ...
    def evaluate(self, batches: Batches, out: np.ndarray, losses: np.ndarray, weights: np.ndarray) -> None: ...
