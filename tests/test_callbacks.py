"""Callbacks: called when they say, nothing without them, and what the package's own ones do."""

from __future__ import annotations

import copy
import csv
import doctest
import math
import signal
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

import fastmb as mb
from fastmb import _fitting, callbacks, checkpoint

RNG = np.random.default_rng(0)
X = RNG.standard_normal((50, 6)).astype(np.float32)
Y = RNG.integers(0, 3, 50)
VAL = {"X_val": X[:20], "y_val": Y[:20]}


def make(executor: str = "numpy", **options: Any) -> mb.Trainer:
    net = mb.Sequential(mb.Linear(6, 8), mb.ReLU(), mb.Dropout(0.2), mb.Linear(8, 3), seed=1)
    return mb.Trainer(net, executor=executor, **{"optimizer": mb.Adam(0.01), "batch_size": 16, "seed": 5} | options)


def fit(trainer: mb.Trainer, *called: mb.Callback, **options: Any) -> mb.History:
    return trainer.fit(X, Y, verbose=0, callbacks=list(called), **{"max_epochs": 3} | options)


def everything(trainer: mb.Trainer) -> tuple[Any, ...]:
    return trainer.net.flat.tobytes(), trainer.state.tobytes(), trainer.t, trainer.epoch, trainer.history["loss"]


class Diary(mb.Callback):
    """Notes what it is called with."""

    def __init__(self) -> None:
        self.notes: list[Any] = []

    def on_fit_begin(self, trainer, metrics):
        self.notes.append(("begin", trainer.t, list(metrics)))

    def on_epoch_end(self, trainer, row):
        assert trainer._current is None
        self.notes.append(("epoch", trainer.t, row["epoch"], trainer.history["loss"][-1] == row["loss"]))

    def on_fit_end(self, trainer):
        self.notes.append(("end", trainer.t, trainer.history.stopped))


class BatchDiary(Diary):
    def on_batch_end(self, trainer, loss):
        self.notes.append(("batch", trainer.t, loss))


class Counting:
    """An executor that counts how often it is entered."""

    def __init__(self, executor: Any) -> None:
        self.executor, self.runs = executor, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.executor, name)

    def run(self, *arguments: Any) -> int:
        self.runs += 1
        return self.executor.run(*arguments)


class OneByOne(Counting):
    """An executor that makes one update a call."""

    def run(self, *arguments: Any) -> int:
        return super().run(*arguments[:3], arguments[3][:1], *arguments[4:])


class Asking(mb.Callback):
    def __init__(self, reason: Any, at: int, batch: bool) -> None:
        self.reason, self.at = reason, at
        if batch:
            self.__class__ = AskingBatch

    def on_epoch_end(self, trainer, row):
        return self.reason if row["epoch"] == self.at else None


class AskingBatch(Asking):
    def on_batch_end(self, trainer, loss):
        return self.reason if trainer.t == self.at else None


# ---- when they are called --------------------------------------------------------------------------------------------


def test_they_are_called_where_they_say(executor):
    diary = Diary()
    trainer = make(executor)
    fit(trainer, diary, max_epochs=2)
    epochs = [("epoch", 4, 1, True), ("epoch", 8, 2, True)]
    assert diary.notes == [("begin", 0, ["loss"]), *epochs, ("end", 8, "max_epochs")]
    diary.notes.clear()
    fit(trainer, diary, max_epochs=1, **VAL)
    assert diary.notes[0] == ("begin", 8, ["loss", "val_loss", "val_accuracy"])


def test_a_mini_batch_is_told_with_its_loss(executor):
    diary, alone, stepped = BatchDiary(), make(executor), make(executor, shuffle=False)
    fit(make(executor, shuffle=False), diary, max_epochs=1)
    losses = [stepped.step(X[rows : rows + 16], Y[rows : rows + 16]) for rows in range(0, 50, 16)]
    assert [note for note in diary.notes if note[0] == "batch"] == [("batch", t + 1, losses[t]) for t in range(4)]
    told = make(executor)
    fit(told, BatchDiary())
    fit(alone)
    assert everything(told) == everything(alone)


def test_python_is_entered_within_an_epoch_only_for_those_that_ask(executor, monkeypatch):
    monkeypatch.setattr(_fitting, "TICK", 1e9)
    runs = []
    for called in [(), (Diary(), mb.EarlyStopping("loss")), (BatchDiary(),)]:
        trainer = make(executor)
        trainer._executor = counting = Counting(trainer._executor)
        fit(trainer, *called, max_epochs=3)
        runs.append(counting.runs)
    assert runs == [3, 3, 12]


def test_epochs_that_are_broken_off_do_not_count(executor):
    diary, trainer = Diary(), make(executor)
    trainer._executor = OneByOne(trainer._executor)
    fit(trainer, diary, max_seconds=0)
    assert diary.notes == [("begin", 0, ["loss"]), ("end", 1, "max_seconds")]


@pytest.mark.parametrize(("at", "batch", "t"), [(2, False, 8), (2, True, 2), (4, True, 4), (5, True, 5)])
def test_a_string_ends_the_fit_and_it_can_go_on(executor, at, batch, t):
    trainer, whole = make(executor), make(executor)
    history = fit(trainer, Diary(), Asking("enough", at, batch))
    assert history.stopped == "enough"
    assert trainer.t == t
    fit(trainer, max_epochs=3 - trainer.epoch)
    fit(whole)
    assert everything(trainer) == everything(whole)


def test_an_instance_may_choose_whether_it_wants_batches(monkeypatch):
    monkeypatch.setattr(_fitting, "TICK", 1e9)

    class Choosing(BatchDiary):
        wants_batches = False

    trainer, diary = make(), Choosing()
    trainer._executor = counting = Counting(trainer._executor)
    fit(trainer, diary)
    assert counting.runs == 3
    assert "batch" not in {note[0] for note in diary.notes}


def test_a_fit_that_raises_has_no_end():
    diary = Diary()
    with pytest.raises(FloatingPointError):
        fit(make(optimizer=mb.SGD(1e38)), diary)
    assert [note[0] for note in diary.notes] == ["begin"]


class Raising(Diary):
    def on_fit_begin(self, trainer, metrics):
        super().on_fit_begin(trainer, metrics)
        if "val_loss" in metrics:
            raise RuntimeError("no")

    def on_fit_end(self, trainer):
        super().on_fit_end(trainer)
        raise RuntimeError("no")

    def on_exception(self, trainer, error):
        self.notes.append(("exception", type(error)))


def test_a_fit_that_raises_is_told_to_all():
    first, second = Raising(), Raising()
    with pytest.raises(FloatingPointError):
        fit(make(optimizer=mb.SGD(1e38)), first, second)
    assert [diary.notes[1:] for diary in (first, second)] == [[("exception", FloatingPointError)]] * 2
    first, second = Raising(), Raising()
    with pytest.raises(RuntimeError, match="no"):
        fit(make(), first, second, **VAL)
    assert first.notes[1:] == second.notes == [("exception", RuntimeError)]


def test_an_end_that_raises_keeps_no_other_from_its_own():
    before, raising, after = Diary(), Raising(), Diary()
    before.notes = after.notes = order = []
    before.on_fit_end = lambda trainer: order.append("first")
    trainer = make()
    with pytest.raises(RuntimeError, match="no"):
        fit(trainer, before, raising, after)
    assert order[-2:] == ["first", ("end", 12, "max_epochs")]
    assert raising.notes[-1] == ("end", 12, "max_epochs")
    assert trainer.history.stopped == "max_epochs"


@pytest.mark.parametrize(
    ("called", "error", "message"),
    [
        ([mb.EarlyStopping], TypeError, r"callbacks must be a list of callbacks such as \[EarlyStopping\(\)\]; got"),
        (print, TypeError, "callbacks must be a list of callbacks"),
        ([Asking(True, 1, False)], TypeError, "Asking.on_epoch_end must return None, or a string .*; got True"),
        (
            [mb.EarlyStopping()],
            ValueError,
            r"monitor must be one of 'loss'; got 'val_loss'.* \(val_ metrics need X_val",
        ),
        ([mb.ModelCheckpoint("x", save_best_only=True)], ValueError, "monitor must be one of 'loss'; got 'val_loss'"),
    ],
)
def test_misuse_is_named(called, error, message):
    with pytest.raises(error, match=message):
        make().fit(X, Y, max_epochs=1, verbose=0, callbacks=called)


def test_an_unknown_metric_is_told_with_those_that_exist_before_anything_is_done():
    trainer = make()
    message = r"monitor must be one of 'loss', 'val_loss', 'val_accuracy'; got 'val_acuracy'; did you mean 'val_accurac"
    with pytest.raises(ValueError, match=message):
        fit(trainer, mb.EarlyStopping("val_acuracy"), **VAL)
    assert trainer.t == 0
    assert trainer.history["epoch"] == []


def test_examples_in_the_documentation_run():
    for module in (callbacks, checkpoint):
        found = doctest.testmod(module)
        assert found.attempted
        assert not found.failed


class Calling(mb.Callback):
    """Calls something with the trainer, once, and notes the error."""

    def __init__(self, call: Any, method: str) -> None:
        self.call, self.method, self.error = call, method, None
        setattr(self, method, self.called)

    @property
    def wants_batches(self):
        return self.method == "on_batch_end"

    def called(self, trainer, *news):
        call, self.call = self.call, None
        try:
            if call:
                call(trainer)
        except Exception as error:
            self.error = error


WITHIN = ["on_fit_begin", "on_batch_end", "on_epoch_end"]


@pytest.mark.parametrize("method", WITHIN)
@pytest.mark.parametrize("name", ["fit", "step", "apply", "load"])
def test_what_moves_a_trainer_is_refused_while_a_fit_of_it_is_under_way(name, method, tmp_path):
    trainer, whole = make(), make()
    trainer.save(tmp_path / "saved")
    arguments = {"fit": (X, Y), "step": (X, Y), "apply": (), "load": (tmp_path / "saved",)}[name]
    calling = Calling(lambda trainer: getattr(trainer, name)(*arguments), method)
    fit(trainer, calling)
    assert isinstance(calling.error, RuntimeError)
    assert str(calling.error) == f"fit() of this trainer is under way: {name}() has to wait until it has ended"
    fit(whole)
    assert everything(trainer) == everything(whole)
    fit(trainer, Calling(lambda trainer: fit(trainer, max_epochs=1), "on_fit_end"), max_epochs=1)
    assert trainer.epoch == 5


@pytest.mark.parametrize("method", WITHIN)
def test_what_leaves_a_trainer_in_its_place_goes_on_working_within_a_fit(method, tmp_path):
    def look(trainer):
        trainer.evaluate(X, Y)
        trainer.gradients(X, Y)
        trainer.net.predict(X)
        trainer.save(tmp_path / "saved")
        with trainer.averaged():
            trainer.evaluate(X, Y)
        fit(copy.deepcopy(trainer), max_epochs=1)
        mb.load(tmp_path / "saved").step(X, Y)

    trainer, whole = make(average=mb.EMA(0.9)), make(average=mb.EMA(0.9))
    looking = Calling(look, method)
    fit(trainer, looking)
    assert looking.error is None
    fit(whole)
    assert everything(trainer) == everything(whole)


def test_a_trainer_is_free_again_after_a_fit_that_raised():
    trainer = make()
    with pytest.raises(RuntimeError, match="no"):
        fit(trainer, Raising(), **VAL)
    trainer.step(X, Y)


@pytest.mark.parametrize("epoch", [3, 100])
def test_a_fit_ends_too_if_a_callback_has_moved_the_epoch(epoch):
    def move(trainer):
        trainer.epoch = epoch

    trainer = make()
    assert fit(trainer, Calling(move, "on_epoch_end"), max_seconds=5).stopped == "max_epochs"
    assert trainer.epoch == epoch


def test_what_an_exception_callback_raises_hides_neither_the_error_nor_it_from_others():
    class Failing(Diary):
        def on_exception(self, trainer, error):
            self.notes.append(("exception", type(error)))
            raise OSError("no log")

    first, second = Failing(), Failing()
    with pytest.raises(FloatingPointError) as caught:
        fit(make(optimizer=mb.SGD(1e38)), first, second)
    assert [diary.notes[1:] for diary in (first, second)] == [[("exception", FloatingPointError)]] * 2
    assert caught.value.__notes__ == ["Failing.on_exception raised OSError('no log')"] * 2


def test_callbacks_read_a_row_and_dont_write_it():
    class Writing(mb.Callback):
        def on_epoch_end(self, trainer, row):
            with pytest.raises(TypeError):
                row["mine"] = np.float32(1)
            assert dict(row) == trainer.history._rows[-1]

    fit(make(), Writing())


# ---- the package's own -----------------------------------------------------------------------------------------------


def stop_after(values: list[float], **options: Any) -> tuple[mb.EarlyStopping, int | None]:
    """The callback, and the epoch in which it ended a fit with these values."""
    trainer = make()
    stopping = mb.EarlyStopping(**options)
    stopping.on_fit_begin(trainer, ["loss", "val_loss", "val_accuracy"])
    for epoch, value in enumerate(values, 1):
        trainer.net.flat.fill(epoch)
        if stopping.on_epoch_end(trainer, {"epoch": epoch, stopping.monitor: value}):
            break
    else:
        epoch = None
    stopping.on_fit_end(trainer)
    assert (trainer.net.flat == (stopping.best_epoch if stopping.restore_best else epoch or len(values))).all()
    return stopping, epoch


@pytest.mark.parametrize("restore", [True, False])
def test_early_stopping_waits_for_its_patience_and_restores_the_best(restore):
    options = {"restore_best": restore}
    stopping, epoch = stop_after([5, 3, 4, 3, 3, 2], patience=3, **options)
    assert (stopping.best, stopping.best_epoch, epoch) == (3, 2, 5)
    stopping, epoch = stop_after([5, 3, 4, 3, 2.9, 4], patience=3, **options)
    assert (stopping.best, stopping.best_epoch, epoch) == (2.9, 5, None)
    stopping, epoch = stop_after([5, 3, 4, 3, 2.9, 2.4], patience=3, min_delta=0.5, **options)
    assert (stopping.best, stopping.best_epoch, epoch) == (3, 2, 5)
    stopping, epoch = stop_after([0.5, 0.7, 0.6, 0.65], monitor="val_accuracy", patience=2, **options)
    assert (stopping.best, stopping.best_epoch, epoch) == (0.7, 2, 4)


def test_nan_is_no_improvement():
    stopping, epoch = stop_after([math.nan, math.nan], patience=2)
    assert (stopping.best, epoch) == (None, 2)
    stopping, epoch = stop_after([math.nan, 2, math.nan, 1], patience=2)
    assert (stopping.best, epoch) == (1, None)


def test_early_stopping_ends_a_fit_with_the_best_weights(executor):
    y = RNG.integers(0, 3, 50)  # noise: what is learnt of it is worth nothing
    trainer, again = make(executor, optimizer=mb.Adam(0.05)), make(executor, optimizer=mb.Adam(0.05))
    stopping = mb.EarlyStopping(patience=4, restore_best=True)
    history = trainer.fit(X, Y, X_val=X, y_val=y, max_epochs=200, verbose=0, callbacks=[stopping])
    assert history.stopped == "early_stopping"
    assert trainer.epoch == stopping.best_epoch + 4
    assert stopping.best == min(history["val_loss"]) == history["val_loss"][stopping.best_epoch - 1]
    assert trainer.evaluate(X, y)["loss"] == stopping.best
    fit(again, max_epochs=stopping.best_epoch)
    assert again.net.flat.tobytes() == trainer.net.flat.tobytes()


def test_weights_are_not_restored_in_the_middle_of_an_epoch(executor):
    trainer, whole = make(executor), make(executor)
    fit(trainer, mb.EarlyStopping("loss", restore_best=True), Asking("pause", 6, True))
    assert trainer.t == 6
    fit(trainer, max_epochs=2)
    fit(whole, max_epochs=3)
    assert everything(trainer) == everything(whole)


class Breaking(mb.Callback):
    """Notes the weights of each epoch, and breaks the fit off in the middle of the third."""

    def __init__(self, how: Any) -> None:
        self.how, self.seen = how, []

    def on_epoch_end(self, trainer, row):
        self.seen.append([array.tobytes() for array in trainer.net._learned])

    def on_batch_end(self, trainer, loss):
        return self.how() if trainer.t == 10 else None


def fail() -> None:
    raise RuntimeError("no")


@pytest.mark.parametrize("how", [lambda: "pause", lambda: signal.raise_signal(signal.SIGINT), fail])
def test_the_best_weights_of_a_fit_that_was_broken_off_can_be_had(executor, how):
    net = mb.Sequential(mb.Linear(6, 8), mb.BatchNorm1d(8), mb.ReLU(), mb.Linear(8, 3))
    trainer = mb.Trainer(net, batch_size=16, executor=executor)
    breaking, stopping = Breaking(how), mb.EarlyStopping("loss", restore_best=True)
    with pytest.raises(RuntimeError, match="no") if how is fail else nullcontext():
        fit(trainer, breaking, stopping)
    assert (trainer.t, stopping.best_epoch) == (10, 2)
    assert trainer.net.flat.tobytes() != breaking.seen[1][0]
    for _ in range(2):
        stopping.restore(trainer)
        assert [array.tobytes() for array in trainer.net._learned] == breaking.seen[1]
        fit(trainer, max_epochs=1)
    assert trainer.epoch == 4


def test_weights_that_are_not_there_or_of_another_network_are_not_restored():
    stopping, without = mb.EarlyStopping("loss", restore_best=True), mb.EarlyStopping("loss")
    trainer, other = make(average=mb.EMA(0.9)), mb.Trainer(mb.mlp([6, 4, 3]))
    fit(trainer, without)
    for each in (stopping, without):
        with pytest.raises(ValueError, match=r"no weights to restore: EarlyStopping\(restore_best=True\) keeps them"):
            each.restore(trainer)
    fit(trainer, stopping)
    before = other.net.flat.copy()
    with pytest.raises(ValueError, match="those of another network than this trainer's"):
        stopping.restore(other)
    assert (other.net.flat == before).all()
    with trainer.averaged(), pytest.raises(RuntimeError, match="the network has its averaged weights"):
        stopping.restore(trainer)


@pytest.mark.parametrize("options", [{"patience": 0}, {"min_delta": -1}, {"patience": 1.5}])
def test_wrong_settings_are_named(options):
    with pytest.raises((ValueError, TypeError), match=next(iter(options)) + " must be"):
        mb.EarlyStopping(**options)


def test_the_last_epoch_is_saved_and_resumes(executor, tmp_path):
    trainer, whole = make(executor), make(executor)
    fit(trainer, mb.ModelCheckpoint(tmp_path / "last"), max_epochs=2)
    found = mb.load(tmp_path / "last")
    assert everything(found) == everything(trainer)
    fit(found, max_epochs=1)
    fit(whole)
    assert everything(found) == everything(whole)


def test_a_save_in_the_middle_of_an_epoch_resumes(executor, tmp_path):
    class Saving(mb.Callback):
        def on_batch_end(self, trainer, loss):
            if trainer.t == 6:
                trainer.save(tmp_path / "middle")

    whole = make(executor)
    fit(whole, Saving())
    found = mb.load(tmp_path / "middle")
    assert found.t == 6
    fit(found, max_epochs=2)
    assert everything(found) == everything(whole)


def test_only_better_epochs_are_saved_if_asked(tmp_path, monkeypatch):
    trainer, saved = make(), []
    monkeypatch.setattr(trainer, "save", lambda path: saved.append(path))
    best = mb.ModelCheckpoint(tmp_path / "best", "val_accuracy", save_best_only=True)
    for values in ([0.5, math.nan, 0.4, 0.6], [0.55, 0.7]):  # two fits
        best.on_fit_begin(trainer, ["loss", "val_loss", "val_accuracy"])
        for value in values:
            best.on_epoch_end(trainer, {"val_accuracy": value})
    assert len(saved) == 3
    assert best.best == 0.7


def test_what_cannot_be_saved_is_told_before_the_first_epoch(tmp_path):
    for trainer, path, error in [
        (make(optimizer=mb.SGD(lambda t: 0.1)), tmp_path / "x", TypeError),
        (make(), tmp_path / "nowhere" / "x", FileNotFoundError),
        (make(), tmp_path, IsADirectoryError),
        (make(), "/proc/x", OSError),
    ]:
        with pytest.raises(error, match="Python function" if error is TypeError else "path must be"):
            fit(trainer, mb.ModelCheckpoint(path))
        assert trainer.t == 0


def test_the_log_has_the_rows_of_the_history(executor, tmp_path):
    trainer, log = make(executor), mb.CSVLogger(tmp_path / "log.csv")
    log.path.write_text("old\n")
    for epochs in (2, 1):
        history = fit(trainer, log, max_epochs=epochs, **VAL)
    with log.path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(history)
    assert {name: [float(row[name]) for row in rows] for name in history} == dict(history)
    fit(trainer, mb.CSVLogger(log.path, append=True), **VAL)
    assert len(log.path.read_text().splitlines()) == 7
    with pytest.raises(ValueError, match=r"begins with 'epoch,loss,val_loss,.*this fit has the columns 'epoch,loss,lr"):
        fit(trainer, log)
    fit(trainer, mb.CSVLogger(log.path))
    assert log.path.read_text().splitlines()[0] == "epoch,loss,lr,seconds,examples_per_second"


def test_a_fit_without_an_epoch_leaves_the_log_that_was_there(tmp_path):
    trainer, log = make(), mb.CSVLogger(tmp_path / "log.csv")
    log.path.write_text("old\n")
    with pytest.raises(ValueError, match="got 'val_los'"):
        fit(trainer, log, mb.EarlyStopping("val_los"))
    with pytest.raises(RuntimeError, match="no"):
        fit(trainer, log, Raising(), **VAL)
    assert fit(trainer, log, Asking("pause", 2, True)).stopped == "pause"
    assert log.path.read_text() == "old\n"
    fit(trainer, log, max_epochs=1)
    header, row = log.path.read_text().splitlines()
    assert (header, row.split(",")[0]) == ("epoch,loss,lr,seconds,examples_per_second", "1")


def test_a_log_that_cannot_be_written_is_told_before_the_first_epoch(tmp_path):
    trainer = make()
    with pytest.raises(FileNotFoundError):
        fit(trainer, mb.CSVLogger(tmp_path / "nowhere" / "log.csv"))
    assert trainer.t == 0


# ---- figures of gradients --------------------------------------------------------------------------------------------


def test_figures_of_gradients_are_told_logged_and_looked_at(executor, tmp_path):
    diary, log = Diary(), mb.CSVLogger(tmp_path / "log.csv")
    saving = mb.ModelCheckpoint(tmp_path / "best", "grad_norm", save_best_only=True)
    trainer = make(executor, gradient_stats=True)
    history = fit(trainer, diary, log, saving, max_epochs=6, **VAL)
    assert ["epoch", *diary.notes[0][2], "lr", "seconds", "examples_per_second"] == list(history)
    with log.path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(history)
    assert [float(row["noise_scale"]) for row in rows] == history["noise_scale"]
    assert saving.best == min(history["grad_norm"])
    for name in ("val_los", "lr"):
        with pytest.raises(ValueError, match=r"one of 'loss', 'example_norm_mean', .*'noise_scale_high'; got"):
            fit(trainer, mb.EarlyStopping(name))
    with pytest.raises(ValueError, match="monitor must be one of 'loss'; got 'grad_norm'"):
        fit(make(executor), mb.EarlyStopping("grad_norm"))


FALL = ["loss", "val_loss", "example_norm_mean", "example_norm_max", "grad_norm", "grad_variance"]
RISE = ["val_accuracy", "val_r2", "noise_scale", "noise_scale_low", "noise_scale_high"]


@pytest.mark.parametrize("name", FALL + RISE)
def test_norms_are_to_fall_and_noise_scales_to_rise(name):
    falls = name in FALL
    assert callbacks.improved(name, 1.0, 2.0) == falls
    assert callbacks.improved(name, 2.0, 1.0) != falls
    assert _fitting.reached(name, 1.0, 2.0) == falls
    assert _fitting.reached(name, 2.0, 1.0) != falls
    assert mb.ReduceLROnPlateau(0.1, name).falls == falls


def test_a_fit_ends_at_a_figure_of_gradients_and_a_rate_follows_one(executor):
    rate = mb.ReduceLROnPlateau(0.1, "grad_variance", patience=0, threshold=0.5)
    trainer = make(executor, gradient_stats=True, optimizer=mb.SGD(rate))
    assert fit(trainer, stop_at={"grad_norm": 1e-6}).stopped == "max_epochs"
    assert fit(trainer, stop_at={"noise_scale": 1e-6}).stopped == "stop_at"
    assert trainer.epoch == 4
    assert len(set(trainer.history["lr"])) > 1


def test_what_could_not_be_saved_is_not_the_best(tmp_path):
    class Unplug(mb.Callback):
        def on_epoch_end(self, trainer, row):
            (tmp_path / "disk").rmdir()

    (tmp_path / "disk").mkdir()
    trainer, best = make(optimizer=mb.SGD(lr=0.0)), mb.ModelCheckpoint(tmp_path / "disk" / "best", "loss", True)
    with pytest.raises(OSError, match="must be in a folder that exists"):
        fit(trainer, Unplug(), best, max_epochs=1)
    assert best.best is None
    (tmp_path / "disk").mkdir()
    fit(trainer, best, max_epochs=1)
    assert (tmp_path / "disk" / "best").exists()


def test_any_string_ends_a_fit():
    class Stop(mb.Callback):
        def on_batch_end(self, trainer, loss):
            return "" if trainer.t == 2 else None

    trainer = make()
    assert fit(trainer, Stop(), max_epochs=3).stopped == ""
    assert trainer.t == 2


def test_after_a_divergence_the_row_of_half_an_epoch_is_back(monkeypatch):
    class Stop(mb.Callback):
        def on_batch_end(self, trainer, loss):
            return "half" if trainer.t == 2 else None

    monkeypatch.setattr(_fitting, "SPARING", 1e9)  # one snapshot, as of a large network
    monkeypatch.setattr("fastmb._snapshot.IN_MEMORY", 1)
    trainer = make(optimizer=mb.SGD(lr=lambda t: 0.001 if t < 9 else 1e30), batch_size=10)
    rows = list(fit(trainer, Stop(), max_epochs=1)["loss"])
    with pytest.raises(FloatingPointError, match="after update 2"):
        fit(trainer, max_epochs=5)
    assert (trainer.t, trainer.epoch, trainer.history["loss"]) == (2, 0, rows)


def test_a_fit_that_a_callback_refuses_leaves_the_task():
    trainer = make()
    fit(trainer, max_epochs=1)
    other = mb.Trainer(trainer.net, "mse", input_scale=0.5, executor="numpy")
    before = trainer.net.task, trainer.net.input_scale, trainer.net.squeeze
    with pytest.raises(ValueError, match="monitor must be one of"):
        other.fit(X, np.eye(3)[Y], callbacks=[mb.EarlyStopping("val_loss")], verbose=0)
    assert (trainer.net.task, trainer.net.input_scale, trainer.net.squeeze) == before
    assert trainer.history.stopped == "max_epochs"
    with pytest.raises(ValueError, match="monitor must be one of"):
        fit(trainer, mb.EarlyStopping("val_loss"))
    assert trainer.history.stopped is None
