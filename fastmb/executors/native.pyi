"""What the compiled module offers to Python."""

from typing import Any

import numpy as np

from ..plan import Plan
from . import Executor, Training

ISAS: tuple[str, ...]

def available_isas() -> list[str]: ...
def isa() -> str: ...
def max_threads() -> int: ...
def permutation(n: int, key: int) -> np.ndarray: ...
def first_nonfinite(a: np.ndarray) -> int: ...
def fma_peak(dtype: str, n_threads: int, seconds: float) -> float: ...
def __getattr__(name: str) -> Any: ...  # hooks for tests

class NativeExecutor(Executor):
    plan: Plan
    training: Training | None
    isa: str
    def __init__(
        self,
        plan: Plan,
        params: np.ndarray,
        training: Training | None = None,
        n_threads: int | None = None,
        isa: str | None = None,
    ) -> None: ...
