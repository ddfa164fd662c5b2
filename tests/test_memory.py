"""What a fit takes of memory: the forecast against the process, and the way back from divergence that keeps it low."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import textwrap

import numpy as np
import pytest

import fastmb as mb
from fastmb import _fitting, _snapshot, memory
from fastmb.executors import native

MB = 10**6
NETWORKS = {  # sizes, optimiser, mini-batch
    "small": ([32, 64, 64, 10], mb.SGD(momentum=0.9), 64),
    "mid": ([784, 512, 512, 10], mb.Adam(), 128),
    "a large batch": ([64, 256, 256, 1], mb.Adam(), 8192),
    "large": ([1024, 2048, 2048, 1000], mb.Adam(), 64),
    "large, three states": ([1024, 1024, 1024], mb.Adam(amsgrad=True), 256),
}


def peak(sizes: list[int], optimizer: mb.SGD | mb.Adam, batch_size: int) -> int:
    """Bytes that a process has more at the peak of two epochs than before the network was made."""
    program = f"""
        import pathlib, numpy as np, fastmb as mb

        def status(name):
            return 1024 * int(pathlib.Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])

        def train(sizes, rows, batch_size):
            layers = [mb.Linear(*pair, init="zeros") for pair in zip(sizes, sizes[1:])]  # no random numbers to draw
            trainer = mb.Trainer(mb.Sequential(*layers), "mse", mb.{optimizer!r}, batch_size=batch_size, n_threads=2)
            trainer.fit(X[:rows, :sizes[0]], y[:rows, :sizes[-1]], max_epochs=2, verbose=0)
            assert trainer.t == 6

        rows = 3 * {batch_size}
        X, y = np.ones((rows, {sizes[0]}), np.uint8), np.ones((rows, {sizes[-1]}), np.uint8)
        train([2, 2, 1], 96, 32)  # whatever is loaded and kept at the first fit of all
        before = status("VmRSS")
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        train({sizes}, rows, {batch_size})
        print(status("VmHWM") - before)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120)
    assert not run.stderr
    return int(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="a process's peak is reset and read in /proc")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_fit_takes_what_the_summary_foretells(name):
    sizes, optimizer, batch_size = NETWORKS[name]
    told = memory.forecast(mb.mlp(sizes).plan, batch_size, optimizer.n_states)
    taken = peak(sizes, optimizer, batch_size)
    assert abs(taken - told.total) < max(10 * MB, 0.1 * told.total)
    budget = told.parameters * (1 + optimizer.n_states) + told.activations + 10 * MB
    assert taken < budget


@pytest.mark.parametrize("isa", native.available_isas())
@pytest.mark.parametrize("name", NETWORKS)
def test_buffers_take_little_more_than_activations(name, isa, monkeypatch):
    """So that the interpreter's own megabytes have room in the budget above; training needs no room to predict."""
    monkeypatch.setenv("FASTMB_ISA", isa)
    sizes, optimizer, batch_size = NETWORKS[name]
    net = mb.Sequential(*(mb.Linear(*pair, init="zeros") for pair in itertools.pairwise(sizes)))
    trainer = mb.Trainer(net, "mse", optimizer, batch_size=batch_size, n_threads=2)
    trainer.step(np.ones((batch_size, sizes[0]), np.uint8), np.ones((batch_size, sizes[-1]), np.uint8))
    told = memory.forecast(net.plan, batch_size, optimizer.n_states)
    assert trainer._executor.arena_bytes - told.activations < 5 * MB


def test_buffers_are_as_large_whether_evaluated_before_or_after():
    X, y = np.ones((64, 1024), np.uint8), np.zeros((64, 600))
    found = set()
    for names in itertools.permutations(["step", "evaluate"]):
        trainer = mb.Trainer(mb.mlp([1024, 1024, 600]), "mse", batch_size=64, n_threads=2)
        for name in names:
            getattr(trainer, name)(X, y)
        found.add(trainer._executor.arena_bytes)
    assert len(found) == 1


def test_the_forecast_counts_every_part():
    plan = mb.mlp([16, 16, 16], bias=False, dtype="float64").plan
    assert memory.forecast(plan, 10, 2) == (4096, 8192, 10 * 64 * 8, 12288)
    large = mb.Sequential(mb.Linear(2048, 2048, init="zeros")).plan
    assert memory.forecast(large, 1, 0).kept == 0


# ---- the copy that a fit goes back to --------------------------------------------------------------------------------


@pytest.mark.parametrize("in_memory", [0, 1 << 23], ids=["file", "memory"])
@pytest.mark.parametrize("n_states", [0, 2])
def test_a_snapshot_gives_back_what_was_taken_last(in_memory, n_states, monkeypatch):
    monkeypatch.setattr(_snapshot, "IN_MEMORY", in_memory)
    arrays = [np.arange(1000.0), np.ones((n_states, 1000))]
    with _snapshot.Snapshot() as snapshot:
        snapshot.take(arrays[:1])
        arrays[0][:] = 7
        snapshot.take(arrays)
        taken = [array.copy() for array in arrays]
        for array in arrays:
            array[...] = np.nan
        snapshot.restore(arrays)
    for array, expected in zip(arrays, taken, strict=True):
        np.testing.assert_array_equal(array, expected)


def test_without_room_for_a_file_the_snapshot_is_in_memory(monkeypatch):
    def no_room(**_: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr(_snapshot, "IN_MEMORY", 0)
    monkeypatch.setattr(_snapshot, "_files", [])
    monkeypatch.setattr(tempfile, "TemporaryFile", no_room)
    array = np.arange(10.0)
    with _snapshot.Snapshot() as snapshot:
        for value in 1, 2:
            array[:] = value
            snapshot.take([array])
        array[:] = np.nan
        snapshot.restore([array])
    assert (array == 2).all()


@pytest.mark.parametrize("in_memory", [0, 1 << 22], ids=["file", "memory"])
def test_snapshots_leave_their_room_to_the_next_and_to_nobody_else(in_memory, monkeypatch):
    monkeypatch.setattr(_snapshot, "IN_MEMORY", in_memory)
    for name in "_files", "_memories":
        monkeypatch.setattr(_snapshot, name, [])
    spare = _snapshot._memories if in_memory else _snapshot._files
    arrays = [np.full(1000, value) for value in range(3)]
    with _snapshot.Snapshot() as one, _snapshot.Snapshot() as other:  # at the same time: room of their own
        for snapshot, array in zip((one, other), arrays, strict=False):
            snapshot.take([array])
        other.restore([into := np.zeros_like(arrays[1])])
    np.testing.assert_array_equal(into, arrays[1])
    assert len(spare) == 1
    left = spare[0]
    with _snapshot.Snapshot() as next_one:
        next_one.take(arrays[1:])
        assert not spare
    assert spare[0] is left
    with _snapshot.Snapshot() as next_one:
        next_one.take(arrays[1:])
        next_one.restore([into := np.zeros(1000, int), np.zeros(1000, int)])
    np.testing.assert_array_equal(into, arrays[1])
    assert len(spare) == bool(in_memory)  # a file that was read is closed
    monkeypatch.setattr(_snapshot, "SPARE", 0)
    with _snapshot.Snapshot() as last:
        last.take(arrays)
    assert len(spare) == bool(in_memory)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_leaves_its_parents_file_alone(monkeypatch):
    monkeypatch.setattr(_snapshot, "IN_MEMORY", 0)
    array = np.arange(1000.0)
    with _snapshot.Snapshot() as before:
        before.take([array])
    assert _snapshot._files
    child = os.fork()
    if child == 0:
        os._exit(len(_snapshot._files))
    assert os.waitpid(child, 0)[1] == 0
    assert _snapshot._files


@pytest.mark.parametrize("bound", [3, 10])
@pytest.mark.parametrize("in_memory", [0, 1 << 23], ids=["file", "memory"])
def test_a_large_network_that_diverges_keeps_its_last_finite_epoch(bound, in_memory, monkeypatch):
    monkeypatch.setattr(_snapshot, "IN_MEMORY", in_memory)
    monkeypatch.setattr(_fitting, "SPARING", 0)
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((70, 5)), rng.standard_normal((70, 1))

    def fitted(optimizer: mb.Adagrad, epochs: int) -> mb.Trainer:
        trainer = mb.Trainer(mb.mlp([5, 8, 1]), "mse", optimizer, batch_size=10)
        if epochs:
            trainer.fit(X, y, max_epochs=epochs, verbose=0)
        return trainer

    options = {"initial_accumulator_value": 0.5}
    trainer = fitted(mb.Adagrad(lambda t: 0.01 if t < bound else 1e60, **options), 0)
    with pytest.raises(FloatingPointError):
        trainer.fit(X, y, max_epochs=5, verbose=0)
    expected = fitted(mb.Adagrad(0.01, **options), bound // 7)
    assert trainer.t == expected.t == bound // 7 * 7
    np.testing.assert_array_equal(trainer.net.flat, expected.net.flat)
    np.testing.assert_array_equal(trainer.state, expected.state)


def test_a_snapshot_that_is_some_epochs_old_is_gone_back_to_whole(monkeypatch):
    monkeypatch.setattr(_snapshot, "IN_MEMORY", 0)
    monkeypatch.setattr(_fitting, "SPARING", 1e9)
    X, y = (np.random.default_rng(0).standard_normal((70, n)) for n in (5, 1))
    trainer = mb.Trainer(mb.mlp([5, 8, 1]), "mse", mb.Adam(lambda t: 0.01 if t < 30 else 1e60), batch_size=10)
    trainer.fit(X, y, max_epochs=2, verbose=0)
    flat, state = trainer.net.flat.copy(), trainer.state.copy()
    with pytest.raises(FloatingPointError, match=r"in epoch 5 at step .* the values they had after update 14"):
        trainer.fit(X, y, max_epochs=5, verbose=0)
    assert (trainer.t, trainer.epoch, len(trainer.history["loss"])) == (14, 2, 2)
    np.testing.assert_array_equal(trainer.net.flat, flat)
    np.testing.assert_array_equal(trainer.state, state)
