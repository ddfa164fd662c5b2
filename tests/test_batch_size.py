"""Advice on the size of mini-batches: a table from measured steps, the noise scale, and an experiment."""

import math

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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: mb.advise_batch_size(t, X, Y, sizes=[8]), "sizes must hold at least 2 sizes"),
        (lambda t: mb.advise_batch_size(t, X, Y, sizes=[8, 10**6]), "sizes must be an integer from 1 to"),
        (lambda t: mb.advise_batch_size(t, X, Y, seconds=0), "seconds must be a number"),
        (lambda t: mb.branch_test(t, X, Y, factors=[0]), "factors must be a number"),
        (lambda t: mb.branch_test(t, X, Y, X_val=X), "X_val and y_val must be given together"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(trained())


@pytest.mark.parametrize("call", [mb.advise_batch_size, mb.branch_test])
def test_batch_normalisation_has_no_noise_scale(call):
    net = mb.Sequential(mb.Linear(64, 8), mb.BatchNorm1d(8), mb.Linear(8, 10))
    trainer = mb.Trainer(net)
    before = net.digest()
    with pytest.raises(ValueError, match=r"the gradient noise scale needs every row's own gradient; .* BatchNorm1d"):
        call(trainer, *mb.datasets.load_digits())
    assert net.digest() == before
