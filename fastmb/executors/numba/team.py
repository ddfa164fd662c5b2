"""Threads that stand ready: Python threads that live in compiled code, without the GIL, and sleep when idle.

A team belongs to one call at a time; a call takes one that is free, or makes one. Thread 0 is the caller. The others
look for work on their seats for some milliseconds after the last, so that the next region finds them awake, and then
sleep. A region is one call of compiled code: Ctrl-C comes before it or after it. A team that nobody has any more ends
its threads.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable

import numpy as np

from . import library
from .records import LINE, MAX_THREADS, SEAT


class Team:
    """Threads 1, 2, ... of one region at a time."""

    def __init__(self) -> None:
        self._memory = np.zeros(MAX_THREADS * SEAT.itemsize + LINE, np.uint8)
        self._seats = self._memory.ctypes.data + -self._memory.ctypes.data % LINE
        self._lead, dismiss = (library.function(library.entry(name)) for name in ("lead", "dismiss"))
        self._serve = library.function(library.entry("serve"))
        self.threads: list[threading.Thread] = []
        weakref.finalize(self, dismiss, self._seats, MAX_THREADS, *[0] * 8).atexit = False

    def run(self, entry: int, engine: int, run: int, threads: int) -> None:
        """The entry at an address, on so many threads."""
        while len(self.threads) < threads - 1:
            self._hire(len(self.threads) + 1)
        self._lead(self._seats, threads, entry, engine, run, 0, 0, 0, 0, 0)

    def _hire(self, tid: int) -> None:
        """Where this is broken off, the seat may have its thread: that of the next time finds it taken, and leaves."""
        seat = self._seats + tid * SEAT.itemsize
        life = self._serve, seat, self._memory
        thread = threading.Thread(target=_live, args=life, name=f"fastmb-{tid}", daemon=True)
        thread.start()
        self.threads.append(thread)


def _live(serve: Callable[..., None], seat: int, memory: np.ndarray) -> None:
    """A thread; as long as it lives, so does the memory of its seat."""
    serve(seat, *[0] * 9)


_free: list[Team] = []  # append and pop are atomic


def run(entry: int, engine: int, run_: int, threads: int) -> None:
    """Runs a sweep's entry on so many threads, this one among them."""
    if threads == 1:
        library.function(entry)(engine, run_, 0, 1, 0, 0, 0, 0, 0, 0)
        return
    try:
        team = _free.pop()
    except IndexError:
        team = Team()
    try:
        team.run(entry, engine, run_, threads)
    finally:
        _free.append(team)


def _dismiss_all() -> None:
    threads = [thread for team in _free for thread in team.threads]
    _free.clear()
    for thread in threads:
        thread.join()


atexit.register(_dismiss_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free.clear)  # the threads stayed with the parent
