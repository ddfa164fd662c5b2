"""Weights and optimiser state as they were when an epoch began, for a fit that diverges.

A copy beside the original would double what a large network takes. So copies of up to `IN_MEMORY` bytes are arrays, and
larger ones go to an unnamed temporary file (where `tempfile.gettempdir` says: TMPDIR, or /tmp), which takes about twice
as long. Where no such file can be made or filled, the copy is in memory after all.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Self

import numpy as np

IN_MEMORY = 1 << 22  # bytes


class Snapshot:
    """One copy of some C-contiguous arrays, taken anew as often as wanted. A context manager: it may own a file."""

    def __init__(self) -> None:
        self._copies: list[np.ndarray] = []
        self._file: Any = None
        self._can_spill = True

    @property
    def in_file(self) -> bool:
        """Whether what was taken last is in a file."""
        return self._file is not None and not self._copies

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            with suppress(OSError):  # what couldn't be written, for lack of room, needn't be
                self._file.close()

    def take(self, arrays: Sequence[np.ndarray]) -> None:
        """Copy the arrays; what was copied before is forgotten."""
        if self._can_spill and sum(array.nbytes for array in arrays) > IN_MEMORY:
            self._copies.clear()
            try:
                return self._spill(arrays)
            except OSError:  # no room, no folder that can be written
                self._can_spill = False
        for copy, array in zip(self._copies, arrays, strict=False):
            copy[...] = array
        self._copies += [array.copy() for array in arrays[len(self._copies) :]]
        return None

    def restore(self, arrays: Sequence[np.ndarray]) -> None:
        """Copy back into the arrays, as many as were taken."""
        if self._copies:
            for copy, array in zip(self._copies, arrays, strict=True):
                array[...] = copy
            return
        self._file.seek(0)
        for array in arrays:
            self._file.readinto(_bytes(array))

    def _spill(self, arrays: Sequence[np.ndarray]) -> None:
        if self._file is None:
            import tempfile

            self._file = tempfile.TemporaryFile(prefix="fastmb-")  # noqa: SIM115  # closed by __exit__
        self._file.seek(0)
        for array in arrays:
            self._file.write(_bytes(array))
        self._file.flush()


def _bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)
