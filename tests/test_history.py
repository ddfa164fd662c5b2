"""The table that a fit leaves behind."""

from __future__ import annotations

import math
import pickle
import sys

import pytest

from fastmb.history import History


def table(n: int, **more: float) -> History:
    history = History()
    for epoch in range(1, n + 1):
        row = {"epoch": epoch, "loss": 1 / epoch, **more, "lr": 0.1, "seconds": 0.5, "examples_per_second": 123456.0}
        history._record(row)
    return history


def test_it_is_a_mapping_of_columns():
    history = table(2, val_loss=0.5, val_accuracy=0.75)
    assert list(history) == ["epoch", "loss", "val_loss", "val_accuracy", "lr", "seconds", "examples_per_second"]
    assert history["loss"] == [1.0, 0.5]
    assert dict(history)["epoch"] == [1, 2]
    assert history == dict(history)
    with pytest.raises(KeyError, match="'accuracy'; the columns are epoch, loss, val_loss"):
        history["accuracy"]


def test_an_empty_one_has_its_columns():
    assert dict(History()) == {"epoch": [], "loss": [], "lr": [], "seconds": [], "examples_per_second": []}
    assert repr(History()) == "epoch  loss  lr  seconds  examples_per_second"


def test_columns_that_come_later_are_nan_before():
    history = table(1)
    history._record({**table(2, val_loss=0.5)._rows[1]})
    assert math.isnan(history["val_loss"][0])
    assert history["val_loss"][1] == 0.5


def test_a_completed_epoch_replaces_its_partial_row():
    history = table(2)
    history._record({**history._rows[1], "loss": 7.0})
    assert history["epoch"] == [1, 2]
    assert history["loss"] == [1.0, 7.0]


def test_its_repr_is_a_small_aligned_table():
    history = table(2, val_loss=0.25)
    history.stopped = "max_epochs"
    assert repr(history).splitlines() == [
        "epoch  loss  val_loss   lr  seconds  examples_per_second",
        "    1     1      0.25  0.1      0.5               123456",
        "    2   0.5      0.25  0.1      0.5               123456",
        "stopped: max_epochs",
    ]
    assert repr(table(100)).splitlines()[1] == "(88 earlier epochs)"
    assert len(repr(table(100)).splitlines()) == 14


def test_it_can_be_pickled():
    history = table(3)
    assert pickle.loads(pickle.dumps(history)) == history


def test_to_pandas():
    frame = table(3, val_loss=0.5).to_pandas()
    assert frame["loss"].tolist() == [1.0, 0.5, 1 / 3]
    assert list(frame.columns) == list(table(3, val_loss=0.5))


def test_plot():
    import matplotlib.pyplot

    matplotlib.use("agg")
    ax = table(3, val_loss=0.5, val_accuracy=0.75).plot()
    assert [line.get_label() for line in ax.get_lines()] == ["loss", "val_loss"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["loss", "val_loss", "val_accuracy"]
    assert ax.get_xlabel() == "epoch"
    assert table(2).plot(ax) is ax
    stats = table(3, val_accuracy=0.75, grad_norm=2.0, noise_scale=3.0).plot()
    assert [text.get_text() for text in stats.get_legend().get_texts()] == ["loss", "val_accuracy"]
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize(("method", "package"), [("to_pandas", "pandas"), ("plot", "matplotlib")])
def test_a_missing_package_is_named_with_its_extra(method, package, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == package] + [package]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"needs the package '{package}': pip install 'fastmb\["):
        getattr(table(1), method)()
