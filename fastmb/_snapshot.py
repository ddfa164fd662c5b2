"""Weights and optimiser state as they were when an epoch began, for a fit that diverges.

A copy beside the original would double what a large network takes. So copies of up to `IN_MEMORY` bytes are in memory,
and larger ones go to an unnamed temporary file (where `tempfile.gettempdir` says: TMPDIR, or /tmp), which takes about
twice as long. Where no such file can be made or filled, the copy is in memory after all.

That memory, and a file of up to `SPARE` bytes, are left to the next snapshot in this process: pages that the system has
to find anew take two to ten times as long as those that are there.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from contextlib import suppress
from operator import is_
from typing import Any, Self

import numpy as np

IN_MEMORY = 1 << 22  # bytes
SPARE = 1 << 27

_memories: list[np.ndarray] = []  # what is spare, one of a kind
_files: list[Any] = []


def _close_files() -> None:
    while _files:
        _files.pop().close()


atexit.register(_close_files)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_files)  # the parent writes to it


class Snapshot:
    """One copy of some C-contiguous arrays, taken anew as often as wanted. A context manager: it may own a file."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)
        self._copied: list[tuple[np.ndarray, np.ndarray]] = []  # with their copies, where these are in memory
        self._file: Any = None
        self._can_spill, self._read = True, False
        self.in_file = False  # whether what was taken last is in a file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._memory.size == IN_MEMORY and not _memories:
            _memories.append(self._memory)
        unread = self._file is not None and not self._read  # so that to close it moves no position in it
        if unread and not _files and os.fstat(self._file.fileno()).st_size <= SPARE:
            _files.append(self._file)
            self._file = None
        self._close()

    def take(self, arrays: Sequence[np.ndarray]) -> None:
        """Copy the arrays; what was copied before is forgotten."""
        taken = [array for array, _ in self._copied]
        if len(arrays) != len(taken) or not all(map(is_, arrays, taken)):
            self._begin(arrays)
        for array, copy in self._copied:
            copy[...] = array

    def _begin(self, arrays: Sequence[np.ndarray]) -> None:
        """Write the arrays to the file, if they go there, or make room for their copies."""
        size = sum(array.nbytes for array in arrays)
        self.in_file = size > IN_MEMORY and self._can_spill and self._spill(arrays)
        self._copied = []
        if self.in_file:
            self._memory = np.empty(0, np.uint8)
            return
        if self._memory.size < size:
            self._memory = _room(size)
        at = 0
        for array in arrays:
            self._copied.append((array, self._memory[at : at + array.nbytes].view(array.dtype).reshape(array.shape)))
            at += array.nbytes

    def restore(self, arrays: Sequence[np.ndarray]) -> None:
        """Copy back into the arrays, as many as were taken."""
        if self.in_file:
            self._read = True
            self._file.seek(0)
            for array in arrays:
                self._file.readinto(_bytes(array))
        for array, (_, copy) in zip(arrays, self._copied, strict=not self.in_file):
            array[...] = copy

    def _spill(self, arrays: Sequence[np.ndarray]) -> bool:
        """Write the arrays to the file, and say whether that could be done: there may be no room, or no folder."""
        try:
            if self._file is None:
                self._file = _unnamed_file()
            self._file.seek(0)
            for array in arrays:
                self._file.write(_bytes(array))
            self._file.flush()
        except OSError:
            self._can_spill = False
            self._close()
        return self._can_spill

    def _close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # what couldn't be written, for lack of room, needn't be
                self._file.close()
            self._file = None


def _unnamed_file() -> Any:
    """The spare one, or a new one."""
    with suppress(IndexError):
        return _files.pop()
    import tempfile

    return tempfile.TemporaryFile(prefix="fastmb-")  # closed, or spared, by Snapshot


def _room(size: int) -> np.ndarray:
    """For so many bytes: the spare memory, if that is enough, or new one."""
    with suppress(IndexError):
        if size <= len(spare := _memories.pop()):
            return spare
    return np.empty(max(size, IN_MEMORY), np.uint8)


def _bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)
