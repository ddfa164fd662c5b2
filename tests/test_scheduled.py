"""Schedules of what isn't the learning rate: momentum, betas, weight decay, dropout."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

import fastmb as mb
from fastmb.rng import dropout_mask

RNG = np.random.default_rng(0)
X = RNG.standard_normal((50, 6)).astype(np.float32)
Y = RNG.integers(0, 3, 50)
FALLING = mb.LinearLR(0.5, 1.0, 0.0, total_iters=6)


def make(executor: str = "native", dropout: object = 0.0, optimizer: object = "sgd") -> mb.Trainer:
    net = mb.Sequential(mb.Dropout(dropout), mb.Linear(6, 8), mb.ReLU(), mb.Dropout(dropout), mb.Linear(8, 3))
    return mb.Trainer(net, "cross_entropy", optimizer, batch_size=16, executor=executor)


def test_dropout_has_the_probability_of_its_step(executor):
    net = mb.Sequential(mb.Dropout(FALLING), mb.Linear(40, 1, bias=False, init="zeros"), dtype="float64")
    trainer = mb.Trainer(net, "mse", mb.SGD(0.0), batch_size=8, executor=executor, seed=3)
    ones, targets = np.ones((8, 40)), np.ones((8, 1))
    for t in range(8):
        _, gradient = trainer.gradients(ones, targets)
        p = FALLING(t)
        mask = dropout_mask(3, t, 0, 8, 40, p, np.dtype("float64"))
        np.testing.assert_allclose(gradient["1.weight"][:, 0], -2 * mask.mean(axis=0), rtol=1e-13)
        trainer.step(ones, targets)


def test_a_schedule_that_stays_gives_the_bits_of_a_number(executor):
    constant, number = (make(executor, p) for p in (mb.ConstantLR(0.3, 1.0), 0.3))
    for trainer in (constant, number):
        trainer.fit(X, Y, max_epochs=3, verbose=0)
    assert (constant.net.flat == number.net.flat).all()
    betas = [
        mb.Adam(betas=(b, 0.99), weight_decay=d) for b, d in [(mb.ConstantLR(0.9, 1.0), lambda t: 0.1), (0.9, 0.1)]
    ]
    varying, number = (make(executor, optimizer=optimizer) for optimizer in betas)
    for trainer in (varying, number):
        trainer.fit(X, Y, max_epochs=3, verbose=0)
    assert (varying.net.flat == number.net.flat).all()


def test_a_resumed_fit_has_the_bits_of_one_never_stopped(executor, tmp_path):
    optimizer = mb.SGD(0.1, momentum=FALLING, weight_decay=FALLING)
    whole, stopped = (make(executor, FALLING, optimizer) for _ in range(2))
    whole.fit(X, Y, max_epochs=4, verbose=0)
    stopped.fit(X, Y, max_epochs=1, verbose=0)
    stopped.fit(X, Y, max_epochs=1, max_seconds=0, verbose=0)
    stopped = pickle.loads(pickle.dumps(stopped))
    stopped.save(tmp_path / "file")
    stopped = mb.load(tmp_path / "file")
    assert stopped.net.modules[0] == mb.Dropout(FALLING)
    stopped.fit(X, Y, max_epochs=4 - stopped.epoch, verbose=0)
    assert (stopped.net.flat == whole.net.flat).all()


def test_predictions_have_no_dropout_whatever_its_schedule():
    with_, without = (make(dropout=p).net for p in (FALLING, 0.0))
    assert (with_(X) == without(X)).all()


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (make(optimizer=mb.SGD(mb.OneCycleLR(0.1, 7))), "lr: OneCycleLR ends after 7 steps; .* until update 8"),
        (make(optimizer=mb.SGD(momentum=mb.OneCycleLR(0.1, 7))), "momentum: OneCycleLR ends after 7 steps"),
        (make(optimizer=mb.AdamW(weight_decay=mb.OneCycleLR(0.1, 7))), "weight_decay: OneCycleLR ends after 7 steps"),
        (make(optimizer=mb.Adam(betas=(mb.OneCycleLR(0.1, 7), 0.9))), r"betas\[0\]: OneCycleLR ends after 7 steps"),
        (make(dropout=mb.OneCycleLR(0.1, 7)), r"p of modules\[0\]: OneCycleLR ends after 7 steps"),
    ],
)
def test_a_schedule_that_ends_before_the_fit_is_told_before_it_begins(trainer, message):
    before = trainer.net.flat.copy()
    with pytest.raises(ValueError, match=message):
        trainer.fit(X, Y, max_epochs=2, verbose=0)
    assert (trainer.net.flat == before).all()


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (make(optimizer=mb.SGD(momentum=lambda t: 1.0)), r"momentum\(0\) must be a number in \[0, 1\); got 1.0"),
        (make(optimizer=mb.Adam(betas=(0.9, lambda t: -1))), r"betas\[1\]\(0\) must be a number in \[0, 1\); got -1"),
        (make(optimizer=mb.SGD(weight_decay=mb.ExponentialLR(1e300, 1e300))), r"weight_decay\(1\) must be .* got inf"),
        (make(dropout=mb.ConstantLR(0.5, 1.0)), None),
        (make(dropout=lambda t: 1.0), r"p\(0\) must be a number in \[0, 1\); got 1.0"),
    ],
)
def test_values_that_are_none_are_told_with_their_step(trainer, message):
    before = trainer.net.flat.copy()
    if message is None:
        trainer.fit(X, Y, max_epochs=2, verbose=0)
        return
    with pytest.raises(ValueError, match=message):
        trainer.fit(X, Y, max_epochs=2, verbose=0)
    assert (trainer.net.flat == before).all()
