"""Schedules: published values, the same bits one by one or at once, misuse named."""

import doctest
import importlib
import math
import pickle

import numpy as np
import pytest

import fastmb as mb
from fastmb import _arithmetic, schedules

EPS = 2.0**-53
EXAMPLES = [
    mb.ConstantLR(0.3, factor=0.25, total_iters=7),
    mb.LinearLR(0.3, start_factor=0.1, end_factor=0.9, total_iters=7),
    mb.StepLR(0.3, step_size=7, gamma=0.9),
    mb.MultiStepLR(0.3, milestones=[9, 3, 1500, 9], gamma=0.3),
    mb.ExponentialLR(0.3, gamma=0.999),
    mb.PolynomialLR(0.3, total_iters=1800, power=2.3),
    mb.CosineAnnealingLR(0.3, T_max=170, eta_min=0.01),
    mb.CosineAnnealingWarmRestarts(0.3, T_0=5, T_mult=3, eta_min=0.01),
    mb.CyclicLR(0.1, 0.3, step_size_up=5, step_size_down=9, mode="exp_range", gamma=0.999),
    mb.OneCycleLR(0.3, total_steps=2100),
    mb.SequentialLR([mb.LinearLR(0.1), mb.CosineAnnealingLR(0.2, T_max=50), mb.ExponentialLR(0.3, 0.9)], [9, 1030]),
    mb.ChainedScheduler([mb.LinearLR(0.3, total_iters=90), mb.ExponentialLR(0.3, 0.99)]),
    mb.WarmUp(mb.OneCycleLR(0.3, epochs=3, steps_per_epoch=700, three_phase=True), total_iters=30),
]
each = pytest.mark.parametrize("schedule", EXAMPLES, ids=[type(schedule).__name__ for schedule in EXAMPLES])


def test_every_schedule_is_tested_here():
    functions = set(schedules.SCHEDULES.values()) - {mb.ReduceLROnPlateau}
    assert {type(schedule) for schedule in EXAMPLES} == functions


@each
def test_rates_have_the_bits_of_calls_wherever_they_start(schedule):
    called = np.array([schedule(step) for step in range(2100)])
    assert np.isfinite(called).all()
    assert (called >= 0).all()
    for start, n in [(0, 2100), (1, 1), (17, 1009), (1023, 2), (5, 0)]:
        rates = schedule.rates(start, n)
        assert rates.dtype == np.float64
        assert rates.tobytes() == called[start : start + n].tobytes()


@each
def test_it_is_a_frozen_value(schedule):
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert hash(pickle.loads(pickle.dumps(schedule))) == hash(schedule)
    with pytest.raises(AttributeError):
        schedule.lr = 1.0


@each
def test_an_optimiser_takes_it_and_a_fit_has_the_bits_of_steps(schedule, executor):
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((20, 3)), rng.standard_normal((20, 2))
    fitted, stepped = (
        mb.Trainer(mb.mlp([3, 4, 2]), "mse", mb.SGD(lr=schedule), batch_size=5, shuffle=False, executor=executor)
        for _ in range(2)
    )
    fitted.fit(X, y, max_epochs=3, verbose=0)
    for _ in range(3):
        for rows in range(0, 20, 5):
            stepped.step(X[rows : rows + 5], y[rows : rows + 5])
    assert fitted.net.flat.tobytes() == stepped.net.flat.tobytes()
    assert fitted.history["lr"] == [schedule(3), schedule(7), schedule(11)]


@pytest.mark.parametrize("module", ["factors", "cycles", "combined"])
def test_examples_in_the_documentation_run(module):
    found = doctest.testmod(importlib.import_module("fastmb.schedules." + module))
    assert found.attempted
    assert not found.failed


def test_warm_up_multiplies_any_schedule():
    cycle = mb.OneCycleLR(0.5, total_steps=20)
    warm = mb.WarmUp(cycle, start_factor=0.2, total_iters=4)
    assert [warm(step) / cycle(step) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1], rel=4 * EPS)
    assert mb.WarmUp(0.5, 0.5, 2).rates(0, 4).tolist() == [0.25, 0.375, 0.5, 0.5]


def test_a_schedule_that_ends_before_the_fit_is_told_before_it_begins():
    X, y = np.zeros((10, 3)), np.zeros((10, 2))
    schedule = mb.SequentialLR([mb.ConstantLR(0.1), mb.OneCycleLR(0.1, total_steps=10)], [4])
    trainer = mb.Trainer(mb.mlp([3, 2]), "mse", mb.SGD(lr=mb.WarmUp(schedule)), batch_size=5)
    before = trainer.net.flat.copy()
    with pytest.raises(ValueError, match="lr: WarmUp ends after 14 steps; this fit is to go on until update 16"):
        trainer.fit(X, y, max_epochs=8, verbose=0)
    assert trainer.t == 0
    assert (trainer.net.flat == before).all()
    trainer.fit(X, y, max_epochs=7, verbose=0)
    assert trainer.t == 14
    with pytest.raises(ValueError, match="WarmUp ends after 14 steps; there is no rate for step 14"):
        trainer.step(X, y)


def test_rates_that_grow_out_of_range_are_named_with_their_step():
    optimizer = mb.SGD(lr=mb.ExponentialLR(1.0, gamma=1e200))
    assert optimizer.learning_rates(0, 2).tolist() == [1.0, 1e200]
    with pytest.raises(ValueError, match=r"lr\(2\) must be a number in \[0, inf\); got inf"):
        optimizer.learning_rates(0, 9)
    with pytest.raises(ValueError, match=r"lr\(2\) must be a number in \[0, inf\); got inf"):
        optimizer.learning_rates(2, 1)
    for schedule in (mb.CyclicLR(0, 1, 3, mode="exp_range", gamma=1e99), mb.StepLR(0, 1, gamma=1e99)):
        with pytest.raises(ValueError, match=r"lr\(\d+\) must be a number in \[0, inf\); got (inf|nan)"):
            mb.SGD(lr=schedule).learning_rates(0, 99)


def test_cosines_are_right_to_two_ulps_of_1():
    x = np.concatenate([np.linspace(0, 9, 10001), np.arange(0, 9, 0.25), 0.25 + np.linspace(-1e-15, 1e-15, 99)])
    reduced = np.remainder(x, 2)  # exact, so that the error of pi x stays that of a small number
    np.testing.assert_allclose(_arithmetic.cospi(x), np.cos(np.pi * reduced), rtol=0, atol=16 * EPS)
    assert _arithmetic.cospi(np.array([0, 0.5, 1, 1.5, 2, 1e9])).tolist() == [1, 0, -1, 0, 1, 1]
    assert np.abs(_arithmetic.cospi(x)).max() == 1


def test_logarithms_are_right_to_three_ulps():
    x = np.concatenate([np.linspace(0, 3, 10001)[1:], 1 - np.arange(1, 99) * 2.0**-53, 2.0 ** np.arange(-1070, 1024)])
    np.testing.assert_array_max_ulp(_arithmetic.log(x), np.log(x), maxulp=3)
    assert _arithmetic.log(np.ones(1)).tolist() == [0]


@pytest.mark.parametrize("exponent", [0, 0.5, 1, 2, 0.9, 1 / 3, 2.3, 7.75, 30.1])
def test_real_powers_are_right_to_an_ulp_per_product(exponent):
    bases = np.linspace(0, 1, 1001)
    np.testing.assert_allclose(_arithmetic.real_power(bases, exponent), bases**exponent, rtol=70 * EPS)


def one(**options):
    return mb.OneCycleLR(0.1, **options)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: mb.StepLR(-1, 5), ValueError, r"lr must be a number in \[0, inf\); got -1"),
        (lambda: mb.StepLR("fast", 5), TypeError, r"lr must be a number in \[0, inf\); got 'fast'"),
        (lambda: mb.StepLR(0.1, 0), ValueError, "step_size must be an integer from 1 to .*; got 0"),
        (lambda: mb.StepLR(0.1, 1.5), TypeError, "step_size must be an integer .*; got 1.5"),
        (lambda: mb.StepLR(0.1, 5, math.nan), ValueError, "gamma must be a number in"),
        (lambda: mb.ConstantLR(0.1, factor=2), ValueError, r"factor must be a number in \[0, 1\]; got 2"),
        (lambda: mb.LinearLR(0.1, start_factor=0), ValueError, r"start_factor must be a number in \(0, 1\]; got 0"),
        (lambda: mb.LinearLR(0.1, total_iters=2**60), ValueError, "total_iters must be an integer from 1 to"),
        (lambda: mb.MultiStepLR(0.1, 5), TypeError, "milestones must be a sequence of integers; got 5"),
        (lambda: mb.MultiStepLR(0.1, [3, -1]), ValueError, r"milestones\[1\] must be an integer from 0 to .*; got -1"),
        (lambda: mb.CosineAnnealingWarmRestarts(0.1, 5, T_mult=0), ValueError, "T_mult must be an integer from 1 to"),
        (lambda: mb.CyclicLR(0.1, 0.2, mode="triangle"), ValueError, "mode must be one of .*; did you mean 'triangula"),
        (lambda: one(), ValueError, "OneCycleLR takes total_steps, or epochs and steps_per_epoch"),
        (lambda: one(epochs=3), ValueError, "OneCycleLR takes total_steps, or epochs and steps_per_epoch"),
        (lambda: one(total_steps=0), ValueError, "total_steps must be an integer from 1 to .*; got 0"),
        (lambda: one(total_steps=5, anneal_strategy="sin"), ValueError, "anneal_strategy must be one of 'cos', 'linea"),
        (lambda: one(total_steps=5)(5), ValueError, "OneCycleLR ends after 5 steps; there is no rate for step 5"),
        (lambda: one(total_steps=5).rates(3, 3), ValueError, "there is no rate for step 5"),
        (lambda: mb.ConstantLR(0.1)(-1), ValueError, "step must be an integer from 0 to .*; got -1"),
        (
            lambda: mb.StepLR(0.1, 5)(2**63),
            ValueError,
            "step must be an integer from 0 to .*; got 922337",
        ),
        (lambda: mb.StepLR(0.1, 5).rates(2**70, 1), ValueError, "start must be an integer from 0 to 9007199254740992"),
        (lambda: mb.SequentialLR([], []), TypeError, r"schedulers must be a sequence of at least one schedule; got \["),
        (lambda: mb.SequentialLR([0.1], []), TypeError, r"schedulers must be a sequence of at least one schedule"),
        (
            lambda: mb.SequentialLR([mb.ConstantLR(0.1)], [3]),
            ValueError,
            "milestones must have one entry less than the 1 schedulers; got 1",
        ),
        (
            lambda: mb.SequentialLR([mb.ConstantLR(0.1)] * 3, [3, 3]),
            ValueError,
            r"milestones must rise from 1 on; got \(3, 3\)",
        ),
        (
            lambda: mb.SequentialLR([one(total_steps=5), mb.ConstantLR(0.1)], [6]),
            ValueError,
            "OneCycleLR ends after 5 steps; until the next of the schedulers begins there are 6",
        ),
        (
            lambda: mb.ChainedScheduler([mb.ConstantLR(0.1), one(total_steps=5)]),
            ValueError,
            r"schedulers\[1\], OneCycleLR\(.*can't be chained: its rate is no multiple of lr",
        ),
        (
            lambda: mb.ChainedScheduler([mb.CosineAnnealingLR(0.1, 5, eta_min=0.01)]),
            ValueError,
            r"schedulers\[0\], CosineAnnealingLR\(.*can't be chained",
        ),
        (
            lambda: mb.ChainedScheduler([mb.ConstantLR(0.1), mb.ConstantLR(0.2)]),
            ValueError,
            r"schedulers must have the same lr; got \[0.1, 0.2\]",
        ),
        (lambda: mb.WarmUp("slow"), TypeError, r"scheduler must be a number in \[0, inf\); got 'slow'"),
    ],
)
def test_misuse_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
