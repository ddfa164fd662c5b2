"""Normalisations, PReLU and Residual: plans, gradients, running statistics, what is refused."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

import fastmb as mb
from fastmb import executors, losses, optim
from fastmb.data import Batches
from fastmb.executors import Training
from fastmb.executors.reference import NumpyExecutor
from fastmb.plan import Op
from fastmb.rng import permutation

RNG = np.random.default_rng(0)
N = 7
X = RNG.normal(size=(N, 5)) * [1, 2, 3, 0.5, 1] + [0, 1, -3, 0, 5]
LABELS = np.array([0, 2, 1, 2, 2, 0, 1])


def networks(seed: int = 1, dtype: str = "float64") -> dict[str, mb.Sequential]:
    """Every layer in every place."""
    linear, act = mb.Linear, mb.Tanh
    bn, ln, res, prelu = mb.BatchNorm1d, mb.LayerNorm, mb.Residual, mb.PReLU
    modules = {
        "batch_norm": [linear(5, 4), bn(4), act(), linear(4, 3)],
        "batch_norm, no affine, other eps": [linear(5, 4), bn(4, eps=0.1, affine=False), act(), linear(4, 3)],
        "batch_norm first and last": [bn(5), linear(5, 3, bias=False), bn(3)],
        "batch_norm after batch_norm": [linear(5, 4), bn(4), bn(4), act(), mb.Dropout(0.3), linear(4, 3)],
        "layer_norm": [linear(5, 4), ln(4), act(), linear(4, 3)],
        "layer_norm first and last": [mb.Dropout(0.2), ln(5), linear(5, 3), ln(3, eps=0.01)],
        "layer_norm without bias, without affine": [
            ln(5, bias=False), linear(5, 4), ln(4, elementwise_affine=False), mb.GELU(), linear(4, 3),
        ],
        "prelu": [linear(5, 4), prelu(), linear(4, 3), prelu(3, init=0.1)],
        "prelu first": [prelu(5), prelu(), linear(5, 4), prelu(4), mb.Dropout(0.2), linear(4, 3)],
        "residual": [linear(5, 4), res(linear(4, 4), act(), linear(4, 4)), act(), linear(4, 3)],
        "residual first": [res(linear(5, 4), act(), linear(4, 5)), linear(5, 3)],
        "residual of operations": [linear(5, 4), act(), res(act()), res(mb.Identity()), linear(4, 3)],
        "residual that starts with operations": [
            mb.Dropout(0.2), res(act(), mb.Dropout(0.3), linear(5, 5)), linear(5, 3),
        ],
        "residual that ends with operations": [
            linear(5, 4), res(linear(4, 4), mb.Dropout(0.2)), act(), linear(4, 3),
        ],
        "residuals in residuals": [
            linear(5, 4),
            res(res(linear(4, 4)), act(), res(linear(4, 6), act(), res(linear(6, 6)), linear(6, 4))),
            res(res(prelu())),
            linear(4, 3),
        ],
        "all": [
            linear(5, 8), bn(8), mb.ReLU(), res(ln(8), linear(8, 8), bn(8), prelu(8), mb.Dropout(0.2), linear(8, 8)),
            prelu(), res(bn(8), mb.SiLU(), linear(8, 8)), ln(8), mb.ReLU(), linear(8, 3), mb.Softmax(),
        ],
    }  # fmt: skip
    found = {}
    rng = np.random.default_rng(seed)
    for name, parts in modules.items():
        net = found[name] = mb.Sequential(*parts, seed=seed, dtype=dtype)
        for array in net.parameters().values():  # nothing at 0 or 1
            array += rng.uniform(-0.3, 0.3, array.shape)
    return found


def build(net, loss="cross_entropy", optimizer="sgd", executor="numpy", batch_size=N, seed=3, n_threads=1):
    optimizer, loss = optim.get(optimizer), losses.get(loss)
    state = np.zeros((optimizer.n_states, net.plan.size), net.dtype)
    optimizer.init_state(state)
    training = Training(loss, optimizer, state, batch_size, seed)
    return executors.load(executor)(net.plan, net.flat, training, n_threads, buffers=net.flat_buffers)


def gradient(executor, net, batches, t=0):
    out, sums = np.full(net.plan.size, np.nan, net.dtype), np.full((1, 2), np.nan)
    executor.gradients(batches, t, out, sums)
    return out, sums[0, 0] / sums[0, 1]


@pytest.mark.parametrize("name", networks())
def test_gradient_is_the_slope_of_the_loss(executor, name):
    net = networks()[name]
    one = build(net, executor=executor)
    batches = Batches(X, LABELS, np.linspace(0.5, 2, N), None, N)
    analytic, _ = gradient(one, net, batches)
    used = np.zeros(net.plan.size, dtype=bool)
    for stage in net.plan.stages:
        used[stage.offset : stage.offset + stage.size] = True
    assert not analytic[~used].any()  # the gaps
    h = 2.0**-13  # truncation h^4 ~ 2e-16 times a fifth derivative, rounding 2^-53 / h ~ 1e-12
    for i in np.flatnonzero(used):
        before = net.flat[i]

        def loss(step, i=i, before=before):
            net.flat[i] = before + step
            return gradient(one, net, batches)[1]

        slope = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)
        net.flat[i] = before
        assert abs(analytic[i] - slope) < 1e-8 * max(1, abs(slope)), i


# ---- plans, names, sizes ---------------------------------------------------------------------------------------------


def test_each_layer_is_a_stage_with_the_operations_behind_it():
    net = mb.Sequential(
        mb.Linear(4, 3), mb.BatchNorm1d(3, eps=0.1, momentum=0.2), mb.ReLU(), mb.Dropout(0.1), mb.PReLU(),
        mb.LayerNorm(3), mb.Tanh(), mb.Linear(3, 2),
    )  # fmt: skip
    assert [(s.kind, s.name, s.n_in, s.n_out, s.rows, s.columns, len(s.ops)) for s in net.plan.stages] == [
        ("linear", "0", 4, 3, 5, 3, 0),
        ("batch_norm", "1", 3, 3, 2, 3, 2),
        ("prelu", "4", 3, 3, 1, 1, 0),
        ("layer_norm", "5", 3, 3, 2, 3, 1),
        ("linear", "7", 3, 2, 4, 2, 0),
    ]
    assert (net.plan.stages[1].eps, net.plan.stages[1].momentum) == (0.1, 0.2)
    assert net.plan.batch_norms == (1,)
    assert net.plan.flops(10) == 10 * (4 * 12 + 6 * 6)


def test_a_residual_is_a_skip_of_its_last_stage():
    def stages(*modules):
        plan = mb.Sequential(mb.Linear(4, 4), *modules, mb.Linear(4, 2)).plan
        return [(s.kind, s.skip, tuple(op.kind for op in s.ops)) for s in plan.stages[:-1]]

    linear, relu, residual = (lambda: mb.Linear(4, 4)), mb.ReLU(), mb.Residual
    assert stages(residual(linear()), relu) == [("linear", None, ()), ("linear", 1, ("relu",))]
    assert stages(relu, residual(linear(), relu), relu) == [
        ("linear", None, ("relu",)), ("linear", None, ("relu",)), ("identity", 1, ("relu",)),
    ]  # fmt: skip
    assert stages(residual(relu, linear())) == [
        ("linear", None, ()), ("identity", None, ("relu",)), ("linear", 1, ()),
    ]  # fmt: skip
    assert stages(residual(residual(linear()), linear())) == [
        ("linear", None, ()), ("linear", 1, ()), ("linear", 1, ()),
    ]  # fmt: skip
    assert stages(residual(residual(linear()))) == [("linear", None, ()), ("linear", 1, ()), ("identity", 1, ())]
    assert stages(residual(mb.Identity())) == [("linear", None, ()), ("identity", 1, ())]


def test_dropouts_are_numbered_through_residuals():
    net = mb.Sequential(
        mb.Dropout(0.1),
        mb.Linear(4, 4),
        mb.Residual(mb.Linear(4, 4), mb.Dropout(0.2)),
        mb.Dropout(0.3),
        mb.Linear(4, 2),
    )
    assert [op for stage in net.plan.stages for op in stage.ops] == [Op("dropout", 0.2, 1), Op("dropout", 0.3, 2)]


def test_parameters_and_buffers_have_torchs_names_and_initial_values():
    net = mb.Sequential(
        mb.Linear(5, 4), mb.BatchNorm1d(4), mb.Residual(mb.LayerNorm(4), mb.Linear(4, 4), mb.PReLU(4, 0.3)), mb.PReLU()
    )
    found = {name: array.shape for name, array in net.parameters().items()}
    assert found == {
        "0.weight": (5, 4), "0.bias": (4,), "1.weight": (4,), "1.bias": (4,), "2.0.weight": (4,), "2.0.bias": (4,),
        "2.1.weight": (4, 4), "2.1.bias": (4,), "2.2.weight": (4,), "3.weight": (1,),
    }  # fmt: skip
    numbers = net.parameters() | net.buffers()
    values = {name: array[0].item() for name, array in numbers.items() if array.ndim == 1}
    assert values == {
        "0.bias": 0, "1.weight": 1, "1.bias": 0, "2.0.weight": 1, "2.0.bias": 0, "2.1.bias": 0,
        "2.2.weight": np.float32(0.3), "3.weight": 0.25, "1.running_mean": 0, "1.running_var": 1,
        "1.num_batches_tracked": 0,
    }  # fmt: skip
    assert all(np.shares_memory(array, net.flat_buffers) for array in net.buffers().values())
    assert mb.mlp([4, 3]).buffers() == {}


def test_a_linear_is_scaled_for_the_activation_behind_the_normalisation():
    def spread(*modules):
        weight = mb.Sequential(mb.Linear(300, 200), *modules, dtype="float64").parameters()["0.weight"]
        return weight.max() * 10  # sqrt(3 / 300) = 1 / 10

    for modules, gain in [
        ((mb.BatchNorm1d(200), mb.ReLU()), 2**0.5),
        ((mb.LayerNorm(200), mb.Tanh()), 5 / 3),
        ((mb.PReLU(init=1.0),), 1),
        ((mb.Residual(mb.LayerNorm(200), mb.SELU()), mb.ReLU()), 1),
    ]:
        assert gain * 0.999 < spread(*modules) <= gain


def test_the_summary_shows_what_residuals_hold():
    net = mb.Sequential(mb.Linear(5, 4), mb.Residual(mb.LayerNorm(4), mb.ReLU(), mb.Linear(4, 4)), mb.BatchNorm1d(4))
    assert net.summary(8).splitlines()[:7] == [
        "     module          output  parameters",
        "0    Linear(5, 4)    (8, 4)          24",
        "1    Residual of 3:  (8, 4)",
        "1.0  LayerNorm(4)    (8, 4)           8",
        "1.1  ReLU()          (8, 4)",
        "1.2  Linear(4, 4)    (8, 4)          20",
        "2    BatchNorm1d(4)  (8, 4)           8",
    ]
    assert repr(net[1]) == "Residual(LayerNorm(4), ReLU(), Linear(4, 4))"


# ---- what is kept ----------------------------------------------------------------------------------------------------


def trained(executor="native", **options):
    net = mb.Sequential(
        mb.Linear(5, 8), mb.BatchNorm1d(8), mb.ReLU(), mb.Residual(mb.Linear(8, 8, init=np.eye(8)), mb.PReLU()),
        mb.LayerNorm(8), mb.Linear(8, 3),
    )  # fmt: skip
    options = {"optimizer": mb.Adam(0.01), "batch_size": 16, "seed": 5, "executor": executor} | options
    return mb.Trainer(net, **options)


DATA = np.random.default_rng(2).normal(size=(100, 5)).astype(np.float32) * 3 + 1
CLASSES = np.random.default_rng(3).integers(0, 3, 100)


def everything(trainer):
    net = trainer.net
    return net.flat.tobytes(), net.flat_buffers.tobytes(), trainer.state.tobytes(), net(DATA).tobytes(), trainer.t


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t)), "checkpoint"],
    ids=["deepcopy", "pickle", "checkpoint"],
)  # fmt: skip
def test_running_statistics_go_with_the_trainer_and_it_goes_on_to_the_same_bits(executor, duplicate, tmp_path):
    trainer, whole = trained(executor), trained(executor)
    trainer.fit(DATA, CLASSES, max_epochs=2, verbose=0)
    whole.fit(DATA, CLASSES, max_epochs=4, verbose=0)
    if duplicate == "checkpoint":
        trainer.save(tmp_path / "file")
        again = mb.load(tmp_path / "file")
    else:
        again = duplicate(trainer)
    assert everything(again) == everything(trainer)
    assert repr(again.net) == repr(trainer.net)
    again.fit(DATA, CLASSES, max_epochs=2, verbose=0)
    assert everything(again) == everything(whole) != everything(trainer)
    assert trainer.net.buffers()["1.num_batches_tracked"] == 14


def test_other_programs_find_the_running_statistics_in_a_checkpoint(tmp_path):
    from safetensors.numpy import load_file

    trainer = trained()
    trainer.fit(DATA, CLASSES, max_epochs=1, verbose=0)
    trainer.save(tmp_path / "file")
    tensors = load_file(tmp_path / "file")
    for name, array in (trainer.net.parameters() | trainer.net.buffers()).items():
        np.testing.assert_array_equal(tensors[name], array)


def test_a_network_pickled_without_buffers_is_read():
    net = mb.mlp([4, 3])
    state = net.__getstate__()
    del state["flat_buffers"]
    other = mb.Sequential.__new__(mb.Sequential)
    other.__setstate__(state)
    assert np.array_equal(other.flat, net.flat)


def test_a_fit_that_diverges_has_the_statistics_of_its_last_finite_epoch(executor):
    trainer, expected = (trained(executor, optimizer=mb.SGD(lambda t: 0.01 if t < 10 else 1e30)) for _ in range(2))
    with pytest.raises(FloatingPointError):
        trainer.fit(DATA, CLASSES, max_epochs=5, verbose=0)
    expected.fit(DATA, CLASSES, max_epochs=1, verbose=0)
    assert everything(trainer) == everything(expected)


def test_a_step_whose_loss_is_not_finite_and_gradients_change_no_statistics(executor):
    trainer = trained(executor)
    trainer.step(DATA, CLASSES)
    before = everything(trainer)
    trainer.gradients(DATA, CLASSES)
    bad = DATA.copy()
    bad[3] = np.nan
    with pytest.raises(FloatingPointError):
        trainer.step(bad, CLASSES)
    trainer.evaluate(DATA, CLASSES)
    assert everything(trainer) == before


def test_early_stopping_brings_back_the_statistics_of_the_best_epoch(executor):
    kept = {}

    class Keep(mb.Callback):
        def on_epoch_end(self, trainer, row):
            kept[row["epoch"]] = everything(trainer)[:2]

    trainer = trained(executor, optimizer=mb.Adam(0.1))
    stopping = mb.EarlyStopping(patience=3, restore_best=True)
    data = {"X_val": DATA[60:], "y_val": CLASSES[60:], "max_epochs": 50, "verbose": 0}
    trainer.fit(DATA[:60], CLASSES[:60], callbacks=[Keep(), stopping], **data)
    assert everything(trainer)[:2] == kept[stopping.best_epoch] != kept[max(kept)]


def test_running_statistics_come_to_those_of_the_data(executor):
    net = mb.Sequential(mb.BatchNorm1d(5, momentum=None), mb.Linear(5, 3), dtype="float64")
    trainer = mb.Trainer(net, batch_size=50, executor=executor)
    trainer.fit(DATA, CLASSES, max_epochs=1, verbose=0)
    found = net.buffers()
    parts = DATA[permutation(len(DATA), trainer.seed, 0)].astype(np.float64).reshape(2, 50, 5)
    np.testing.assert_allclose(found["0.running_mean"], parts.mean(axis=(0, 1)), rtol=1e-12)
    np.testing.assert_allclose(found["0.running_var"], parts.var(axis=1, ddof=1).mean(axis=0), rtol=1e-12)
    assert found["0.num_batches_tracked"] == 2


def test_without_given_buffers_an_executor_has_its_own():
    net = networks()["batch_norm"]
    out = np.full((N, 3), np.nan)
    for name in executors.NAMES:
        training = Training(losses.get("cross_entropy"), mb.SGD(), np.zeros((0, net.plan.size)), N, 0)
        one = executors.load(name)(net.plan, net.flat, training, 1)
        gradient(one, net, Batches(X, LABELS, None, None, N))
        one.forward(X, 1.0, out)
    assert NumpyExecutor(net.plan, net.flat).buffers.size == net.plan.buffer_size


# ---- what is refused -------------------------------------------------------------------------------------------------

norm = mb.BatchNorm1d(4)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: mb.BatchNorm1d(0), ValueError, "num_features must be an integer >= 1; got 0"),
        (lambda: mb.BatchNorm1d(4, eps=0), ValueError, r"eps must be a number in \(0, inf\); got 0"),
        (lambda: mb.BatchNorm1d(4, momentum=2), ValueError, r"momentum must be a number in \[0, 1\]; got 2"),
        (lambda: mb.LayerNorm(4.5), TypeError, "normalized_shape must be an integer >= 1; got 4.5"),
        (lambda: mb.PReLU(0), ValueError, "num_parameters must be an integer >= 1; got 0"),
        (lambda: mb.PReLU(init=np.inf), ValueError, "init must be a number in"),
        (lambda: mb.Residual(), ValueError, "Residual must hold at least one module; got none"),
        (lambda: mb.Residual(mb.ReLU), TypeError, r"modules\[0\] of Residual must be a module such as"),
        (
            lambda: mb.Sequential(mb.Linear(5, 4), mb.BatchNorm1d(5)),
            ValueError,
            r"modules\[1\], BatchNorm1d\(5\), takes 5 features; modules\[0\], Linear\(5, 4\), gives 4",
        ),
        (
            lambda: mb.Sequential(mb.LayerNorm(5), mb.Linear(4, 3)),
            ValueError,
            r"modules\[1\], Linear\(4, 3\), takes 4 features; modules\[0\], LayerNorm\(5\), gives 5",
        ),
        (
            lambda: mb.Sequential(mb.Linear(5, 4), mb.ReLU(), mb.PReLU(3)),
            ValueError,
            r"modules\[2\], PReLU\(num_parameters=3\), takes 3 features; modules\[0\], Linear\(5, 4\), gives 4",
        ),
        (
            lambda: mb.Sequential(mb.Linear(5, 4), mb.Residual(mb.Linear(4, 3))),
            ValueError,
            r"modules\[1\], Residual\(Linear\(4, 3\)\), takes 4 features and gives 3; modules\(x\) \+ x needs as many",
        ),
        (
            lambda: mb.Sequential(mb.Residual(mb.ReLU(), mb.Linear(5, 4))),
            ValueError,
            r"modules\[0\], .*, takes 5 features and gives 4",
        ),
        (
            lambda: mb.Sequential(mb.Linear(5, 4), mb.Residual(mb.ReLU(), mb.Residual(mb.Linear(3, 4)))),
            ValueError,
            r"modules\[1\].modules\[1\].modules\[0\], Linear\(3, 4\), takes 3 features; modules\[0\], Linear\(5, 4\)",
        ),
        (
            lambda: mb.Sequential(mb.Linear(5, 4), mb.Residual(mb.Softmax())),
            ValueError,
            r"Softmax must be the last module; modules\[1\].modules\[0\] is one",
        ),
        (
            lambda: mb.Sequential(mb.Linear(4, 4), norm, mb.Residual(norm)),
            ValueError,
            r"modules\[2\].modules\[0\], BatchNorm1d\(4\), is there twice; layers share no parameters",
        ),
        (lambda: mb.Sequential(mb.LayerNorm(4)), ValueError, r"at least one Linear; got LayerNorm\(4\)"),
    ],
)
def test_misuse_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("rows", "options", "which"),
    [
        (
            65,
            {"batch_size": 64},
            r"X has 65 rows, and the last mini-batch of 64 would have 1 \(drop_last=True leaves it",
        ),
        (64, {"batch_size": 1}, "X has 64 rows, and a mini-batch would have 1"),
        (64, {"batch_size": 1, "drop_last": True}, "X has 64 rows, and a mini-batch would have 1"),
        (1, {"batch_size": 64}, "X has 1 row, and a mini-batch would have 1"),
    ],
)
def test_a_mini_batch_of_one_row_is_refused_before_anything_changes(executor, rows, options, which):
    trainer = trained(executor, **options)
    before = everything(trainer)
    with pytest.raises(ValueError, match="more than 1 value per channel, in training; " + which):
        trainer.fit(DATA[:rows], CLASSES[:rows], verbose=0)
    for call in (trainer.step, trainer.gradients):
        with pytest.raises(ValueError, match="BatchNorm1d needs more than 1 row"):
            call(DATA[:1], CLASSES[:1])
    assert everything(trainer) == before
    assert trainer.history["loss"] == []


def test_one_row_is_enough_where_nothing_needs_more(executor):
    trainer = trained(executor, batch_size=64, drop_last=True)
    trainer.fit(DATA[:65], CLASSES[:65], max_epochs=1, verbose=0)
    assert trainer.t == 1
    trainer.evaluate(DATA[:1], CLASSES[:1])
    assert trainer.net(DATA[0]).shape == (3,)
    other = mb.Trainer(mb.Sequential(mb.LayerNorm(5), mb.Linear(5, 3), mb.PReLU()), executor=executor)
    other.step(DATA[:1], CLASSES[:1])
