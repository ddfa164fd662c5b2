"""How large a mini-batch should be: an estimate from measured steps and the gradient noise scale, and an experiment.

McCandlish, Kaplan, Amodei et al. (2018, "An empirical model of large-batch training"): to come as far as S steps with
the exact gradient, mini-batches of B rows need about ``S (1 + B_noise / B)`` steps, B_noise the gradient noise scale.
With t(B) seconds a step, the wall time is ``S (1 + B_noise / B) t(B)``; where t = t0 + c B, it is least at ``B =
sqrt(B_noise t0 / c)``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ._checks import integer, number
from ._checks import verbose as check_verbose
from ._errors import missing_extra
from ._per_example import check_rows_apart
from ._progress import Whole
from ._trial import check_trainer, present_lr, standing, trial
from .data import check_X
from .optim import SGD, Optimizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .trainer import Trainer

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
ROUNDS = 3  # every size is timed so often, the sizes in turn; the fastest counts
STRAIGHT = 0.15  # largest relative error of a straight line that is taken for one
NOISE_BATCH = 64  # rows of the mini-batches that the noise is measured with
NOISE_ROWS = 20_000  # rows that it is measured on, at most


@dataclass(frozen=True)
class BatchSizeAdvice:
    """What `advise_batch_size` found; printing it gives the table.

    Attributes
    ----------
    batch_size : int
        The size with which training is estimated to be fastest, rounded to a power of 2 or what the set allows.
    noise_scale : float
        B_noise at the weights as they are; infinite if the mean gradient could not be told from 0.
    interval : tuple of float
        Its 95 % interval.
    sizes, seconds : tuple
        The measured curve: mini-batch sizes and seconds a step.
    t0, c : float or None
        The straight line ``t0 + c B``, or None where the curve is none.
    lr : float or None
        Learning rate scaled to `batch_size`; None if it is a schedule (scale that by `lr_factor`).
    lr_factor : float
        What the learning rate is multiplied by. SGD: ``(1 + B_noise / B) / (1 + B_noise / B')`` from B to B'; adaptive
        optimisers: ``sqrt(B' / B)``.
    betas : tuple of float or None
        For Adam and its kin ``1 - (1 - beta) B' / B``, so that their means reach over as many rows (Malladi et al.
        2022).
    """

    batch_size: int
    noise_scale: float
    interval: tuple[float, float]
    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    t0: float | None
    c: float | None
    before: int
    lr: float | None
    lr_factor: float
    betas: tuple[float, ...] | None

    def cost(self, batch_size: float) -> float:
        """The estimated wall time with this size, that of the advised one being 1."""
        return self._time(batch_size) / self._time(self.batch_size)

    def _time(self, B: float) -> float:
        noise = self.noise_scale if math.isfinite(self.noise_scale) else 1e9
        return (1 + noise / B) * float(np.interp(math.log(B), np.log(self.sizes), self.seconds))

    def __str__(self) -> str:
        lines = ["    batch   us a step        rows/s   wall time, estimated"]
        for size, seconds in zip(self.sizes, self.seconds, strict=True):
            mark = "  <- advised" if size == self.batch_size else ""
            rate = f"{size / seconds:>14,.0f}"
            lines.append(f"{size:>9,}{1e6 * seconds:>12,.1f}{rate}{self.cost(size):>12.2f} x{mark}")
        low, high = self.interval
        lines.append(f"gradient noise scale: {self.noise_scale:,.0f} rows (95 %: {low:,.0f} to {high:,.0f})")
        if self.c is not None and self.t0 is not None:
            lines.append(f"a step takes {1e6 * self.t0:,.1f} us + {1e9 * self.c:,.1f} ns a row")
        else:
            lines.append("time a step isn't a straight line here: the measured curve was searched")
        half, double = self.cost(self.batch_size / 2), self.cost(self.batch_size * 2)
        lines.append(f"half of {self.batch_size:,} would take {half:.2f} times as long, double {double:.2f} times")
        rates = f"lr {self.lr:.3g}" if self.lr is not None else f"lr times {self.lr_factor:.3g}"
        betas = "" if self.betas is None else f", betas ({', '.join(f'{beta:.4g}' for beta in self.betas)})"
        lines.append(f"from {self.before:,} to {self.batch_size:,} rows: {rates}{betas}")
        lines.append(
            "An estimate: the noise scale is that of the weights as they are, and grows in training, "
            "often tenfold; ask again later. branch_test tries it out."
        )
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the estimated wall time and the measured time a step against the size. Needs Matplotlib."""
        try:
            import matplotlib.pyplot as plt
        except ImportError:
            raise missing_extra("matplotlib", "plot", "BatchSizeAdvice.plot()") from None
        if ax is None:
            _, ax = plt.subplots()
        other = ax.twinx()
        line = ax.plot(self.sizes, [self.cost(size) for size in self.sizes], "o-", label="wall time, estimated")
        line += other.plot(self.sizes, [1e6 * t for t in self.seconds], "s--", color="C1", label="us a step")
        line.append(ax.axvline(self.batch_size, color="C2", label="advised"))
        ax.set_xscale("log", base=2)
        ax.set_xlabel("rows of a mini-batch")
        ax.set_ylabel("wall time, of the advised one's")
        other.set_ylabel("us a step")
        ax.legend(handles=line)
        return ax


def advise_batch_size(
    trainer: Trainer,
    X: Any,
    y: Any,
    *,
    sizes: Sequence[int] | None = None,
    seconds: float = 2.0,
    verbose: int = 1,
) -> BatchSizeAdvice:
    """Estimate the mini-batch size with which `trainer` would train fastest, from here on, on this machine.

    Times steps of several sizes, and measures the gradient noise scale, on copies: the trainer isn't changed.

    Parameters
    ----------
    trainer : Trainer
        After some training, not fresh: the noise scale of random weights says little.
    X, y : array-like
        As for `Trainer.fit`.
    sizes : sequence of int, optional
        Sizes to time; default powers of 2 from 8 to 2048, as far as the set has rows.
    seconds : float, default 2
        Time that the measurement may take, about.
    verbose : int, default 1
        1 prints the table.

    Returns
    -------
    BatchSizeAdvice

    Raises
    ------
    ValueError
        If `BatchNorm1d` mixes the rows, so that they have no gradients of their own.
    KeyboardInterrupt
        At Ctrl-C.

    See Also
    --------
    branch_test : The check by experiment.
    """
    check_trainer(trainer)
    seconds, verbose = number("seconds", seconds, "(0, inf)"), check_verbose(verbose)
    n = len(check_X(X, trainer.net.plan.n_features, False))
    if sizes is not None and not isinstance(sizes, Iterable):
        raise TypeError(f"sizes must be a sequence of integers such as [32, 256]; got {sizes!r}")
    chosen = (
        [size for size in SIZES if size <= n] if sizes is None else [integer("sizes", size, 1, n) for size in sizes]
    )
    chosen = sorted(set(chosen))
    if len(chosen) < 2:
        raise ValueError(f"sizes must hold at least 2 sizes of at most {n} rows; got {chosen}")
    scale, low, high = _noise(trainer, X, y)
    measured = _times(trainer, X, y, chosen, seconds)
    t0, c = _line(chosen, measured)
    noise = scale if math.isfinite(scale) else 1e9
    if t0 is not None and c is not None:
        best = math.sqrt(noise * t0 / c)
    else:
        grid = np.geomspace(chosen[0], chosen[-1], 200)
        best = float(grid[np.argmin((1 + noise / grid) * np.interp(np.log(grid), np.log(chosen), measured))])
    size = min(chosen[-1], max(chosen[0], 2 ** max(0, round(math.log2(max(best, 1.0))))))
    factor, betas = _scaled(trainer.optimizer, trainer.rows_of_update, size, noise)
    lr = trainer.optimizer.lr
    advice = BatchSizeAdvice(
        batch_size=size,
        noise_scale=scale,
        interval=(low, high),
        sizes=tuple(chosen),
        seconds=tuple(measured),
        t0=t0,
        c=c,
        before=trainer.rows_of_update,
        lr=lr * factor if isinstance(lr, float) else None,
        lr_factor=factor,
        betas=betas,
    )
    if verbose:
        print(advice)
    return advice


@dataclass(frozen=True)
class Branch:
    """One branch of a `branch_test`: the mini-batch size, what lr was multiplied by, and what came of it."""

    factor: float
    batch_size: int
    lr_factor: float
    loss: float
    updates: int
    seconds: float


def branch_test(
    trainer: Trainer,
    X: Any,
    y: Any,
    *,
    factors: Sequence[float] = (1, 2, 4),
    max_epochs: int = 1,
    X_val: Any = None,
    y_val: Any = None,
    verbose: int = 1,
) -> list[Branch]:
    """Train copies of `trainer` on the same rows with larger and smaller mini-batches, and compare the losses.

    A size whose loss is as low as that of factor 1 wastes nothing; the largest of them is the critical batch size. The
    learning rate is scaled as `advise_batch_size` says, with the noise scale measured here. It, and what else has a
    schedule, stays at its present value: with mini-batches of another size, there are other updates. The trainer isn't
    changed.

    Parameters
    ----------
    trainer : Trainer
    X, y : array-like
        As for `Trainer.fit`.
    factors : sequence of float, default (1, 2, 4)
        Multiples of the trainer's mini-batch.
    max_epochs : int, default 1
        Epochs of every branch.
    X_val, y_val : array-like, optional
        What the loss is evaluated on at the end; by default `X` and `y`.
    verbose : int, default 1
        1 prints a table.

    Returns
    -------
    list of Branch
        In the order of `factors`.

    Raises
    ------
    ValueError
        If `BatchNorm1d` mixes the rows, so that they have no gradients of their own.
    KeyboardInterrupt
        At Ctrl-C.
    """
    check_trainer(trainer)
    verbose = check_verbose(verbose)
    if (X_val is None) != (y_val is None):
        raise ValueError("X_val and y_val must be given together")
    check_X(X, trainer.net.plan.n_features, False)
    if not isinstance(factors, Iterable):
        raise TypeError(f"factors must be a sequence of numbers such as (1, 2, 4); got {factors!r}")
    factors = [number("factors", factor, "(0, inf)") for factor in factors]
    scale, lr = _noise(trainer, X, y)[0], present_lr(trainer)
    found = []
    for factor in factors:
        size = max(1, round(min(len(X), trainer.rows_of_update * factor)))
        lr_factor, betas = _scaled(trainer.optimizer, trainer.rows_of_update, size, scale)
        others = {} if betas is None else {"betas": betas}
        branch = trial(trainer, standing(trainer, lr * lr_factor, **others), **_batches_of(size))
        begin, before = time.perf_counter(), branch.t
        with Whole():
            branch.fit(X, y, max_epochs=max_epochs, verbose=0)
        took = time.perf_counter() - begin
        loss = branch.evaluate(*((X, y) if X_val is None else (X_val, y_val)))["loss"]
        found.append(Branch(factor, size, lr_factor, loss, branch.t - before, took))
    if verbose:
        print("   batch   lr times    updates    seconds       loss")
        for b in found:
            print(f"{b.batch_size:>8,}{b.lr_factor:>11.3g}{b.updates:>11,}{b.seconds:>11.3g}{b.loss:>11.5g}")
    return found


def _noise(trainer: Trainer, X: Any, y: Any) -> tuple[float, float, float]:
    """The gradient noise scale at the trainer's weights, and its interval."""
    check_rows_apart(trainer.net, "the gradient noise scale")
    rows = np.linspace(0, len(X) - 1, min(len(X), NOISE_ROWS)).astype(np.int64)
    some = (X, y) if len(rows) == len(X) else (np.asarray(X)[rows], np.asarray(y)[rows])
    size = max(2, min(NOISE_BATCH, len(rows) // 4))
    plain = {"gradient_stats": True, "average": None, "clip_per_example": None, "noise_multiplier": 0.0}
    still = trial(trainer, SGD(lr=0.0), **_batches_of(size) | plain)
    with Whole():
        history = still.fit(*some, max_epochs=1, verbose=0)
    scale, low, high = (history[name][-1] for name in ("noise_scale", "noise_scale_low", "noise_scale_high"))
    return scale, low, high


def _batches_of(size: int) -> dict[str, Any]:
    """The settings of mini-batches of so many rows, and nothing besides."""
    return {"batch_size": size, "accumulate_steps": 1, "drop_last": False, "gradient_stats": False}


def _times(trainer: Trainer, X: Any, y: Any, sizes: list[int], seconds: float) -> list[float]:
    """Seconds a step for every size."""
    copies = [trial(trainer, standing(trainer, 0.0), **_batches_of(size)) for size in sizes]
    found = [math.inf] * len(sizes)
    for _ in range(ROUNDS):
        for i, each in enumerate(copies):
            before = each.t
            limit = seconds / ROUNDS / len(sizes)
            with Whole():
                each.fit(X, y, max_epochs=10**6, max_seconds=limit, verbose=0, check_finite=False)
            spent = sum(each.history["seconds"])
            each.history._rows.clear()
            found[i] = min(found[i], spent / (each.t - before))
    return found


def _line(sizes: list[int], seconds: list[float]) -> tuple[float | None, float | None]:
    """t0 and c of a straight line through the times, errors relative; None, None if there is no such line."""
    B, t = np.array(sizes, float), np.array(seconds)
    A = np.stack([1 / t, B / t], axis=1)
    t0, c = np.linalg.lstsq(A, np.ones(len(t)), rcond=None)[0].tolist()
    if t0 <= 0 or c <= 0 or np.abs((t0 + c * B) / t - 1).max() > STRAIGHT:
        return None, None
    return t0, c


def _scaled(optimizer: Optimizer, before: int, after: int, noise: float) -> tuple[float, tuple[float, ...] | None]:
    """What lr is to be multiplied by from mini-batches of `before` rows to `after`, and the betas then."""
    ratio = after / before
    if isinstance(optimizer, SGD):
        noise = noise if math.isfinite(noise) else 1e9
        return (1 + noise / before) / (1 + noise / after), None
    betas = getattr(optimizer, "betas", None)
    if betas is not None and all(isinstance(beta, float) for beta in betas):
        betas = tuple(max(0.0, 1 - (1 - beta) * ratio) for beta in betas)
    else:
        betas = None
    return math.sqrt(ratio), betas
