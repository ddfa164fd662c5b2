"""Gradients before they become an update: every row's own, added up, shortened, with noise, limited, and told of.

What every executor computes is checked against sums written out here, and `native` against the reference, to rounding,
over instruction sets, thread counts and sizes; the same bits whatever the threads."""

import copy
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest

import fastmb as mb
from fastmb import _gradient_stats, executors, threads
from fastmb.data import Batches
from fastmb.executors import Rules, Training, native
from fastmb.executors.native import NativeExecutor
from fastmb.executors.reference import NumpyExecutor
from fastmb.rng import normal, poisson_batches

ISAS = native.available_isas()
FMA_ISAS = [isa for isa in ISAS if isa != "v2"]
ODD = [1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 65, 97]
RULES = {
    "parts": Rules(part_rows=17),
    "clip": Rules(clip_per_example=0.3),
    "noise": Rules(clip_per_example=0.3, noise_multiplier=1.5),
    "norm": Rules(max_grad_norm=0.05),
    "value": Rules(clip_value=0.01),
    "divide": Rules(divide=50.0),
    "all": Rules(part_rows=31, clip_per_example=0.5, noise_multiplier=0.5, max_grad_norm=0.2, clip_value=0.02),
}
RNG = np.random.default_rng(0)
X = RNG.normal(size=(97, 13))
Y = RNG.integers(0, 5, 97)


@pytest.fixture
def any_thread_count(monkeypatch):
    """As many threads as asked for, whatever the machine has."""
    monkeypatch.setattr(threads, "limit", lambda: 16)


def net(dtype="float64", widths=(33, 17), dropout=0.2, n_out=5):
    return mb.mlp([13, *widths, n_out], activation="tanh", dropout=dropout, dtype=dtype, seed=1)


def make(executor, dtype="float64", optimizer=None, dropout=0.2, **options):
    options = {"batch_size": 32, "executor": executor, "seed": 4} | options
    return mb.Trainer(net(dtype, dropout=dropout), optimizer=optimizer or mb.SGD(lr=0.1), **options)


def updated(build, rules, dtype, n, loss="cross_entropy", seed=3, stats=False, order=None, offsets=None):
    """Weights, state, statistics and norms after some updates by an executor."""
    network = net(dtype)
    optimizer, steps = mb.Adam(lr=0.01), 3
    flat, state = network.flat.copy(), np.zeros((2, network.plan.size), network.dtype)
    y = Y if loss == "cross_entropy" else np.eye(5)[Y]
    training = Training(mb.losses.get(loss), optimizer, state, n, seed, rules)
    executor = build(network.plan, flat, training)
    told, norms = np.full((steps, 5), np.nan), np.full(len(X), np.nan, np.float32)
    batches = Batches(X, y, None, order, n, offsets=offsets)
    if offsets is None:
        steps = min(steps, batches.n_batches)
    sums = np.full((steps, 2), np.nan)
    coefficients = optimizer.coefficients(7, steps, np.full(steps, 0.01))
    assert executor.run(batches, 0, 7, coefficients, sums, 1e9, told[:steps] if stats else None, norms) == steps
    return flat, state, told[:steps], norms


# ---- native against the reference, and against itself ----------------------------------------------------------------


@pytest.mark.parametrize("n", ODD)
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_native_follows_every_rule_as_the_reference_does(rules, dtype, n):
    rules = RULES[rules]
    expected = updated(NumpyExecutor, rules, dtype, n, stats=True)
    for isa in ISAS:
        got = updated(lambda *a, isa=isa: NativeExecutor(*a, 1, isa), rules, dtype, n, stats=True)
        # Adam divides by a gradient's size, and the limits by a norm: relative errors of the gradient reach the weights
        # in units of lr.
        tolerance = 2e-4 if dtype == "float32" else 1e-11
        np.testing.assert_allclose(got[0], expected[0], atol=tolerance, rtol=0)
        np.testing.assert_allclose(got[2], expected[2], rtol=3e-4 if dtype == "float32" else 1e-10)
        np.testing.assert_allclose(got[3], expected[3], rtol=1e-4 if dtype == "float32" else 1e-6)


@pytest.mark.parametrize("rules", [*RULES, "plain"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [1, 3, 33, 97])
def test_the_bits_do_not_depend_on_threads_or_instruction_set(any_thread_count, rules, dtype, n):
    rules = RULES.get(rules, Rules())
    found = [
        updated(lambda *a, i=isa, t=n_threads: NativeExecutor(*a, t, i), rules, dtype, n, stats=True)
        for isa in FMA_ISAS
        for n_threads in (1, 2, 3, 4, 7)
    ]
    for weights, state, told, norms in found[1:]:
        assert np.array_equal(weights, found[0][0])
        assert np.array_equal(state, found[0][1])
        np.testing.assert_allclose(told, found[0][2], rtol=1e-5 if dtype == "float32" else 1e-12)
        np.testing.assert_array_equal(norms, found[0][3])


@pytest.mark.parametrize("rules", [*RULES, "plain"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_statistics_change_no_bit(any_thread_count, rules, dtype, n_threads):
    # They need a stored gradient before the update; without them the last part's tiles may go into it at once.
    rules = RULES.get(rules, Rules())
    build = lambda *a: NativeExecutor(*a, n_threads)  # noqa: E731
    plain, told = (updated(build, rules, dtype, 33, stats=s) for s in (False, True))
    assert np.array_equal(plain[0], told[0])
    assert np.array_equal(plain[1], told[1])


@pytest.mark.parametrize("n_threads", [1, 3])
def test_mini_batches_of_any_size_and_none(executor, any_thread_count, n_threads):
    order = np.random.default_rng(1).integers(0, 97, 60)
    offsets = np.array([0, 33, 33, 60])
    rules = Rules(divide=20.0)
    expected = updated(NumpyExecutor, rules, "float64", 20, order=order, offsets=offsets, stats=True)
    build = mb.executors.load(executor)
    got = updated(lambda *a: build(*a, n_threads), rules, "float64", 20, order=order, offsets=offsets, stats=True)
    np.testing.assert_allclose(got[0], expected[0], atol=1e-12)
    np.testing.assert_allclose(got[2], expected[2], rtol=1e-9)
    assert got[2][1].tolist() == [0, 0, 0, 0, 0]


# ---- the sums that they stand for ------------------------------------------------------------------------------------


def test_rows_own_gradients_are_those_of_mini_batches_of_one(executor):
    trainer = make(executor, dropout=0.0)
    found = trainer.per_example_gradients(X, Y)
    for i in range(0, 97, 13):
        alone = trainer.gradients(X[i : i + 1], Y[i : i + 1])[1]
        for name, gradient in alone.items():
            np.testing.assert_allclose(found[name][i], gradient, atol=1e-14)
    mean = trainer.gradients(X, Y)[1]
    norms = np.zeros(97)
    for name, gradients in found.items():
        np.testing.assert_allclose(gradients.mean(axis=0), mean[name], atol=1e-15)
        norms += (gradients**2).reshape(97, -1).sum(axis=1)
    np.testing.assert_allclose(trainer.per_example_norms(X, Y), np.sqrt(norms), rtol=1e-12)


@pytest.mark.parametrize("n", ODD)
def test_rows_own_figures_are_those_of_the_reference(executor, n):
    mine, reference = make(executor, "float32"), make("numpy", "float64")
    reference.net.flat[:] = mine.net.flat
    for name in ("per_example_norms", "per_example_losses", "input_gradients"):
        got, expected = (getattr(t, name)(X[:n], Y[:n]) for t in (mine, reference))
        np.testing.assert_allclose(got, expected, atol=2e-6 * max(1, np.abs(expected).max()))
    got, expected = (t.per_example_gradients(X[:n], Y[:n]) for t in (mine, reference))
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], atol=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("isa", ISAS)
def test_rows_own_gradients_are_written_wherever_arrays_begin(isa, dtype):
    rows, sums = 5, np.zeros((1, 2))
    for width in 3, 15, 16, 33, 64, 512, 513:
        plan = (network := mb.mlp([13, width, 17], dtype=dtype)).plan
        training = Training(mb.CrossEntropy(), mb.SGD(), np.zeros((0, plan.size), dtype), rows, 0)
        arguments = Batches(X[:rows], Y[:rows], None, None, rows), 0, sums
        expected = [np.full((rows, *shape), np.nan, dtype) for shape in plan.shapes.values()]
        NumpyExecutor(plan, network.flat, training).per_example(*arguments, gradients=expected)
        executor, first = NativeExecutor(plan, network.flat, training, 1, isa), []
        for offset in range(17):
            around = [np.full(offset + array.size + 40, np.nan, dtype) for array in expected]
            found = [
                memory[offset : offset + array.size].reshape(array.shape)
                for memory, array in zip(around, expected, strict=True)
            ]
            executor.per_example(*arguments, gradients=found)
            first = first or found
            for memory, array, other, right in zip(around, found, first, expected, strict=True):
                np.testing.assert_array_equal(array, other)
                assert np.isnan(memory).sum() == memory.size - array.size  # nothing else is written
                limit = (1e-5 if dtype == "float32" else 1e-14) * np.abs(right).max()
                np.testing.assert_allclose(array, right, rtol=0, atol=limit)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rows_own_gradients_begin_at_cache_lines_and_own_their_memory(dtype):
    for n in 1, 3, 33:
        trainer = make("native", dtype)
        found = trainer.per_example_gradients(X[:n], Y[:n])
        copies = {name: array.copy() for name, array in found.items()}
        del trainer
        again = make("native", dtype).per_example_gradients(X[:n] + 1, Y[:n])  # takes memory that is free
        for name, array in found.items():
            assert array.ctypes.data % 64 == 0
            assert array.flags.c_contiguous
            assert array.flags.writeable
            assert not any(
                np.shares_memory(array, other) for other in (*again.values(), *found.values()) if other is not array
            )
            np.testing.assert_array_equal(array, copies[name])


def test_rows_can_be_chosen(executor):
    trainer = make(executor, dropout=0.0)
    found, whole = trainer.per_example_gradients(X, Y, rows=[5, 0, -1]), trainer.per_example_gradients(X, Y)
    for name in whole:
        np.testing.assert_array_equal(found[name], whole[name][[5, 0, 96]])
    assert trainer.per_example_gradients(X, Y, rows=[])["0.weight"].shape == (0, 13, 33)
    with pytest.raises(IndexError, match="rows holds 97; X has 97 rows"):
        trainer.per_example_gradients(X, Y, rows=[97])
    with pytest.raises(TypeError, match="rows must be a list of row numbers; got float64"):
        trainer.per_example_gradients(X, Y, rows=[0.5])


def test_too_much_memory_is_refused_with_the_figures(monkeypatch):
    trainer = make("native")
    monkeypatch.setattr("fastmb._per_example.available_memory", lambda: 100_000)
    monkeypatch.setattr("fastmb._per_example.UNASKED", 0)
    with pytest.raises(MemoryError, match=r"the gradients of 97 rows take 0\.000\d+ GB; 0\.0001 GB are available"):
        trainer.per_example_gradients(X, Y)


def test_available_memory_is_a_plausible_figure():
    assert 1e7 < mb._per_example.available_memory() < 1e15


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_clipping_is_what_it_says(executor, dtype):
    clipped, plain = make(executor, dtype, dropout=0.0, clip_per_example=4.0), make(executor, dtype, dropout=0.0)
    gradients, norms = plain.per_example_gradients(X, Y), plain.per_example_norms(X, Y)
    factor = np.minimum(1, 4.0 / norms)
    expected = {name: g.copy() for name, g in plain.net.parameters().items()}
    for name, each in gradients.items():
        expected[name] -= 0.1 * np.tensordot(factor, each, 1) / 97
    clipped.step(X, Y)
    assert 0 < (norms > 4.0).sum() < 97
    for name, w in clipped.net.parameters().items():
        np.testing.assert_allclose(w, expected[name], atol=1e-6 if dtype == "float32" else 1e-14)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_row_is_clipped_without_its_weight_and_then_weighted(executor, dtype):
    weights = RNG.uniform(0.1, 30, 97)
    weights[5] = 0
    clipped, plain = make(executor, dtype, dropout=0.0, clip_per_example=4.0), make(executor, dtype, dropout=0.0)
    gradients, norms = plain.per_example_gradients(X, Y), plain.per_example_norms(X, Y)
    factor = np.minimum(1, 4.0 / norms) * weights
    expected = {name: g.copy() for name, g in plain.net.parameters().items()}
    for name, each in gradients.items():
        expected[name] -= 0.1 * np.tensordot(factor, each, 1) / weights.sum()
    added = copy.deepcopy(clipped)
    clipped.step(X, Y, weights)
    added.accumulate(X[:40], Y[:40], weights[:40])
    added.accumulate(X[40:], Y[40:], weights[40:])
    added.apply()
    for trainer in (clipped, added):
        for name, w in trainer.net.parameters().items():
            np.testing.assert_allclose(w, expected[name], atol=1e-6 if dtype == "float32" else 1e-14)


def test_norms_in_the_history_are_without_weights(executor):
    trainer = make(executor, optimizer=mb.SGD(lr=0.0), dropout=0.0, gradient_stats=True)
    weights = RNG.uniform(0.1, 30, 97)
    weights[5] = 0
    history = trainer.fit(X, Y, sample_weight=weights, max_epochs=1, verbose=0)
    expected = trainer.per_example_norms(X, Y) * (weights > 0)
    np.testing.assert_allclose(history.example_norms, expected, rtol=1e-6)


def test_limits_are_those_of_torch(executor):
    limited, plain = make(executor, max_grad_norm=0.1, clip_value=0.004), make(executor)
    gradient = plain.gradients(X, Y)[1]
    norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
    expected = {
        name: w - 0.1 * np.clip(gradient[name] * min(1, 0.1 / (norm + 1e-6)), -0.004, 0.004)
        for name, w in plain.net.parameters().items()
    }
    limited.step(X, Y)
    for name, w in limited.net.parameters().items():
        np.testing.assert_allclose(w, expected[name], atol=1e-15)


# ---- added up --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [1, 5, 97])
@pytest.mark.parametrize("options", [{}, {"clip_per_example": 0.4}, {"max_grad_norm": 0.1}, {"clip_value": 0.01}])
def test_accumulated_pieces_make_the_update_of_the_whole(executor, pieces, options):
    whole, parts = (make(executor, optimizer=mb.Adam(lr=0.01), **options) for _ in range(2))
    weights = np.random.default_rng(2).random(97)
    whole.step(X, Y, weights)
    for rows in np.array_split(np.arange(97), pieces):
        parts.accumulate(X[rows], Y[rows], weights[rows])
    parts.apply()
    assert parts.t == whole.t == 1
    np.testing.assert_allclose(parts.net.flat, whole.net.flat, atol=1e-12)


@pytest.mark.parametrize("k", [2, 3, 7])
def test_accumulate_steps_makes_the_updates_of_the_larger_mini_batch(executor, k):
    # 97 rows: the last update of an epoch has fewer mini-batches, and the last of these fewer rows.
    small = make(executor, batch_size=8, accumulate_steps=k)
    large = make(executor, batch_size=8 * k)
    for trainer in (small, large):
        trainer.fit(X, Y, max_epochs=3, verbose=0)
    assert small.t == large.t == 3 * -(-97 // (8 * k))
    np.testing.assert_allclose(small.net.flat, large.net.flat, atol=1e-13)
    np.testing.assert_allclose(small.history["loss"], large.history["loss"], rtol=1e-13)


def test_what_waits_survives_pickles_and_files(executor, tmp_path):
    trainer = make(executor)
    trainer.accumulate(X[:10], Y[:10])
    trainer.save(tmp_path / "t.safetensors")
    for again in (pickle.loads(pickle.dumps(trainer)), mb.load(tmp_path / "t.safetensors")):
        for each in (again, one := pickle.loads(pickle.dumps(trainer))):
            each.accumulate(X[10:], Y[10:])
            each.apply()
        assert np.array_equal(again.net.flat, one.net.flat)


def test_nothing_waits_or_something_else_does(executor):
    trainer = make(executor)
    with pytest.raises(ValueError, match=r"no gradients wait: call accumulate\(\) or backward\(\) first"):
        trainer.apply()
    trainer.accumulate(X, Y)
    with pytest.raises(ValueError, match=r"gradients from accumulate\(\) wait"):
        trainer.backward(X, np.ones((97, 5)))
    trainer.zero_grad()
    trainer.backward(X, np.ones((97, 5)))
    with pytest.raises(ValueError, match=r"gradients from backward\(\) wait"):
        trainer.accumulate(X, Y)
    for wrong, message in [
        (np.ones((97, 4)), r"output_gradients must have shape \(97, 5\); got \(97, 4\)"),
        (np.full((97, 5), np.inf), "output_gradients must be finite; got inf in row 0, column 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            trainer.backward(X, wrong)


def test_a_loss_that_is_not_finite_adds_nothing(executor):
    trainer, bad = make(executor), X.copy()
    trainer.accumulate(X, Y)
    before = trainer._pending.flat.copy()
    bad[3, 3] = np.nan
    with pytest.raises(FloatingPointError, match="the loss is nan; nothing was added"):
        trainer.accumulate(bad, Y)
    assert np.array_equal(trainer._pending.flat, before)
    assert trainer._pending.rows == 97


# ---- from outside, and to the inputs ---------------------------------------------------------------------------------


def test_a_gradient_from_outside_is_the_losses_own(executor):
    mine, outside = (make(executor, dropout=0.0) for _ in range(2))
    z = outside.net(X)
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    back = outside.backward(X[:50], (p - np.eye(5)[Y])[:50] / 97)
    rest = outside.backward(X[50:], (p - np.eye(5)[Y])[50:] / 97)
    outside.apply()
    np.testing.assert_allclose(np.vstack([back, rest]) * 97, mine.input_gradients(X, Y), atol=1e-13)
    mine.step(X, Y)
    np.testing.assert_allclose(outside.net.flat, mine.net.flat, atol=1e-14)


def test_input_gradients_are_differences(executor):
    trainer = make(executor, dropout=0.0, input_scale=0.5)
    found, h = trainer.input_gradients(X, Y), 1e-6
    for j in range(13):
        step = h * np.eye(13)[j]
        difference = trainer.per_example_losses(X + step, Y) - trainer.per_example_losses(X - step, Y)
        np.testing.assert_allclose(found[:, j], difference / (2 * h), atol=1e-8)


@pytest.mark.parametrize("softmax", [False, True])
def test_jacobian_is_the_derivative_of_the_output(softmax):
    modules = [mb.Tanh(), mb.Linear(13, 9), mb.GELU(), mb.Dropout(0.5), mb.Linear(9, 4), *[mb.Softmax()] * softmax]
    network, h = mb.Sequential(*modules, dtype="float64", seed=2), 1e-6
    found = network.jacobian(X)
    differences = [(network(X + h * e) - network(X - h * e)) / (2 * h) for e in np.eye(13)]
    np.testing.assert_allclose(found, np.stack(differences, axis=-1), atol=1e-8)
    np.testing.assert_array_equal(network.jacobian(X[3]), found[3])


# ---- noise and chance ------------------------------------------------------------------------------------------------


def test_noise_is_normal():
    z = normal(5, 9, 2, 200_001)
    assert abs(z.mean()) < 4 / np.sqrt(len(z))
    assert abs(z.var() - 1) < 4 * np.sqrt(2 / len(z))
    inside = [(np.abs(z) < k).mean() for k in (1, 2, 3)]
    np.testing.assert_allclose(inside, [0.6827, 0.9545, 0.9973], atol=0.004)
    assert abs(np.corrcoef(z[:-1], z[1:])[0, 1]) < 0.01
    assert not np.intersect1d(z, normal(5, 10, 2, 200_001)).size > 5
    assert np.array_equal(normal(5, 9, 2, 100), z[:100])


@pytest.mark.parametrize("secure", [False, True])
def test_noise_has_the_deviation_that_was_asked_for(executor, secure):
    options = {"clip_per_example": 0.5, "noise_multiplier": 2.0, "dropout": 0.0}
    one, other = (make(executor, secure=secure, **options) for _ in range(2))
    still = make(executor, dropout=0.0, clip_per_example=0.5)
    for trainer in (one, other, still):
        trainer.step(X, Y)
    noise = np.concatenate(
        [(a - b).ravel() for a, b in zip(*(t.net.parameters().values() for t in (one, still)), strict=True)]
    )
    assert abs(noise.std() / (0.1 * 2 * 0.5 / 97) - 1) < 4 / np.sqrt(2 * len(noise))
    assert np.array_equal(one.net.flat, other.net.flat) != secure
    gaps = np.ones(one.net.flat.size, bool)
    for stage in one.net.plan.stages:
        gaps[stage.offset : stage.offset + stage.size] = False
    assert not one.net.flat[gaps].any()


def test_poisson_mini_batches_take_every_row_with_its_probability():
    order, offsets = poisson_batches(1000, 500, 0.03, np.random.default_rng(0).random)
    sizes = np.diff(offsets)
    assert abs(sizes.mean() - 30) < 4 * np.sqrt(30 * 0.97 / 500)
    assert abs(sizes.var() / (30 * 0.97) - 1) < 0.3
    counts = np.bincount(order, minlength=1000)
    assert abs(counts.var() / (500 * 0.03 * 0.97) - 1) < 0.2
    for k in range(500):
        rows = order[offsets[k] : offsets[k + 1]]
        assert (np.diff(rows) > 0).all()
    assert poisson_batches(7, 3, 1.0, np.random.default_rng(0).random)[0].tolist() == [*range(7)] * 3
    rare, ends = poisson_batches(10, 1000, 1e-4, np.random.default_rng(0).random)
    assert len(rare) == ends[-1] < 10


def test_poisson_sampling_is_the_seeds_and_goes_on_after_a_pause(executor):
    options = {"sampling": "poisson", "batch_size": 8, "clip_per_example": 0.5, "noise_multiplier": 0.5}
    whole, pieces, other = (make(executor, **options | {"seed": seed}) for seed in (1, 1, 2))
    whole.fit(X, Y, max_epochs=3, verbose=0)
    other.fit(X, Y, max_epochs=3, verbose=0)
    while pieces.epoch < 3:
        pieces.fit(X, Y, max_epochs=1, max_seconds=0, verbose=0)
        pieces = pickle.loads(pickle.dumps(pieces))
    assert np.array_equal(whole.net.flat, pieces.net.flat)
    assert not np.array_equal(whole.net.flat, other.net.flat)


# ---- told of ---------------------------------------------------------------------------------------------------------


def test_the_history_tells_what_the_gradients_were(executor):
    trainer = make(executor, optimizer=mb.SGD(lr=0.0), dropout=0.0, gradient_stats=True, batch_size=10)
    history = trainer.fit(X, Y, max_epochs=1, verbose=0)
    norms = trainer.per_example_norms(X, Y)
    np.testing.assert_allclose(history.example_norms, norms, rtol=1e-6)
    np.testing.assert_allclose(history["example_norm_mean"][-1], norms.mean(), rtol=1e-12)
    np.testing.assert_allclose(history["example_norm_max"][-1], norms.max(), rtol=1e-12)
    np.testing.assert_array_equal(history.hardest(5), np.argsort(-norms)[:5])
    each = trainer.per_example_gradients(X, Y)
    flat = np.concatenate([g.reshape(97, -1) for g in each.values()], axis=1)
    variance = flat.var(axis=0, ddof=1).sum()
    assert abs(history["grad_variance"][-1] / variance - 1) < 0.1


def test_the_estimators_are_unbiased():
    """Rows with a known mean and covariance: the averages of |G|^2 and tr S over many mini-batches come to them."""
    rng, G, B = np.random.default_rng(0), np.array([0.3, -0.2, 0.1]), 8
    g = G + rng.standard_normal((4000, B, 3)) * [1.0, 0.5, 2.0]
    squares, mean = (g**2).sum(axis=2), (g.mean(axis=1) ** 2).sum(axis=1)
    stats = np.stack([squares.sum(1), squares.max(1), mean, np.full(4000, B), np.sqrt(squares).sum(1)], axis=1)
    found = _gradient_stats.moments(stats, np.zeros(_gradient_stats.MOMENTS))
    trace, ratio, low, high = _gradient_stats.noise_scale(found)
    assert abs(trace - 5.25) < 0.15
    assert low < 5.25 / (G @ G) < high
    assert low < ratio < high
    halves = _gradient_stats.moments(stats[2000:], _gradient_stats.moments(stats[:2000], found * 0))
    np.testing.assert_allclose(halves, found, rtol=1e-12)
    assert np.isnan(_gradient_stats.noise_scale(np.zeros(_gradient_stats.MOMENTS))).all()


def test_statistics_of_an_interrupted_epoch_are_those_of_a_whole_one(executor, tmp_path):
    whole, pieces = (make(executor, gradient_stats=True, batch_size=8) for _ in range(2))
    whole.fit(X, Y, max_epochs=2, verbose=0)
    while pieces.epoch < 2:
        pieces.fit(X, Y, max_epochs=1, max_seconds=0, verbose=0)
        pieces.save(tmp_path / "t.safetensors")
        pieces = mb.load(tmp_path / "t.safetensors")
    for name in ("example_norm_mean", "example_norm_max", "grad_norm", "noise_scale", "noise_scale_low"):
        np.testing.assert_array_equal(whole.history[name], pieces.history[name])
    np.testing.assert_array_equal(whole.history.hardest(7), pieces.history.hardest(7))


def test_the_hardest_need_statistics():
    history = make("native").fit(X, Y, max_epochs=1, verbose=0)
    with pytest.raises(ValueError, match=r"no gradient norms are known: fit with Trainer\(..., gradient_stats=True\)"):
        history.hardest()


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"accumulate_steps": 0}, ValueError, "accumulate_steps must be an integer >= 1; got 0"),
        ({"max_grad_norm": 0}, ValueError, r"max_grad_norm must be a number in \(0, inf\); got 0"),
        ({"clip_value": -1.0}, ValueError, r"clip_value must be a number in \(0, inf\); got -1.0"),
        ({"clip_per_example": "1"}, TypeError, r"clip_per_example must be a number in \(0, inf\); got '1'"),
        ({"noise_multiplier": 1.0}, ValueError, "noise_multiplier needs clip_per_example"),
        ({"sampling": "random"}, ValueError, "sampling"),
    ],
)
def test_wrong_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        make("native", **options)


def test_weights_and_privacy_exclude_each_other():
    private = {"clip_per_example": 1.0, "noise_multiplier": 1.0}
    with pytest.raises(ValueError, match="noise_multiplier and class weights exclude each other"):
        mb.Trainer(net(), mb.CrossEntropy(class_weight=np.ones(5)), **private)
    with pytest.raises(ValueError, match="sample_weight and noise_multiplier exclude each other"):
        make("native", **private).fit(X, Y, sample_weight=np.ones(97), verbose=0)
    with pytest.raises(ValueError, match="X has 97 rows; mini-batches of 128 can't be drawn from them"):
        make("native", sampling="poisson", batch_size=128).fit(X, Y, verbose=0)


# ---- rows that count for nothing, and rows without a gradient ------------------------------------------------------


def test_rows_of_weight_zero_may_come_alone(executor):
    rng = np.random.default_rng(0)
    X, y, weight = rng.standard_normal((6, 5)), rng.integers(0, 3, 6), np.array([0, 1.0, 0, 2, 0, 3])
    whole, apart = (mb.Trainer(mb.mlp([5, 8, 3], dtype="float64"), executor=executor) for _ in range(2))
    whole.accumulate(X, y, weight)
    losses = [apart.accumulate(X[i : i + 1], y[i : i + 1], weight[i : i + 1]) for i in range(6)]
    assert np.isnan(losses).tolist() == (weight == 0).tolist()
    for each in (whole, apart):
        each.apply()
    np.testing.assert_allclose(apart.net.flat, whole.net.flat, rtol=0, atol=1e-12)
    apart.accumulate(X[:1], y[:1], [0.0])
    with pytest.raises(ValueError, match="from accumulate"):
        apart.backward(X, np.ones((6, 3)))
    before = apart.net.flat.copy()
    apart.apply()
    assert np.abs(apart.net.flat - before).max() < 0.01


@pytest.mark.parametrize("what", ["gradients", "per_example_norms", "per_example_gradients", "input_gradients"])
def test_a_loss_that_is_not_finite_has_no_gradient(what, executor):
    trainer = mb.Trainer(mb.mlp([4, 8, 1]), "mse", executor=executor)
    X = np.ones((6, 4))
    X[3, 2] = np.nan
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        getattr(trainer, what)(X, np.ones(6))


WITHOUT_ENTROPY = """
import sys, numpy as np, fastmb as mb
private = {"clip_per_example": 1, "noise_multiplier": 1, "secure": True}
trainer = mb.Trainer(mb.mlp([4, 8, 3]), executor=sys.argv[1], **private)
before, X, y = trainer.net.flat.copy(), np.ones((6, 4)), np.arange(6) % 3
trainer.accumulate(X, y)
for call in (lambda: trainer.step(X, y), lambda: trainer.fit(X, y, verbose=0), trainer.apply):
    try:
        call()
    except OSError as error:
        print("random numbers" in str(error), trainer.t, np.array_equal(trainer.net.flat, before))
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="makes a system without random numbers with gcc")
@pytest.mark.parametrize("name", ["native", "numba"])
def test_without_random_numbers_of_the_system_no_update_is_made(name, tmp_path):
    if not executors.available(name):
        pytest.skip(f"{name} isn't here")
    (tmp_path / "none.c").write_text("int getentropy(void *p, unsigned long n) { (void)p; (void)n; return -1; }")
    library = str(tmp_path / "none.so")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, str(tmp_path / "none.c")], check=True)
    command = [sys.executable, "-c", WITHOUT_ENTROPY, name]
    done = subprocess.run(command, env=os.environ | {"LD_PRELOAD": library}, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["True 0 True"] * 3


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", [name for name in ("native", "numba") if executors.available(name)])
def test_a_handful_of_rows_has_the_bits_of_these_rows_among_many(name, isa, dtype, monkeypatch):
    monkeypatch.setenv("FASTMB_ISA", isa)
    x, y = RNG.normal(size=(40, 9)).astype(dtype), RNG.integers(0, 5, 40)
    for hidden in ([1], [7, 8], [15, 16, 17], [31, 33], [65, 97]):
        trainer = mb.Trainer(mb.mlp([9, *hidden, 5], activation="tanh", dtype=dtype), executor=name)
        among = trainer.input_gradients(x, y)
        assert np.isfinite(among).all()
        for rows in (*range(1, 9), 33, 39):
            assert trainer.input_gradients(x[:rows], y[:rows]).tobytes() == among[:rows].tobytes(), (hidden, rows)
