"""Threads that stand ready: Python threads that live in compiled code, without the GIL, and sleep when idle.

A team belongs to one call at a time; a call takes one that is free, or makes one. Thread 0 is the caller. The others
look for work on their seats for some milliseconds after the last, so that the next region finds them awake, and then
sleep in a lock. Python wakes those that sleep.
"""

from __future__ import annotations

import atexit
import os
import threading

import numpy as np

from . import library
from .records import LINE, SEAT, offset
from .sync import LEAVE, PARKED

_STATE = offset(SEAT, "state")
_SIZE = 256  # seats of a team


class Team:
    """Threads 1, 2, ... of one region at a time."""

    def __init__(self) -> None:
        self._memory = np.zeros(_SIZE * SEAT.itemsize + LINE, np.uint8)
        start = -self._memory.ctypes.data % LINE
        self._seats = self._memory[start : start + _SIZE * SEAT.itemsize].view(SEAT)
        self._address = self._seats.ctypes.data
        self._serve, self._post, self._lead = (library.function(library.entry(n)) for n in ("serve", "post", "lead"))
        self._locks: list[threading.Lock] = [threading.Lock()]  # a seat's thread sleeps in its lock
        self._threads: list[threading.Thread] = []

    def run(self, entry: int, engine: int, run: int, threads: int) -> None:
        """The entry at an address, on so many threads."""
        while len(self._locks) < threads:
            self._hire()
        self._post(self._address, threads, entry, engine, run, 0, 0, 0, 0, 0)
        for tid in np.flatnonzero(self._seats["was"][1:threads] == PARKED).tolist():
            self._locks[tid + 1].release()
        self._lead(self._address, threads, entry, engine, run, 0, 0, 0, 0, 0)

    def _hire(self) -> None:
        tid, lock = len(self._locks), threading.Lock()
        lock.acquire()
        self._locks.append(lock)
        thread = threading.Thread(target=self._live, args=(tid, lock), name=f"fastmb-{tid}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _live(self, tid: int, lock: threading.Lock) -> None:
        seat = self._address + tid * SEAT.itemsize
        while True:
            self._serve(seat, *[0] * 9)
            if self._seats["state"][tid] == LEAVE:
                return
            lock.acquire()

    def dismiss(self) -> None:
        """Ends the threads."""
        for tid in range(1, len(self._locks)):
            self._seats["state"][tid] = LEAVE
        for lock in self._locks[1:]:
            if lock.locked():
                lock.release()
        for thread in self._threads:
            thread.join()


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
    team.run(entry, engine, run_, threads)
    _free.append(team)


def _dismiss_all() -> None:
    while _free:
        _free.pop().dismiss()


atexit.register(_dismiss_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free.clear)  # the threads stayed with the parent
