"""Networks: their plans, their parameters, what they predict, and what they refuse."""

import copy
import pickle
import sys

import numpy as np
import pytest

import fastmb as mb
from fastmb import executors, nn
from fastmb.plan import Op

X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


def test_a_stage_is_a_linear_with_what_follows_it():
    net = mb.Sequential(
        mb.Dropout(0.1),
        mb.Linear(4, 3),
        mb.GELU("tanh"),
        mb.Dropout(0.2),
        mb.LeakyReLU(0.3),
        mb.Linear(3, 2, bias=False),
    )
    plan = net.plan
    assert plan.input_ops == (Op("dropout", 0.1, 0),)
    assert plan.stages[0].ops == (Op("gelu_tanh"), Op("dropout", 0.2, 1), Op("leaky_relu", 0.3))
    assert plan.stages[1].ops == ()
    assert [(s.n_in, s.n_out, s.bias, s.offset, s.name) for s in plan.stages] == [
        (4, 3, True, 0, "1"),
        (3, 2, False, 16, "5"),
    ]


def test_what_does_nothing_is_no_part_of_the_plan():
    net = mb.Sequential(mb.Identity(), mb.Linear(4, 3), mb.Dropout(0), mb.Identity(), mb.Softmax())
    assert net.plan.input_ops == net.plan.stages[0].ops == ()


def test_every_activation_has_the_kind_that_it_is_listed_under():
    assert {name: make().kind for name, make in nn.ACTIVATIONS.items()} == {name: name for name in nn.ACTIVATIONS}


def test_parameters_are_live_views_named_after_their_module():
    net = mb.mlp([4, 3, 2], dtype="float64")
    parameters = net.parameters()
    assert {name: array.shape for name, array in parameters.items()} == {
        "0.weight": (4, 3),
        "0.bias": (3,),
        "2.weight": (3, 2),
        "2.bias": (2,),
    }
    assert all(np.shares_memory(array, net.flat) for array in parameters.values())
    before = net(X)
    parameters["2.bias"][:] += 1
    np.testing.assert_allclose(net(X), before + 1, rtol=0, atol=4 * np.finfo(np.float64).eps * np.abs(before).max())


@pytest.mark.parametrize("name", ["flat", "flat_buffers"])
def test_what_is_assigned_to_a_vector_is_copied_in(name):
    net = mb.Sequential(mb.Linear(4, 3), mb.BatchNorm1d(3), mb.Linear(3, 2))
    net(X)  # it has an executor now
    vector, views = getattr(net, name), net.parameters() | net.buffers()
    other = np.arange(vector.size, dtype=np.float64) / 64 + 1
    setattr(net, name, other)
    assert getattr(net, name) is vector
    assert vector.tolist() == other.tolist()
    assert all(array is views[each] for each, array in (net.parameters() | net.buffers()).items())
    assert np.array_equal(net(X), pickle.loads(pickle.dumps(net))(X))
    setattr(net, name, getattr(net, name).__imul__(2))  # what `net.flat *= 2` does
    assert vector.tolist() == (2 * other).tolist()
    for wrong, error in ((other[1:], ValueError), (other[0], ValueError), ("ones", TypeError)):
        with pytest.raises(error, match=f"^{name} must "):
            setattr(net, name, wrong)
    assert vector.tolist() == (2 * other).tolist()


def test_what_was_assigned_to_a_networks_vector_is_trained_on(executor):
    one, other = (mb.Trainer(mb.mlp([4, 3, 2]), n_threads=1, executor=executor) for _ in range(2))
    values = one.net.flat * 0.5
    one.net.flat = values
    other.net.flat[:] = values
    for each in (one, other):
        each.step(X, np.array([0, 1, 0, 1, 0, 1]))
    assert one.net.digest() == other.net.digest()
    assert one.evaluate(X, [0] * 6) == other.evaluate(X, [0] * 6)


@pytest.mark.parametrize("name", ["plan", "modules", "dtype", "softmax"])
def test_what_a_network_is_made_of_cannot_be_replaced(name):
    net = mb.mlp([4, 3, 2])
    before = getattr(net, name)
    with pytest.raises(AttributeError, match=f"^{name} can't be replaced: make a new Sequential"):
        setattr(net, name, getattr(mb.mlp([4, 3, 2]), name))
    assert getattr(net, name) is before


def test_parameters_are_written_to_and_never_replaced():
    net = mb.Sequential(mb.Linear(4, 3), mb.BatchNorm1d(3))
    found, W = net.parameters(), np.ones((4, 3), np.float32)
    hint = r"write to the array, \['0.weight'\]\[:\] = values; an array that is put in its place"
    with pytest.raises(TypeError, match=hint):
        found["0.weight"] = W
    with pytest.raises(TypeError, match="write to the array"):
        found.update({"0.weight": W})
    with pytest.raises(TypeError, match="write to the array"):
        found |= {"0.weight": W}
    with pytest.raises(TypeError, match=r"write to the array, \['1.running_mean'\]\[:\] = values"):
        net.buffers()["1.running_mean"] = W[0]
    both = net.parameters() | net.buffers()
    for name, array in both.items():
        assert array is (net.parameters().get(name) if name in net.parameters() else net.buffers()[name])
    both["0.weight"] = W  # an ordinary dict
    for way in copy.copy, copy.deepcopy, lambda found: pickle.loads(pickle.dumps(found)):
        again = way(net.parameters())
        assert list(again) == list(net.parameters())
        again["0.weight"] = W
        assert type(again) is dict
    deep = copy.deepcopy(net.parameters())["0.weight"]
    net.parameters()["0.weight"][:] = W
    assert (deep != W).any()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_flat_vector_starts_at_a_cache_line_also_after_a_pickle(dtype):
    net = mb.mlp([4, 3, 2], dtype=dtype)
    for one in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert one.flat.ctypes.data % 64 == 0
        assert one.flat.dtype == net.dtype == dtype


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_says_the_same_and_owns_its_parameters(duplicate):
    net = mb.mlp([4, 3, 2], dropout=0.5, activation="gelu_tanh", seed=7)
    net(X)  # it has an executor now, which a copy must not share
    net.task, net.squeeze, net.input_scale = "classification", True, 0.5
    other = duplicate(net)
    assert repr(other) == repr(net)
    assert (other.task, other.squeeze, other.input_scale) == ("classification", True, 0.5)
    assert np.array_equal(other(X), net(X))
    before = net(X)
    other.parameters()["0.weight"][:] = 0
    assert np.array_equal(net(X), before)
    assert not np.array_equal(other(X), before)


def test_output_is_that_of_the_formula():
    net = mb.mlp([4, 3, 2], activation="tanh", dropout=0.5, dtype="float64")
    p = net.parameters()
    expected = np.tanh(X.astype(np.float64) @ p["0.weight"] + p["0.bias"]) @ p["3.weight"] + p["3.bias"]
    np.testing.assert_allclose(net(X), expected, rtol=1e-13)


def test_one_row_gives_one_row():
    net = mb.mlp([4, 3, 2])
    assert net(X[0]).shape == (2,)
    np.testing.assert_allclose(net(X[0]), net(X)[0], rtol=1e-5)
    assert net(X[0].tolist()).shape == (2,)


def test_inputs_are_scaled_by_input_scale():
    net = mb.mlp([4, 3, 2], dtype="float64")
    pixels = np.arange(24, dtype=np.uint8).reshape(6, 4)
    expected = net(pixels / 255)
    net.input_scale = 1 / 255
    np.testing.assert_allclose(net(pixels), expected, rtol=1e-13, atol=1e-15)


def test_a_softmax_at_the_end_gives_probabilities():
    linear = mb.Linear(4, 3, init="normal")
    raw = mb.Sequential(linear, dtype="float64")(X) * 1e5
    net = mb.Sequential(mb.Linear(4, 3, init="normal"), mb.Softmax(), dtype="float64")
    net.flat *= 1e5  # exp would overflow if it were not shifted
    z = np.exp(raw - raw.max(axis=1, keepdims=True))
    np.testing.assert_allclose(net(X), z / z.sum(axis=1, keepdims=True), rtol=1e-10, atol=1e-300)
    assert np.array_equal(net.predict_proba(X), net(X))
    assert np.array_equal(net.predict(X), net(X))  # no task yet


def test_predict_returns_what_the_task_asks_for():
    net = mb.mlp([4, 3, 2], seed=1)
    raw = net(X)
    assert np.array_equal(net.predict(X), raw)
    net.task = "classification"
    assert np.array_equal(net.predict(X), raw.argmax(axis=1))
    assert net.predict(X).dtype == np.int64
    np.testing.assert_allclose(net.predict_proba(X).sum(axis=1), 1, rtol=1e-6)
    net.task = "multilabel"
    assert np.array_equal(net.predict(X), (raw > 0).astype(np.int64))
    np.testing.assert_allclose(net.predict_proba(X), 1 / (1 + np.exp(-raw)), rtol=1e-6)


def test_squeeze_drops_the_only_output():
    net = mb.mlp([4, 3, 1])
    assert net.predict(X).shape == (6, 1)
    net.squeeze = True
    assert net.predict(X).shape == (6,)
    net.task = "multilabel"
    assert net.predict(X).shape == net.predict_proba(X).shape == (6,)


def test_predict_refuses_nan_where_a_call_lets_it_through():
    net = mb.mlp([4, 3, 2])
    bad = X.copy()
    bad[3, 1] = np.nan
    with pytest.raises(ValueError, match="X must be finite; got nan in row 3, column 1"):
        net.predict(bad)
    assert np.isnan(net(bad)[3]).any()
    assert np.isfinite(net(bad)[[0, 1, 2, 4, 5]]).all()


def test_predict_proba_says_when_there_are_no_probabilities():
    with pytest.raises(ValueError, match=r"predict_proba takes a network that ends in Softmax\(\)"):
        mb.mlp([4, 3, 2]).predict_proba(X)


def test_wrong_features_are_named():
    with pytest.raises(ValueError, match="X has 3 features; the network takes 4"):
        mb.mlp([4, 3, 2])(X[:, :3])


@pytest.mark.parametrize("there", [["numba", "numpy"], ["numpy"]])
def test_without_the_extension_networks_run_on_the_next_executor(there, monkeypatch):
    monkeypatch.setattr(executors, "available", lambda name: name in there)
    assert executors.default_name() == there[0]
    assert executors.default().__name__ == {"numba": "NumbaExecutor", "numpy": "NumpyExecutor"}[there[0]]


def test_an_extension_that_fails_to_load_is_not_passed_over(monkeypatch):
    monkeypatch.setattr(executors, "available", lambda name: True)
    monkeypatch.setitem(sys.modules, "fastmb.executors.native", None)
    with pytest.raises(ModuleNotFoundError, match="native"):
        executors.default()


def test_mlp_is_the_sequential_that_it_stands_for():
    net = mb.mlp([4, 3, 2], activation="relu", dropout=0.1, seed=5, bias=False)
    same = mb.Sequential(mb.Linear(4, 3, bias=False), mb.ReLU(), mb.Dropout(0.1), mb.Linear(3, 2, bias=False), seed=5)
    assert repr(net) == repr(same)
    assert np.array_equal(net.flat, same.flat)
    assert len(net) == 4
    assert net[1] == mb.ReLU()
    assert list(net) == list(net.modules)


def test_repr_shows_what_is_not_default():
    modules = (mb.Linear(4, 3, bias=False, init=np.ones((4, 3))), mb.LeakyReLU(0.2), mb.ELU(), mb.GELU("tanh"))
    assert [repr(module) for module in modules] == [
        "Linear(4, 3, bias=False, init=array of shape (4, 3))",
        "LeakyReLU(negative_slope=0.2)",
        "ELU()",
        "GELU(approximate='tanh')",
    ]


def test_summary_is_a_table_of_modules_shapes_and_parameters():
    assert mb.mlp([784, 128, 10]).summary(64).splitlines() == [
        "   module            output     parameters",
        "0  Linear(784, 128)  (64, 128)     100,480",
        "1  ReLU()            (64, 128)",
        "2  Linear(128, 10)   (64, 10)        1,290",
        "101,770 parameters, float32, 397.5 KiB",
        "26.182 MFLOP a training step of 64 rows",
        "2.6 MiB (parameters 0.4, states 0.8, activations 0.3, kept 1.2) in a fit with Adam",
    ]
    assert (
        mb.mlp([784, 128, 10])
        .summary(64, "sgd")
        .endswith("1.0 MiB (parameters 0.4, activations 0.3, kept 0.4) in a fit with SGD")
    )
    assert "(n, 128)" in mb.mlp([784, 128, 10]).summary()


shared = mb.Linear(3, 3)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: mb.Linear(0, 3), ValueError, "in_features must be an integer >= 1; got 0"),
        (lambda: mb.Linear(3, 2.5), TypeError, "out_features must be an integer >= 1; got 2.5"),
        (lambda: mb.Linear(3, True), TypeError, "out_features must be an integer >= 1; got True"),
        (lambda: mb.Dropout(1), ValueError, r"p must be a number in \[0, 1\); got 1"),
        (lambda: mb.Dropout(-0.1), ValueError, r"p must be a number in \[0, 1\); got -0.1"),
        (
            lambda: mb.GELU("tan"),
            ValueError,
            "approximate must be one of 'none', 'tanh'; got 'tan'; did you mean 'tanh'",
        ),
        (lambda: mb.ELU(0), ValueError, r"alpha must be a number in \(0, inf\); got 0"),
        (lambda: mb.LeakyReLU(np.inf), ValueError, "negative_slope must be a number in"),
        (lambda: mb.Sequential(), ValueError, "modules must hold at least one Linear; got none"),
        (lambda: mb.Sequential(mb.ReLU()), ValueError, r"modules must hold at least one Linear; got ReLU\(\)"),
        (
            lambda: mb.Sequential(mb.Linear(4, 3), mb.ReLU(), mb.Linear(5, 2)),
            ValueError,
            r"modules\[2\], Linear\(5, 2\), takes 5 features; modules\[0\], Linear\(4, 3\), gives 3",
        ),
        (
            lambda: mb.Sequential(mb.Softmax(), mb.Linear(4, 3)),
            ValueError,
            r"Softmax must be the last module; modules\[0\]",
        ),
        (lambda: mb.Sequential(mb.Linear(4, 3), mb.ReLU), TypeError, r"modules\[1\] must be a module such as"),
        (lambda: mb.Sequential([mb.Linear(4, 3)]), TypeError, r"modules\[0\] must be a module such as"),
        (lambda: mb.Sequential(shared, shared), ValueError, r"modules\[1\], Linear\(3, 3\), is there twice"),
        (
            lambda: mb.Sequential(mb.Linear(4, 3), dtype="float16"),
            ValueError,
            "dtype must be one of 'float32', 'float64'; got",
        ),
        (lambda: mb.Sequential(mb.Linear(4, 3), dtype="single precision"), ValueError, "dtype must be one of"),
        (lambda: mb.mlp([4, 3], dtype=None), ValueError, "dtype must be one of 'float32', 'float64'; got None"),
        (lambda: mb.Softmax(dim=1), TypeError, r"^Softmax\.__init__\(\) got an unexpected keyword argument 'dim'"),
        (lambda: mb.mlp(64, 128, 10), TypeError, r"sizes must be a sequence of integers such as .*; got 64"),
        (lambda: mb.mlp("64"), TypeError, r"sizes must be a sequence of integers such as .*; got '64'"),
        (lambda: mb.mlp(None), TypeError, "sizes must be a sequence of integers such as .*; got None"),
        (lambda: mb.mlp([4, 2.5, 3]), TypeError, r"sizes\[1\] must be an integer >= 1; got 2.5"),
        (lambda: mb.mlp([4, 0]), ValueError, r"sizes\[1\] must be an integer >= 1; got 0"),
        (
            lambda: mb.mlp([4, 3], activation=["relu"]),
            TypeError,
            r"activation must be a name or a module such as Activation\(f\); got \['relu'\]",
        ),
        (
            lambda: mb.mlp([4, 3], activation=mb.Dropout(0.5)),
            TypeError,
            r"activation must be a name or a module such as Activation\(f\); got Dropout\(\)",
        ),
        (lambda: mb.Sequential(mb.Linear(4, 3), seed=-1), ValueError, "seed must be an integer from 0 to"),
        (lambda: mb.Sequential(mb.Linear(4, 3), seed=None), TypeError, "seed must be an integer from 0 to"),
        (lambda: mb.mlp([4]), ValueError, r"sizes must have at least 2 values, features and outputs; got \[4\]"),
        (
            lambda: mb.mlp([4, 3], activation="rleu"),
            ValueError,
            "activation must be one of .*; got 'rleu'; did you mean",
        ),
        (lambda: mb.mlp([4, 3], dropout=1.0), ValueError, r"dropout must be a number in \[0, 1\); got 1.0"),
        (lambda: mb.mlp([4, 3], dropout=np.ones(2)), TypeError, r"dropout must be a number in \[0, 1\); got array"),
        (lambda: mb.mlp([4, 3]).summary(0), ValueError, "batch_size must be an integer >= 1; got 0"),
    ],
)
def test_misuse_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_several_outputs_stay_after_another_task():
    net, x = mb.mlp([3, 4, 2]), np.ones((5, 3))
    mb.Trainer(net).fit(x, np.array([0, 1, 0, 1, 0]), max_epochs=1, verbose=0)
    for loss in ("mse", "bce_with_logits"):
        trainer = mb.Trainer(net, loss)
        trainer.backward(x, np.ones((5, 2)))
        trainer.apply()
        assert net.predict(x).shape == (5, 2)
    assert net.predict_proba(x).shape == (5, 2)
