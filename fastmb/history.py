"""What a fit leaves behind: one row of figures for each epoch, as a table of columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ._checks import integer
from ._errors import missing_extra

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

_FIRST = ("epoch", "loss")
_LAST = ("lr", "seconds", "examples_per_second")
_SHOWN = 12  # rows of a repr


class History(Mapping[str, list[float]]):
    """The figures of every epoch: a mapping of column names to lists, one entry an epoch.

    Attributes
    ----------
    stopped : str or None
        Why the last fit ended: ``"max_epochs"``, ``"max_seconds"``, ``"stop_at"``, ``"interrupted"``, or what a
        callback said, such as ``"early_stopping"``. None before the first fit, during one, and after one that raised.
    example_norms : ndarray of shape (n,) or None
        With ``gradient_stats=True``: the norm of each row's own gradient when it was last trained on, float32.

    Notes
    -----
    Columns: ``epoch``, from 1; ``loss``, the mean training loss over the epoch's mini-batches, each taken before its
    update; with validation data ``val_loss`` and ``val_accuracy`` or ``val_r2``, after the epoch (NaN in epochs
    without); ``lr``, the learning rate of the epoch's last update; ``seconds`` of training, validation not included;
    ``examples_per_second``. With ``gradient_stats=True`` also ``example_norm_mean`` and ``example_norm_max``, norms of
    the rows' own gradients; ``grad_norm``, the root of the mean squared norm of the mini-batches' gradients;
    ``grad_variance``, the trace of the covariance of a row's gradient; ``noise_scale``, the gradient noise scale
    B_simple (McCandlish et al. 2018), and the ends of its 95 % interval, ``noise_scale_low`` and ``noise_scale_high``.
    An epoch that was broken off has a row for the part that was done, which the row of the whole epoch replaces when a
    later fit completes it.

    Examples
    --------
    >>> history = trainer.fit(X, y, max_epochs=3)  # doctest: +SKIP
    >>> history["loss"]  # doctest: +SKIP
    [1.12, 0.61, 0.44]
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, float]] = []
        self.stopped: str | None = None
        self.example_norms: np.ndarray | None = None

    def _norms_of(self, n: int) -> np.ndarray:
        """Where a fit over `n` rows writes the norms of their gradients."""
        if self.example_norms is None or len(self.example_norms) != n:
            self.example_norms = np.full(n, np.nan, np.float32)
        return self.example_norms

    def hardest(self, k: int = 10) -> np.ndarray:
        """The rows whose own gradient was the longest when they were last trained on, the longest first.

        Outliers and wrong labels are among them. Needs a fit by a trainer with ``gradient_stats=True``; the norms are
        in `example_norms`, (n,) float32, without sample weights; NaN for rows that weren't met, 0 for rows of weight 0.

        Parameters
        ----------
        k : int, default 10
            How many.

        Returns
        -------
        ndarray of shape (k,)
            Row numbers of the fit's `X`, int64; fewer if fewer were met.
        """
        k = integer("k", k, 1)
        if self.example_norms is None:
            raise ValueError("no gradient norms are known: fit with Trainer(..., gradient_stats=True)")
        order = np.argsort(-self.example_norms, kind="stable")  # NaN last
        return order[: min(k, int((self.example_norms == self.example_norms).sum()))]

    def _record(self, row: dict[str, float]) -> None:
        if self._rows and self._rows[-1]["epoch"] == row["epoch"]:
            self._rows.pop()
        self._rows.append(row)

    @property
    def _columns(self) -> tuple[str, ...]:
        others = {name: None for row in self._rows for name in row if name not in _FIRST + _LAST}
        return (*_FIRST, *others, *_LAST)

    def __getitem__(self, column: str) -> list[float]:
        if column not in self._columns:
            raise KeyError(f"{column!r}; the columns are {', '.join(self._columns)}")
        return [row.get(column, float("nan")) for row in self._rows]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def _shown(self) -> list[list[str]]:
        """The cells of the last rows."""
        return [[_text(row.get(name)) for name in self._columns] for row in self._rows[-_SHOWN:]]

    def _repr_html_(self) -> str:
        from ._html import history

        return history(self)

    def __repr__(self) -> str:
        columns, shown = self._columns, self._shown()
        widths = [max(map(len, cells)) for cells in zip(columns, *shown, strict=True)]
        lines = ["  ".join(map(str.rjust, cells, widths)) for cells in [columns, *shown]]
        if hidden := len(self._rows) - len(shown):
            lines.insert(1, f"({hidden} earlier epochs)")
        if self.stopped:
            lines.append(f"stopped: {self.stopped}")
        return "\n".join(lines)

    def to_pandas(self) -> pandas.DataFrame:
        """The table as a data frame, one row an epoch. Needs pandas: ``pip install 'fastmb[pandas]'``."""
        try:
            import pandas
        except ImportError:
            raise missing_extra("pandas", "pandas", "History.to_pandas()") from None
        return pandas.DataFrame(dict(self))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Plot the losses, and the validation metric on an axis of its own, against the epoch.

        Needs Matplotlib: ``pip install 'fastmb[plot]'``.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            Where to; a new figure by default.

        Returns
        -------
        matplotlib.axes.Axes
            The axes with the losses.
        """
        try:
            import matplotlib.pyplot as plt
        except ImportError:
            raise missing_extra("matplotlib", "plot", "History.plot()") from None
        if ax is None:
            _, ax = plt.subplots()
        lines: list[Any] = []
        for name in self._columns:
            if not name.endswith("loss") and not name.startswith("val_"):
                continue
            on = ax if name.endswith("loss") else ax.twinx()
            style = "-" if on is ax else "--"
            lines += on.plot(self["epoch"], self[name], style, color=f"C{len(lines)}", label=name)
            on.set_ylabel("loss" if on is ax else name)
            if on is not ax:  # what is drawn later would hide the legend
                ax.set_zorder(on.get_zorder() + 1)
                ax.patch.set_visible(False)
        ax.set_xlabel("epoch")
        ax.legend(handles=lines, loc="center right")
        return ax


def _text(value: float | None) -> str:
    if value is None or value != value:
        return "nan"
    return str(value) if isinstance(value, int) else f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
