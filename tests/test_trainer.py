"""The trainer: what fit, step, gradients and evaluate promise, on every executor."""

from __future__ import annotations

import copy
import functools
import math
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

import fastmb as mb
from fastmb import _fitting, executors, trainer
from fastmb._progress import Interrupt, Whole
from fastmb.data import permutation

RNG = np.random.default_rng(0)
N = 100
X = RNG.standard_normal((N, 6)).astype(np.float32)
Y = RNG.integers(0, 3, N)
W = RNG.random(N)
LOSSES = {
    "cross_entropy": Y,
    "bce_with_logits": RNG.integers(0, 2, (N, 3)),
    "mse": X[:, :3] @ RNG.standard_normal((3, 3)),
}


def falling(t: int) -> float:
    return 0.01 / (1 + t)


def make(executor: str, loss: Any = "cross_entropy", **options: Any) -> mb.Trainer:
    options = {"optimizer": mb.Adam(lr=0.01), "batch_size": 16, "seed": 5} | options
    net = mb.Sequential(mb.Linear(6, 8), mb.ReLU(), mb.Dropout(0.2), mb.Linear(8, 3), seed=1)
    return mb.Trainer(net, loss, executor=executor, **options)


def everything(trainer: mb.Trainer) -> tuple[bytes, bytes, int, int]:
    return trainer.net.flat.tobytes(), trainer.state.tobytes(), trainer.t, trainer.epoch


fit = functools.partial(mb.Trainer.fit, verbose=0)


class Stuttering:
    """An executor that makes at most `most` updates a call, and does something after so many calls."""

    def __init__(self, executor: Any, most: int, after: int = -1, do: Any = None) -> None:
        self.executor, self.most, self.after, self.do = executor, most, after, do

    def __getattr__(self, name: str) -> Any:
        return getattr(self.executor, name)

    def run(self, batches, first, t, coefficients, sums, seconds, *more):
        self.after -= 1
        if self.after == 0:
            self.do()
        return self.executor.run(batches, first, t, coefficients[: self.most], sums, seconds, *more)


# ---- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shuffle", [True, False])
def test_fit_makes_the_bits_of_steps_in_the_same_order(executor, loss, shuffle):
    y = LOSSES[loss]
    fitted, stepped = (make(executor, loss, shuffle=shuffle, optimizer=mb.Adam(lr=falling)) for _ in range(2))
    history = fit(fitted, X, y, max_epochs=3, sample_weight=W)
    for epoch in range(3):
        order = permutation(N, 5, epoch) if shuffle else np.arange(N)
        total = weight = 0.0
        for rows in np.split(order, range(16, N, 16)):
            mean = stepped.step(X[rows], y[rows], sample_weight=W[rows])
            total, weight = total + mean * W[rows].sum(), weight + W[rows].sum()
        assert history["loss"][epoch] == pytest.approx(total / weight, rel=1e-12)
        assert history["lr"][epoch] == falling(stepped.t - 1)
    assert everything(fitted)[:3] == everything(stepped)[:3]


def test_fit_called_again_goes_on(executor):
    whole, parts = make(executor), make(executor)
    history = fit(whole, X, Y, max_epochs=5)
    fit(parts, X, Y, max_epochs=2)
    assert fit(parts, X, Y, max_epochs=3)["loss"] == history["loss"]
    assert history["epoch"] == [1, 2, 3, 4, 5]
    assert parts.history is fit(parts, X, Y, max_epochs=1)
    assert everything(parts) != everything(whole)
    fit(whole, X, Y, max_epochs=1)
    assert everything(parts) == everything(whole)


@pytest.mark.parametrize("calls", range(1, 13))
def test_an_interrupted_fit_is_gone_on_with_as_if_it_had_not_been(executor, calls):
    whole, broken = make(executor), make(executor)
    history = fit(whole, X, Y, max_epochs=3, X_val=X, y_val=Y)
    inner = broken._executor
    broken._executor = Stuttering(inner, 2, calls, lambda: signal.raise_signal(signal.SIGINT))
    first = fit(broken, X, Y, max_epochs=3, X_val=X, y_val=Y)
    assert first.stopped == ("max_epochs" if calls == 12 else "interrupted")
    assert broken.t == sum([2, 2, 2, 1][call % 4] for call in range(calls))
    assert len(first["epoch"]) == math.ceil(calls / 4)
    assert not np.isnan(first["val_loss"]).any()
    broken._executor = inner
    if broken.epoch < 3:
        fit(broken, X, Y, max_epochs=3 - broken.epoch, X_val=X, y_val=Y)
    assert everything(broken) == everything(whole)
    for column in "epoch", "loss", "val_loss", "val_accuracy", "lr":
        assert broken.history[column] == history[column]


@pytest.mark.parametrize("slices", [1, 3, 7])
def test_slices_dont_change_bits(executor, slices, monkeypatch):
    whole, cut = make(executor, optimizer=mb.Adam(lr=falling)), make(executor, optimizer=mb.Adam(lr=falling))
    history = fit(whole, X, Y, max_epochs=2)
    monkeypatch.setattr(_fitting, "SLICE", slices)
    cut._executor = Stuttering(cut._executor, 2)
    assert fit(cut, X, Y, max_epochs=2)["loss"] == pytest.approx(history["loss"], rel=1e-12)
    assert everything(cut) == everything(whole)


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda trainer: pickle.loads(pickle.dumps(trainer))])
def test_a_copy_goes_on_to_the_same_bits_in_the_middle_of_an_epoch_too(executor, way):
    original = make(executor)
    inner = original._executor
    original._executor = Stuttering(inner, 2, 6, lambda: signal.raise_signal(signal.SIGINT))
    assert fit(original, X, Y, max_epochs=3).stopped == "interrupted"
    original._executor = inner
    other = way(original)
    assert everything(other) == everything(original)
    assert other.net.flat is not original.net.flat
    for one in original, other:
        fit(one, X, Y, max_epochs=2)
    assert everything(other) == everything(original)
    assert other.history["loss"] == original.history["loss"]
    assert other.history.stopped == "max_epochs"


@pytest.mark.parametrize("dtype", ["u1", "i2", "f2", "f8", ">f4", "i8"])
def test_the_dtype_and_layout_of_X_dont_change_bits(executor, dtype):
    levels = RNG.integers(0, 100, (N, 6))
    plain, other = make(executor, input_scale=1 / 64), make(executor)
    fit(plain, levels.astype(dtype)[:, ::-1], Y.astype("i2"), max_epochs=2)
    fit(other, np.asfortranarray(levels[:, ::-1] / 64), Y, max_epochs=2)
    assert everything(plain) == everything(other)
    np.testing.assert_array_equal(plain.net(levels[:, ::-1]), other.net(levels[:, ::-1] / 64))


def test_other_rows_than_before_begin_a_new_epoch(executor):
    broken = make(executor)
    broken._executor = Stuttering(broken._executor, 2, 2, lambda: signal.raise_signal(signal.SIGINT))
    fit(broken, X, Y)
    assert (broken.t, broken.epoch) == (4, 0)
    fit(broken, X[:50], Y[:50], max_epochs=1)
    assert (broken.t, broken.epoch) == (8, 2)
    assert broken.history["epoch"] == [1, 2]


# ---- why a fit ends --------------------------------------------------------------------------------------------------


def test_it_stops_at_max_epochs(executor):
    history = fit(make(executor), X, Y, max_epochs=4)
    assert history.stopped == "max_epochs"
    assert all(len(column) == 4 for column in history.values())
    assert min(history["seconds"]) > 0
    assert history["examples_per_second"][0] == pytest.approx(N / history["seconds"][0])


def test_it_stops_at_max_seconds_in_the_middle_of_an_epoch(executor):
    trainer = make(executor, batch_size=1)
    trainer._executor = Stuttering(trainer._executor, 1)
    history = fit(trainer, X, Y, max_epochs=10, max_seconds=0, X_val=X, y_val=Y)
    assert history.stopped == "max_seconds"
    assert (trainer.t, trainer.epoch, history["epoch"]) == (1, 0, [1])
    assert history["examples_per_second"][0] == pytest.approx(1 / history["seconds"][0])
    assert 0 < history["val_loss"][0] < 10


def test_it_stops_when_stop_at_is_reached(executor):
    goals = {"loss": 1.05, "val_accuracy": 0.4}
    history = fit(make(executor), X, Y, max_epochs=500, X_val=X, y_val=Y, stop_at=goals)
    assert history.stopped == "stop_at"
    figures = zip(history["loss"], history["val_accuracy"], strict=True)
    met = [loss <= 1.05 and accuracy >= 0.4 for loss, accuracy in figures]
    assert met.index(True) == len(met) - 1


def test_ctrl_c_ends_a_fit_after_the_current_mini_batch(executor):
    trainer = make(executor)
    before = trainer.net.flat.copy()
    threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()
    history = fit(trainer, X, Y, max_epochs=10**8, X_val=X, y_val=Y, max_seconds=60)
    assert history.stopped == "interrupted"
    assert trainer.t > 0
    assert not np.array_equal(trainer.net.flat, before)
    assert all(len(column) == len(history["epoch"]) for column in history.values())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_in_a_program_leaves_the_fit_in_order(executor):
    program = f"""
        import numpy as np, sys, fastmb as mb
        trainer = mb.Trainer(mb.mlp([20, 30, 2]), executor={executor!r})
        print("fitting", flush=True)
        history = trainer.fit(np.ones((500, 20)), np.zeros(500, int), max_epochs=10**8, max_seconds=30)
        print(history.stopped, trainer.t > 0, len(history["epoch"]) - trainer.epoch in (0, 1))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "fitting\n"
        threading.Timer(1.0, process.send_signal, [signal.SIGINT]).start()
        out, error = process.communicate(timeout=60)
    assert (out, process.returncode) == ("interrupted True True\n", 0), error


def test_the_users_own_signal_handler_stays(executor):
    def handler(*_: object) -> None:
        seen.append(1)

    seen: list[int] = []
    trainer = make(executor)
    trainer._executor = Stuttering(trainer._executor, 2, 2, lambda: signal.raise_signal(signal.SIGINT))
    signal.signal(signal.SIGINT, handler)
    try:
        assert fit(trainer, X, Y, max_epochs=2).stopped == "max_epochs"
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert seen == [1]


DISTURBED = [*filter(executors.available, executors.NAMES), "muon"]  # whose updates are Python


class AlarmError(Exception):
    pass


def trainers_to_disturb(executor: str) -> tuple[mb.Trainer, mb.Trainer, Any, Any]:
    """Two trainers alike, and a mini-batch that takes their executor long."""
    options: dict[str, Any] = {"optimizer": mb.Adam(0.001), "executor": executor}
    rows, hidden = (1 << 9 if executor == "numpy" else 1 << 13), 200
    if executor == "muon":
        options, hidden = {"optimizer": mb.Muon(0.01)}, 40
    nets = [mb.mlp([6, hidden, hidden, 3], seed=1) for _ in range(2)]
    one, other = (mb.Trainer(net, batch_size=rows, n_threads=1, **options) for net in nets)
    Z, z = np.resize(X, (rows, 6)), np.resize(Y, rows)
    for each in (one, other):
        each.step(Z, z)  # what has to be compiled is, then
    return one, other, Z, z


@pytest.fixture
def until_alarm():
    """Repeats calls until a signal comes, some milliseconds later, whose handler raises."""

    def handle(*_: object) -> None:
        raise AlarmError

    def repeat(*calls: Any) -> None:
        signal.setitimer(signal.ITIMER_REAL, RNG.uniform(0.02, 0.08))
        with suppress(AlarmError):
            while True:
                for call in calls:
                    call()

    before = signal.signal(signal.SIGALRM, handle)
    yield repeat
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("executor", DISTURBED)
def test_an_exception_from_a_signal_parts_no_update_from_its_count(executor, until_alarm):
    one, other, Z, z = trainers_to_disturb(executor)
    for _ in range(3):
        until_alarm(lambda: one.step(Z, z))
        while other.t < one.t:
            other.step(Z, z)
        assert everything(one) == everything(other)


@pytest.mark.parametrize("executor", DISTURBED)
def test_an_exception_from_a_signal_parts_no_sum_from_its_weight(executor, until_alarm):
    one, other, Z, z = trainers_to_disturb(executor)
    for _ in range(3):
        for each in one, other:
            each.accumulate(Z, z)
        until_alarm(lambda: one.accumulate(Z, z))
        while other._pending.rows < one._pending.rows:
            other.accumulate(Z, z)
        assert one._pending.weight == other._pending.weight == one._pending.rows
        for each in one, other:
            each.apply()
        assert everything(one) == everything(other)


def test_an_exception_from_a_signal_parts_no_gradient_from_outside_from_its_rows(executor, until_alarm):
    one, _, Z, _ = trainers_to_disturb(executor)
    g = np.ones((len(Z), 3), np.float32)
    one.backward(Z, g)
    once = one._pending.flat.copy()
    until_alarm(lambda: one.backward(Z, g))
    times = one._pending.rows / len(Z)
    np.testing.assert_allclose(one._pending.flat, once * times, rtol=1e-3, atol=1e-3 * times)


@pytest.mark.parametrize("executor", DISTURBED)
def test_an_exception_from_a_signal_parts_no_applied_gradient_from_its_count(executor, until_alarm):
    one, other, Z, z = trainers_to_disturb(executor)
    Z, z = Z[:2], z[:2]
    for _ in range(3):
        until_alarm(lambda: one.accumulate(Z, z), one.apply)
        while other.t < one.t:
            other.accumulate(Z, z)
            other.apply()
        one.zero_grad()
        assert everything(one) == everything(other)


@pytest.mark.parametrize("executor", DISTURBED)
def test_a_fit_that_a_signal_raised_in_is_gone_on_with_as_if_it_had_not_been(executor, until_alarm):
    one, other, Z, z = trainers_to_disturb(executor)
    one.batch_size = other.batch_size = 64
    for _ in range(4):
        until_alarm(lambda: fit(one, Z, z, max_epochs=10**6))
        assert one._current is None or one._current.seconds > 0
    fit(one, Z, z, max_epochs=1)
    fit(other, Z, z, max_epochs=one.epoch)
    assert everything(one) == everything(other)
    assert one.history["loss"] == other.history["loss"]
    assert one.history["lr"] == other.history["lr"]


def test_an_exception_before_the_first_mini_batch_leaves_no_epoch_begun(executor):
    trainer = make(executor, optimizer=mb.SGD(lr=lambda t: 0.1 if t < 7 else -1.0))
    fit(trainer, X, Y, max_epochs=1)
    with pytest.raises(ValueError, match="-1"):
        fit(trainer, X, Y, max_epochs=1)
    assert (trainer.t, trainer.epoch, trainer._current) == (7, 1, None)
    trainer.batch_size = 50
    trainer.optimizer = mb.SGD(0.1)
    fit(trainer, X[:50], Y[:50], max_epochs=1)
    assert (trainer.t, trainer.epoch) == (8, 2)


def ctrl_c(times: int = 1) -> None:
    for _ in range(times):
        signal.raise_signal(signal.SIGINT)


class Pressing(mb.Callback):
    """Has Ctrl-C pressed so many times after the first epoch or mini-batch, and notes what came of it."""

    def __init__(self, times: int, batch: bool = False) -> None:
        self.times, self.batch, self.came = times, batch, []

    @property
    def wants_batches(self):
        return self.batch

    def press(self):
        self.came.append("pressed")
        ctrl_c(self.times)
        self.came.append("went on")

    def on_epoch_end(self, trainer, row):
        if not self.batch:
            self.press()

    def on_batch_end(self, trainer, loss):
        self.press()

    def on_exception(self, trainer, error):
        self.came.append(type(error))


@pytest.mark.parametrize("batch", [False, True])
def test_a_second_ctrl_c_breaks_a_callback_off(executor, batch):
    whole, broken = make(executor), make(executor)
    once, twice = Pressing(1, batch), Pressing(2, batch)
    assert fit(broken, X, Y, callbacks=[once]).stopped == "interrupted"
    assert once.came == ["pressed", "went on"]
    with pytest.raises(KeyboardInterrupt):
        fit(broken, X, Y, callbacks=[twice])
    assert twice.came == ["pressed", KeyboardInterrupt]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert broken.t == (2 if batch else 14)
    fit(broken, X, Y, max_epochs=3 - broken.epoch)
    fit(whole, X, Y, max_epochs=3)
    assert everything(broken) == everything(whole)


def test_a_second_ctrl_c_breaks_a_validation_off(executor):
    whole, broken = make(executor, average=mb.EMA(0.9, every=2)), make(executor, average=mb.EMA(0.9, every=2))
    inner = broken._executor

    class Validating(Stuttering):
        def evaluate(self, *arguments):
            ctrl_c(2)
            inner.evaluate(*arguments)

    broken._executor = Validating(inner, 100)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, X, Y, X_val=X, y_val=Y)
    broken._executor = inner
    assert (broken.epoch, broken.history["epoch"], "val_loss" in broken.history) == (1, [1], False)
    fit(broken, X, Y, X_val=X, y_val=Y, max_epochs=2)
    fit(whole, X, Y, X_val=X, y_val=Y, max_epochs=3)
    assert everything(broken) == everything(whole)
    for column in "epoch", "loss", "lr":
        assert broken.history[column] == whole.history[column]
    np.testing.assert_array_equal(broken.history["val_loss"], [math.nan, *whole.history["val_loss"][1:]])


@pytest.mark.parametrize("nested", [False, True])
def test_a_second_ctrl_c_breaks_no_mini_batch_off(executor, nested):
    whole, broken, outer = make(executor), make(executor), make(executor)
    inner = broken._executor
    broken._executor = Stuttering(inner, 2, 2, lambda: ctrl_c(3))

    class Fitting(mb.Callback):
        def on_epoch_end(self, trainer, row):
            fit(broken, X, Y)

    if nested:
        assert fit(outer, X, Y, callbacks=[Fitting()]).stopped == "interrupted"
        assert outer.epoch == 1
    else:
        fit(broken, X, Y)
    assert (broken.history.stopped, broken.t) == ("interrupted", 4)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    broken._executor = inner
    for each in broken, whole:
        fit(each, X, Y, max_epochs=1)
    assert everything(broken) == everything(whole)


def test_what_has_to_be_whole_ends_with_the_ctrl_c_that_came_before_or_during_it():
    def press_and_fit(trainer: mb.Trainer) -> None:
        with Whole():
            ctrl_c()
            fit(trainer, X, Y, max_epochs=10**6)

    trainer = make("numpy")
    with pytest.raises(KeyboardInterrupt):
        press_and_fit(trainer)
    assert trainer.history.stopped == "interrupted"
    with pytest.raises(KeyboardInterrupt):
        press_and_fit(make("numpy", optimizer=mb.SGD(1e38)))
    with Interrupt() as around:
        ctrl_c()
        around.raises = True
        with Whole() as whole:  # a callback's own, which is begun afterwards
            assert not whole.hit
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_threads_wait_for_one_another(executor):
    together, alone = make(executor, optimizer=mb.SGD(lr=0.0)), make(executor, optimizer=mb.SGD(lr=0.0))
    threads = [threading.Thread(target=fit, args=(together, X, Y), kwargs={"max_epochs": 10}) for _ in range(3)]
    threads += [threading.Thread(target=lambda: [together.step(X, Y) for _ in range(50)])]
    threads += [threading.Thread(target=lambda: [together.evaluate(X, Y) for _ in range(50)])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (together.t, together.epoch) == (3 * 10 * 7 + 50, 30)
    assert together.history["epoch"] == list(range(1, 31))
    assert together.evaluate(X, Y) == alone.evaluate(X, Y)


# ---- what isn't finite, and what is refused --------------------------------------------------------------------------


def test_a_diverging_fit_raises_and_keeps_the_last_finite_epoch(executor):
    bound = 18
    trainer = make(executor, "mse", optimizer=mb.SGD(lr=lambda t: 0.01 if t < bound else 1e60))
    with pytest.raises(
        FloatingPointError, match=r"the loss became (nan|inf) in epoch 3 at step 6 of 7, with lr 1e\+60"
    ):
        fit(trainer, X, LOSSES["mse"], max_epochs=10)
    expected = make(executor, "mse", optimizer=mb.SGD(lr=0.01))
    fit(expected, X, LOSSES["mse"], max_epochs=trainer.epoch)
    assert trainer.epoch == 2
    assert everything(trainer) == everything(expected)
    assert trainer.history["epoch"] == [1, 2]
    assert trainer.history.stopped is None
    bound = 1000  # and on from there, as if nothing had been
    assert fit(trainer, X, LOSSES["mse"], max_epochs=2)["loss"] == fit(expected, X, LOSSES["mse"], max_epochs=2)["loss"]
    assert everything(trainer) == everything(expected)


def test_weights_that_overflow_in_the_last_step_of_an_epoch_are_not_kept(executor):
    trainer = make(executor, optimizer=mb.SGD(lr=lambda t: 0.01 if t < 13 else 1e300))
    trainer.net.parameters()["0.bias"][:] = 1.0
    with pytest.raises(
        FloatingPointError, match="a weight became NaN or infinite in epoch 2 at step 7 of 7, with lr 1e"
    ):
        fit(trainer, X, Y)
    assert (trainer.epoch, trainer.t) == (1, 7)
    assert np.isfinite(trainer.net.flat).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_that_was_let_in_ends_the_fit_where_it_is_met(executor, bad):
    data = X.copy()
    data[70, 2] = bad
    trainer = make(executor, shuffle=False)
    before = everything(trainer)
    with pytest.raises(ValueError, match=r"X must be finite; got .* in row 70, column 2"):
        fit(trainer, data, Y)
    with pytest.raises(
        FloatingPointError, match=r"epoch 1 at step 5 of 7, with lr 0.01; .* the values they began with"
    ):
        fit(trainer, data, Y, check_finite=False)
    assert everything(trainer) == before


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_whose_loss_is_not_finite_changes_nothing(executor, bad):
    trainer = make(executor)
    data = X.copy()
    data[70, 2] = bad
    before = everything(trainer)
    with pytest.raises(FloatingPointError, match=r"the loss of update 1 is (nan|inf); nothing was changed"):
        trainer.step(data, Y)
    assert everything(trainer) == before


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((X[:, :5], Y), {}),
        ((X, Y[:-1]), {}),
        ((X, Y + 1), {}),
        ((X, Y), {"sample_weight": -W}),
        ((X, Y), {"X_val": X, "y_val": Y - 1}),
        ((X, Y), {"X_val": X}),
        ((X, Y), {"stop_at": {"val_accuracy": 1}}),
        ((X, Y), {"max_epochs": 0}),
    ],
)
def test_a_refused_fit_changes_nothing(executor, arguments, options):
    trainer = make(executor)
    fit(trainer, X, Y, max_epochs=1)
    before = everything(trainer), dict(trainer.history), trainer.history.stopped
    with pytest.raises(ValueError, match=r"."):
        fit(trainer, *arguments, **options)
    assert (everything(trainer), dict(trainer.history), trainer.history.stopped) == before


def test_a_wrong_mini_batch_is_refused(executor):
    trainer = make(executor)
    for method in trainer.step, trainer.gradients, trainer.evaluate:
        with pytest.raises(ValueError, match="X has 5 features; the network takes 6"):
            method(X[:, :5], Y)
        with pytest.raises(ValueError, match=r"y must hold class labels from 0 to 2; got 3 in row \d+"):
            method(X, Y + 1)
    assert trainer.t == 0


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "drop", "steps"), [(1, False, 100), (100, True, 1), (1000, False, 1), (33, False, 4), (33, True, 3)]
)
def test_mini_batches_may_have_any_size(executor, size, drop, steps):
    trainer = make(executor, batch_size=size, drop_last=drop)
    history = fit(trainer, X, Y, max_epochs=2)
    assert trainer.t == 2 * steps
    assert history["examples_per_second"][0] == pytest.approx(min(N, steps * size) / history["seconds"][0])


def test_a_step_may_be_larger_and_smaller_than_batch_size(executor):
    big, small = make(executor), make(executor, batch_size=N)
    for rows in slice(0, 1), slice(0, N), slice(5, 50):
        assert big.step(X[rows], Y[rows]) == small.step(X[rows], Y[rows])
    assert everything(big) == everything(small)


# ---- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_what_a_step_follows(executor, loss):
    y = LOSSES[loss]
    trainer = make(executor, loss, optimizer=mb.SGD(lr=1.0))
    before = everything(trainer)
    start = {name: array.copy() for name, array in trainer.net.parameters().items()}
    value, gradients = trainer.gradients(X, y, sample_weight=W)
    assert everything(trainer) == before
    assert list(gradients) == list(start)
    assert value == trainer.step(X, y, sample_weight=W)
    for name, array in trainer.net.parameters().items():
        scale = np.abs(start[name]).max() + np.abs(gradients[name]).max()
        np.testing.assert_allclose(start[name] - gradients[name], array, atol=2e-7 * scale, rtol=0)


def test_an_evaluation_is_that_of_the_outputs(executor, monkeypatch):
    monkeypatch.setattr(trainer, "_CHUNK", 8 * 7)  # rows of 8: chunks of 7
    classes, labels, values = (make(executor, loss) for loss in LOSSES)
    z = classes.net(X).astype(np.float64)
    logp = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    found = classes.evaluate(X, Y, sample_weight=W)
    assert found["loss"] == pytest.approx(-(W * logp[range(N), Y]).sum() / W.sum(), rel=1e-5)
    assert found["accuracy"] == pytest.approx((W * (z.argmax(axis=1) == Y)).sum() / W.sum())
    rows = np.eye(3)[Y]
    assert classes.evaluate(X, rows) == pytest.approx(classes.evaluate(X, Y), rel=1e-12)
    assert classes.evaluate(X, Y)["accuracy"] == (classes.net.predict(X) == Y).mean()

    y = LOSSES["bce_with_logits"]
    assert labels.evaluate(X, y)["accuracy"] == pytest.approx((labels.net.predict(X) == y).mean())

    y = LOSSES["mse"]
    residual, total = ((values.net(X) - y) ** 2).sum(axis=0), ((y - y.mean(axis=0)) ** 2).sum(axis=0)
    found = values.evaluate(X, y)
    assert found["r2"] == pytest.approx((1 - residual / total).mean(), rel=1e-5)
    assert found["loss"] == pytest.approx((residual / N).mean(), rel=1e-5)
    mean = (W @ y) / W.sum()
    weighted = 1 - W @ (values.net(X) - y) ** 2 / (W @ (y - mean) ** 2)
    assert values.evaluate(X, y, sample_weight=W)["r2"] == pytest.approx(weighted.mean(), rel=1e-5)


def test_r2_of_a_constant_target_is_1_or_0(executor):
    trainer = make(executor, "mse")
    trainer.net.flat[:] = 0
    assert trainer.evaluate(X, np.zeros((N, 3)))["r2"] == 1
    assert trainer.evaluate(X, np.ones((N, 3)))["r2"] == 0


@pytest.mark.parametrize("chunk", [1, 64, 1 << 20])
def test_r2_knows_a_constant_target_whatever_its_sums_are_rounded_to(chunk, monkeypatch):
    monkeypatch.setattr(trainer, "_CHUNK", chunk)
    one = make("numpy", "mse")
    for value in (0.1, 1 / 3, 1e30, -7.7):
        constant = np.full((N, 3), value)
        assert one.evaluate(X, constant)["r2"] == 0
        apart = np.where(np.arange(N)[:, None] % 7 == 3, 5.0, constant)  # in rows without weight
        assert one.evaluate(X, apart, sample_weight=np.arange(N) % 7 != 3)["r2"] == 0
    one.net.flat[:] = 0
    one.net.parameters()["3.bias"][:] = 0.1
    assert one.evaluate(X, np.full((N, 3), np.float32(0.1)), sample_weight=W)["r2"] == 1
    tiny = np.zeros((N, 3))
    tiny[0] = 1e-200  # its square is 0
    assert one.evaluate(X, tiny)["r2"] == 0


def test_validation_is_an_evaluation_after_the_epoch(executor):
    trainer = make(executor)
    history = fit(trainer, X, Y, max_epochs=2, X_val=X[:30], y_val=Y[:30])
    found = trainer.evaluate(X[:30], Y[:30])
    assert (history["val_loss"][-1], history["val_accuracy"][-1]) == (found["loss"], found["accuracy"])


def test_the_loss_decides_what_predict_returns(executor):
    for loss, y in LOSSES.items():
        trainer = make(executor, loss)
        fit(trainer, X, y, max_epochs=1)
        assert trainer.net.task == trainer.loss.task
        assert trainer.net.predict(X).shape == ((N,) if loss == "cross_entropy" else (N, 3))
    one = mb.Trainer(mb.mlp([6, 1]), "mse", executor=executor)
    for y in W, W[:, None]:
        fit(one, X, y, max_epochs=1)
        assert one.net.predict(X).shape == y.shape


def test_it_learns_the_digits(executor):
    X, y = mb.datasets.load_digits()
    trainer = mb.Trainer(mb.mlp([64, 64, 10]), optimizer=mb.Adam(lr=0.003), input_scale=1 / 16, executor=executor)
    fit(trainer, X[:1400], y[:1400], max_epochs=20)
    assert trainer.evaluate(X[1400:], y[1400:])["accuracy"] > 0.9


# ---- around it -------------------------------------------------------------------------------------------------------


def test_progress_is_a_bar_or_plain_lines_or_nothing(executor, capsys, monkeypatch):
    trainer = make(executor)
    trainer.fit(X, Y, max_epochs=2, verbose=0)
    assert capsys.readouterr() == ("", "")
    trainer.fit(X, Y, max_epochs=2, verbose=1, X_val=X, y_val=Y)
    out, error = capsys.readouterr()
    assert out == ""
    assert "| 2.0/2 epochs [" in error
    assert "val_accuracy=" in error
    for name in ("tqdm", "tqdm.auto"):
        monkeypatch.setitem(sys.modules, name, None)
    trainer.fit(X, Y, max_epochs=2, verbose=1)
    out, error = capsys.readouterr()
    assert out == ""
    assert [line.split("  ")[0] for line in error.splitlines()] == ["epoch 1/2", "epoch 2/2"]


def test_a_notebook_gets_its_own_bar(monkeypatch):
    """`tqdm.auto` knows where it is; the bar is made by what it chose, once, and updated and closed."""
    made = []

    class Widget:
        n = 0.0

        def __init__(self, **options):
            made.append(self)
            self.notes = [options["total"]]

        def update(self, n):
            self.n += n

        def set_postfix(self, figures, refresh):
            self.notes.append(list(figures))

        def close(self):
            self.notes.append("closed")

    monkeypatch.setattr("tqdm.auto.tqdm", Widget)
    make("numpy").fit(X, Y, max_epochs=2)
    assert [widget.notes for widget in made] == [[2, *[["loss", "lr", "examples/s"]] * 2, "closed"]]
    assert made[0].n == 2


def test_importing_takes_numpy_alone():
    names = "'tqdm', 'pandas', 'matplotlib', 'scipy', 'torch'"
    program = f"import sys, fastmb; print([name for name in ({names}) if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts memory this way on Linux alone")
def test_a_memmap_of_2_gigabytes_is_never_copied(executor, tmp_path):
    """A process that may have 400 MB more than it has already checks, trains on and evaluates a file of 2 GB."""
    program = f"""
        import pathlib, resource, numpy as np, fastmb as mb
        n, features = 1 << 18, 2048
        X = np.memmap({str(tmp_path / "X")!r}, np.float32, "w+", shape=(n, features))  # sparse: takes no room
        del X
        X = np.memmap({str(tmp_path / "X")!r}, np.float32, "r", shape=(n, features))
        assert X.nbytes == 2 << 30
        y = np.zeros(n, np.uint8)
        trainer = mb.Trainer(mb.mlp([features, 4, 2]), batch_size=4096, executor={executor!r})
        trainer.step(X[:64], y[:64])
        status = pathlib.Path("/proc/self/status").read_text()
        used = int(status.split("VmData:")[1].split()[0]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (used + 400 * 2**20,) * 2)
        trainer.fit(X, y, max_epochs=1, verbose=0)
        assert trainer.t == 1 + 64
        assert trainer.evaluate(X, y)["loss"] < 1
        try:
            np.array(X)
        except MemoryError:
            print("a copy would have failed")
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.stdout == "a copy would have failed\n", run.stderr
