"""What surrounds a fit: the line that shows how far it is, and Ctrl-C."""

from __future__ import annotations

import signal
import sys
import threading
from _signal import getsignal  # type: ignore[import-not-found]  # takes a thirtieth of the other one's time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, Self

_NUMBERS = sorted(signal.valid_signals())


class Interrupt:
    """While entered, Ctrl-C is noted in `hit` instead of raising `KeyboardInterrupt` anywhere in the middle.

    As long as `raises` is set, because all is consistent and it may take long, a second one is raised after all. Only
    in the main thread, and only in place of Python's own handler; whoever has installed another keeps it. Where one is
    entered within another, as by a fit that a callback makes, both note it.
    """

    def __init__(self) -> None:
        self.hit = self.raises = False
        self._around: Interrupt | None = None  # which this one takes the place of
        self._before: Any = None  # the handler before; None if none was installed

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            handler: Any = signal.getsignal(signal.SIGINT)
            around = getattr(handler, "__self__", None)
            if isinstance(around, Interrupt):
                self._around = around
                self.hit = around.hit and not around.raises  # what a callback begins is another matter
            if self._around or handler is signal.default_int_handler:
                self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        if self.raises and self.hit:
            raise KeyboardInterrupt
        each: Interrupt | None = self
        while each is not None:
            each.hit, each = True, each._around

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


class Whole(Interrupt):
    """Around a fit that is worth nothing unless it is whole: when it has ended, Ctrl-C is raised."""

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if self.hit:
            raise KeyboardInterrupt


@contextmanager
def undisturbed() -> Iterator[None]:
    """While entered, handlers of signals wait, so that what Python changes bit by bit is changed as a whole."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[Any, tuple[int, FrameType | None]]] = []

    def wait(handler: Any) -> Any:
        return lambda *signal_: came.append((handler, signal_))

    def catch_up() -> None:
        for handler, signal_ in came:
            handler(*signal_)

    with ExitStack() as stack:
        stack.callback(catch_up)
        for number in _NUMBERS:
            if callable(handler := getsignal(number)):
                stack.callback(signal.signal, number, handler)
                signal.signal(number, wait(handler))
        yield


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
