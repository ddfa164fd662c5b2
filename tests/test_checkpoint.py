"""Checkpoints: a trainer comes back whole, and no crash leaves half of a file."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import textwrap
import threading
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import fastmb as mb
from fastmb import _files, _fitting, checkpoint, optim

RNG = np.random.default_rng(0)
X = RNG.standard_normal((100, 6)).astype(np.float32)
Y = RNG.integers(0, 3, 100)
SCHEDULE = mb.SequentialLR(
    [
        mb.ChainedScheduler([mb.LinearLR(0.01), mb.MultiStepLR(0.01, [3, 9])]),
        mb.WarmUp(mb.CyclicLR(0.001, 0.01, 3, mode="exp_range", gamma=0.99)),
    ],
    [20],
)


def make(executor: str = "numpy", **options: Any) -> mb.Trainer:
    options = {"optimizer": mb.Adam(lr=0.01), "batch_size": 16, "seed": 5} | options
    net = mb.Sequential(mb.Linear(6, 8), mb.ReLU(), mb.Dropout(0.2), mb.Linear(8, 3), seed=1)
    return mb.Trainer(net, executor=executor, **options)


def fit(trainer: mb.Trainer, epochs: int, **options: Any) -> mb.History:
    return trainer.fit(X, Y, max_epochs=epochs, verbose=0, **options)


def everything(trainer: mb.Trainer) -> tuple[Any, ...]:
    place = trainer._current and (trainer._current.rows, trainer._current.done, trainer._current.sums.tobytes())
    return trainer.net.flat.tobytes(), trainer.state.tobytes(), trainer.t, trainer.epoch, place


def again(trainer: mb.Trainer, folder: Any) -> mb.Trainer:
    trainer.save(folder / "again")
    return mb.load(folder / "again")


# ---- whole -----------------------------------------------------------------------------------------------------------

OPTIMIZERS = [
    mb.SGD(0.01, momentum=0.9, nesterov=True),
    mb.SGD(SCHEDULE),
    mb.Adam(0.01, betas=(0.8, 0.99), amsgrad=True),
    mb.AdamW(0.01),
    mb.RMSprop(0.01, momentum=0.5, centered=True),
    mb.Adagrad(0.01, initial_accumulator_value=0.25),
    mb.NAdam(0.01, decoupled_weight_decay=True),
    mb.RAdam(0.01, weight_decay=SCHEDULE),
    mb.Adamax(0.01, betas=(SCHEDULE, 0.99)),
    mb.Adadelta(),
    mb.Adafactor(0.1),
    mb.Muon(0.1, adamw_names=["3.*"], adamw_lr=SCHEDULE, groups={"0.*": {"lr": 0.5}}),
    mb.Lion(groups=[("*.bias", {"lr": 3, "weight_decay": 0}), ("0.*", {"lr": 0})]),
]


def test_every_optimiser_is_saved_here():
    assert {type(optimizer) for optimizer in OPTIMIZERS} == set(optim.OPTIMIZERS.values())


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o.kind)
def test_a_resumed_fit_has_the_bits_of_one_never_stopped(executor, optimizer, tmp_path):
    whole, stopped = make(executor, optimizer=optimizer), make(executor, optimizer=optimizer)
    fit(whole, 5, X_val=X, y_val=Y)
    fit(stopped, 2, X_val=X, y_val=Y)
    resumed = again(stopped, tmp_path)
    assert everything(resumed) == everything(stopped)
    assert repr(resumed) == repr(stopped)
    assert resumed.optimizer == optimizer
    assert resumed.history == stopped.history
    assert resumed.history.stopped == "max_epochs"
    fit(resumed, 3, X_val=X, y_val=Y)
    assert everything(resumed) == everything(whole)
    for column in ("epoch", "loss", "val_loss", "val_accuracy", "lr"):
        assert resumed.history[column] == whole.history[column]


class OneByOne:
    """An executor that makes one update a call."""

    def __init__(self, executor: Any) -> None:
        self.executor = executor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.executor, name)

    def run(self, *arguments: Any) -> int:
        return self.executor.run(*arguments[:3], arguments[3][:1], *arguments[4:])


@pytest.mark.parametrize("slice_", [_fitting.SLICE, 3])
@pytest.mark.parametrize("batch_size", [7, 16])
def test_mid_epoch_too(executor, slice_, batch_size, tmp_path, monkeypatch):
    monkeypatch.setattr(_fitting, "SLICE", slice_)
    monkeypatch.setattr(checkpoint, "SLICE", slice_)
    whole, resumed = (make(executor, batch_size=batch_size) for _ in range(2))
    fit(whole, 2)
    places = set()
    while resumed.epoch < 2:
        resumed._executor = OneByOne(resumed._executor)
        fit(resumed, 1, max_seconds=0)
        before = everything(resumed)
        resumed = again(resumed, tmp_path)
        assert everything(resumed) == before
        places.add(resumed._current and resumed._current.done)
    assert places == {*range(1, -(-100 // batch_size)), None}
    assert everything(resumed) == everything(whole)
    assert resumed.history["loss"] == whole.history["loss"]


def test_all_settings_come_back(tmp_path):
    modules = [
        mb.LeakyReLU(0.3),
        mb.ELU(0.5),
        mb.SELU(),
        mb.GELU(),
        mb.GELU("tanh"),
        mb.SiLU(),
        mb.Mish(),
        mb.Softplus(),
    ]
    modules += [mb.Tanh(), mb.Sigmoid(), mb.Identity(), mb.Dropout(0.3), mb.ReLU()]
    first = mb.Linear(6, 8, bias=False, init=np.asfortranarray(RNG.standard_normal((6, 8))))
    last = mb.Linear(8, 3, init="normal", bias_init=[0.1, 0.2, 0.3])
    net = mb.Sequential(first, *modules, last, mb.Softmax(), seed=2**64 - 1, dtype="float64")
    loss = mb.CrossEntropy(0.1, class_weight=[1, 2, 0.1])
    options = {"shuffle": False, "drop_last": True, "seed": 2**64 - 1, "n_threads": 3, "input_scale": 0.1}
    trainer = mb.Trainer(net, loss, "sgd", batch_size=33, executor="numpy", **options)
    fit(trainer, 1)
    found = again(trainer, tmp_path)
    assert repr(found) == repr(trainer)
    assert repr(found.net) == repr(net)
    assert found.net.modules[1:-2] == net.modules[1:-2]
    assert (found.net.modules[0].init == first.init).all()
    assert (found.net.modules[-2].bias_init == last.bias_init).all()
    assert (found.loss.class_weight == loss.class_weight).all()
    for name in ("batch_size", "n_threads", "executor", *options):
        assert getattr(found, name) == getattr(trainer, name)
    for name in ("seed", "dtype", "squeeze", "task", "input_scale"):
        assert getattr(found.net, name) == getattr(net, name)
    assert (found.net.predict_proba(X) == net.predict_proba(X)).all()


@pytest.mark.parametrize("loss", [mb.MSE(), mb.MAE(), mb.Huber(0.3), mb.BCEWithLogits([2.0])])
def test_every_loss_comes_back(loss, tmp_path):
    trainer = mb.Trainer(mb.mlp([6, 1]), loss, executor="numpy")
    trainer.fit(X, Y > 0, max_epochs=1, verbose=0)
    found = again(trainer, tmp_path)
    assert repr(found) == repr(trainer)
    assert (found.net.predict(X) == trainer.net.predict(X)).all()
    assert found.net.predict(X).shape == (100,)
    with pytest.raises(ValueError, match="X has 5 features"):  # the same checks, too
        found.evaluate(X[:, :5], Y > 0)


def test_others_can_read_it(tmp_path):
    trainer = make()
    trainer.save(tmp_path / "file")
    with safe_open(tmp_path / "file", "np") as file:
        parameters = trainer.net.parameters()
        assert {*parameters, "state.0.0.weight", "state.1.3.bias"} <= set(file.keys())
        for name, array in parameters.items():
            assert (file.get_tensor(name) == array).all()
        assert json.loads(file.metadata()["fastmb"])["optimizer"]["lr"] == 0.01


def test_what_a_file_cannot_hold_is_named(tmp_path):
    class Own(mb.ReLU):
        pass

    for trainer, message in [
        (
            make(optimizer=mb.SGD(lr=math.sqrt)),
            "optimizer.lr can't be saved: <built-in function sqrt> is a Python func",
        ),
        (mb.Trainer(mb.Sequential(mb.Linear(6, 3), Own())), "net.1 can't be saved: Own is not one of Linear, Dropout"),
    ]:
        with pytest.raises(TypeError, match=message):
            trainer.save(tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_a_path_that_no_file_can_have_is_named(tmp_path):
    for path, error, message in [
        (tmp_path, IsADirectoryError, "path must be that of a file; got the folder"),
        (tmp_path / "nowhere" / "x", FileNotFoundError, "path must be in a folder that exists; got "),
        ("/proc/x", OSError, "path must be in a folder where files can be made; got '/proc/x'"),
    ]:
        with pytest.raises(error, match=message):
            make("numpy").save(path)


def test_rows_that_could_not_be_loaded_are_not_saved(tmp_path):
    trainer = make("numpy")
    fit(trainer, 1)
    trainer.history._rows[0]["mine"] = "good"
    with pytest.raises(ValueError, match="history must hold rows of numbers"):
        trainer.save(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_header_that_no_reader_takes_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_LONGEST", 1000)
    with pytest.raises(ValueError, match=r"header of \d+ bytes, 1000 are allowed; history has 0 rows"):
        make().save(tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    make().save(tmp_path / "file")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"needs the package 'safetensors': pip install 'fastmb\[checkpoint\]'"):
        mb.load(tmp_path / "file")


def test_large_tensors_are_written_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(_files, "_CHUNK", 100)
    trainer = make()
    trainer.save(tmp_path / "file")
    assert mb.load(tmp_path / "file").net.flat.tobytes() == trainer.net.flat.tobytes()


def test_it_can_be_saved_where_no_thread_can_be_started(tmp_path, monkeypatch):
    class Refused(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't create new thread at interpreter shutdown")

    trainer = make()
    monkeypatch.setattr(threading, "Thread", Refused)
    trainer.save(tmp_path / "file")
    assert mb.load(tmp_path / "file").net.flat.tobytes() == trainer.net.flat.tobytes()


# ---- into a trainer that is there ------------------------------------------------------------------------------------


def test_a_trainer_goes_on_from_a_checkpoint_of_one_like_it(tmp_path, executor):
    whole, saved, other = (make(executor=executor) for _ in range(3))
    fit(whole, 4)
    fit(saved, 2)
    saved.save(tmp_path / "file")
    fit(other, 1)
    view = other.net.parameters()["0.weight"]
    other.load(tmp_path / "file")
    assert view is other.net.parameters()["0.weight"]
    fit(other, 2)
    assert everything(other) == everything(whole)
    assert other.history["epoch"] == whole.history["epoch"]


def test_hyper_parameters_stay(tmp_path):
    make().save(tmp_path / "file")
    trainer = make(optimizer=mb.Adam(0.5), batch_size=7, seed=9)
    trainer.load(tmp_path / "file")
    assert (trainer.optimizer.lr, trainer.batch_size, trainer.seed) == (0.5, 7, 9)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (
            lambda: mb.mlp([6, 9, 3]),
            r"0.weight has shape \(6, 8\), the network's has \(6, 9\); 0.bias has shape \(8,\), ",
        ),
        (
            lambda: mb.mlp([6, 8, 5, 3]),
            r"4.weight is missing; 4.bias is missing; 2.weight has shape \(8, 3\), the",
        ),
        (lambda: mb.mlp([6, 8, 3], bias=False), "0.bias is none of the network's; 2.bias is none of the network's$"),
        (lambda: mb.mlp([6, 8, 3], dtype="float64"), "0.weight is float32, the network's is float64; "),
    ],
)
def test_a_checkpoint_of_another_network_is_told_by_its_parameters(tmp_path, net, message):
    mb.Trainer(mb.mlp([6, 8, 3])).save(tmp_path / "file")
    trainer = mb.Trainer(net())
    before = everything(trainer)
    with pytest.raises(ValueError, match=r"/file is a checkpoint of another network: " + message):
        trainer.load(tmp_path / "file")
    assert everything(trainer) == before


def test_gradients_that_were_not_applied_come_too(tmp_path):
    trainer, other = make(), make()
    trainer.accumulate(X[:20], Y[:20])
    trainer.save(tmp_path / "file")
    other.accumulate(X[20:30], Y[20:30])
    other.load(tmp_path / "file")
    for each in (trainer, other):
        each.apply()
    assert everything(other) == everything(trainer)


def test_a_checkpoint_of_another_optimiser_is_told(tmp_path):
    make().save(tmp_path / "file")
    message = r"optimiser: of 0\.weight it has the state of Adam \(adam\), this trainer takes that of SGD \(momentum\)"
    with pytest.raises(ValueError, match=message):
        make(optimizer=mb.SGD(momentum=0.9)).load(tmp_path / "file")


def test_a_checkpoint_whose_matrices_have_another_state_is_told(tmp_path):
    trainer, other = (make(optimizer=mb.Muon(0.01, adamw_names=names)) for names in (["0.*"], ["*"]))
    fit(trainer, 1)
    trainer.save(tmp_path / "file")
    before = everything(other)
    message = (
        r"another optimiser: of 3\.weight it has the state of Muon \(muon\), this trainer takes that of Muon \(adam\)"
    )
    with pytest.raises(ValueError, match=message):
        other.load(tmp_path / "file")
    assert everything(other) == before
    like = make(optimizer=mb.Muon(0.02, adamw_names=["0.weight", "*.bias"]))
    like.load(tmp_path / "file")
    assert like.state.tobytes() == trainer.state.tobytes()


def test_a_checkpoint_with_another_average_is_told(tmp_path):
    trainer, other = make(average=mb.EMA(0.9, every=1)), make(average=mb.EMA(0.9, every=1))
    fit(trainer, 1)
    trainer.save(tmp_path / "file")
    with pytest.raises(ValueError, match=r"a trainer with average=EMA\(decay=0.9.*; this one's is None"):
        make().load(tmp_path / "file")
    other.load(tmp_path / "file")
    assert everything(other) == everything(trainer)
    with other.averaged(), pytest.raises(RuntimeError, match=r"leave `with trainer\.averaged"):
        other.load(tmp_path / "file")


def test_a_schedule_that_reacts_follows_the_history_of_the_checkpoint(tmp_path):
    def plateau(**options: Any) -> mb.Trainer:
        return make(optimizer=mb.SGD(mb.ReduceLROnPlateau(0.01, "loss", mode="max", patience=0)), **options)

    trainer, other = plateau(), plateau()
    fit(trainer, 5)
    trainer.save(tmp_path / "file")
    fit(other, 1)
    other.load(tmp_path / "file")
    fit(trainer, 1)
    fit(other, 1)
    assert other.history["lr"] == trainer.history["lr"]
    assert other.history["lr"][-1] < 0.01


def test_the_middle_of_an_epoch_needs_the_same_mini_batches(tmp_path):
    class Pause(mb.Callback):
        def on_batch_end(self, trainer, loss):
            return "pause" if trainer.t == 2 else None

    trainer = make()
    fit(trainer, 2, callbacks=[Pause()])
    trainer.save(tmp_path / "file")
    other = make(batch_size=7, seed=9)
    message = "middle of an epoch of other mini-batches: batch_size was 16, is 7; seed was 5, is 9"
    with pytest.raises(ValueError, match=message):
        other.load(tmp_path / "file")
    assert other.t == 0
    resumed = make()
    resumed.load(tmp_path / "file")
    fit(trainer, 2)
    fit(resumed, 2)
    assert everything(resumed) == everything(trainer)


# ---- crashes ---------------------------------------------------------------------------------------------------------


def test_the_disk_has_the_new_file_before_it_takes_the_place_of_the_old(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (calls.append((name, kind(*a))), real(*a))[1])

    def kind(target: Any, *_: Any) -> str:
        return "folder" if isinstance(target, int) and os.path.isdir(f"/proc/self/fd/{target}") else "file"

    make().save(tmp_path / "file")
    assert calls == [("fsync", "file"), ("replace", "file"), ("fsync", "folder")]
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch, name, error):
    make(seed=1).save(tmp_path / "file")

    def fail(*_: Any) -> None:
        raise error

    new = make(seed=2)
    monkeypatch.setattr(os, name, fail)
    with pytest.raises(type(error)):
        new.save(tmp_path / "file")
    assert mb.load(tmp_path / "file").seed == 1
    assert os.listdir(tmp_path) == ["file"]


def test_a_leftover_is_written_over_and_a_link_is_followed(tmp_path):
    (tmp_path / ".file.tmp").write_bytes(b"x" * 10**5)
    (tmp_path / "link").symlink_to(tmp_path / "file")
    make().save(tmp_path / "link")
    assert mb.load(tmp_path / "file").t == 0
    assert (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


@pytest.mark.parametrize("name", ["x" * 255, "\N{GREEK SMALL LETTER PSI}" * 127, "\U0001f600" * 63], ids=[1, 2, 4])
def test_a_name_may_be_as_long_as_the_file_system_takes(tmp_path, name):
    make().save(tmp_path / name)
    assert mb.load(tmp_path / name).t == 0
    assert os.listdir(tmp_path) == [name]


def test_many_may_save_at_once(tmp_path):
    data = [bytes([i]) * 100_000 for i in range(4)]
    errors = []

    def save(i: int) -> None:
        try:
            for _ in range(10):
                _files.replace(tmp_path / "file", lambda file: file.writelines([data[i][:50_000], data[i][50_000:]]))
                assert (tmp_path / "file").read_bytes() in data
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert os.listdir(tmp_path) == ["file"]


def test_200_kills_leave_the_old_file_or_the_new_one(tmp_path):
    """A process saves again and again, and is killed somewhere in between; what is there is one of its saves, whole."""
    program = f"""
        import os, random, signal, time
        import fastmb as mb
        path, left = {str(tmp_path / "file")!r}, 0
        trainer = mb.Trainer(mb.mlp([200, 200, 10]), executor="numpy")

        def save(t):
            trainer.t = t
            trainer.net.flat.fill(t)
            trainer.save(path)

        save(0)
        last = 0
        for kill in range(200):
            child = os.fork()
            if not child:
                t = last
                while True:
                    t += 1
                    save(t)
            time.sleep(random.Random(kill).uniform(0, 0.01))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            left += os.path.exists(os.path.join(os.path.dirname(path), ".file.tmp"))
            found = mb.load(path)
            assert found.t >= last, (found.t, last)
            for array in found.net.parameters().values():
                assert (array == found.t).all(), kill
            last = found.t
        print(last, left)
    """
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr
    saved, left = map(int, run.stdout.split())
    assert saved > 0
    assert left > 0  # kills did hit a save
