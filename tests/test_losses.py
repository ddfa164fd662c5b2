"""Losses check what they are made of; what they compute is tested with the executors."""

import copy
import pickle

import numpy as np
import pytest

import fastmb as mb
from fastmb import losses


@pytest.mark.parametrize(
    ("name", "cls", "task"),
    [
        ("cross_entropy", mb.CrossEntropy, "classification"),
        ("bce_with_logits", mb.BCEWithLogits, "multilabel"),
        ("mse", mb.MSE, "regression"),
        ("mae", mb.MAE, "regression"),
        ("huber", mb.Huber, "regression"),
    ],
)
def test_get_knows_every_loss_by_its_name(name, cls, task):
    loss = losses.get(name)
    assert type(loss) is cls
    assert (loss.kind, loss.task) == (name, task)
    assert (loss.label_smoothing, loss.weight, loss.delta) == (0.0, None, 1.0)  # every executor reads all three
    assert losses.get(loss) is loss


def test_weights_are_read_only_float64_copies():
    given = np.array([1, 2, 0], dtype=np.int8)
    loss = mb.CrossEntropy(class_weight=given)
    given[0] = 9
    assert loss.weight.dtype == np.float64
    assert loss.weight.tolist() == [1, 2, 0]
    with pytest.raises(ValueError, match="read-only"):
        loss.weight[0] = 5
    assert mb.BCEWithLogits(pos_weight=3).weight.tolist() == [3]


def test_losses_pickle_and_copy():
    loss = mb.CrossEntropy(label_smoothing=0.1, class_weight=[1, 2])
    for other in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):
        assert repr(other) == repr(loss) == "CrossEntropy(label_smoothing=0.1, class_weight=array([1., 2.]))"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: losses.get("crossentropy"), ValueError, "got 'crossentropy'; did you mean 'cross_entropy'"),
        (lambda: losses.get(mb.MSE), TypeError, "loss must be a name or a Loss such as MSE()"),
        (
            lambda: mb.CrossEntropy(label_smoothing=1.5),
            ValueError,
            r"label_smoothing must be a number in \[0, 1\]; got 1.5",
        ),
        (
            lambda: mb.CrossEntropy(class_weight=[1, -2]),
            ValueError,
            "class_weight must be finite and >= 0; got -2.0 at pos",
        ),
        (
            lambda: mb.CrossEntropy(class_weight=[[1]]),
            ValueError,
            r"class_weight must have one dimension; got shape \(1, 1",
        ),
        (
            lambda: mb.CrossEntropy(class_weight="balanced"),
            TypeError,
            "class_weight must be an array of numbers; got 'bal",
        ),
        (
            lambda: mb.BCEWithLogits(pos_weight=[1, np.nan]),
            ValueError,
            "pos_weight must be finite .* nan at position 1",
        ),
        (lambda: mb.Huber(delta=0), ValueError, r"delta must be a number in \(0, inf\); got 0"),
        (lambda: mb.Huber(delta="1"), TypeError, "delta must be a number"),
        (
            lambda: mb.CrossEntropy(class_weight=[1, 1]).check_outputs(3),
            ValueError,
            "class_weight must have 3 values.*; got 2",
        ),
        (lambda: mb.BCEWithLogits([1, 1]).check_outputs(1), ValueError, "pos_weight must have 1 values.*; got 2"),
        (lambda: mb.CrossEntropy().check_outputs(1), ValueError, "at least 2 outputs"),
    ],
)
def test_misuse_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("loss", [mb.CrossEntropy(class_weight=[1, 0, 1]), mb.BCEWithLogits([1, 2, 3]), mb.MSE()])
def test_check_outputs_accepts_what_fits(loss):
    loss.check_outputs(3)
