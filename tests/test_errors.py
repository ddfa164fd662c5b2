"""Misuse of a trainer is refused at once, in words that name the argument, what was expected and what came."""

from __future__ import annotations

import re

import numpy as np
import pytest

import fastmb as mb
from fastmb import _errors

NET = mb.mlp([3, 4, 2])
X, Y = np.zeros((5, 3), np.float32), np.zeros(5, int)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"net": [3, 4, 2]}, TypeError, "net must be a Sequential; got list"),
        ({"loss": "cross-entropy"}, ValueError, "loss must be one of 'cross_entropy', "),
        ({"loss": "cross-entropy"}, ValueError, "did you mean 'cross_entropy'?"),
        ({"loss": mb.CrossEntropy(class_weight=[1, 2, 3])}, ValueError, "class_weight must have 2 values"),
        ({"net": mb.mlp([3, 1])}, ValueError, "cross_entropy takes a network with at least 2 outputs"),
        ({"optimizer": "adamm"}, ValueError, "did you mean 'adam'?"),
        ({"optimizer": 0.1}, TypeError, "optimizer must be a name or an Optimizer such as Adam(lr=1e-3); got 0.1"),
        ({"batch_size": 0}, ValueError, "batch_size must be an integer >= 1; got 0"),
        ({"batch_size": -64}, ValueError, "batch_size must be an integer >= 1; got -64"),
        ({"batch_size": 2.0}, TypeError, "batch_size must be an integer >= 1; got 2.0"),
        ({"batch_size": True}, TypeError, "batch_size must be an integer >= 1; got True"),
        (
            {"batch_size": 2**63},
            ValueError,
            "batch_size * accumulate_steps must be an integer from 1 to 9007199254740992; got 9223372036854775808",
        ),
        (
            {"batch_size": 2**30, "accumulate_steps": 2**40},
            ValueError,
            "batch_size * accumulate_steps must be an integ",
        ),
        ({"batch_size": 10**5000}, ValueError, "; got an integer of 16610 bits"),
        ({"seed": -1}, ValueError, "seed must be an integer from 0 to 18446744073709551615; got -1"),
        ({"n_threads": 0}, ValueError, "n_threads must be an integer >= 1; got 0"),
        (
            {"executor": "Native"},
            ValueError,
            "executor must be one of 'native', 'numba', 'numpy'; got 'Native'; did you mean",
        ),
        ({"input_scale": 0}, ValueError, "input_scale must be a number in (0, inf); got 0"),
        ({"input_scale": np.nan}, ValueError, "input_scale must be a number in (0, inf); got nan"),
        (
            {"net": mb.Sequential(mb.Linear(3, 2), mb.Softmax()), "loss": "mse"},
            ValueError,
            "a Softmax at the output goes with cross_entropy; loss is mse",
        ),
    ],
)
def test_a_wrong_trainer_is_refused(executor, options, error, message):
    arguments = {"net": NET, "executor": executor} | options
    with pytest.raises(error, match=re.escape(message)):
        mb.Trainer(**arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_epochs": 0}, ValueError, "max_epochs must be an integer >= 1; got 0"),
        ({"max_epochs": 1.5}, TypeError, "max_epochs must be an integer >= 1; got 1.5"),
        ({"max_seconds": -1}, ValueError, "max_seconds must be a number in [0, inf); got -1"),
        ({"check_finite": "no"}, TypeError, "check_finite must be True or False; got 'no'"),
        ({"verbose": "x"}, TypeError, "verbose must be an integer >= 0; got 'x'"),
        ({"verbose": None}, TypeError, "verbose must be an integer >= 0; got None"),
        ({"verbose": -1}, ValueError, "verbose must be an integer >= 0; got -1"),
        ({"X_val": X}, ValueError, "X_val and y_val must be given together"),
        ({"y_val": Y}, ValueError, "X_val and y_val must be given together"),
        ({"X_val": X[:, :2], "y_val": Y}, ValueError, "X_val has 2 features; the network takes 3"),
        ({"X_val": X, "y_val": Y[:4]}, ValueError, "y_val has 4 rows; X_val has 5"),
        ({"X_val": X, "y_val": Y + 2}, ValueError, "y_val must hold class labels from 0 to 1; got 2 in row 0"),
        ({"sample_weight": [1, 2]}, ValueError, "sample_weight must have shape (5,)"),
        ({"stop_at": {"accuracy": 1}}, ValueError, "stop_at must be one of 'loss'; got 'accuracy' (val_ metrics need"),
        (
            {"stop_at": {"val_acuracy": 1}, "X_val": X, "y_val": Y},
            ValueError,
            "stop_at must be one of 'loss', 'val_loss', 'val_accuracy'; got 'val_acuracy'; did you mean",
        ),
        ({"stop_at": {"loss": "low"}}, TypeError, "stop_at['loss'] must be a number in (-inf, inf); got 'low'"),
        ({"stop_at": {"loss": np.nan}}, ValueError, "stop_at['loss'] must be a number in (-inf, inf); got nan"),
        ({"stop_at": 0.5}, TypeError, "stop_at must be a mapping of names to goals, such as {'loss': 0.1}; got 0.5"),
    ],
)
def test_wrong_options_of_fit_are_refused(executor, options, error, message):
    trainer = mb.Trainer(NET, executor=executor)
    with pytest.raises(error, match="^" + re.escape(message)):
        trainer.fit(X, Y, **{"verbose": 0} | options)
    assert trainer.t == 0


@pytest.mark.parametrize(("loss", "y"), [("cross_entropy", Y), ("mse", np.zeros((5, 2)))])
def test_numbers_that_the_networks_dtype_makes_infinite_are_refused(executor, loss, y):
    trainer = mb.Trainer(mb.mlp([3, 4, 2]), loss, executor=executor)
    large = X.astype(np.float64)
    large[4, 1] = -1e300
    where = "must fit in float32, the network's dtype; got -1e+300 in row 4, column 1"
    for call, name in (
        (lambda: trainer.fit(large, y, verbose=0), "X"),
        (lambda: trainer.fit(X, y, X_val=large, y_val=y, verbose=0), "X_val"),
        (lambda: trainer.evaluate(large, y), "X"),
        (lambda: trainer.net.predict(large), "X"),
        (lambda: trainer.net.jacobian(large), "X"),
    ):
        with pytest.raises(ValueError, match="^" + re.escape(f"{name} {where}")):
            call()
    if loss == "mse":
        with pytest.raises(
            ValueError, match=re.escape("y must fit in float32, the network's dtype; got 1e+300 in row 0")
        ):
            trainer.fit(X, y + 1e300, verbose=0)
    assert trainer.t == 0
    mb.Trainer(mb.mlp([3, 4, 2], dtype="float64"), loss, executor=executor).evaluate(large * 1e-200, y)


@pytest.mark.parametrize("verbose", [0, False, np.bool_(False), np.int64(0), 1, True, 2])
def test_whether_a_fit_says_something_is_a_number_or_a_bool(verbose, capsys):
    mb.Trainer(NET, executor="numpy").fit(X, Y, max_epochs=1, verbose=verbose)
    assert bool(capsys.readouterr().err) == bool(verbose)


@pytest.mark.parametrize("function", [mb.find_lr, mb.branch_test, mb.advise_batch_size])
def test_what_tries_something_on_a_trainer_takes_no_network(function):
    with pytest.raises(TypeError, match=r"^trainer must be a Trainer; got Sequential$"):
        function(NET, X, Y)


def test_ragged_data_are_named(executor):
    trainer = mb.Trainer(NET, executor=executor)
    ragged = [[1], [1, 2]]
    for call, name in (
        (lambda: trainer.fit(X, ragged, verbose=0), "y"),
        (lambda: trainer.step(X, ragged), "y"),
        (lambda: trainer.fit(X, Y, X_val=X, y_val=ragged, verbose=0), "y_val"),
        (lambda: NET.predict(ragged), "X"),
        (lambda: NET.jacobian(ragged), "X"),
    ):
        with pytest.raises(ValueError, match=f"^{name} can't be made an array: "):
            call()


def test_drop_last_must_leave_something(executor):
    trainer = mb.Trainer(NET, executor=executor, drop_last=True, batch_size=8)
    with pytest.raises(ValueError, match="X has 5 rows; drop_last leaves no mini-batch of 8"):
        trainer.fit(X, Y, verbose=0)


def test_an_unknown_name_comes_with_the_nearest_known():
    known = ["adam", "sgd"]
    assert (
        str(_errors.unknown_name("o", "Adan", known))
        == "o must be one of 'adam', 'sgd'; got 'Adan'; did you mean 'adam'?"
    )
    assert str(_errors.unknown_name("o", "xyz", known)) == "o must be one of 'adam', 'sgd'; got 'xyz'"


def test_a_missing_package_comes_with_its_extra():
    error = _errors.missing_extra("pandas", "pandas", "to_pandas()")
    assert str(error) == "to_pandas() needs the package 'pandas': pip install 'fastmb[pandas]'"
