"""ReduceLROnPlateau: torch's rates, whatever the metric does, and the same after a stop."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest

import fastmb as mb
from fastmb import _fitting, _snapshot, checkpoint

RNG = np.random.default_rng(0)
X = RNG.standard_normal((60, 6)).astype(np.float32)
Y = RNG.integers(0, 3, 60)
OPTIONS = [
    {},
    {"patience": 0},
    {"factor": 0.5, "patience": 2, "cooldown": 3},
    {"mode": "max", "patience": 1, "threshold": 0.1},
    {"mode": "max", "threshold_mode": "abs", "threshold": 0.2, "patience": 1, "factor": 0.3},
    {"threshold_mode": "abs", "threshold": 0.05, "patience": 1, "min_lr": 0.02},
    {"patience": 0, "factor": 0.9, "eps": 0.01},
    {"patience": 3, "cooldown": 1, "factor": 0.0, "min_lr": 1e-3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=repr)
@pytest.mark.parametrize("seed", range(5))
def test_every_epoch_has_torchs_rate(options, seed):
    torch = pytest.importorskip("torch", reason="compares with PyTorch, which is too large for the test extra")
    metrics = np.random.default_rng(seed).random(100) * np.linspace(1, 0.5, 100)
    metrics[[17, 50]] = math.nan, math.inf
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **options)
    ours = mb.ReduceLROnPlateau(0.3, **options)
    standing = ours.start()
    for value in metrics.tolist():
        assert standing.lr == optimizer.param_groups[0]["lr"]
        optimizer.step()
        theirs.step(value)
        standing = ours.after(standing, value)


def make(executor: str, **options) -> mb.Trainer:
    rate = mb.ReduceLROnPlateau(
        0.1, "loss", **{"patience": 0, "threshold": 0.1, "factor": 0.5, "cooldown": 1} | options
    )
    return mb.Trainer(mb.mlp([6, 8, 3]), optimizer=mb.SGD(rate, 0.9), batch_size=16, executor=executor)


def test_a_fit_has_the_rates_of_its_losses(executor):
    trainer = make(executor)
    history = trainer.fit(X, Y, max_epochs=12, verbose=0)
    schedule = trainer.optimizer.lr
    standing = schedule.start()
    for loss, rate in zip(history["loss"], history["lr"], strict=True):
        assert rate == standing.lr
        standing = schedule.after(standing, loss)
    assert len(set(history["lr"])) > 2


@pytest.mark.parametrize("way", ["checkpoint", "pickle", "go on"])
def test_a_resumed_fit_has_the_bits_of_one_never_stopped(way, executor, tmp_path):
    whole, stopped = make(executor), make(executor)
    whole.fit(X, Y, max_epochs=12, verbose=0)
    while stopped.epoch < 12:
        stopped.fit(X, Y, max_epochs=1, verbose=0)
        if stopped.epoch < 12:
            stopped.fit(X, Y, max_epochs=1, max_seconds=0, verbose=0)
        if way == "checkpoint":
            stopped.save(tmp_path / "file")
            stopped = mb.load(tmp_path / "file")
        elif way == "pickle":
            stopped = pickle.loads(pickle.dumps(stopped))
    assert stopped.history["lr"] == whole.history["lr"]
    assert (stopped.net.flat == whole.net.flat).all()


def test_a_step_has_the_rate_of_the_epochs_before():
    trainer, other = make("native"), make("native")
    for each in (trainer, other):
        each.fit(X, Y, max_epochs=5, verbose=0)
    rate = trainer._reacted()
    assert rate < 0.1
    trainer.step(X, Y)
    other.optimizer = mb.SGD(rate, 0.9)
    other._build(other.state)
    other.step(X, Y)
    assert (trainer.net.flat == other.net.flat).all()


def rates(schedule, losses):
    """What the schedule makes of losses, from its own first epoch on."""
    standing, found = schedule.start(), []
    for loss in losses:
        found.append(standing.lr)
        standing = schedule.after(standing, loss)
    return found


@pytest.mark.parametrize("way", ["go on", "checkpoint", "pickle", "load"])
def test_one_that_is_assigned_begins_with_the_epochs_after(way, executor, tmp_path):
    options = {"batch_size": 16, "executor": executor}
    trainer = mb.Trainer(mb.mlp([6, 8, 3]), optimizer=mb.SGD(1e-3, 0.9), **options)
    trainer.fit(X, Y, max_epochs=4, verbose=0)
    schedule = mb.ReduceLROnPlateau(0.1, "loss", patience=0, threshold=0.5, factor=0.5)
    trainer.optimizer = mb.SGD(schedule, 0.9)
    assert trainer._reacted() == 0.1
    trainer.fit(X, Y, max_epochs=3, verbose=0)
    trainer.batch_size = 16  # another setting: all is worked out anew
    if way == "checkpoint":
        trainer.save(tmp_path / "file")
        trainer = mb.load(tmp_path / "file")
    elif way == "pickle":
        trainer = pickle.loads(pickle.dumps(trainer))
    elif way == "load":
        trainer.save(tmp_path / "file")
        trainer = mb.Trainer(mb.mlp([6, 8, 3]), optimizer=mb.SGD(schedule, 0.9), **options)
        trainer.load(tmp_path / "file")
    history = trainer.fit(X, Y, max_epochs=3, verbose=0)
    assert history["lr"][4:] == rates(schedule, history["loss"][4:])
    assert len(set(history["lr"][4:])) > 2
    rate = trainer._reacted()
    trainer.optimizer = replace(trainer.optimizer, weight_decay=0.1)  # the same schedule goes on
    assert trainer._reacted() == rate
    trainer.optimizer = mb.SGD(copy.copy(schedule), 0.9)  # one like it begins
    assert trainer._reacted() == 0.1


def test_a_divergence_goes_back_to_before_it_was_assigned(executor, monkeypatch):
    monkeypatch.setattr(_snapshot, "IN_MEMORY", 0)
    monkeypatch.setattr(_fitting, "SPARING", 1e9)
    schedule = mb.ReduceLROnPlateau(0.1, "loss", patience=0, threshold=0.9)

    class Assigning(mb.Callback):
        def on_epoch_end(self, trainer, row):
            if row["epoch"] == 3:
                trainer.optimizer = mb.SGD(schedule, 0.9)
                trainer.net.flat[:] = math.nan

    trainer = mb.Trainer(mb.mlp([6, 8, 3]), optimizer=mb.SGD(0.01, 0.9), executor=executor)
    with pytest.raises(FloatingPointError, match="in epoch 4"):
        trainer.fit(X, Y, max_epochs=8, verbose=0, callbacks=[Assigning()])
    assert trainer.epoch < 3
    before = trainer.epoch
    history = trainer.fit(X, Y, max_epochs=4, verbose=0)
    assert history["lr"][before:] == rates(schedule, history["loss"][before:])


def test_a_checkpoint_that_does_not_tell_the_epoch_is_loaded(tmp_path, monkeypatch):
    trainer = make("numpy", threshold=0.9)
    trainer.fit(X, Y, max_epochs=4, verbose=0)
    describe = checkpoint.describe

    def without(trainer, tensors):
        found = describe(trainer, tensors)
        assert found["position"].pop("since") == 0
        return found

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "describe", without)
        trainer.save(tmp_path / "file")
    assert mb.load(tmp_path / "file")._reacted() == trainer._reacted() < 0.1


def test_a_metric_that_does_not_exist_is_told_with_those_that_do():
    trainer = mb.Trainer(mb.mlp([6, 3]), optimizer=mb.SGD(mb.ReduceLROnPlateau(0.1)))
    before = trainer.net.flat.copy()
    with pytest.raises(ValueError, match=r"monitor must be one of 'loss'; got 'val_loss'.*val_ metrics need X_val"):
        trainer.fit(X, Y, verbose=0)
    assert (trainer.net.flat == before).all()
    trainer = mb.Trainer(mb.mlp([6, 3]), optimizer=mb.SGD(mb.ReduceLROnPlateau(0.1, "val_acuracy")))
    with pytest.raises(ValueError, match="'val_loss', 'val_accuracy'; got 'val_acuracy'; did you mean 'val_accuracy'"):
        trainer.fit(X, Y, X_val=X, y_val=Y, verbose=0)


def test_the_direction_follows_from_the_metric_unless_told():
    assert mb.ReduceLROnPlateau(0.1, "val_loss").falls
    assert not mb.ReduceLROnPlateau(0.1, "val_accuracy").falls
    assert mb.ReduceLROnPlateau(0.1, "val_accuracy", mode="min").falls


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"factor": 1}, ValueError, r"factor must be a number in \[0, 1\); got 1"),
        ({"mode": "low"}, ValueError, "mode must be one of 'min', 'max'; got 'low'"),
        ({"threshold_mode": "both"}, ValueError, "threshold_mode must be one of 'rel', 'abs'"),
        ({"patience": -1}, ValueError, "patience must be an integer"),
        ({"lr": mb.StepLR(0.1, 3)}, TypeError, "lr must be a number"),
        ({"monitor": 5}, TypeError, "monitor must be the name of a metric; got 5"),
    ],
)
def test_misuse_is_named(wrong, error, message):
    with pytest.raises(error, match=message):
        mb.ReduceLROnPlateau(**{"lr": 0.1} | wrong)
    with pytest.raises(TypeError, match="schedulers must be a sequence of at least one schedule"):
        mb.SequentialLR([mb.ReduceLROnPlateau(0.1)], [])
    with pytest.raises(TypeError, match="momentum must be a number"):
        mb.SGD(momentum=mb.ReduceLROnPlateau(0.1))


def test_epochs_that_a_divergence_takes_back_are_forgotten(executor, monkeypatch):
    monkeypatch.setattr(_snapshot, "IN_MEMORY", 0)  # snapshots are taken as for large networks, seldom
    monkeypatch.setattr(_fitting, "SPARING", 1e9)

    class Breaking(mb.Callback):
        def on_epoch_end(self, trainer, row):
            if row["epoch"] == 6:
                trainer.net.flat[:] = math.nan

    trainer = make(executor, threshold=0.9)
    with pytest.raises(FloatingPointError, match="in epoch 7"):
        trainer.fit(X, Y, max_epochs=8, verbose=0, callbacks=[Breaking()])
    assert trainer.epoch == len(trainer.history["epoch"]) < 6
    again = copy.deepcopy(trainer)
    for each in trainer, again:
        each.fit(X, Y, max_epochs=3, verbose=0)
    assert trainer.history["lr"] == again.history["lr"]
    assert (trainer.net.flat == again.net.flat).all()
