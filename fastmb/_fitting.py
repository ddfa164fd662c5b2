"""The loop of a fit: epochs, cut into ticks inside which no Python runs.

Between ticks all is consistent. This is where Ctrl-C, the time limit and a loss that isn't finite are looked at, and
where a fit can be broken off: the trainer keeps the `Epoch`, and a later fit goes on from it as if nothing had been.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import _gradient_stats
from ._metrics import falls
from ._progress import Interrupt, Progress
from ._snapshot import Snapshot
from .data import Batches, all_finite
from .rng import permutation, poisson_batches

if TYPE_CHECKING:
    from .callbacks import Callback
    from .trainer import Trainer

TICK = 0.05  # seconds between looks at Ctrl-C, the clock and the progress bar
SPARING = 50  # a snapshot in a file is taken anew when so many times what it takes have passed
SLICE = 1 << 13  # mini-batches whose learning rates, coefficients and sums are held at a time

Validation = tuple[np.ndarray, np.ndarray, np.ndarray | None]


@dataclass
class Epoch:
    """How far an epoch is."""

    rows: int
    done: int = 0  # mini-batches
    seconds: float = 0.0
    lr: float = math.nan  # of the last update
    loss: float = 0.0  # weighted sum over the slices before this one, and its weight
    weight: float = 0.0
    sums: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))  # of this slice's mini-batches
    stats: np.ndarray | None = None  # of their gradients, (n, 5), if asked for; and `moments` of the slices before
    moments: np.ndarray = field(default_factory=lambda: np.zeros(_gradient_stats.MOMENTS))

    def mean_loss(self) -> float:
        loss, weight = self._totals()
        return loss / weight if weight else math.nan

    def gradient_figures(self) -> dict[str, float]:
        """The columns of the history that tell of gradients, if they were asked for."""
        return {} if self.stats is None else _gradient_stats.figures(self._moments())

    def next_slice(self, n: int, gradient_stats: bool) -> None:
        totals, moments = (self._totals(), self._moments()) if self.done else ((self.loss, self.weight), self.moments)
        sums, stats = np.zeros((n, 2)), np.zeros((n, _gradient_stats.COLUMNS)) if gradient_stats else None
        (self.loss, self.weight), self.moments, self.sums, self.stats = totals, moments, sums, stats  # all or nothing

    def _moments(self) -> np.ndarray:
        return self.moments if self.stats is None else _gradient_stats.moments(self.stats, self.moments)

    def _totals(self) -> tuple[float, float]:
        loss, weight = np.add.reduce(self.sums, axis=0).tolist()
        return self.loss + loss, self.weight + weight

    def copy(self) -> Epoch:
        stats = None if self.stats is None else self.stats.copy()
        return Epoch(
            self.rows, self.done, self.seconds, self.lr, self.loss, self.weight, self.sums.copy(), stats, self.moments
        )


class Kept(NamedTuple):
    """Where a trainer was when the snapshot was taken."""

    t: int
    epoch: int
    current: Epoch
    fresh: bool  # as a new trainer's state is
    rows: int  # of the history,
    row: dict[str, float] | None  # and the last of them
    until: float  # when it is worth another one, on the clock of `time.perf_counter`


class Fitting:
    """One call of `Trainer.fit`, once everything is checked."""

    def __init__(
        self, trainer: Trainer, batches: Batches, steps: int, deadline: float, callbacks: Sequence[Callback] = ()
    ) -> None:
        self.trainer, self.batches, self.steps, self.deadline = trainer, batches, steps, deadline
        self.callbacks = callbacks
        self.each_batch = [each for each in callbacks if each.wants_batches]
        self.asked: str | None = None  # the reason for which a callback wants the fit to end
        self.interrupt = Interrupt()
        self.snapshot = Snapshot()  # of the weights and the optimiser's state when an epoch began
        self.kept: Kept | None = None  # what else was then
        if trainer._current is not None and trainer._current.rows != len(batches.X):
            trainer._epoch_done()
        self.first = trainer.epoch
        self.norms = trainer.history._norms_of(len(batches.X)) if trainer.gradient_stats else None

    def run(self, max_epochs: int, val: Validation | None, goals: Mapping[str, float], verbose: bool) -> str:
        """Train until there is a reason to stop, and return it."""
        trainer = self.trainer
        with self.interrupt, self.snapshot, Progress(max_epochs, verbose) as progress:
            while True:
                complete = self._epoch(progress)
                row = self._record(val)
                progress.epoch(trainer.epoch - self.first, row)
                if complete:
                    self._tell(self.callbacks, "on_epoch_end", MappingProxyType(row))
                if complete and goals and all(reached(name, row[name], goal) for name, goal in goals.items()):
                    return "stop_at"
                if trainer.epoch - self.first >= max_epochs:
                    return "max_epochs"
                if (why := self._broken_off()) is not None:
                    return why

    def _epoch(self, progress: Progress) -> bool:
        """Train to the end of the epoch, or to where it is broken off; whether it is complete."""
        trainer = self.trainer
        begin = time.perf_counter()
        epoch = trainer._current or Epoch(len(self.batches.X))  # the trainer's when a mini-batch of it is done
        try:
            self.batches.order = None  # one order at a time
            if trainer.sampling == "poisson":
                share = self.batches.batch_size / epoch.rows
                uniform = trainer._uniform()
                self.batches.order, self.batches.offsets = poisson_batches(epoch.rows, self.steps, share, uniform)
            elif trainer.shuffle:
                self.batches.order = permutation(epoch.rows, trainer.seed, trainer.epoch)
            self._keep(epoch)
            while epoch.done < self.steps and self._slice(epoch, progress) is None:
                pass
            if not all(map(all_finite, trainer.net._learned)):
                self._diverged("a weight became NaN or infinite", epoch.done, epoch.lr)
        finally:
            epoch.seconds += time.perf_counter() - begin
        return epoch.done == self.steps

    def _slice(self, epoch: Epoch, progress: Progress) -> str | None:
        """Train to the end of the slice, or as long as the optimiser is the same; returns why, if broken off before."""
        trainer = self.trainer
        first = epoch.done % SLICE
        if first == 0:
            epoch.next_slice(min(SLICE, self.steps - epoch.done), trainer.gradient_stats)
        sums = epoch.sums[first:]
        optimizer = trainer.optimizer
        rates, coefficients = trainer._coefficients(len(sums))
        made = 0
        while made < len(sums) and trainer.optimizer is optimizer:  # a callback may give it another one
            seconds = max(0.0, min(TICK, self.deadline - time.perf_counter()))
            these = slice(made, made + 1 if self.each_batch else None)
            stats = None if epoch.stats is None else epoch.stats[first:][these]
            executor = trainer._executor
            before = executor.made
            try:
                executor.run(
                    self.batches, epoch.done, trainer.t, coefficients[these], sums[these], seconds, stats, self.norms
                )
            finally:  # as in `Trainer.step`
                done = executor.made - before
                if done:
                    made, epoch.done, trainer.t = made + done, epoch.done + done, trainer.t + done
                    epoch.lr, trainer._current = rates[made - 1], epoch
            if made < len(sums) and not math.isfinite(loss := float(sums[made, 0])):
                self._diverged(f"the loss became {loss}", epoch.done + 1, float(rates[made]))
            if self.each_batch:
                loss, weight = sums[made - 1].tolist()
                self._tell(self.each_batch, "on_batch_end", loss / weight if weight else math.nan)
            progress.within(trainer.epoch - self.first + epoch.done / self.steps)
            if (why := self._broken_off()) is not None:
                return why
        return None

    def _tell(self, callbacks: Sequence[Callback], method: str, *news: Any) -> None:
        """Call a method of callbacks, and note the first reason to end that one of them returns."""
        self.interrupt.raises = True
        try:
            for callback in callbacks:
                reason = getattr(callback, method)(self.trainer, *news)
                if not (reason is None or isinstance(reason, str)):
                    name = f"{type(callback).__name__}.{method}"
                    raise TypeError(f"{name} must return None, or a string to end the fit; got {reason!r}")
                self.asked = reason if self.asked is None else self.asked
        finally:
            self.interrupt.raises = False

    def _broken_off(self) -> str | None:
        if self.interrupt.hit:
            return "interrupted"
        if self.asked is not None:
            return self.asked
        return "max_seconds" if time.perf_counter() >= self.deadline else None

    def _keep(self, epoch: Epoch) -> None:
        """Take the snapshot that a fit goes back to if it diverges: each epoch, or in a file seldom enough."""
        trainer, begin = self.trainer, time.perf_counter()
        if self.kept is not None and self.snapshot.in_file and begin < self.kept.until:
            return
        fresh, rows = trainer._is_fresh(), trainer.history._rows
        self.snapshot.take(self._changing(fresh))
        end = time.perf_counter()
        until, row = end + SPARING * (end - begin), rows[-1] if rows else None
        self.kept = Kept(trainer.t, trainer.epoch, epoch.copy(), fresh, len(rows), row, until)

    def _changing(self, fresh: bool) -> list[np.ndarray]:
        """The arrays that an epoch changes and that can't be had otherwise: of a new trainer the weights alone."""
        return [*self.trainer.net._learned, *([] if fresh else [self.trainer.state])]

    def _diverged(self, what: str, step: int, lr: float) -> None:
        """Go back to the snapshot, and say so."""
        trainer, kept, wrong = self.trainer, self.kept, self.trainer.epoch + 1
        assert kept is not None
        trainer.t, trainer.epoch, trainer._current = kept.t, kept.epoch, kept.current if kept.current.done else None
        del trainer.history._rows[kept.rows :]
        if kept.row is not None:
            trainer.history._rows[-1] = kept.row  # that of the whole epoch may have taken its place
        trainer._standing = None  # it may follow from them
        self.snapshot.restore(self._changing(kept.fresh))
        if kept.fresh:
            trainer.state.fill(0)  # the average's, too
            trainer.optimizer.init_state(trainer.state[: trainer.optimizer.n_states])
        back = f"they had after update {kept.t}" if kept.t else "they began with"
        raise FloatingPointError(
            f"{what} in epoch {wrong} at step {step} of {self.steps}, with lr {lr:g}; weights and "
            f"optimiser state have the values {back} (a smaller lr, or data scaled to about 1, may help)"
        )

    def _record(self, val: Validation | None) -> dict[str, float]:
        """Count a complete epoch, evaluate, and add the row to the history."""
        trainer = self.trainer
        epoch = trainer._current
        assert epoch is not None
        row: dict[str, float] = {"epoch": trainer.epoch + 1, "loss": epoch.mean_loss()} | epoch.gradient_figures()
        examples = min(epoch.done * self.batches.batch_size, epoch.rows)
        self.interrupt.raises = True
        try:
            if epoch.done == self.steps:
                trainer._epoch_done()
            if val is not None:
                with trainer.averaged() if getattr(trainer.average, "validate", False) else nullcontext():
                    row |= {"val_" + name: value for name, value in trainer._evaluate(*val).items()}
        finally:  # the epoch counts, if its validation is broken off too
            self.interrupt.raises = False
            row |= {"lr": float(epoch.lr), "seconds": epoch.seconds, "examples_per_second": examples / epoch.seconds}
            trainer.history._record(row)
        return row


def reached(name: str, value: float, goal: float) -> bool:
    """What is to fall has to come down to its goal, what is to rise up to it."""
    return value <= goal if falls(name) else value >= goal
