"""Networks of every layer: `native` and `numba` compute what the reference does, the same bits however they are run."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest

import fastmb as mb
from fastmb import executors, threads
from fastmb.data import Batches
from fastmb.executors import Training, native
from fastmb.plan import buffer_views, views

ISAS = native.available_isas()
FMA_ISAS = [isa for isa in ISAS if isa != "v2"]
COMPILED = [f"native {isa}" for isa in ISAS] + [f"numba {ISAS[-1]}"]  # executor and instruction set
DTYPES = ["float32", "float64"]
ODD = [1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 65, 97]


@pytest.fixture(autouse=True)
def any_thread_count(monkeypatch):
    """As many threads as asked for, whatever the machine has."""
    monkeypatch.setattr(threads, "limit", lambda: 16)


def blocks(name, n, hidden, out):
    """A network with the layer called `name`, or with all of them."""
    linear, bn, ln, prelu, res = mb.Linear, mb.BatchNorm1d, mb.LayerNorm, mb.PReLU, mb.Residual
    return {
        "batch_norm": [linear(n, hidden, bias=False), bn(hidden), mb.ReLU(), linear(hidden, out)],
        "batch_norm first": [
            bn(n, affine=False), linear(n, hidden), bn(hidden), bn(hidden), mb.GELU(), linear(hidden, out),
        ],
        "layer_norm": [ln(n), linear(n, hidden), ln(hidden, bias=False), mb.ReLU(), linear(hidden, out)],
        "prelu": [linear(n, hidden), prelu(), linear(hidden, hidden), prelu(hidden), linear(hidden, out)],
        "residual": [
            linear(n, hidden), res(mb.SiLU(), linear(hidden, hidden), mb.Dropout(0.2)), mb.ReLU(),
            res(res(linear(hidden, hidden)), mb.Tanh()), linear(hidden, out),
        ],
        "all": [
            mb.Dropout(0.1), linear(n, hidden), bn(hidden), mb.ReLU(),
            res(ln(hidden), linear(hidden, hidden + 1), bn(hidden + 1), prelu(), linear(hidden + 1, hidden)),
            prelu(hidden), res(bn(hidden), mb.SiLU(), mb.Dropout(0.2), linear(hidden, hidden)), ln(hidden), mb.ReLU(),
            linear(hidden, out),
        ],
    }[name]  # fmt: skip


NAMES = ["batch_norm", "batch_norm first", "layer_norm", "prelu", "residual", "all"]


def network(name, n, hidden, out, dtype, seed=2):
    net = mb.Sequential(*blocks(name, n, hidden, out), seed=seed, dtype=dtype)
    rng = np.random.default_rng(seed)
    for array in net.parameters().values():
        array += rng.uniform(-0.2, 0.2, array.shape)
    for array in net.buffers().values():
        array += rng.uniform(0, 0.5, array.shape)
    return net


def executor(which, net, isa=None, n_threads=1, batch_size=16, optimizer=None):
    """One of them on its own copy of the network; also that copy's parameters and buffers."""
    optimizer = mb.SGD(lr=0.1) if optimizer is None else optimizer
    state = np.zeros((optimizer.n_states, net.plan.size), net.dtype)
    flat, buffers = net.flat.copy(), net.flat_buffers.copy()
    training = Training(mb.MSE(), optimizer, state, batch_size, 3)
    isas = {} if which == "numpy" else {"isa": isa}
    return executors.load(which)(net.plan, flat, training, n_threads, **isas, buffers=buffers), flat, buffers


def tolerance(net, rows):
    """As in test_conformance; a normalisation divides by what may be small: ten times that."""
    depth = max(rows, *(max(stage.n_in, stage.n_out) for stage in net.plan.stages))
    return 80 * len(net.plan.stages) * np.sqrt(depth) * np.finfo(net.dtype).eps


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_any_batch_size_and_width_are_those_of_the_reference(name, dtype, compiled):
    ours, isa = compiled.split()
    rng = np.random.default_rng(1)
    for rows, n_threads in itertools.product(ODD, [1, 3]):
        if rows == 1 and name in ("batch_norm", "batch_norm first", "all"):
            continue
        net = network(name, 5, rows if rows > 1 else 9, 3, dtype)
        batches = Batches(
            rng.standard_normal((rows, 5)).astype(dtype), rng.standard_normal((rows, 3)), None, None, rows
        )
        found = []
        for which in (ours, "numpy"):
            one, flat, buffers = executor(which, net, isa, n_threads, rows)
            out, sums = np.full(net.plan.size, np.nan, dtype), np.full((1, 2), np.nan)
            one.gradients(batches, 5, out, sums)
            assert np.array_equal(flat, net.flat)
            assert np.array_equal(buffers, net.flat_buffers)  # nothing is updated
            found.append((views(out, net.plan), sums))
        (got, sums), (expected, expected_sums) = found
        limit = tolerance(net, rows)
        np.testing.assert_allclose(sums, expected_sums, rtol=limit)
        for key, gradient in got.items():
            size = max(1e-1, np.abs(expected[key]).max())
            np.testing.assert_allclose(gradient, expected[key], rtol=0, atol=limit * size, err_msg=f"{rows} {key}")


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("name", NAMES)
def test_epochs_are_those_of_the_reference(name, compiled):
    ours, isa = compiled.split()
    rng = np.random.default_rng(1)
    net = network(name, 13, 33, 5, "float64")
    optimizer = mb.Adam(lr=0.01, weight_decay=0.01)
    X, y, order = rng.standard_normal((70, 13)), rng.standard_normal((70, 5)), rng.permutation(70)
    batches = Batches(X, y, rng.random(70), order, 16)
    results = []
    for which in (ours, "numpy"):
        one, flat, buffers = executor(which, net, isa, 3, 16, optimizer)
        sums = np.full((5, 2), np.nan)
        for t in (0, 5):
            assert one.run(batches, 0, t, optimizer.coefficients(t, 5, optimizer.learning_rates(t, 5)), sums, 1e9) == 5
        results.append((flat, buffers, sums))
    for got, expected in zip(*results, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_losses_in_inference_are_those_of_the_reference(name, compiled):
    ours, isa = compiled.split()
    rng = np.random.default_rng(1)
    for rows, n_threads in itertools.product(ODD, [1, 3]):
        net = network(name, 9, 33, 5, "float64")
        X, y = rng.standard_normal((rows, 9)), rng.standard_normal((rows, 5))
        results = []
        for which in (ours, "numpy"):
            one, _, buffers = executor(which, net, isa, n_threads)
            out, losses, weights = np.full((rows, 5), np.nan), np.full(rows, np.nan), np.full(rows, np.nan)
            one.forward(X, 0.5, out)
            results.append(out.copy())
            out[:] = np.nan
            one.evaluate(Batches(X, y, None, None, 16, 0.5), out, losses, weights)
            results += [out, losses, weights]
            assert np.array_equal(buffers, net.flat_buffers)
        for got, expected in zip(results[:4], results[4:], strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-12)


def train(name, n_threads, compiled, dtype, batch_size, how, monkeypatch):
    executor, isa = compiled.split()
    monkeypatch.setenv("FASTMB_ISA", isa)
    rng = np.random.default_rng(1)
    rows = min(150, 3 * batch_size + 2)
    X, y = rng.standard_normal((rows, 19)).astype(dtype), rng.integers(0, 10, rows)
    net = network(name, 19, 40, 10, dtype)
    trainer = mb.Trainer(
        net,
        optimizer=mb.Adam(lr=0.01),
        batch_size=batch_size,
        seed=7,
        n_threads=n_threads,
        executor=executor,
        shuffle=how == "fit shuffled",
    )
    if how == "step":
        for start in range(0, rows, batch_size):
            trainer.step(X[start : start + batch_size], y[start : start + batch_size])
    else:
        trainer.fit(X, y, max_epochs=1, verbose=0)
    return hashlib.sha256(
        net.flat.tobytes() + net.flat_buffers.tobytes() + trainer.per_example_losses(X, y).tobytes()
    ).hexdigest()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 16, 33, 64, 65, 150, 1000])
@pytest.mark.parametrize("name", ["batch_norm", "layer_norm", "all"])
def test_same_bits_for_any_thread_count_and_instruction_set(name, batch_size, dtype, monkeypatch):
    if name in ("batch_norm", "all") and batch_size == 1:
        batch_size = 5
    how = [(n, f"native {FMA_ISAS[n % len(FMA_ISAS)]}") for n in (2, 3, 4, 7)]
    how += [(1, f"{executor} {isa}") for executor in ("native", "numba") for isa in FMA_ISAS]
    how += [(n, f"numba {FMA_ISAS[-1]}") for n in (2, 3)]
    digests = {train(name, n, compiled, dtype, batch_size, "fit shuffled", monkeypatch) for n, compiled in how}
    assert len(digests) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_same_bits_for_fit_and_step(name, dtype, monkeypatch):
    digests = {
        train(name, n, f"{executor} {ISAS[-1]}", dtype, 16, how, monkeypatch)
        for n, how, executor in itertools.product([1, 3], ["step", "fit"], ["native", "numba"][: 1 + bool(FMA_ISAS)])
    }
    assert len(digests) == 1


def test_buffers_of_a_run_are_named():
    net = network("all", 5, 4, 3, "float32")
    names = [
        f"{i}.{what}" for i in ("2", "4.2", "6.0") for what in ("running_mean", "running_var", "num_batches_tracked")
    ]
    assert list(buffer_views(net.flat_buffers, net.plan)) == names
