"""What other packages are handed: read back from what they wrote."""

from __future__ import annotations

import doctest
import math
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastmb as mb
from fastmb import _fitting, integrations

# The packages' own imports may warn; that is their business.
pytestmark = pytest.mark.filterwarnings("default")

RNG = np.random.default_rng(0)
X = RNG.standard_normal((50, 6)).astype(np.float32)
Y = RNG.integers(0, 3, 50)
VAL = {"X_val": X[:20], "y_val": Y[:20]}
COLUMNS = ["loss", "val_loss", "val_accuracy", "lr", "seconds", "examples_per_second"]


def make(**options: Any) -> mb.Trainer:
    net = mb.Sequential(mb.Linear(6, 8), mb.ReLU(), mb.Linear(8, 3), seed=1)
    options = {"optimizer": mb.Adam(0.01), "batch_size": 16, "seed": 5, "executor": "numpy"} | options
    return mb.Trainer(net, **options)


def fit(trainer: mb.Trainer, *called: mb.Callback, **options: Any) -> mb.History:
    return trainer.fit(X, Y, verbose=0, callbacks=list(called), **{"max_epochs": 3} | VAL | options)


class BatchLosses(mb.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_batch_end(self, trainer, loss):
        self.losses.append(loss)


def diverging() -> mb.Trainer:
    return make(optimizer=mb.SGD(1e38))


def same(found: list[float], expected: list[float]) -> bool:
    """Equal as float32, which TensorBoard has."""
    return np.array_equal(np.float32(found), np.float32(expected), equal_nan=True)


# ---- TensorBoard -----------------------------------------------------------------------------------------------------


def scalars(folder: Any) -> dict[str, list[tuple[int, float]]]:
    """The scalars of all event files of a folder: by tag, steps and values in the order of the files."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(Path(folder).glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):  # records: length, its checksum, event, its checksum
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += length + 16
            for value in event.summary.value:
                if value.WhichOneof("value") == "simple_value":
                    found.setdefault(value.tag, []).append((event.step, value.simple_value))
                else:
                    found.setdefault("text " + value.tag, []).append((event.step, math.nan))
        assert at == len(data)
    return found


def test_tensorboard_has_the_rows_of_the_history(tmp_path):
    trainer, board = make(), mb.TensorBoard(tmp_path)
    for epochs in (2, 1):
        history = fit(trainer, board, max_epochs=epochs)
    found = scalars(tmp_path)
    assert sorted(found) == sorted([*COLUMNS, "text trainer/text_summary"])
    for name in COLUMNS:
        assert [step for step, _ in found[name]] == [1, 2, 3]
        assert same([value for _, value in found[name]], history[name])
    assert len(list(tmp_path.iterdir())) == 2  # a file a fit, in one second or not


@pytest.mark.parametrize(("freq", "every"), [("batch", 1), (3, 3)])
def test_tensorboard_has_mini_batches_if_asked(tmp_path, freq, every):
    losses = BatchLosses()
    fit(make(), mb.TensorBoard(str(tmp_path), update_freq=freq), losses)
    found = scalars(tmp_path)["batch_loss"]
    assert [step for step, _ in found] == list(range(every, 13, every))
    assert same([value for _, value in found], losses.losses[every - 1 :: every])


def test_tensorboard_names_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    board = mb.TensorBoard()
    fit(make(), board)
    assert Path(board.log_dir).parts[0] == "runs"
    assert len(scalars(board.log_dir)["loss"]) == 3


def test_tensorboard_is_closed_after_a_fit_that_raised(tmp_path):
    board = mb.TensorBoard(tmp_path)
    with pytest.raises(FloatingPointError):
        fit(diverging(), board)
    assert board._writer is None
    fit(make(), board)
    assert [step for step, _ in scalars(tmp_path)["loss"]] == [1, 2, 3]


# ---- MLflow ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    """MLflow with a store of its own."""
    mlflow = pytest.importorskip("mlflow")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    yield mlflow
    assert mlflow.active_run() is None
    mlflow.set_tracking_uri(before)


def logged(mlflow: Any, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(each.step, each.value) for each in mlflow.MlflowClient().get_metric_history(run_id, name)]


def test_mlflow_has_settings_and_rows_in_a_run_of_the_fits_own(mlflow):
    optimizer = mb.SGD(0.02, momentum=0.9)
    trainer, log = make(optimizer=optimizer), mb.MLflow("digits", update_freq=6)
    losses = BatchLosses()
    for epochs in (2, 1):
        history = fit(trainer, log, losses, max_epochs=epochs)
        assert mlflow.active_run() is None
    run = mlflow.get_run(log.run_id)
    assert (run.info.run_name, run.info.status) == ("digits", "FINISHED")
    expected = {"optimizer": "SGD", "lr": "0.02", "momentum": "0.9", "batch_size": "16", "seed": "5", "shuffle": "True"}
    assert expected.items() <= run.data.params.items()
    assert run.data.params["net"] == "Linear(6, 8), ReLU(), Linear(8, 3)"
    assert run.data.params["n_parameters"] == str(7 * 8 + 9 * 3)
    for name in COLUMNS:
        assert logged(mlflow, log.run_id, name) == list(enumerate(history[name], 1))
    assert logged(mlflow, log.run_id, "batch_loss") == [(6, losses.losses[5]), (12, losses.losses[11])]
    assert len(mlflow.search_runs(output_format="list")) == 1
    # an active run is taken, and stays active
    with mlflow.start_run() as run:
        fit(make(), log)
        assert log.run_id == run.info.run_id == mlflow.active_run().info.run_id
    assert len(logged(mlflow, run.info.run_id, "loss")) == 3
    # a fit that raises
    log = mb.MLflow()
    with pytest.raises(FloatingPointError):
        fit(diverging(), log)
    assert mlflow.get_run(log.run_id).info.status == "FAILED"
    # a callback that was in the user's run makes one of its own when there is none
    log = mb.MLflow()
    with mlflow.start_run() as run:
        fit(make(), log)
    fit(make(), log)
    assert log.run_id != run.info.run_id
    # what is too long is cut
    log = mb.MLflow()
    fit(make(loss=mb.CrossEntropy(class_weight=[1.0, 2.0, 3.0])), log)
    net = mb.mlp([6, *[8] * 50, 3])
    mb.Trainer(net, executor="numpy").fit(X, Y, max_epochs=1, verbose=0, callbacks=[mb.MLflow()])


def test_mlflow_has_what_was_assigned_since_as_tags(mlflow):
    def tags() -> dict[str, str]:
        found = mlflow.get_run(log.run_id).data.tags
        return {name: value for name, value in found.items() if not name.startswith("mlflow.")}

    trainer, log = make(optimizer=mb.SGD(0.02)), mb.MLflow()
    fit(trainer, log)
    params, run_id = mlflow.get_run(log.run_id).data.params, log.run_id
    assert tags() == {}
    trainer.batch_size, trainer.optimizer = 32, mb.SGD(0.01)
    fit(trainer, log)
    assert tags() == {"batch_size": "32", "lr": "0.01"}
    trainer.batch_size = 16
    fit(trainer, log)
    assert tags() == {"batch_size": "16", "lr": "0.01"}
    assert log.run_id == run_id
    assert mlflow.get_run(run_id).data.params == params
    assert len(logged(mlflow, run_id, "loss")) == 9
    # two trainers in one run
    with mlflow.start_run():
        fit(make(optimizer=mb.SGD(0.02)), log)
        fit(make(optimizer=mb.Adam(0.02)), log := mb.MLflow())
    params = mlflow.get_run(log.run_id).data.params
    assert (params["optimizer"], params["nesterov"], params["betas"]) == ("SGD", "False", "(0.9, 0.999)")
    assert tags() == {"optimizer": "Adam"}


def test_long_settings_are_cut():
    trainer = mb.Trainer(mb.mlp([6, *[8] * 50, 3]))
    text = integrations._settings(trainer)["net"]
    assert len(text) == 500
    assert text.endswith("...")


# ---- Optuna ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def optuna():
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def test_optuna_is_told_every_epoch(optuna):
    study = optuna.create_study(direction="maximize")

    def objective(trial: Any) -> float:
        history = fit(make(), mb.OptunaPruning(trial, "val_accuracy"))
        histories.append(history)
        return history["val_accuracy"][-1]

    histories: list[mb.History] = []
    study.optimize(objective, n_trials=2)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 2
    for trial, history in zip(study.trials, histories, strict=True):
        assert trial.intermediate_values == dict(zip([1, 2, 3], history["val_accuracy"], strict=True))


def test_a_pruned_fit_ends_with_its_weights(optuna, executor):
    trainers = []

    def objective(trial: Any) -> float:
        lr = trial.suggest_categorical("lr", [0.01, 0.0])
        trainer = make(optimizer=mb.SGD(lr), executor=executor)
        trainers.append((trial, trainer))
        return fit(trainer, mb.OptunaPruning(trial, "loss"), BatchLosses())["loss"][-1]

    pruner = optuna.pruners.ThresholdPruner(upper=0.0, n_warmup_steps=2)  # every trial, after its second epoch
    study = optuna.create_study(direction="minimize", pruner=pruner)
    study.optimize(objective, n_trials=2)
    assert [trial.state.name for trial in study.trials] == ["PRUNED"] * 2
    for _, trainer in trainers:
        assert trainer.epoch == 2
        assert trainer.history.stopped == "pruned"
        plain = make(optimizer=trainer.optimizer, executor=executor)
        fit(plain, max_epochs=2)
        assert plain.net.flat.tobytes() == trainer.net.flat.tobytes()


def test_others_end_properly_when_a_fit_is_pruned(optuna, tmp_path):
    pruner = optuna.pruners.ThresholdPruner(upper=0.0, n_warmup_steps=4)
    study = optuna.create_study(pruner=pruner)
    trainer, stopping = make(optimizer=mb.SGD(1.0)), mb.EarlyStopping(restore_best=True, patience=100)
    board = mb.TensorBoard(tmp_path)
    with pytest.raises(optuna.TrialPruned, match="pruned after epoch 4"):
        fit(trainer, mb.OptunaPruning(study.ask()), stopping, board, max_epochs=9)
    assert trainer.evaluate(VAL["X_val"], VAL["y_val"])["loss"] == stopping.best
    assert board._writer is None


def test_a_study_that_looks_the_other_way_is_told(optuna):
    trainer = make()
    for direction, monitor in (("maximize", "val_loss"), ("minimize", "val_accuracy")):
        trial = optuna.create_study(direction=direction).ask()
        wanted = "minimize" if direction == "maximize" else "maximize"
        message = f"monitor='{monitor}' needs a study with direction '{wanted}'; this one's is '{direction}'"
        with pytest.raises(ValueError, match=message):
            fit(trainer, mb.OptunaPruning(trial, monitor))
    with pytest.raises(ValueError, match="monitor must be one of 'loss', 'val_loss', 'val_accuracy'; got 'accuracy'"):
        fit(trainer, mb.OptunaPruning(optuna.create_study().ask(), "accuracy"))
    with pytest.raises(TypeError, match="trial must be an Optuna trial; got None"):
        fit(trainer, mb.OptunaPruning(None))
    assert trainer.t == 0
    fit(trainer, mb.OptunaPruning(optuna.trial.FixedTrial({})))
    assert trainer.t == 12


# ---- all -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make_callback", "package", "extra"),
    [
        (mb.TensorBoard, "tensorboardX", "tensorboard"),
        (mb.MLflow, "mlflow", "mlflow"),
        (lambda: mb.OptunaPruning(None), "optuna", "optuna"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(make_callback, package, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    trainer, callback = make(), make_callback()
    with pytest.raises(ImportError, match=rf"needs the package '{package}': pip install 'fastmb\[{extra}\]'"):
        fit(trainer, callback)
    assert trainer.t == 0


@pytest.mark.parametrize("logger", [mb.TensorBoard, mb.MLflow])
def test_mini_batches_are_entered_only_if_asked(logger):
    assert not logger().wants_batches
    assert logger(update_freq="batch").wants_batches
    assert logger(update_freq=10).wants_batches
    for freq, error, message in [
        ("batches", ValueError, "update_freq must be one of 'epoch', 'batch'; got 'batches'; did you mean 'batch'"),
        (0, ValueError, "update_freq must be an integer >= 1; got 0"),
        (1.5, TypeError, "update_freq must be an integer >= 1; got 1.5"),
    ]:
        with pytest.raises(error, match=message):
            logger(update_freq=freq)


def test_no_python_runs_within_an_epoch_for_a_logger_of_epochs(tmp_path, monkeypatch):
    monkeypatch.setattr(_fitting, "TICK", 1e9)
    trainer, runs = make(), []
    run = trainer._executor.run
    monkeypatch.setattr(trainer._executor, "run", lambda *a: (runs.append(1), run(*a))[1])
    fit(trainer, mb.TensorBoard(tmp_path))
    assert len(runs) == 3
    fit(trainer, mb.TensorBoard(tmp_path, update_freq=2))
    assert len(runs) == 3 + 12


def test_examples_in_the_documentation_run():
    found = doctest.testmod(integrations)
    assert found.attempted
    assert not found.failed
