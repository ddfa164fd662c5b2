"""Initial weights have the distribution that their name says."""

from math import sqrt

import numpy as np
import pytest

import fastmb as mb
from fastmb import init

N_IN, N_OUT = 300, 200
UNIFORM = {  # name -> where the distribution ends, before a Linear that a ReLU follows
    "kaiming_uniform": sqrt(2) * sqrt(3 / N_IN),
    "xavier_uniform": sqrt(6 / (N_IN + N_OUT)),
    "lecun_uniform": sqrt(3 / N_IN),
    "uniform": 1 / sqrt(N_IN),
}
NORMAL = {  # name -> standard deviation
    "kaiming_normal": sqrt(2) / sqrt(N_IN),
    "xavier_normal": sqrt(2 / (N_IN + N_OUT)),
    "lecun_normal": 1 / sqrt(N_IN),
    "normal": 0.02,
}


def weight(start, activation=None, seed=0):
    activation = mb.ReLU() if activation is None else activation
    net = mb.Sequential(mb.Linear(N_IN, N_OUT, init=start), activation, seed=seed, dtype="float64")
    return net.parameters()["0.weight"]


def test_every_name_is_tested_here():
    assert set(init.NAMES) == {*UNIFORM, *NORMAL, "zeros"}


@pytest.mark.parametrize("name", UNIFORM)
def test_uniform_names_fill_their_interval_evenly(name):
    w = weight(name) / UNIFORM[name]
    n = w.size
    assert np.abs(w).max() <= 1
    assert np.abs(w).max() > 1 - 20 / n
    assert abs(w.mean()) < 5 * sqrt(1 / 3 / n)
    assert abs((w**2).mean() - 1 / 3) < 5 * sqrt(4 / 45 / n)


@pytest.mark.parametrize("name", NORMAL)
def test_normal_names_have_their_deviation(name):
    w = weight(name) / NORMAL[name]
    n = w.size
    assert abs(w.mean()) < 5 / sqrt(n)
    assert abs(w.var() - 1) < 5 * sqrt(2 / n)
    assert abs((np.abs(w) < 1).mean() - 0.6827) < 5 * sqrt(0.25 / n)


def test_zeros_are_zeros():
    assert not weight("zeros").any()


@pytest.mark.parametrize(
    ("activation", "gain"),
    [
        (mb.ReLU(), sqrt(2)),
        (mb.LeakyReLU(0.5), sqrt(2 / 1.25)),
        (mb.GELU(), sqrt(2)),
        (mb.Tanh(), 5 / 3),
        (mb.SELU(), 1),
        (mb.Sigmoid(), 1),
        (mb.Identity(), 1),
    ],
)
def test_kaiming_takes_the_gain_of_the_activation_that_follows(activation, gain):
    np.testing.assert_allclose(weight("kaiming_uniform", activation), weight("lecun_uniform") * gain, rtol=1e-14)


def test_an_activation_after_the_next_linear_is_none_that_follows():
    net = mb.Sequential(mb.Linear(N_IN, 9), mb.Linear(9, 9), mb.ReLU(), dtype="float64")
    alone = mb.Sequential(mb.Linear(N_IN, 9), dtype="float64")
    assert np.array_equal(net.parameters()["0.weight"], alone.parameters()["0.weight"])


def test_the_default_is_kaiming_uniform_with_biases_of_zero_and_gain_1_at_the_output():
    net = mb.mlp([N_IN, N_OUT, N_IN], dropout=0.5, dtype="float64")
    weights = net.parameters()
    bound = sqrt(3 / N_IN) * sqrt(2)
    assert bound * 0.999 < np.abs(weights["0.weight"]).max() <= bound
    assert not weights["0.bias"].any()
    bound = sqrt(3 / N_OUT)
    assert bound * 0.999 < np.abs(weights["3.weight"]).max() <= bound


@pytest.mark.parametrize(("name", "low", "high"), [("uniform", 0.9, 1.0), ("normal", 0.04 * 10, 0.12 * 10)])
def test_biases_are_drawn_by_name(name, low, high):
    net = mb.Sequential(mb.Linear(100, 1000, bias_init=name))  # uniform: +-1/sqrt(100); normal: 0.02, 1000 of them
    assert low < np.abs(net.parameters()["0.bias"]).max() * 10 <= high


def test_arrays_are_taken_as_they_are():
    W, b = np.arange(6.0).reshape(2, 3), [7, 8, 9]
    net = mb.Sequential(mb.Linear(2, 3, init=W, bias_init=b))
    W[:] = np.nan  # a copy was made
    assert net.parameters()["0.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert net.parameters()["0.bias"].tolist() == b


def test_same_seed_same_weights_and_another_seed_others():
    assert np.array_equal(weight("normal", seed=1), weight("normal", seed=1))
    assert not np.array_equal(weight("normal", seed=1), weight("normal", seed=2))


def test_float32_weights_are_the_float64_ones_rounded():
    double, single = (mb.mlp([7, 5, 3], dtype=dtype, seed=3).flat for dtype in ("float64", "float32"))
    assert np.array_equal(double.astype(np.float32)[: 7 * 5], single[: 7 * 5])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"init": "kaimin_uniform"},
            ValueError,
            r"init must be one of .*; got 'kaimin_uniform'; did you mean 'kaiming_uniform'",
        ),
        ({"init": np.zeros((3, 2))}, ValueError, r"init must have shape \(2, 3\); got \(3, 2\)"),
        ({"init": np.full((2, 3), np.nan)}, ValueError, "init must be finite"),
        ({"init": object()}, TypeError, "init must be a name or an array of numbers"),
        ({"bias_init": "lecun_normal"}, ValueError, "bias_init must be one of 'zeros', 'uniform', 'normal'"),
        ({"bias_init": [1, 2]}, ValueError, r"bias_init must have shape \(3,\); got \(2,\)"),
    ],
)
def test_misuse_is_named(options, error, message):
    with pytest.raises(error, match=message):
        mb.Linear(2, 3, **options)
