"""What notebooks show: well-formed HTML that stands alone, whatever is in it."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

import fastmb as mb
from fastmb import _html
from fastmb.history import History

RNG = np.random.default_rng(0)
X = RNG.standard_normal((50, 6)).astype(np.float32)
Y = RNG.integers(0, 3, 50)


class Page(HTMLParser):
    """Parses, and raises where a tag isn't closed in its turn."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.styles: list[str] = []
        self.texts: list[str] = []
        self.points: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        self.tags.append(tag)
        attributes = dict(attrs)
        self.styles.append(attributes.get("style") or "")
        if tag == "polyline":
            self.points.append(attributes["points"])
        assert not {"src", "href", "onclick", "onload"} & attributes.keys()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def fitted(**options: Any) -> mb.Trainer:
    net = mb.Sequential(mb.Linear(6, 8), mb.ReLU(), mb.Dropout(0.2), mb.Linear(8, 3))
    trainer = mb.Trainer(net, executor="numpy")
    trainer.fit(X, Y, verbose=0, **options)
    return trainer


def test_a_network_shows_its_modules_and_sizes():
    page = Page(mb.mlp([1000, 8, 3])._repr_html_())
    assert page.texts[0] == "Sequential"
    assert {"Linear(1000, 8)", "(n, 8)", "8,008", "ReLU()", "Linear(8, 3)", "(n, 3)", "27"} <= set(page.texts)
    assert page.texts[-1] == mb.mlp([1000, 8, 3]).summary().splitlines()[-1]


def test_a_trainer_shows_its_parts_and_its_history():
    trainer = mb.Trainer(mb.mlp([6, 8, 3]))
    page = Page(trainer._repr_html_())
    assert {"Trainer", repr(trainer.loss), repr(trainer.optimizer), "64", "0 epochs, 0 updates"} <= set(page.texts)
    assert "History" not in page.texts
    page = Page(fitted(max_epochs=2)._repr_html_())
    assert {"History", "2 epochs, 2 updates", "stopped: max_epochs"} <= set(page.texts)


def test_a_history_shows_its_last_rows_and_a_plot():
    history = fitted(max_epochs=20, X_val=X, y_val=Y).history
    page = Page(history._repr_html_())
    assert set(history) <= set(page.texts)
    assert page.tags.count("tr") == 1 + 12
    assert page.texts[-1] == "8 earlier epochs not shown; stopped: max_epochs"
    assert len(page.points) == 2
    heights = [float(point.split(",")[1]) for point in page.points[0].split()]
    assert len(heights) == 20
    assert int(np.argmax(heights)) == int(np.argmin(history["loss"]))  # the lower, the further down


@pytest.mark.parametrize("n", [0, 1, 2])
def test_short_histories(n):
    history = History()
    for epoch in range(1, n + 1):
        history._record({"epoch": epoch, "loss": 1.0, "lr": 0.1, "seconds": 0.5, "examples_per_second": 123.0})
    assert len(Page(history._repr_html_()).points) == (n > 1)


def test_what_is_not_finite_is_left_out_of_the_plot():
    assert _html._plot({"loss": [math.nan, math.nan]}) == ""
    html = _html._plot({"loss": [1.0, math.nan, math.inf, 3.0]})
    assert Page(html).points == ["4.0,56.0 296.0,4.0"]


def test_long_histories_stay_small():
    assert len(_html._plot({"loss": list(np.arange(100_000.0))})) < 6000


def test_text_is_escaped():
    class Evil(mb.ReLU):
        def __repr__(self) -> str:
            return "<script>alert('&')</script>"

    trainer = mb.Trainer(mb.Sequential(mb.Linear(6, 3), Evil()))
    trainer.history.stopped = "<b>&amp;"
    trainer.history._record(
        {"epoch": 1, "loss": 1.0, "val_<i>": 0.5, "lr": 0.1, "seconds": 1.0, "examples_per_second": 1.0}
    )
    page = Page(trainer._repr_html_())
    assert {"<script>alert('&')</script>", "stopped: <b>&amp;", "val_<i>"} <= set(page.texts)
    assert not {"script", "b", "i"} & set(page.tags)


def test_it_has_no_colours_of_its_own_and_no_scripts():
    page = Page(fitted(max_epochs=2)._repr_html_())
    assert not {"script", "style", "link", "img"} & set(page.tags)
    for style in page.styles:
        for entry in filter(None, style.split(";")):
            name, value = entry.split(":")
            if name.strip() in ("color", "background", "border"):
                assert value.strip() in ("inherit", "none")
            if name.strip() == "border-bottom":
                assert value.strip() == "1px solid currentColor"
