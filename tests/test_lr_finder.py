"""The learning-rate finder: a range test that changes nothing and suggests a rate worth taking."""

from __future__ import annotations

import doctest
import math
import signal
import sys
from typing import Any

import numpy as np
import pytest

import fastmb as mb
from fastmb import lr_finder

RNG = np.random.default_rng(0)
X = RNG.standard_normal((100, 6)).astype(np.float32)
Y = RNG.integers(0, 3, 100)


def make(executor: str = "numpy", **options: Any) -> mb.Trainer:
    net = mb.Sequential(mb.Linear(6, 8), mb.ReLU(), mb.Dropout(0.2), mb.Linear(8, 3), seed=1)
    return mb.Trainer(net, executor=executor, **{"optimizer": mb.Adam(0.01), "batch_size": 16, "seed": 5} | options)


def everything(trainer: mb.Trainer) -> tuple[Any, ...]:
    place = trainer._current and (trainer._current.done, trainer._current.sums.tobytes())
    arrays = trainer.net.flat.tobytes(), trainer.state.tobytes()
    settings = trainer.optimizer, trainer.net.squeeze, trainer.net.task, trainer.history.stopped
    return *arrays, trainer.t, trainer.epoch, place, dict(trainer.history), *settings


class Pause(mb.Callback):
    def on_batch_end(self, trainer, loss):
        return "pause" if trainer.t == 3 else None


@pytest.mark.parametrize("average", [None, mb.SWA(0, lr=0.5, anneal_epochs=0)])
@pytest.mark.parametrize("fits", [[], [{}], [{"callbacks": [Pause()]}]])
def test_nothing_of_the_trainer_changes(executor, fits, average):
    trainer = make(executor, optimizer=mb.SGD(mb.OneCycleLR(0.1, total_steps=100), momentum=0.9), average=average)
    for options in fits:
        trainer.fit(X, Y, max_epochs=2, verbose=0, **options)
    before = everything(trainer)
    mb.find_lr(trainer, X, Y, num_iter=50)
    assert everything(trainer) == before


@pytest.mark.parametrize("average", [None, mb.SWA(0, lr=0.5, anneal_epochs=0), mb.EMA(every=1)])
def test_each_rate_is_tried_by_one_update(executor, average):
    trainer = make(executor, average=average)
    trainer.fit(X, Y, max_epochs=1, verbose=0)
    found = mb.find_lr(trainer, X, Y, start_lr=1e-5, end_lr=0.1, num_iter=30)
    np.testing.assert_allclose(found.lrs, np.geomspace(1e-5, 0.1, 30), rtol=1e-12)
    losses: list[float] = []

    class Notes(mb.Callback):
        def on_batch_end(self, trainer, loss):
            losses.append(loss)
            return "enough" if len(losses) == 30 else None

    optimizer = mb.Adam(lambda t: float(found.lrs[min(t - trainer.t, 29)]))
    by_hand = make(executor, optimizer=optimizer)
    for mine, other in ((by_hand.net.flat, trainer.net.flat), (by_hand.state, trainer.state[:2])):
        mine[...] = other
    by_hand.t, by_hand.epoch, first = trainer.t, trainer.epoch, trainer.t
    assert first == 7
    by_hand.fit(X, Y, max_epochs=9, verbose=0, callbacks=[Notes()])
    assert found.losses.tolist() == losses


CYCLE = mb.OneCycleLR(0.1, total_steps=21)
HALVING = mb.ExponentialLR(0.5, 0.9)


@pytest.mark.parametrize("epochs", [0, 1, 3])  # of 7 updates: the last is the end of the cycle
@pytest.mark.parametrize("residual", [False, True])
def test_other_schedules_stand_still(executor, epochs, residual):
    def make_with(optimizer: mb.Optimizer, p: Any) -> mb.Trainer:
        dropout = mb.Residual(mb.Linear(6, 6), mb.Dropout(p)) if residual else mb.Dropout(p)
        net = mb.Sequential(dropout, mb.Linear(6, 3), mb.Dropout(0.1))
        return mb.Trainer(net, optimizer=optimizer, executor=executor, batch_size=16)

    sgd = mb.SGD(CYCLE, CYCLE.momentum(), weight_decay=HALVING, groups={"*.bias": {"lr": 0.5}})
    trainer = make_with(sgd, CYCLE)
    if epochs:
        trainer.fit(X, Y, max_epochs=epochs, verbose=0)
    found = mb.find_lr(trainer, X, Y, num_iter=40)
    t = trainer.t
    p, momentum = (schedule(min(t, 20)) for schedule in (CYCLE, CYCLE.momentum()))
    number = make_with(mb.SGD(0.1, momentum, weight_decay=HALVING(t), groups={"*.bias": {"lr": 0.5}}), p)
    number.net.flat[:], number.state[:], number.t, number.epoch = trainer.net.flat, trainer.state, t, trainer.epoch
    assert found.losses.tolist() == mb.find_lr(number, X, Y, num_iter=40).losses.tolist()


@pytest.mark.parametrize("betas", [(0.9, 0.99), (CYCLE.momentum(), mb.ConstantLR(0.99, 1.0))])
def test_a_rate_that_follows_a_metric_or_has_no_value_plays_no_part(executor, betas):
    def none(t: int) -> float:
        raise RuntimeError("no")

    found = [
        mb.find_lr(make(executor, optimizer=mb.Adam(lr, betas)), X, Y, num_iter=30).losses.tolist()
        for lr in (0.01, mb.ReduceLROnPlateau(0.1), CYCLE, none)
    ]
    assert found == found[:1] * 4


@pytest.mark.parametrize("call", [1, 5, 30])  # of 30 mini-batches
def test_ctrl_c_is_raised_and_nothing_has_changed(executor, call, monkeypatch):
    trainer = make(executor)
    before, calls, make_executor = everything(trainer), iter(range(1, 100)), mb.Trainer._executor_for

    class Pressing:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def run(self, *arguments: Any) -> int:
            if next(calls) == call:
                signal.raise_signal(signal.SIGINT)
            return self.inner.run(*arguments)

    monkeypatch.setattr(mb.Trainer, "_executor_for", lambda *arguments: Pressing(make_executor(*arguments)))
    with pytest.raises(KeyboardInterrupt):
        mb.find_lr(trainer, X, Y, num_iter=30)
    assert next(calls) == call + 1
    assert everything(trainer) == before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_suggestion_trains_well():
    X, y = mb.datasets.load_digits()
    for optimizer in (mb.SGD, mb.Adam):
        options = {"input_scale": 1 / 16, "seed": 0}
        found = mb.find_lr(mb.Trainer(mb.mlp([64, 32, 10]), optimizer=optimizer(), **options), X, y)
        trainer = mb.Trainer(mb.mlp([64, 32, 10]), optimizer=optimizer(lr=found.suggestion), **options)
        trainer.fit(X, y, max_epochs=10, verbose=0)
        assert trainer.evaluate(X, y)["accuracy"] > 0.9


def curve(shape: Any, n: int = 200) -> lr_finder.LRFinder:
    lrs = np.geomspace(1e-6, 10, n)
    return lr_finder.LRFinder(lrs, np.array([shape(math.log10(lr)) for lr in lrs]))


def test_the_suggestion_is_where_the_loss_falls_most_steeply():
    def falls_then_diverges(x: float) -> float:
        return 1 / (1 + math.exp(4 * (x + 2))) + (1e6 if x > 0.9 else 0)  # steepest at 1e-2

    assert curve(falls_then_diverges).suggestion == pytest.approx(1e-2, rel=0.2)
    noisy = curve(lambda x: falls_then_diverges(x) + RNG.normal(0, 0.03))
    assert noisy.suggestion == pytest.approx(1e-2, rel=1)


def test_there_is_none_where_the_loss_does_not_fall():
    assert curve(lambda x: x + 10).suggestion is None
    assert curve(lambda x: 1.0).suggestion is None
    assert curve(lambda x: -x + 10, n=5).suggestion is None


def test_smoothed_is_the_weighted_mean_of_what_is_around():
    losses = RNG.uniform(1, 2, 40)
    found = lr_finder.LRFinder(np.geomspace(1e-3, 1, 40), losses, 0.8)
    apart = abs(np.arange(40)[:, None] - np.arange(40))
    weights = 0.8**apart
    np.testing.assert_allclose(found.smoothed, weights @ losses / weights.sum(1), rtol=1e-12)
    np.testing.assert_allclose(lr_finder.LRFinder(found.lrs, losses, 0.0).smoothed, losses)


def test_it_stops_when_the_loss_has_grown(executor):
    target = X[:, :3] * 2
    found = mb.find_lr(make(executor, loss="mse", optimizer=mb.SGD()), X, target, end_lr=1e6)
    assert 50 < len(found.lrs) == len(found.losses) < 200
    assert found.suggestion is not None
    later = mb.find_lr(make(executor, loss="mse", optimizer=mb.SGD()), X, target, end_lr=1e6, diverge_threshold=1e9)
    assert len(later.lrs) > len(found.lrs)
    assert np.isfinite(later.losses).all()  # a loss that isn't finite ends it, and isn't there


def test_a_loss_that_is_never_finite_is_told(executor):
    trainer = make(executor)
    trainer.net.flat.fill(np.inf)
    with pytest.raises(FloatingPointError, match=r"the loss became (nan|inf)"):
        mb.find_lr(trainer, X, Y)


def test_mini_batches_without_weight_are_left_out(executor):
    weight = np.zeros(100)
    weight[:20] = 1
    found = mb.find_lr(make(executor, shuffle=False), X, Y, sample_weight=weight, num_iter=20)
    assert found.lrs.tolist() == [lr for k, lr in enumerate(np.geomspace(1e-6, 10, 20)) if k % 7 < 2]
    assert len(found.losses) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_lr": 0}, r"start_lr must be a number in \(0, inf\); got 0"),
        ({"start_lr": 1, "end_lr": 1}, "end_lr must be larger than start_lr = 1.0; got 1.0"),
        ({"num_iter": 1}, "num_iter must be an integer >= 2; got 1"),
        ({"smoothing": 1}, r"smoothing must be a number in \[0, 1\); got 1"),
        ({"diverge_threshold": 1}, r"diverge_threshold must be a number in \(1, inf\); got 1"),
        ({"X": X[:, :5]}, "X has 5 features"),
    ],
)
def test_misuse_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        mb.find_lr(make(), **{"X": X, "y": Y} | options)


def test_plot():
    import matplotlib.pyplot

    matplotlib.use("agg")
    found = curve(lambda x: 1 / (1 + math.exp(4 * (x + 2))))
    ax = found.plot()
    assert ax.get_xscale() == "log"
    losses, smoothed, mark = ax.get_lines()
    assert losses.get_ydata().tolist() == found.losses.tolist()
    assert smoothed.get_ydata().tolist() == found.smoothed.tolist()
    assert mark.get_xdata().tolist() == [found.suggestion]
    assert mark.get_label() == f"suggestion: {found.suggestion:.2g}"
    flat = curve(lambda x: 1.0)
    assert flat.plot(ax) is ax
    assert len(ax.get_lines()) == 5
    matplotlib.pyplot.close("all")


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"needs the package 'matplotlib': pip install 'fastmb\[plot\]'"):
        curve(lambda x: -x).plot()


def test_examples_in_the_documentation_run():
    assert not doctest.testmod(lr_finder).failed
