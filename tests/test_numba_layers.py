"""Normalisations, PReLU and Residual in the numba executor beside the native one: the same bits whatever is asked."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

import fastmb as mb
from fastmb import threads
from fastmb.data import Batches
from fastmb.executors import native

pytest.importorskip("numba", reason="the numba executor needs it; the test extra brings it")
if native.available_isas()[-1] == "v2":
    pytest.skip("without fused multiply-add the bits are each set's own", allow_module_level=True)

conformance = runpy.run_path(str(Path(__file__).with_name("test_layers_conformance.py")))
NAMES, network = conformance["NAMES"], conformance["network"]
DTYPES = ["float32", "float64"]
ROWS_APART = ["layer_norm", "prelu", "residual"]
RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((90, 19)), RNG.integers(0, 10, 90)


@pytest.fixture(autouse=True)
def any_thread_count(monkeypatch):
    """As many threads as asked for, whatever the machine has."""
    monkeypatch.setattr(threads, "limit", lambda: 16)


def both(name, dtype, n_threads, look, hidden=40, **options):
    """What `look` finds at a trainer of each executor."""
    found = []
    for executor in ("numba", "native"):
        net = network(name, 19, hidden, 10, dtype)
        options = {"optimizer": mb.Adam(0.01), "batch_size": 16, "seed": 7} | options
        trainer = mb.Trainer(net, executor=executor, n_threads=n_threads, **options)
        found.append([np.asarray(array).tobytes() for array in look(trainer)])
    return found


def fitted(trainer):
    """Weights, statistics, and what is written down of a fit and of inference after it."""
    trainer.fit(X, Y, max_epochs=2, verbose=0)
    history = [trainer.history[name] for name in trainer.history if "second" not in name]
    averaged = [] if trainer.average is None else [trainer.averaged_net().flat]
    return trainer.net.flat, trainer.net.flat_buffers, trainer.per_example_losses(X, Y), *averaged, *history


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_fit_has_the_bits_of_native(name, dtype):
    for n_threads, batch_size in [(1, 5), (1, 16), (4, 7), (3, 16), (2, 33), (7, 90), (5, 2)]:
        ours, theirs = both(name, dtype, n_threads, fitted, batch_size=batch_size)
        assert ours == theirs, (n_threads, batch_size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_width_has_the_bits_of_native(dtype):
    for hidden in [1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 65, 97]:
        ours, theirs = both("all", dtype, 3, fitted, hidden)
        assert ours == theirs, hidden


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_steps": 2},
        {"max_grad_norm": 0.1},
        {"clip_value": 0.01},
        {"average": mb.EMA(0.9)},
        {"optimizer": mb.AdamW(0.01, groups={"*.bias": {"weight_decay": 0, "lr": 3}})},
    ],
    ids=str,
)
def test_every_rule_has_the_bits_of_native(options, dtype):
    ours, theirs = both("all", dtype, 3, fitted, **options)
    assert ours == theirs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"clip_per_example": 0.5}, {"clip_per_example": 0.5, "noise_multiplier": 0.7}])
@pytest.mark.parametrize("name", ROWS_APART)
def test_shortened_rows_and_their_norms_have_the_bits_of_native(name, options, dtype):
    ours, theirs = both(name, dtype, 3, fitted, gradient_stats=True, **options)
    assert ours == theirs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [4, 9, 33])
def test_the_mean_gradients_norm_has_the_bits_of_native(hidden, dtype):
    """Where a layer is one panel, its gradient's rows are one span."""
    found = []
    for executor in ("numba", "native"):
        net = mb.Sequential(mb.Linear(7, hidden), mb.LayerNorm(hidden), mb.Linear(hidden, 3), seed=0, dtype=dtype)
        trainer = mb.Trainer(net, batch_size=16, executor=executor, gradient_stats=True)
        rows, rng, stats = 16 * 300, np.random.default_rng(0), np.zeros((300, 5))
        batches = Batches(rng.standard_normal((rows, 7)).astype(dtype), rng.integers(0, 3, rows), None, None, 16)
        _, coefficients = trainer._coefficients(300)
        assert trainer._executor.run(batches, 0, 0, coefficients, np.zeros((300, 2)), 60, stats) == 300
        found.append(stats)
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROWS_APART)
def test_rows_own_gradients_have_the_bits_of_native(name, dtype):
    def look(trainer):
        each = trainer.per_example_gradients(X, Y)
        return *each.values(), trainer.per_example_norms(X, Y), trainer.input_gradients(X, Y)

    for n_threads in (1, 3):
        ours, theirs = both(name, dtype, n_threads, look)
        assert ours == theirs


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_the_input_have_the_bits_of_native(name):
    for n_threads in (1, 3):
        ours, theirs = both(name, "float32", n_threads, lambda trainer: [trainer.backward(X, np.ones((90, 10)))])
        assert ours == theirs
