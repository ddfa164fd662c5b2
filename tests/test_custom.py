"""A user's own activations and losses: checked when made, compiled for blocks, the same answer in every executor."""

import ctypes
import hashlib
import itertools
import math
import operator
import pickle
import subprocess
import sys
from functools import partial
from math import erf, tanh
from types import ModuleType

import numba
import numpy as np
import pytest

import fastmb as mb
from fastmb import threads
from fastmb.data import Batches
from fastmb.executors import Training, native
from fastmb.executors.native import NativeExecutor
from fastmb.executors.numba import NumbaExecutor
from fastmb.executors.reference import NumpyExecutor
from fastmb.functions import Function

ISAS = native.available_isas()
FMA_ISAS = [isa for isa in ISAS if isa != "v2"]
DTYPES = ["float32", "float64"]
ODD = [1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 65, 97]
ALPHA = 0.7
SQUARES, ONES = np.array([1.0, 4.0]), np.ones(3)


def softplus(x):
    return np.log1p(np.exp(-abs(x))) + max(x, 0)


def mish(x):
    return x * np.tanh(softplus(x))


def mish_slope(x):
    t = np.tanh(softplus(x))
    return t + x * (1 - t * t) / (1 + np.exp(-x))


@numba.njit
def jitted(x):
    return x * x + 1


def branches(x):
    if x > 1:
        return 2.0 * x - 1
    if x < -1:
        return -1
    return x


def with_loop(x):
    total = 0.0
    for i in range(1, 4):
        total += x / i
    return total


def sum_of_powers(x):
    total = 0.0
    for i in range(-2, 4):
        total += i * (x * x + 1) ** i + x ** abs(i)
    return total


def nested(x):
    square = lambda t: t**2 + 0.5 * t  # noqa: E731
    return square(x) + sum([x**i for i in (1, 2)])


def refuses(x):
    if x >= 9:
        raise ValueError("too large")
    return x


def scaled(factor):
    return lambda x: factor * np.tanh(x / factor)


ACTIVATIONS = {
    "mish": mish,
    "log1p of exp": lambda x: x * np.tanh(np.log1p(np.exp(x))),
    "branches": branches,
    "where": lambda x: np.where(x > 0, x, ALPHA * np.expm1(x)),
    "math": lambda x: math.sqrt(1 + x * x) + math.fabs(x) / 3,
    "gelu": lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))),
    "names": lambda x: tanh(x) - np.pi * x,
    "powers": lambda x: 0.01 * x**3 - x**2 + (1 + x**2) ** -1 + (x * x + 1) ** 0.5 + 2**x,
    "power": lambda x: np.power(x, 2) + np.square(x) + pow(x, 3) / 9 + operator.pow(x, 2.0),
    "other powers": lambda x: x**0 * x ** (x > 0) + (x < 0) ** 2 + 2**-2 * x + np.exp(x) ** x + 2.5**x + abs(x) ** 1.5,
    "sum of powers": sum_of_powers,
    "nested": nested,
    "powers of others": lambda x: x * (SQUARES**2).sum() + ((1j + 1) ** 2).imag,
    "clip": lambda x: np.clip(x, -2, 2.5) * np.minimum(np.maximum(x, -1), 3),
    "one bound": lambda x: np.clip(x, -1, None) * np.clip(x, None, 2.5) + np.clip(3 * x, a_min=-2, a_max=None),
    "no bound": lambda x: np.clip(x, None, None) - max(np.clip(x, a_max=2, a_min=-2), 0),
    "most of many": lambda x: max(x, 0.0, 0.1 * x) + min(2, x, 3 * x, 1 + x) - max(1, 2, 3),
    "logaddexp": lambda x: np.logaddexp(0, x) + np.logaddexp(x, -x),
    "closure": scaled(1.3),
    "default": lambda x, slope=0.2: max(slope * x, x),
    "jitted": lambda x: jitted(x) / 4,
    "loop": with_loop,
    "truth": lambda x: (x > 0) * x + (x < -1) * 0.5 * (x + 1),
    "sine": lambda x: x + np.sin(3 * x) ** 2 / 3 + np.arctan(x) - math.cos(x),
    "hyperbolic": lambda x: np.log(np.cosh(x)) + np.arcsinh(np.sinh(x)),
    "bases": lambda x: np.log2(1 + np.exp2(x)) + np.log10(1 + x * x) + np.sign(x) + np.reciprocal(1 + x * x),
    "erfc": lambda x: math.erfc(x) + math.erf(x / 2) + np.sqrt(np.abs(x) + 1),
    "constant": lambda x: 1.0,
    "in place": lambda x: -(+x) / 2 - 1 / (3 + x * x) - (4 - x),
}
LOSSES = {
    "log cosh": mb.Loss(lambda z, y: np.log(np.cosh(z - y))),
    "poisson": mb.Loss(lambda z, y: np.exp(z) - y * z, lambda z, y: np.exp(z) - y),
    "poisson, from the value": mb.Loss(lambda z, y: np.exp(z) - y * z, lambda z, y, loss: loss + y * z - y),
    "huber": mb.Loss(lambda z, y: 0.5 * (z - y) ** 2 if abs(z - y) < 1 else abs(z - y) - 0.5),
    "quantile": mb.Loss(lambda z, y: max(0.9 * (y - z), 0.1 * (z - y))),
}


def block(function, x, d=None, mode=1):
    """The compiled callback over x; the value, and what stands in d."""
    callback = function.compiled(x.dtype)
    a, d = np.array(x), np.full_like(x, np.nan) if d is None else np.array(d)
    pointer = ctypes.c_void_p
    call = ctypes.CFUNCTYPE(None, pointer, pointer, ctypes.c_int64, ctypes.c_int64)(callback.address)
    call(a.ctypes.data, d.ctypes.data, a.size, mode)
    return a, d


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_compiled_is_what_python_says(name, dtype):
    function = Function(ACTIVATIONS[name], None, 1)
    x = np.linspace(-6.03, 5.97, 97).astype(dtype)
    value = function.value(x)
    slope = function.slope(x, value=value)
    tolerance = 64 * np.finfo(dtype).eps
    a, d = block(function, x)
    np.testing.assert_allclose(a, value, rtol=tolerance, atol=tolerance * np.abs(value).max())
    np.testing.assert_allclose(d, slope, rtol=tolerance, atol=tolerance * np.abs(slope).max())
    again, left = block(function, x, mode=0)
    np.testing.assert_array_equal(again, a)
    assert np.isnan(left).all()
    _, product = block(function, x, d=np.full_like(x, 3), mode=2)
    np.testing.assert_allclose(product, 3 * d, rtol=2 * np.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["mish", "branches", "gelu", "sine", "hyperbolic"])
def test_an_element_has_the_same_bits_anywhere_in_a_block(name, dtype):
    function = Function(ACTIVATIONS[name], None, 1)
    x = np.random.default_rng(0).standard_normal(4096).astype(dtype) * 3
    whole = block(function, x)
    for start, n in [(1, 97), (2, 64), (3, 1), (5, 15), (100, 16), (777, 33), (1000, 1024)]:
        for part, all_ in zip(block(function, x[start : start + n]), whole, strict=True):
            np.testing.assert_array_equal(part, all_[start : start + n])


POWERS = {  # off 0, the points that are checked
    "inverse": lambda x: x**-1,
    "inverse square": lambda x: x**-2 - np.power(x, -3),
    "constant": lambda x: x**0 + np.power(x, 0.0),
    "first": lambda x: x**1 + pow(x, 1.0),
    "polynomial": lambda x: sum([x**i for i in range(4)]),
    "root": lambda x: abs(x) ** 0.5,
    "of itself": lambda x: abs(x) ** x,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", POWERS)
def test_powers_at_the_ends_are_those_of_numpy(name, dtype):
    function = Function(POWERS[name], None, 1)
    x = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e9, -1e9, 3.0, -3.0], dtype)
    value = function.value(x)
    slope = function.slope(x, value=value)
    limit = {"rtol": 16 * np.finfo(dtype).eps, "atol": np.finfo(dtype).tiny}
    with np.errstate(over="ignore"):
        value, slope = value.astype(dtype), slope.astype(dtype)
    for mode in (0, 1):
        a, d = block(function, x, mode=mode)
        np.testing.assert_allclose(a, value, **limit)
    np.testing.assert_allclose(d, slope, **limit)


@pytest.mark.parametrize("at", [0.0, -0.0, 2.0])
def test_a_power_of_0_has_no_slope(at):
    at = np.array([at])
    for f in (POWERS["constant"], lambda x: x**False + math.pow(x, 0)):
        function = Function(f, None, 1)
        assert function.slope(at, value=np.ones(1)) == [0]
        assert block(function, at)[1] == [0]
    polynomial = Function(POWERS["polynomial"], None, 1)
    assert polynomial.slope(np.zeros(1), value=np.ones(1)) == [1]


def executors(net, loss, batch_size, isa, n_threads):
    """Those that are compiled, and the reference as the last."""
    built = []
    compiled = [NativeExecutor] + [NumbaExecutor] * (isa == ISAS[-1])
    for build in [*(partial(executor, n_threads=n_threads, isa=isa) for executor in compiled), NumpyExecutor]:
        training = Training(loss, mb.SGD(), np.zeros((0, net.plan.size), net.plan.dtype), batch_size, 3)
        built.append(build(net.plan, net.flat.copy(), training))
    return built


def compare_gradients(net, loss, X, y, isa, n_threads=1):
    batches = Batches(X, y, np.linspace(0.5, 1, len(X)), None, len(X))
    results = []
    for executor in executors(net, loss, len(X), isa, n_threads):
        out, sums = np.full(net.plan.size, np.nan, net.plan.dtype), np.full((1, 2), np.nan)
        executor.gradients(batches, 5, out, sums)
        raw, losses, weights = (
            np.full((len(X), net.plan.n_outputs), np.nan, net.plan.dtype),
            *np.full((2, len(X)), np.nan),
        )
        executor.evaluate(batches, raw, losses, weights)
        results.append((out, sums, raw, losses, weights))
    tolerance = 64 * np.sqrt(len(X) + 97) * np.finfo(net.plan.dtype).eps
    for found in results[:-1]:
        for got, expected in zip(found, results[-1], strict=True):
            limit = tolerance * max(1e-3, np.abs(expected).max())
            np.testing.assert_allclose(got, expected, rtol=tolerance, atol=limit)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_the_reference(loss, dtype, isa):
    rng = np.random.default_rng(1)
    net = mb.Sequential(
        mb.Activation(ACTIVATIONS["closure"]),
        mb.Linear(13, 18),
        mb.Activation(mish, mish_slope),
        mb.Dropout(0.2),
        mb.Tanh(),
        mb.Activation(np.tanh, lambda x, y: 1 - y * y),
        mb.Linear(18, 37),
        mb.Activation(branches),
        mb.Linear(37, 5),
        dtype=dtype,
        seed=2,
    )
    compare_gradients(net, LOSSES[loss], rng.standard_normal((37, 13)), rng.standard_normal((37, 5)), isa)


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("rows", ODD)
def test_any_batch_size_and_width(rows, n_threads, monkeypatch):
    monkeypatch.setattr(threads, "limit", lambda: 16)
    rng = np.random.default_rng(rows)
    for sizes in [(rows, 17, 3), (5, rows, 33), (34, 15, rows)]:
        net = mb.mlp(sizes, activation=mb.Activation(mish), dtype="float64")
        X, y = rng.standard_normal((rows, sizes[0])), rng.standard_normal((rows, sizes[2]))
        compare_gradients(net, LOSSES["log cosh"], X, y, ISAS[-1], n_threads)


def train(n_threads, isa, dtype, batch_size, monkeypatch, executor="native"):
    monkeypatch.setenv("FASTMB_ISA", isa)
    rng = np.random.default_rng(1)
    X, y = rng.standard_normal((150, 19)).astype(dtype), rng.standard_normal((150, 21))
    net = mb.mlp([19, 40, 33, 21], activation=mb.Activation(mish), dropout=0.1, dtype=dtype)
    options = {"batch_size": batch_size, "n_threads": n_threads, "executor": executor}
    trainer = mb.Trainer(net, LOSSES["log cosh"], mb.Adam(lr=0.01), **options)
    trainer.fit(X, y, max_epochs=2, verbose=0)
    return hashlib.sha256(net.flat.tobytes()).hexdigest()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_size", [1, 7, 33, 64, 150])
def test_same_bits_for_any_thread_count_and_instruction_set(batch_size, dtype, monkeypatch):
    monkeypatch.setattr(threads, "limit", lambda: 16)
    digests = {train(n, isa, dtype, batch_size, monkeypatch) for n, isa in itertools.product([1, 2, 3, 7], FMA_ISAS)}
    digests |= {train(n, isa, dtype, batch_size, monkeypatch, "numba") for n in (1, 3) for isa in FMA_ISAS[-1:]}
    assert len(digests) == 1


def test_learns_like_the_built_in_one(executor):
    X, y = mb.datasets.load_digits()
    X, y = X[:200], y[:200]
    losses = []
    for activation in ("mish", mb.Activation(mish)):
        net = mb.mlp([64, 16, 10], activation=activation, seed=1, dtype="float64")
        trainer = mb.Trainer(net, input_scale=1 / 16, executor=executor)
        trainer.fit(X, y, max_epochs=3, verbose=0)
        losses.append(trainer.evaluate(X, y)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_a_parameter_with_a_default_is_not_the_value():
    for df in (lambda x, factor=2.0: factor * x, lambda x, *rest: 2 * x, lambda x, factor=2.0, other=0.0: factor * x):
        function = Function(lambda x: x * x, df, 1)
        x = np.linspace(-3, 3, 7)
        np.testing.assert_array_equal(block(function, x)[1], 2 * x)
    loss = Function(lambda z, y: (z - y) ** 2, lambda z, y, factor=2.0: factor * (z - y), 2)
    np.testing.assert_array_equal(block(loss, x, d=np.ones(7))[0], 2 * (x - 1))
    assert Function(np.exp, lambda x, y: y, 1).takes_value
    assert not Function(np.exp, np.exp, 1).takes_value


def test_padding_is_no_row(executor):
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((40, 3)), rng.uniform(1, 2, (40, 2))
    loss = mb.Loss(lambda z, y: (z - y) ** 2 * y**-2)
    results = []
    for name in (executor, "numpy"):
        trainer = mb.Trainer(mb.Sequential(mb.Linear(3, 2), dtype="float64", seed=1), loss, executor=name)
        mean, gradients = trainer.gradients(X, y)
        results.append([mean, *gradients["0.weight"].flat, *gradients["0.bias"], trainer.step(X, y), *trainer.net.flat])
    np.testing.assert_allclose(*results, rtol=1e-12)


FAIL = {  # from 9 on
    "raise": (refuses, None),
    "tuple": (lambda x: x * (1.0, 1.0, 1.0)[int(abs(x)) // 3], lambda x: 1.0),
    "array": (lambda x: x * ONES[int(abs(x)) // 3], lambda x: 1.0),
    "derivative": (lambda x: x, lambda x: refuses(x) * 0 + 1.0),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAIL)
def test_where_a_function_fails_there_is_nan(name, dtype, capfd):
    function = Function(*FAIL[name], 1)
    x = np.array([1, 9, 2, 12, 3, 4, 5, 6, 7], dtype)
    fine = np.abs(x) < 9
    for mode in (0, 1, 2):
        a, d = block(function, x, d=np.full_like(x, 2), mode=mode)
        np.testing.assert_array_equal(a, x if name == "derivative" and mode == 0 else np.where(fine, x, np.nan))
        np.testing.assert_array_equal(d, np.full_like(x, 2) if mode == 0 else np.where(fine, mode, np.nan))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", FAIL)
def test_a_function_that_fails_is_no_number(name, executor):
    X, y = np.full((40, 3), 4.0), np.zeros((40, 2))
    net = mb.Sequential(
        mb.Linear(3, 2, init=np.ones((3, 2))), mb.ReLU(), mb.Activation(*FAIL[name]), mb.ReLU(), dtype="float64"
    )
    trainer = mb.Trainer(net, "mse", executor=executor)
    before = net.flat.copy()
    with pytest.raises((ValueError, IndexError) if executor == "numpy" else FloatingPointError):
        trainer.step(X, y)
    assert (net.flat == before).all()


def test_rows_that_are_none_may_fail(executor):
    def divides(z, y):
        if y == 0:
            raise ZeroDivisionError
        return (z - y) ** 2 / y

    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((40, 3)), rng.uniform(1, 2, (40, 2))
    losses = [
        mb.Trainer(mb.mlp([3, 2], dtype="float64"), mb.Loss(f), executor=executor).step(X, y)
        for f in (divides, lambda z, y: (z - y) ** 2 / y)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-13)


def test_names_are_those_of_the_first_use(executor):
    def slope():
        return factor * table[0] * settings.unit

    def leaky(x):
        return slope() * x if x < 0 else x

    table, settings = np.ones(1), ModuleType("settings")
    settings.unit = 1.0
    X = np.full((2, 3), -1.0)

    def found(activation):
        net = mb.Sequential(activation, mb.Linear(3, 1, init=np.ones((3, 1))), dtype="float64")
        return [net(X)[0, 0], -(mb.Trainer(net, "mse", executor=executor).evaluate(X, np.zeros(2))["loss"] ** 0.5)]

    for factor in (1, 0.1, 0.5):
        activation = mb.Activation(leaky)
        assert found(activation) == pytest.approx([-3 * factor] * 2)
    compile_again = activation.function.compiled(np.dtype("float64"))
    assert mb.Activation(leaky).function.compiled(np.dtype("float64")) is compile_again
    table[0] = 2
    assert found(activation) == pytest.approx([-3] * 2)
    settings.unit = 3.0
    assert found(mb.Activation(leaky)) == pytest.approx([-9] * 2)


def test_nan_is_not_hidden():
    for name in "mish", "clip", "where", "log1p of exp", "branches", "gelu", "hyperbolic":
        value, slope = block(Function(ACTIVATIONS[name], None, 1), np.array([np.nan]))
        assert np.isnan(value + slope).all()
    trainer = mb.Trainer(mb.mlp([2, 3, 1], activation=mb.Activation(mish)), LOSSES["huber"])
    with pytest.raises(FloatingPointError, match="the loss of update 1 is nan"):
        trainer.step(np.full((4, 2), np.nan), np.zeros(4))


def test_the_gain_is_that_of_the_initialisation():
    own, relu, tanh_ = (
        mb.mlp([9, 4, 2], activation=a).flat for a in (mb.Activation(mish), "relu", mb.Activation(np.tanh, gain=5 / 3))
    )
    np.testing.assert_array_equal(own, relu)
    np.testing.assert_array_equal(tanh_, mb.mlp([9, 4, 2], activation="tanh").flat)


def test_modules_show_and_compare():
    own = mb.Activation(mish)
    assert repr(own) == "Activation(mish)"
    assert repr(mb.Activation(mish, gain=1)) == "Activation(mish, gain=1.0)"
    assert repr(mb.Loss(LOSSES["huber"].function.f, task="multilabel")) == "Loss(<lambda>, task='multilabel')"
    assert own == mb.Activation(mish)
    assert hash(own) == hash(mb.Activation(mish))
    assert own != mb.Activation(softplus)
    assert own != mb.Mish()
    assert mb.Mish() == mb.Mish()
    assert "Activation(mish)" in mb.mlp([3, 4, 1], activation=own).summary(8)
    assert "Activation(mish)" in repr(mb.mlp([3, 4, 1], activation=own))
    assert isinstance(mb.ReLU(), mb.Activation)
    assert isinstance(mb.MSE(), mb.Loss)
    for builtin in (mb.ReLU, mb.Mish, mb.MSE):
        with pytest.raises(TypeError):
            builtin(mish)


def test_multilabel_loss_predicts_labels():
    bce = mb.Loss(lambda z, y: np.logaddexp(0, z) - y * z, task="multilabel")
    X = np.random.default_rng(0).standard_normal((200, 3))
    y = (X[:, :2] > 0).astype(int)
    net = mb.mlp([3, 2], seed=0)
    mb.Trainer(net, bce, mb.Adam(0.05)).fit(X, y, max_epochs=30, verbose=0)
    assert (net.predict(X) == y).mean() > 0.9


def test_what_can_be_imported_can_be_pickled():
    trainer = mb.Trainer(mb.mlp([3, 4, 2], activation=mb.Activation(np.tanh)), "mse")
    net = pickle.loads(pickle.dumps(trainer.net))
    X = np.ones((2, 3))
    np.testing.assert_array_equal(net(X), trainer.net(X))
    assert pickle.loads(pickle.dumps(mb.Loss(np.logaddexp, task="regression"))).function.f is np.logaddexp
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(mb.Activation(lambda x: 2 * x))


def test_checkpoints_name_what_they_cannot_hold(tmp_path):
    X, y = np.ones((2, 3)), np.ones(2)
    for activation, loss, message in [
        (mb.Activation(mish), "mse", r"net\.1 can't be saved: Activation\(mish\) is made of a Python function"),
        ("relu", mb.Loss(np.logaddexp), r"loss can't be saved: Loss\(logaddexp\) is made of a Python function"),
    ]:
        trainer = mb.Trainer(mb.mlp([3, 2, 1], activation=activation), loss)
        trainer.step(X, y)
        with pytest.raises(TypeError, match=message):
            trainer.save(tmp_path / "a.safetensors")
        assert not list(tmp_path.iterdir())


def no_source(x):
    return float("nan") if x < -3 else x


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: mb.Activation(mish, lambda x: np.tanh(x)),
            ValueError,
            r"df is not the derivative of f \(mish\): at x = -7.37 it is -0.999999, finite differences give -0.0040",
        ),
        (lambda: mb.Activation(mish, lambda x: mish_slope(x) + 1e-4), ValueError, "df is not the derivative"),
        (lambda: mb.Activation(mish, lambda x: math.nan), ValueError, "df is not the derivative.* it is nan"),
        (
            lambda: mb.Loss(lambda z, y: (z - y) ** 2, lambda z, y: z - y),
            ValueError,
            r"df is not the derivative of f \(<lambda>\): at z = .*, y = 0 it is",
        ),
        (lambda: mb.Activation(np.log), ValueError, r"f must be finite; f\(x = -7.37\) of log is nan"),
        (lambda: mb.Activation(no_source), ValueError, r"f must be finite; f\(x = -7.37\) of no_source is nan"),
        (lambda: mb.Activation(lambda x: 1 / math.floor(abs(x))), ValueError, "f must be finite"),
        (lambda: mb.Loss(lambda z, y: np.log(z) * y), ValueError, r"f must be finite; f\(z = -7.37, y = 0\)"),
        (
            lambda: mb.Activation(lambda x, y: x),
            TypeError,
            r"f must take 1 numbers, called as f\(x\); got <lambda>\(x, y\)",
        ),
        (lambda: mb.Activation(mish, lambda: 1.0), TypeError, r"df must take 1 or 2 numbers, called as df\(x\)"),
        (lambda: mb.Loss(mish), TypeError, r"f must take 2 numbers, called as f\(z, y\); got mish\(x\)"),
        (lambda: mb.Activation(), TypeError, r"f must be a function of numbers, called as f\(x\); got None"),
        (lambda: mb.Loss(), TypeError, r"f must be a function of numbers, called as f\(z, y\); got None"),
        (lambda: mb.Activation("mish"), TypeError, "f must be a function of numbers, called as f.x.; got 'mish'"),
        (lambda: mb.Activation(mish, 3), TypeError, "df must be a function of numbers, called as df.x.; got 3"),
        (lambda: mb.Activation(lambda x: "a"), TypeError, "f of <lambda> failed on a float: .* a real number; got 'a'"),
        (lambda: mb.Activation(lambda x: x + 1j), TypeError, "it must return a real number"),
        (lambda: mb.Activation(lambda x: None), TypeError, "it must return a real number; got None"),
        (lambda: mb.Activation(lambda x: [x]), TypeError, "it must return a real number"),
        (lambda: mb.Activation(lambda x: undefined), NameError, "f of <lambda> failed on a float"),  # noqa: F821
        (lambda: mb.Activation(mish, gain=0), ValueError, r"gain must be a number in \(0, inf\); got 0"),
        (lambda: mb.Loss(lambda z, y: z - y, task="ranking"), ValueError, "task must be one of .*; got 'ranking'"),
        (
            lambda: mb.mlp([2, 3, 1], activation=mb.Activation(lambda x: float(f"{x}"), lambda x: 1.0))(
                np.ones((1, 2))
            ),
            TypeError,
            "<lambda> can't be compiled by numba",
        ),
        (
            lambda: mb.mlp([2, 3, 1], activation=mish),
            TypeError,
            r"activation must be a name or a module such as Activation\(f\)",
        ),
        (lambda: mb.Trainer(mb.mlp([2, 1]), mish), TypeError, r"a Loss such as MSE\(\) or Loss\(f\); got <function"),
    ],
)
def test_misuse_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_without_numba_the_extra_is_named_and_the_reference_runs():
    program = """
import sys
sys.modules["numba"] = None
import numpy as np, fastmb as mb
net = mb.mlp([2, 3, 1], activation=mb.Activation(np.tanh))
X, y = np.ones((4, 2)), np.ones(4)
mb.Trainer(net, mb.Loss(lambda z, y: (z - y) ** 2), executor="numpy").step(X, y)
try:
    mb.Trainer(net, "mse").step(X, y)
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install 'fastmb[numba]'" in done.stdout


def test_importing_fastmb_imports_none_of_this():
    program = "import sys, fastmb; print([m for m in sys.modules if 'numba' in m or 'fastmb.functions' in m])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_exception_that_takes_no_message_is_told_all_the_same():
    class TwoError(Exception):
        def __init__(self, a, b):
            super().__init__(a, b)

    def f(x):
        raise TwoError(1, 2)

    with pytest.raises(RuntimeError, match="f of f failed on a float"):
        mb.Activation(f)
