"""What surrounds a fit: the line that shows how far it is, and Ctrl-C."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Mapping
from types import FrameType
from typing import Any, Self


class Interrupt:
    """While entered, Ctrl-C is noted in `hit` instead of raising `KeyboardInterrupt` anywhere in the middle.

    Only in the main thread, and only in place of Python's own handler; whoever has installed another keeps it.
    """

    def __init__(self) -> None:
        self.hit = False
        self._installed = False

    def __enter__(self) -> Self:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)
            self._installed = True
        return self

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.hit = True

    def __exit__(self, *error: object) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)


class Progress:
    """One line: tqdm's bar, or its widget in a notebook. Without tqdm a line on standard error for each epoch."""

    def __init__(self, epochs: int, verbose: bool) -> None:
        self._epochs, self._verbose = epochs, verbose
        self._bar: Any = None
        if verbose:
            try:
                from tqdm.auto import tqdm
            except ImportError:
                return
            shape = "{l_bar}{bar}| {n:.1f}/{total} epochs [{elapsed}<{remaining}{postfix}]"
            self._bar = tqdm(total=epochs, bar_format=shape)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def within(self, epochs: float) -> None:
        """So many epochs are done, and a part of one."""
        if self._bar is not None:
            self._bar.update(epochs - self._bar.n)

    def epoch(self, epochs: int, row: Mapping[str, float]) -> None:
        """An epoch's row of the history is there."""
        if not self._verbose:
            return
        figures = {name: f"{value:.4g}" for name, value in row.items() if name not in ("epoch", "seconds")}
        figures["examples/s"] = figures.pop("examples_per_second")
        if self._bar is not None:
            self._bar.set_postfix(figures, refresh=False)
            self._bar.update(epochs - self._bar.n)
        else:
            text = "  ".join(f"{name} {value}" for name, value in figures.items())
            print(f"epoch {epochs}/{self._epochs}  {text}", file=sys.stderr, flush=True)
