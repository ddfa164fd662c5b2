"""Rows' own gradients and the rules on gradients through every layer: `native` and `numba` against the reference, over
instruction sets, threads and sizes; the same bits whatever the threads."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import fastmb as mb
from fastmb import threads
from fastmb.data import Batches
from fastmb.executors import Rules, Training, native
from fastmb.executors.native import NativeExecutor
from fastmb.executors.numba import NumbaExecutor
from fastmb.executors.reference import NumpyExecutor

ISAS = native.available_isas()
FMA_ISAS = [isa for isa in ISAS if isa != "v2"]
COMPILED = [(NativeExecutor, isa) for isa in ISAS] + [(NumbaExecutor, ISAS[-1])]
ODD = [1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 65, 97]
RULES = {
    "parts": Rules(part_rows=17),
    "clip": Rules(clip_per_example=0.3),
    "noise": Rules(clip_per_example=0.3, noise_multiplier=1.5),
    "all": Rules(part_rows=31, clip_per_example=0.5, noise_multiplier=0.5, max_grad_norm=0.2, clip_value=0.02),
}
RNG = np.random.default_rng(0)
X = RNG.normal(size=(97, 13))
Y = RNG.integers(0, 5, 97)


@pytest.fixture(autouse=True)
def any_thread_count(monkeypatch):
    """As many threads as asked for, whatever the machine has."""
    monkeypatch.setattr(threads, "limit", lambda: 16)


def blocks(name, hidden):
    linear, ln, prelu, res = mb.Linear, mb.LayerNorm, mb.PReLU, mb.Residual
    return {
        "LayerNorm": [ln(13), linear(13, hidden), ln(hidden, bias=False), mb.ReLU(), linear(hidden, 5), ln(5)],
        "LayerNorm, not affine": [linear(13, hidden), ln(hidden, elementwise_affine=False), linear(hidden, 5)],
        "PReLU": [prelu(13), prelu(), linear(13, hidden), prelu(hidden), mb.Dropout(0.2), linear(hidden, 5), prelu()],
        "Residual": [
            res(linear(13, hidden), mb.Tanh(), linear(hidden, 13)), linear(13, hidden), res(mb.SiLU()), mb.GELU(),
            res(res(linear(hidden, hidden)), mb.Dropout(0.2)), linear(hidden, 5),
        ],
        "all": [
            mb.Dropout(0.1), res(mb.Tanh(), ln(13), linear(13, 13), prelu()), linear(13, hidden), prelu(hidden),
            res(ln(hidden), linear(hidden, 9), mb.ReLU(), res(ln(9, bias=False), linear(9, 9)), linear(9, hidden)),
            ln(hidden), linear(hidden, 5),
        ],
    }[name]  # fmt: skip


NAMES = ["LayerNorm", "LayerNorm, not affine", "PReLU", "Residual", "all"]


def network(name, hidden, dtype):
    net = mb.Sequential(*blocks(name, hidden), seed=2, dtype=dtype)
    for i, array in enumerate(net.parameters().values()):
        array += np.random.default_rng(i).uniform(-0.3, 0.3, array.shape)
    return net


def training(net, optimizer=None, batch_size=97, rules=None):
    optimizer = mb.SGD(lr=0.1) if optimizer is None else optimizer
    state = np.zeros((optimizer.n_states, net.plan.size), net.dtype)
    return Training(mb.CrossEntropy(), optimizer, state, batch_size, 3, rules or Rules())


def rows_own(executor, net, n):
    """Norms, gradients by name, and gradients of the inputs, of the first `n` rows; their loss."""
    whole, found = [], {}
    for stage in net.plan.stages:
        own = {what: np.full((n, *shape), np.nan, net.dtype) for what, shape in stage.shapes}
        whole += [own.get("weight"), own.get("bias")]
        found |= {f"{stage.name}.{what}": array for what, array in own.items()}
    found["norms"], found["inputs"] = np.full(n, np.nan, net.dtype), np.full((n, 13), np.nan, net.dtype)
    sums = np.full((1, 2), np.nan)
    batches = Batches(X[:n], Y[:n], np.linspace(0.5, 2, n), None, n, 0.5)
    assert executor.per_example(batches, 5, sums, found["norms"], whole, found["inputs"])
    return found | {"sums": sums}


@pytest.mark.parametrize(("cls", "isa"), COMPILED)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_own_gradients_of_any_number_and_width_are_those_of_the_reference(name, dtype, cls, isa):
    for n, n_threads in itertools.product(ODD, [1, 3]):
        net = network(name, n if n > 1 else 9, dtype)
        expected = rows_own(NumpyExecutor(net.plan, net.flat, training(net)), net, n)
        found = rows_own(cls(net.plan, net.flat, training(net), n_threads, isa), net, n)
        for key, array in expected.items():
            # A LayerNorm divides by what may be small, and takes differences.
            limit = (2e-4 if dtype == "float32" else 1e-12) * max(1, np.abs(array).max())
            np.testing.assert_allclose(found[key], array, rtol=0, atol=limit, err_msg=f"{n} {key}")


def updated(make, name, rules, dtype, n, stats=True):
    """Weights, state, what is told of gradients, and norms, after some updates."""
    net, optimizer = network(name, 33, dtype), mb.Adam(lr=0.01, eps=1e-4)
    of = training(net, optimizer, n, rules)
    batches = Batches(X, Y, None, None, n)
    steps = min(3, batches.n_batches)
    told, norms, sums = np.full((steps, 5), np.nan), np.full(97, np.nan, np.float32), np.full((steps, 2), np.nan)
    coefficients = optimizer.coefficients(7, steps, np.full(steps, 0.01))
    executor, wanted = make(net.plan, net.flat, of), (told, norms) if stats else ()
    assert executor.run(batches, 0, 7, coefficients, sums, 1e9, *wanted) == steps
    return net.flat, of.state, told, norms


@pytest.mark.parametrize("n", [1, 7, 33, 65, 97])
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", NAMES)
def test_rules_are_followed_through_every_layer_as_the_reference_does(name, rules, n):
    expected = updated(NumpyExecutor, name, RULES[rules], "float64", n)
    for cls, isa in COMPILED:
        found = updated(lambda *a, cls=cls, isa=isa: cls(*a, 3, isa), name, RULES[rules], "float64", n)
        np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=1e-11)
        np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=1e-11)
        np.testing.assert_allclose(found[2], expected[2], rtol=1e-9)
        np.testing.assert_allclose(found[3], expected[3], rtol=1e-6, atol=1e-12)  # of p - 1, near 0


@pytest.mark.parametrize("n", [1, 33, 97])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", ["LayerNorm", "all"])
def test_the_bits_do_not_depend_on_threads_or_instruction_set(name, rules, dtype, n):
    found = [
        updated(lambda *a, i=isa, t=n_threads: NativeExecutor(*a, t, i), name, RULES[rules], dtype, n)
        for isa in FMA_ISAS
        for n_threads in (1, 2, 3, 7)
    ]
    found.append(updated(lambda *a: NumbaExecutor(*a, 2, (FMA_ISAS or ISAS)[-1]), name, RULES[rules], dtype, n))
    for weights, state, _, norms in found[1:]:
        assert np.array_equal(weights, found[0][0])
        assert np.array_equal(state, found[0][1])
        np.testing.assert_array_equal(norms, found[0][3])
    weights = updated(lambda *a: NativeExecutor(*a, 1), name, RULES[rules], dtype, n, stats=False)[0]
    assert native.isa() == "v2" or np.array_equal(weights, found[0][0])  # being told of changes none either


# ---- batch normalisation, whose rows are mixed ---------------------------------------------------------------------


def mixed(dtype="float64"):
    net = mb.Sequential(
        mb.BatchNorm1d(13), mb.Linear(13, 8), mb.BatchNorm1d(8), mb.Tanh(),
        mb.Residual(mb.Linear(8, 8), mb.BatchNorm1d(8), mb.PReLU()), mb.Linear(8, 5), dtype=dtype,
    )  # fmt: skip
    for i, array in enumerate((net.parameters() | net.buffers()).values()):
        array += np.random.default_rng(i).uniform(0, 0.3, array.shape)
    return net


def test_gradients_of_inputs_are_slopes_through_the_statistics_of_the_mini_batch(executor):
    trainer, n, h = mb.Trainer(mixed(), executor=executor, input_scale=0.5), 9, 1e-5
    given = RNG.normal(size=(n, 5))
    found = trainer.backward(X[:n], given)
    inner = trainer._outside_executor()

    def total(x):
        sums, gradient = np.zeros((1, 2)), np.zeros_like(trainer.net.flat)
        inner.gradients(Batches(x, given, None, None, n, 0.5), 0, gradient, sums)
        return sums[0, 0]

    for i, j in [(0, 0), (3, 12), (8, 5)]:
        step = np.zeros((n, 13))
        step[i, j] = h
        np.testing.assert_allclose(found[i, j], (total(X[:n] + step) - total(X[:n] - step)) / (2 * h), rtol=1e-6)


def test_pieces_have_statistics_of_their_own(executor):
    trainer, alone = (mb.Trainer(mixed(), executor=executor, optimizer=mb.SGD(0.1)) for _ in range(2))
    expected = alone.net.flat.copy()
    for rows in (slice(0, 40), slice(40, 64)):
        trainer.accumulate(X[rows], Y[rows])
        _, of_piece = alone.gradients(X[rows], Y[rows])
        for name, array in mb.plan.views(expected, alone.net.plan).items():
            array -= 0.1 * of_piece[name] * (rows.stop - rows.start) / 64
    trainer.apply()
    np.testing.assert_allclose(trainer.net.flat, expected, rtol=0, atol=1e-13)
    assert trainer.net.buffers()["0.num_batches_tracked"] == alone.net.buffers()["0.num_batches_tracked"] + 2


def test_what_is_refused_changes_nothing(executor):
    trainer = mb.Trainer(mixed(), executor=executor)
    trainer.accumulate(X, Y)
    before = trainer.net.flat_buffers.copy(), trainer._pending.flat.copy()
    counted = trainer._pending.weight, trainer._pending.rows
    bad = X.copy()
    bad[96, 3] = np.inf
    with pytest.raises(FloatingPointError, match="nothing was added"), np.errstate(invalid="ignore"):
        trainer.accumulate(bad, Y)
    for call in (trainer.accumulate, trainer.per_example_norms, trainer.input_gradients):
        with pytest.raises(ValueError, match="BatchNorm1d"):
            call(X[:1], Y[:1])
    np.testing.assert_array_equal(trainer.net.flat_buffers, before[0])
    np.testing.assert_array_equal(trainer._pending.flat, before[1])
    assert (trainer._pending.weight, trainer._pending.rows) == counted
    trainer.zero_grad()
    with pytest.raises(ValueError, match="BatchNorm1d needs more than 1 row"):
        trainer.backward(X[:1], np.ones((1, 5)))
    np.testing.assert_array_equal(trainer.net.flat_buffers, before[0])
    assert trainer._pending is None
