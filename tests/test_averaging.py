"""Averages of the weights: torch's, in the middle of anything, and in the way of nothing."""

from __future__ import annotations

import pickle
from itertools import product
from typing import Any

import numpy as np
import pytest

import fastmb as mb
from fastmb import executors, threads
from fastmb.executors import native

RNG = np.random.default_rng(0)
X = RNG.standard_normal((100, 6)).astype(np.float32)
Y = RNG.integers(0, 3, 100)
AVERAGES = [mb.EMA(0.9, every=1), mb.EMA(0.99, every=4), mb.SWA(2), mb.SWA(1, lr=0.5, anneal_epochs=3)]
SAME = ["native"] if native.isa() == "v2" else ["native", "numba"]  # executors whose bits are the same
each_average = pytest.mark.parametrize("average", AVERAGES, ids=repr)


def make(average: Any, executor: str = "native", optimizer: Any = None, **options: Any) -> mb.Trainer:
    net = mb.Sequential(mb.Linear(6, 33), mb.ReLU(), mb.Dropout(0.2), mb.Linear(33, 3), seed=1)
    options = {"batch_size": 16, "seed": 5} | options
    return mb.Trainer(net, optimizer=optimizer or mb.SGD(0.1, 0.9), executor=executor, average=average, **options)


def fit(trainer: mb.Trainer, epochs: int, **options: Any) -> mb.History:
    return trainer.fit(X, Y, max_epochs=epochs, verbose=0, **options)


def test_the_moving_average_is_torchs(executor):
    torch = pytest.importorskip("torch", reason="compares with PyTorch, which is too large for the test extra")
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    for decay, every in [(0.9, 1), (0.75, 3)]:
        trainer = make(mb.EMA(decay, every), executor)
        model = torch.nn.ParameterList([torch.tensor(trainer.net.flat)])
        theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay**every))
        for step in range(12):
            trainer.step(X[:16], Y[:16])
            if (step + 1) % every:
                continue
            model[0].data[:] = torch.tensor(trainer.net.flat)
            theirs.update_parameters(model)
            expected = theirs.module[0].detach().numpy()
            np.testing.assert_allclose(trainer.state[-1], expected, rtol=1e-5, atol=1e-7)


def test_the_mean_over_epochs_is_torchs(executor):
    torch = pytest.importorskip("torch", reason="compares with PyTorch, which is too large for the test extra")
    from torch.optim.swa_utils import AveragedModel

    trainer = make(mb.SWA(2), executor)
    model = torch.nn.ParameterList([torch.tensor(trainer.net.flat)])
    theirs = AveragedModel(model)
    for epoch in range(1, 7):
        fit(trainer, 1)
        model[0].data[:] = torch.tensor(trainer.net.flat)
        if epoch > 2:
            theirs.update_parameters(model)
            expected = theirs.module[0].detach().numpy()
            np.testing.assert_allclose(trainer.averaged_net().flat, expected, rtol=1e-6, atol=1e-7)
        else:
            assert (trainer.averaged_net().flat == trainer.net.flat).all()


@pytest.mark.parametrize("strategy", ["cos", "linear"])
@pytest.mark.parametrize("anneal_epochs", [1, 4])
def test_the_learning_rate_goes_where_torchs_goes(strategy, anneal_epochs):
    torch = pytest.importorskip("torch", reason="compares with PyTorch, which is too large for the test extra")
    from torch.optim.swa_utils import SWALR

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = SWALR(optimizer, 0.3, anneal_epochs, strategy)
    expected = [0.1] * 2
    for _ in range(6):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    average = mb.SWA(2, lr=0.3, anneal_epochs=anneal_epochs, anneal_strategy=strategy)
    found = fit(make(average, "numpy", mb.SGD(0.1)), 8)["lr"]
    np.testing.assert_allclose(found, expected, rtol=1e-14)
    assert fit(make(mb.SWA(2, lr=0.3, anneal_epochs=0), "numpy", mb.SGD(0.1)), 3)["lr"] == [0.1, 0.1, 0.3]


@each_average
def test_it_changes_nothing_about_the_training(average, executor):
    plain, averaged = make(None, executor), make(average, executor)
    epochs = 1 if getattr(average, "lr", None) else 4
    for trainer in (plain, averaged):
        fit(trainer, epochs)
    assert (plain.net.flat == averaged.net.flat).all()
    assert (plain.state == averaged.state[:-1]).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_same_bits_however_it_is_run(dtype, monkeypatch):
    monkeypatch.setattr(threads, "limit", lambda: 16)
    found = set()
    for n_threads, how, executor in product([1, 3], ["fit", "step"], SAME):
        net = mb.mlp([6, 33, 3], dtype=dtype)
        options = {"average": mb.EMA(0.9, every=3), "optimizer": mb.Adam(0.1), "batch_size": 16}
        trainer = mb.Trainer(net, shuffle=False, n_threads=n_threads, executor=executor, **options)
        for start in range(0, 100, 16):
            if how == "step":
                trainer.step(X[start : start + 16], Y[start : start + 16])
        if how == "fit":
            fit(trainer, 1)
        found.add(trainer.state.tobytes())
    assert len(found) == 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("width", [1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 65, 97])
def test_the_executors_agree(width, dtype):
    states = []
    for name in executors.NAMES:
        net = mb.mlp([6, width, 3], dtype=dtype, activation="tanh")
        groups = {"*.bias": {"lr": 0.5}}
        trainer = mb.Trainer(net, optimizer=mb.SGD(0.1, groups=groups), average=mb.EMA(0.8, every=2), executor=name)
        fit(trainer, 4)
        states.append(trainer.averaged_net().flat)
    for state in states[:-1]:
        np.testing.assert_allclose(state, states[-1], rtol=1e-4 if dtype == "float32" else 1e-12, atol=1e-6)


@each_average
@pytest.mark.parametrize("way", ["checkpoint", "pickle"])
def test_a_resumed_fit_has_the_bits_of_one_never_stopped(average, way, executor, tmp_path):
    whole, stopped = make(average, executor), make(average, executor)
    fit(whole, 6)
    for epochs in (1, 2):
        fit(stopped, epochs)
        stopped.fit(X, Y, max_epochs=1, max_seconds=0, verbose=0)  # some mini-batches more
        if way == "checkpoint":
            stopped.save(tmp_path / "file")
            resumed = mb.load(tmp_path / "file")
        else:
            resumed = pickle.loads(pickle.dumps(stopped))
        assert resumed.average == average
        assert (resumed.state == stopped.state).all()
        stopped = resumed
    fit(stopped, 6 - stopped.epoch)
    assert (stopped.state == whole.state).all()
    assert (stopped.net.flat == whole.net.flat).all()
    assert (stopped.averaged_net().flat == whole.averaged_net().flat).all()


def test_a_checkpoint_has_the_average_by_name(tmp_path):
    from safetensors import safe_open

    trainer = make(mb.EMA())
    fit(trainer, 3)
    trainer.save(tmp_path / "file")
    with safe_open(tmp_path / "file", "np") as file:
        assert (file.get_tensor("average.0.weight") == trainer.averaged_net().parameters()["0.weight"]).all()


def test_the_network_has_the_average_for_a_while_and_then_its_own_weights(executor):
    trainer = make(mb.EMA(0.9, every=1), executor)
    fit(trainer, 2)
    own, mean = trainer.net.flat.copy(), trainer.averaged_net()
    with trainer.averaged() as net:
        assert net is trainer.net
        assert (net.flat == mean.flat).all()
        inside = trainer.evaluate(X, Y)
        with trainer.averaged():
            pass
        assert (net.flat == mean.flat).all()
        for forbidden in (
            lambda: trainer.step(X, Y),
            lambda: fit(trainer, 1),
            lambda: trainer.save("file"),
            lambda: pickle.dumps(trainer),
        ):
            with pytest.raises(RuntimeError, match=r"leave `with trainer.averaged\(\)` first"):
                forbidden()
    assert (trainer.net.flat == own).all()
    assert trainer.evaluate(X, Y) != inside
    with pytest.raises(KeyError), trainer.averaged():
        raise KeyError
    assert (trainer.net.flat == own).all()


def normalised(average: Any, executor: str = "native", momentum: float | None = 0.1, **options: Any) -> mb.Trainer:
    norm = mb.BatchNorm1d(8, momentum=momentum)
    residual = mb.Residual(mb.Linear(8, 8, bias=False), mb.BatchNorm1d(8), mb.Tanh())
    net = mb.Sequential(mb.Linear(6, 8), norm, residual, mb.Linear(8, 3), seed=1, dtype="float64")
    options = {"optimizer": mb.SGD(0.1), "batch_size": 16, "input_scale": 0.5} | options
    return mb.Trainer(net, executor=executor, average=average, **options)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("optimizer", [mb.SGD(0.1), mb.Muon(0.01)], ids=lambda o: o.kind)
def test_statistics_of_the_average_are_torchs(executor, momentum, optimizer):
    torch = pytest.importorskip("torch", reason="compares with PyTorch, which is too large for the test extra")
    from torch.optim.swa_utils import update_bn

    class Residual(torch.nn.Sequential):
        def forward(self, x: Any) -> Any:
            return x + super().forward(x)

    def batch_norm(momentum: float | None = 0.1) -> Any:
        return torch.nn.BatchNorm1d(8, momentum=momentum)

    trainer = normalised(mb.SWA(1), executor, momentum, optimizer=optimizer)
    fit(trainer, 3)
    residual = Residual(torch.nn.Linear(8, 8, bias=False), batch_norm(), torch.nn.Tanh())
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), batch_norm(momentum), residual, torch.nn.Linear(8, 3)).double()
    average = trainer.averaged_net()
    given = average.parameters() | average.buffers()
    model.load_state_dict(
        {name: torch.tensor(given[name].T).reshape(v.shape) for name, v in model.state_dict().items()}
    )
    rows = torch.tensor(X.astype(np.float64) / 2)
    update_bn(rows.split(16), model)
    with trainer.averaged() as net:
        flat = net.flat.copy()
        trainer.update_bn(X)
        assert (net.flat == flat).all()
        updated = trainer.averaged_net()
    for name, array in updated.buffers().items():
        np.testing.assert_allclose(array, model.state_dict()[name].numpy(), rtol=1e-10, atol=1e-12, err_msg=name)
    np.testing.assert_allclose(updated(X), model.eval()(rows).detach().numpy(), rtol=1e-10, atol=1e-10)


def test_statistics_of_the_average_are_the_networks_for_as_long_as_the_weights(executor):
    plain, trainer = (normalised(mb.EMA(0.9, every=1), executor) for _ in range(2))
    for each in (plain, trainer):
        fit(each, 2)
    own = {name: array.copy() for name, array in trainer.net.buffers().items()}
    with trainer.averaged() as net:
        before = trainer.evaluate(X, Y)
        trainer.update_bn(X)
        assert trainer.evaluate(X, Y) != before
        updated = trainer.averaged_net()
    for name, array in net.buffers().items():
        assert (array == own[name]).all()
        assert (array != updated.buffers()[name]).any()
    for each in (plain, trainer):
        fit(each, 1)
    assert plain.net.digest() == trainer.net.digest()


def test_statistics_are_those_of_whole_mini_batches_where_the_last_is_dropped(executor):
    trainers = [normalised(None, executor, drop_last=True), normalised(None, executor)]
    for trainer, rows in zip(trainers, (97, 96), strict=True):
        trainer.update_bn(X[:rows])
    assert trainers[0].net.digest() == trainers[1].net.digest() != normalised(None, executor).net.digest()
    assert trainers[0].net.buffers()["1.num_batches_tracked"] == 6


def test_statistics_that_cannot_be_taken_stay_as_they_are(executor):
    trainer = normalised(None, executor)
    fit(trainer, 1)
    before = trainer.net.digest()
    bad = X.copy()
    bad[50] = np.nan
    for wrong, message in (
        (X[:97], "X has 97 rows, and the last"),
        (X[:, :5], "5 features"),
        (bad, "got nan in row 50"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer.update_bn(wrong)
    assert trainer.net.digest() == before
    for huge in (1e200, 1e308):
        trainer.net.flat[:] = huge
        before = trainer.net.digest()
        with pytest.raises(FloatingPointError, match="statistics of X are not finite; nothing was changed"):
            trainer.update_bn(X)
        assert trainer.net.digest() == before


def test_a_network_without_batch_normalisation_has_no_statistics():
    trainer = make(mb.EMA(0.9))
    before = trainer.net.digest()
    assert trainer.update_bn(X[:1]) is None
    assert trainer.net.digest() == before


@pytest.mark.parametrize("executor", SAME)
def test_statistics_have_the_same_bits_for_any_number_of_threads(executor, monkeypatch):
    monkeypatch.setattr(threads, "limit", lambda: 3)
    found = set()
    for n_threads in (1, 3):
        net = mb.Sequential(mb.Linear(6, 8), mb.Dropout(0.3), mb.BatchNorm1d(8), mb.ReLU(), mb.Linear(8, 3))
        trainer = mb.Trainer(net, executor=executor, n_threads=n_threads, batch_size=50)
        trainer.update_bn(X)
        found.add(net.digest())
    assert len(found) == 1


def test_before_anything_is_averaged_it_is_the_network(executor):
    trainer = make(mb.EMA(0.9, every=5), executor)
    for _ in range(4):
        trainer.step(X, Y)
    assert (trainer.averaged_net().flat == trainer.net.flat).all()
    trainer.step(X, Y)
    assert (trainer.state[-1] == trainer.net.flat).all()
    trainer.step(X, Y)
    assert (trainer.averaged_net().flat != trainer.net.flat).any()


def test_validation_and_what_is_restored_are_of_the_average():
    val = {"X_val": X, "y_val": Y}
    for validate in (True, False):
        trainer = make(mb.EMA(0.9, validate=validate))
        stopping = mb.EarlyStopping("val_loss", patience=100, restore_best=True)
        fit(trainer, 1, **val)
        flat = trainer.averaged_net().flat if validate else trainer.net.flat
        with trainer.averaged():
            averaged = trainer.evaluate(X, Y)["loss"]
        told = trainer.history["val_loss"][-1]
        assert told == (averaged if validate else trainer.evaluate(X, Y)["loss"])
        expected = flat.copy()
        trainer = make(mb.EMA(0.9, validate=validate))
        fit(trainer, 1, callbacks=[stopping], **val)
        assert (trainer.net.flat == expected).all()


@pytest.mark.parametrize("bound", [0, 3, 10])
def test_a_fit_that_diverges_leaves_the_average_of_its_last_finite_epoch(bound):
    def rate(t: int) -> float:
        return 0.01 if t < bound else 1e30

    trainer = make(mb.EMA(0.9, every=1), optimizer=mb.SGD(rate))
    with pytest.raises(FloatingPointError):
        fit(trainer, 5)
    expected = make(mb.EMA(0.9, every=1), optimizer=mb.SGD(0.01))
    if epochs := trainer.epoch:
        fit(expected, epochs)
    assert (trainer.state == expected.state).all()
    assert (trainer.averaged_net().flat == expected.averaged_net().flat).all()


def test_an_epoch_that_is_given_up_counts_as_one():
    trainer = make(mb.SWA(0))
    trainer.fit(X, Y, max_epochs=1, max_seconds=0, verbose=0)
    if trainer._current is None:
        pytest.fail("the epoch should have been broken off")
    first = trainer.net.flat.copy()
    trainer.fit(X[:50], Y[:50], max_epochs=1, verbose=0)
    np.testing.assert_allclose(trainer.state[-1], (first + trainer.net.flat) / 2, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("make_it", "error", "message"),
    [
        (lambda: mb.EMA(1), ValueError, r"decay must be a number in \[0, 1\); got 1"),
        (lambda: mb.EMA(every=0), ValueError, "every must be an integer"),
        (lambda: mb.SWA(-1), ValueError, "start_epoch must be an integer"),
        (lambda: mb.SWA(1, lr=-1), ValueError, "lr must be a number in"),
        (lambda: mb.SWA(1, anneal_epochs=-1), ValueError, "anneal_epochs must be an integer"),
        (lambda: mb.SWA(1, anneal_strategy="log"), ValueError, "anneal_strategy must be one of 'cos', 'linear'"),
        (lambda: make(0.999), TypeError, r"average must be an average such as EMA\(0.999\); got 0.999"),
        (lambda: make(None).averaged_net(), ValueError, "this trainer keeps no average"),
        (lambda: make(None).averaged().__enter__(), ValueError, "this trainer keeps no average"),
    ],
)
def test_misuse_is_named(make_it, error, message):
    with pytest.raises(error, match=message):
        make_it()


@pytest.mark.parametrize(("saved", "own"), [(mb.SWA(10), mb.SWA(1)), (mb.EMA(0.9, every=10), mb.EMA(0.9, every=1))])
def test_a_checkpoint_with_another_count_of_weights_is_refused(saved, own, tmp_path):
    X, y = mb.datasets.load_digits()
    trainers = [mb.Trainer(mb.mlp([64, 8, 10]), batch_size=500, average=average) for average in (saved, own)]
    trainers[0].fit(X, y, max_epochs=2, verbose=0)
    trainers[0].save(tmp_path / "saved")
    before = trainers[1].net.digest()
    with pytest.raises(ValueError, match="average="):
        trainers[1].load(tmp_path / "saved")
    assert trainers[1].net.digest() == before
