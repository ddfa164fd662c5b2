"""What goes through the network together changes no bit: mini-batches of many rows and small networks, which go in
pieces; parts of a mini-batch, several of which go at once where they need little memory.
"""

from __future__ import annotations

import numpy as np
import pytest

import fastmb as mb
from fastmb import memory
from fastmb import threads as thread_counts
from fastmb.executors import native

N = 9001
RNG = np.random.default_rng(0)
X = RNG.standard_normal((N, 7))
Y = RNG.standard_normal((N, 3))
W = RNG.random(N)


@pytest.fixture(autouse=True)
def _as_many_threads_as_asked_for(monkeypatch):
    """Whatever the machine has."""
    monkeypatch.setattr(thread_counts, "limit", lambda: 7)


def trainer(dtype: str = "float32", batch_size: int = N, **options) -> mb.Trainer:
    net = mb.mlp([7, 33, 16, 3], activation="tanh", dropout=0.1, dtype=dtype, seed=3)
    return mb.Trainer(net, "huber", mb.Adam(0.01), batch_size=batch_size, **options)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [N, 6001, 6160], ids=lambda n: f"{n} rows")  # of 6160, often 16 are left
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("isa", native.available_isas())
def test_pieces_have_the_bits_of_the_whole(isa, dtype, batch_size, threads, monkeypatch):
    """Statistics of gradients need the mini-batch as a whole; training is the same with them and without."""
    monkeypatch.setenv("FASTMB_ISA", isa)
    options = {"executor": "native", "n_threads": threads}
    pieces, whole = (trainer(dtype, batch_size, gradient_stats=stats, **options) for stats in (False, True))
    for weights in (None, W):
        for one in pieces, whole:
            one.fit(X, Y, max_epochs=2, sample_weight=weights, verbose=0)
    np.testing.assert_array_equal(pieces.net.flat, whole.net.flat)
    np.testing.assert_array_equal(pieces.state, whole.state)
    np.testing.assert_array_equal(pieces.history["loss"], whole.history["loss"])
    assert 8 <= pieces._executor.piece_rows <= batch_size // 2
    assert whole._executor.piece_rows == 0
    activations: int = memory.forecast(pieces.net.plan, batch_size, 2).activations
    assert pieces._executor.arena_bytes < 0.7 * activations < 0.7 * whole._executor.arena_bytes


@pytest.mark.parametrize("threads", [None, 2, 3, 7])
@pytest.mark.parametrize("batch_size", [1, 7, 15, 16, 17, 31, 32, 33, 63, 65, 97, 150, 700])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("isa", native.available_isas())
def test_threads_that_hand_sums_on_have_the_bits_of_one(isa, dtype, batch_size, threads, monkeypatch):
    """The last mini-batch is smaller, and has fewer pieces than there are threads."""
    monkeypatch.setenv("FASTMB_ISA", isa)
    chained, alone = (trainer(dtype, batch_size, executor="native", n_threads=n) for n in (threads, 1))
    n = max(160, 2 * batch_size - 9)
    for weights in (None, W[:n]):
        for one in chained, alone:
            one.fit(X[:n], Y[:n], max_epochs=2, sample_weight=weights, verbose=0)
    np.testing.assert_array_equal(chained.net.flat, alone.net.flat)
    np.testing.assert_array_equal(chained.state, alone.state)
    np.testing.assert_array_equal(chained.history["loss"], alone.history["loss"])
    rows = chained._executor.piece_rows
    assert rows % 8 == 0
    if threads is not None:
        assert (threads - 1) * rows < batch_size
        assert rows > 0 or batch_size < max(100, 32 * threads)


@pytest.mark.parametrize("isa", native.available_isas())
def test_sums_are_handed_on_where_they_are_less_than_what_rows_leave(isa, monkeypatch):
    monkeypatch.setenv("FASTMB_ISA", isa)
    inputs, labels = RNG.standard_normal((512, 32)).astype(np.float32), RNG.integers(0, 10, 512)
    for batch_size, handed_on in ((64, False), (512, True)):
        trained = mb.Trainer(mb.mlp([32, 64, 64, 10]), batch_size=batch_size, n_threads=2)
        trained.fit(inputs, labels, max_epochs=1, verbose=0)
        assert (trained._executor.piece_rows > 0) == handed_on


def test_steps_gradients_and_small_mini_batches_after_large_ones():
    one, other = trainer(n_threads=1), trainer(n_threads=1, executor="numpy", dtype="float64")
    other.net.flat[:] = one.net.flat
    for rows in (N, 5, N - 1, 1, 4097):
        np.testing.assert_allclose(one.step(X[:rows], Y[:rows]), other.step(X[:rows], Y[:rows]), rtol=1e-5)
        found, expected = one.gradients(X[:rows], Y[:rows])[1], other.gradients(X[:rows], Y[:rows])[1]
        for name, gradient in expected.items():
            np.testing.assert_allclose(found[name], gradient, rtol=1e-3, atol=1e-4 * abs(gradient).max())


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("row", [0, 4000, N - 1])
def test_a_bad_row_in_any_piece_changes_nothing(row, threads):
    trained = trainer(n_threads=threads)
    trained.step(X, Y)
    before = trained.net.flat.copy(), trained.state.copy()
    bad = X.copy()
    bad[row, 0] = np.nan
    with pytest.raises(FloatingPointError):
        trained.step(bad, Y)
    assert trained._executor.piece_rows > 0
    np.testing.assert_array_equal(trained.net.flat, before[0])
    np.testing.assert_array_equal(trained.state, before[1])
    trained.step(X, Y)
    assert np.isfinite(trained.net.flat).all()


@pytest.mark.parametrize(
    "options", [{}, {"clip_per_example": 0.5}, {"max_grad_norm": 0.05}, {"clip_value": 0.01}], ids=str
)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("part", "k"), [(32, 4), (64, 3), (96, 7), (640, 14), (33, 3)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("isa", native.available_isas())
def test_parts_that_go_together_have_the_bits_of_parts_that_are_accumulated(
    isa, dtype, part, k, threads, options, monkeypatch
):
    """Mini-batches of 128 to 8960 rows, the last one smaller; some 2500 rows are what goes together of this network."""
    monkeypatch.setenv("FASTMB_ISA", isa)
    options = {"executor": "native", "n_threads": threads, **options}
    together = trainer(dtype, part, accumulate_steps=k, shuffle=False, **options)
    apart = trainer(dtype, part, **options)
    together.fit(X, Y, max_epochs=1, verbose=0)
    losses = []
    for begin in range(0, N, part * k):
        for first in range(begin, min(begin + part * k, N), part):
            rows = slice(first, min(first + part, N))
            losses.append(apart.accumulate(X[rows], Y[rows]))
        apart.apply()
    np.testing.assert_array_equal(together.net.flat, apart.net.flat)
    np.testing.assert_array_equal(together.state, apart.state)
    np.testing.assert_allclose(together.history["loss"], np.average(losses, weights=[part] * (N // part) + [N % part]))


@pytest.mark.parametrize("k", [1, 4])
def test_parts_of_a_small_network_go_together(k):
    """There is room for their rows."""
    trained = trainer(batch_size=64, accumulate_steps=k, n_threads=1)
    trained.fit(X, Y, max_epochs=1, verbose=0)
    activations: int = memory.forecast(trained.net.plan, 64 * k, 2).activations
    assert activations < trained._executor.arena_bytes < 2 * activations + 2**17


def test_parts_of_a_large_network_go_one_at_a_time():
    """Accumulated mini-batches take the memory of one."""
    net = mb.mlp([784, 512, 512, 10], seed=0)
    trained = mb.Trainer(net, "cross_entropy", mb.SGD(0.01), batch_size=256, accumulate_steps=16, n_threads=2)
    inputs, labels = RNG.standard_normal((4096, 784)).astype(np.float32), RNG.integers(0, 10, 4096)
    trained.fit(inputs, labels, max_epochs=1, verbose=0)
    activations: int = memory.forecast(net.plan, 256, 1).activations
    assert trained._executor.arena_bytes < activations + 2**22
