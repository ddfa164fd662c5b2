"""Advice on the size of mini-batches: a table from measured steps, the noise scale, and an experiment."""

import copy
import math
import signal

import numpy as np
import pytest

import fastmb as mb
from fastmb import batch_size as module
from fastmb.batch_size import BatchSizeAdvice

X, Y = mb.datasets.load_digits()


def trained(optimizer=None):
    trainer = mb.Trainer(mb.mlp([64, 32, 10]), optimizer=optimizer or mb.SGD(lr=0.1), batch_size=32, input_scale=1 / 16)
    trainer.fit(X, Y, max_epochs=1, verbose=0)
    return trainer


def advice(**changed):
    values = {
        "batch_size": 64,
        "noise_scale": 100.0,
        "interval": (50.0, 150.0),
        "sizes": (16, 32, 64, 128),
        "seconds": (2e-5, 3e-5, 5e-5, 9e-5),
        "t0": 1e-5,
        "c": 6e-7,
        "before": 32,
        "lr": 0.1,
        "lr_factor": 1.5,
        "betas": None,
    }
    return BatchSizeAdvice(**values | changed)


def test_advice_is_given_and_the_trainer_stays_as_it_was(capsys):
    trainer = trained()
    before, t, rows = trainer.net.flat.copy(), trainer.t, len(trainer.history["loss"])
    found = mb.advise_batch_size(trainer, X, Y, seconds=0.3)
    assert np.array_equal(trainer.net.flat, before)
    assert (trainer.t, len(trainer.history["loss"])) == (t, rows)
    assert found.batch_size in range(8, 2049)
    assert found.interval[0] <= found.noise_scale <= found.interval[1]
    assert all(seconds > 0 for seconds in found.seconds)
    printed = capsys.readouterr().out
    assert printed == str(found) + "\n"
    for part in ("us a step", "gradient noise scale", "<- advised", "half of", "double", "An estimate"):
        assert part in printed


def test_the_best_size_of_a_straight_line_is_the_formulas(monkeypatch):
    t0, c, noise = 4e-5, 1e-7, 640.0
    monkeypatch.setattr(module, "_noise", lambda *_: (noise, 500.0, 800.0))
    monkeypatch.setattr(module, "_times", lambda _t, _X, _y, sizes, _s: [t0 + c * B for B in sizes])
    found = mb.advise_batch_size(trained(), X, Y, verbose=0)
    np.testing.assert_allclose([found.t0, found.c], [t0, c])
    assert found.batch_size == 2 ** round(math.log2(math.sqrt(noise * t0 / c)))
    assert min(found.sizes, key=found.cost) in (found.batch_size / 2, found.batch_size, found.batch_size * 2)


def test_a_curve_that_is_no_line_is_searched(monkeypatch):
    monkeypatch.setattr(module, "_noise", lambda *_: (1e5, 5e4, 2e5))
    monkeypatch.setattr(module, "_times", lambda _t, _X, _y, sizes, _s: [1e-4 if B <= 128 else 1e-6 * B for B in sizes])
    found = mb.advise_batch_size(trained(), X, Y, verbose=0)
    assert found.t0 is None
    assert "the measured curve was searched" in str(found)
    assert found.batch_size >= 128


def test_rates_scale_as_they_say():
    assert module._scaled(mb.SGD(lr=0.1), 32, 64, 64.0) == (pytest.approx(3 / 2), None)
    factor, betas = module._scaled(mb.Adam(), 32, 128, 64.0)
    assert factor == 2
    assert betas == pytest.approx((0.6, 0.996))
    assert "lr times 1.5" in str(advice(lr=None))
    assert "lr 0.1, betas (0.6, 0.996)" in str(advice(betas=(0.6, 0.996)))


def test_cost_is_relative_to_the_advised():
    found = advice()
    assert found.cost(64) == 1
    assert found.cost(128) == pytest.approx((1 + 100 / 128) * 9e-5 / ((1 + 100 / 64) * 5e-5))


def test_the_curve_is_drawn():
    pytest.importorskip("matplotlib").use("Agg")
    axes = advice().plot()
    assert axes.get_xlabel() == "rows of a mini-batch"


def test_a_branch_test_trains_copies(capsys):
    trainer = trained(mb.Adam(lr=lambda t: 0.01 / (1 + t)))
    before = trainer.net.flat.copy()
    found = mb.branch_test(trainer, X, Y, factors=(1, 4), X_val=X[:200], y_val=Y[:200])
    assert np.array_equal(trainer.net.flat, before)
    assert [b.batch_size for b in found] == [32, 128]
    assert [b.updates for b in found] == [57, 15]
    assert all(0 < b.loss < 3 for b in found)
    assert len(capsys.readouterr().out.splitlines()) == 3


CYCLE = mb.OneCycleLR(0.1, total_steps=100)


@pytest.mark.parametrize(
    "optimizer",
    [
        mb.SGD(CYCLE, momentum=CYCLE.momentum()),
        mb.SGD(mb.ReduceLROnPlateau(0.1, "loss", patience=0, threshold=0.9)),
        mb.Adam(CYCLE, betas=(CYCLE.momentum(), 0.999)),
        mb.Muon(CYCLE, adamw_lr=CYCLE),
    ],
)
def test_schedules_are_no_obstacle(optimizer):
    trainer = trained(optimizer)
    found = mb.advise_batch_size(trainer, X, Y, sizes=[16, 64], seconds=0.1, verbose=0)
    assert (found.lr, found.betas) == (None, None)
    assert "lr times" in str(found)
    assert len(mb.branch_test(trainer, X, Y, factors=(0.5, 2), max_epochs=3, verbose=0)) == 2


@pytest.mark.parametrize("epochs", [1, 2])  # of 57 updates: the cycle ends at 100
def test_a_branch_has_the_rate_that_stands(epochs):
    for lr in (CYCLE, mb.ReduceLROnPlateau(0.1, "loss", patience=0, threshold=0.9)):
        trainer = mb.Trainer(mb.mlp([64, 32, 10]), optimizer=mb.SGD(lr), batch_size=32, input_scale=1 / 16)
        trainer.fit(X[:1600], Y[:1600], max_epochs=epochs, verbose=0)
        if lr is not CYCLE:
            trainer.fit(X[:1600], Y[:1600], max_epochs=2, verbose=0)
        rate = trainer._reacted() if lr is not CYCLE else CYCLE(min(trainer.t, 99))
        (found,) = mb.branch_test(trainer, X, Y, factors=[1], verbose=0)
        number = copy.deepcopy(trainer)
        number.optimizer = mb.SGD(rate)
        number.fit(X, Y, max_epochs=1, verbose=0)
        assert found.loss == number.evaluate(X, Y)["loss"]


def test_a_momentum_that_has_come_to_nothing_keeps_the_state():
    falling = mb.LinearLR(0.9, 1.0, 0.0, total_iters=57)
    trainer = trained(mb.RMSprop(0.001, momentum=falling))
    again = copy.deepcopy(trainer)
    again.fit(X, Y, max_epochs=1, verbose=0)
    (found,) = mb.branch_test(trainer, X, Y, factors=[1], verbose=0)
    assert found.loss == again.evaluate(X, Y)["loss"]


@pytest.mark.parametrize("press", [1, 2, 3, 5])
@pytest.mark.parametrize("call", [mb.advise_batch_size, mb.branch_test])
def test_ctrl_c_is_raised_and_nothing_has_changed(call, press, monkeypatch):
    trainer = trained()
    calls, make_executor = iter(range(1, 1000)), mb.Trainer._executor_for
    before = trainer.net.digest(), trainer.t, dict(trainer.history)

    class Pressing:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def run(self, *arguments):
            if next(calls) == press:
                signal.raise_signal(signal.SIGINT)
            return self.inner.run(*arguments)

    monkeypatch.setattr(mb.Trainer, "_executor_for", lambda *arguments: Pressing(make_executor(*arguments)))
    options = {"sizes": [16, 64], "seconds": 0.6} if call is mb.advise_batch_size else {"factors": [1] * 5}
    with pytest.raises(KeyboardInterrupt):
        call(trainer, X, Y, **options)
    assert (trainer.net.digest(), trainer.t, dict(trainer.history)) == before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_copies_have_the_settings_that_count():
    trainer = mb.Trainer(mb.mlp([64, 32, 10]), accumulate_steps=2, gradient_stats=True, average=mb.EMA(0.9, every=1))
    trainer.fit(X, Y, max_epochs=1, verbose=0)
    trainer.fit(X, Y, max_seconds=0, verbose=0)
    found = mb.branch_test(trainer, X, Y, factors=(0.5, 1), verbose=0)
    assert [b.batch_size for b in found] == [64, 128]
    assert [b.updates for b in found] == [29, 15]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: mb.advise_batch_size(t, X, Y, sizes=[8]), "sizes must hold at least 2 sizes"),
        (lambda t: mb.advise_batch_size(t, X, Y, sizes=[8, 10**6]), "sizes must be an integer from 1 to"),
        (lambda t: mb.advise_batch_size(t, X, Y, seconds=0), "seconds must be a number"),
        (lambda t: mb.branch_test(t, X, Y, factors=[0]), "factors must be a number"),
        (lambda t: mb.branch_test(t, X, Y, X_val=X), "X_val and y_val must be given together"),
        (lambda t: mb.advise_batch_size(t, X, Y, verbose="no"), "verbose must be an integer >= 0; got 'no'"),
        (lambda t: mb.branch_test(t, X, Y, verbose=None), "verbose must be an integer >= 0; got None"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(trained())


@pytest.mark.parametrize("call", [mb.advise_batch_size, mb.branch_test])
def test_batch_normalisation_has_no_noise_scale(call):
    net = mb.Sequential(mb.Linear(64, 8), mb.BatchNorm1d(8), mb.Linear(8, 10))
    trainer = mb.Trainer(net)
    before = net.digest()
    with pytest.raises(ValueError, match=r"the gradient noise scale needs every row's own gradient; .* BatchNorm1d"):
        call(trainer, *mb.datasets.load_digits())
    assert net.digest() == before


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda trainer: mb.advise_batch_size(trainer, 5, Y), ValueError, r"X must have shape \(n, 64\); got \(\)"),
        (
            lambda trainer: mb.advise_batch_size(trainer, X, Y, sizes=8),
            TypeError,
            "sizes must be a sequence of integers",
        ),
        (lambda trainer: mb.branch_test(trainer, 5, Y), ValueError, r"X must have shape \(n, 64\); got \(\)"),
        (lambda trainer: mb.branch_test(trainer, X, Y, factors=2), TypeError, "factors must be a sequence"),
    ],
)
def test_what_is_no_sequence_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(mb.Trainer(mb.mlp([64, 10])))


def test_factors_may_come_from_a_generator_and_be_huge():
    trainer = mb.Trainer(mb.mlp([64, 10]), input_scale=1 / 16)
    found = mb.branch_test(trainer, X, Y, factors=(factor for factor in (1, 1e308)), verbose=0)
    assert [branch.batch_size for branch in found] == [trainer.batch_size, len(X)]
    with pytest.raises(ValueError, match="sizes must hold at least 2 sizes"):
        mb.advise_batch_size(trainer, X, Y, sizes=[8, 8], seconds=0.1, verbose=0)
