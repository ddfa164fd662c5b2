"""The reference executor is right: by finite differences, by hand, and by the contract of `Executor.run`.

What is worked by hand runs on every executor that was built, since its numbers are exact in any of them.
"""

import time

import numpy as np
import pytest

import fastmb as mb
from fastmb import executors, losses, nn, optim
from fastmb.data import Batches
from fastmb.executors import Training
from fastmb.executors.reference import ACTIVATIONS, ROWS, NumpyExecutor, update
from fastmb.rng import dropout_mask

RNG = np.random.default_rng(0)
N = 7
X = RNG.normal(size=(N, 5))
LABELS = np.array([0, 2, 1, 2, 2, 0, 1])
ROWS_OF_PROBABILITIES = RNG.dirichlet(np.ones(3), size=N)
BITS = RNG.integers(0, 2, size=(N, 3)).astype(np.uint8)
TARGETS = RNG.normal(size=(N, 3)) * 2
LOSSES = {
    "cross_entropy": ("cross_entropy", LABELS),
    "cross_entropy rows": ("cross_entropy", ROWS_OF_PROBABILITIES),
    "cross_entropy smoothed, weighted": (mb.CrossEntropy(0.1, [0.5, 1, 2]), LABELS),
    "cross_entropy rows, smoothed, weighted": (mb.CrossEntropy(0.2, [0.5, 1, 2]), ROWS_OF_PROBABILITIES),
    "bce_with_logits": ("bce_with_logits", BITS),
    "bce_with_logits weighted": (mb.BCEWithLogits([0.5, 1, 3]), ROWS_OF_PROBABILITIES),
    "mse": ("mse", TARGETS),
    "mae": ("mae", TARGETS),
    "huber": (mb.Huber(0.8), TARGETS),
}
BUILT = pytest.mark.parametrize("executor", executors.NAMES)


def build(net, loss, optimizer="sgd", batch_size=N, seed=3, executor=NumpyExecutor):
    """An executor of `net`, and its optimiser state."""
    optimizer, loss = optim.get(optimizer), losses.get(loss)
    state = np.zeros((optimizer.n_states, net.plan.size), net.dtype)
    optimizer.init_state(state)
    return executor(net.plan, net.flat, Training(loss, optimizer, state, batch_size, seed), 1), state


def run(executor, batches, optimizer, steps, first=0, t=0, seconds=1e9):
    optimizer = optim.get(optimizer)
    sums = np.full((steps, 2), np.nan)
    coefficients = optimizer.coefficients(t, steps, optimizer.learning_rates(t, steps))
    return executor.run(batches, first, t, coefficients, sums, seconds), sums


def gradient(executor, net, batches, t=0):
    out, sums = np.full(net.plan.size, np.nan, net.dtype), np.full((1, 2), np.nan)
    executor.gradients(batches, t, out, sums)
    return out, sums[0, 0] / sums[0, 1]


def assert_gradient_is_the_slope_of_the_loss(net, loss, batches):
    executor, _ = build(net, loss)
    analytic, _ = gradient(executor, net, batches)
    used = np.zeros(net.plan.size, dtype=bool)
    for stage in net.plan.stages:
        used[stage.offset : stage.offset + stage.size] = True
    assert not analytic[~used].any()  # the gaps
    h = 2.0**-17  # truncation h^2 ~ 6e-11, rounding 2^-53 / h ~ 1.5e-11
    for i in np.flatnonzero(used):
        before = net.flat[i]
        net.flat[i] = before + h
        above = gradient(executor, net, batches)[1]
        net.flat[i] = before - h
        below = gradient(executor, net, batches)[1]
        net.flat[i] = before
        assert abs(analytic[i] - (above - below) / (2 * h)) < 3e-9, i


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", nn.ACTIVATIONS)
def test_gradient_is_the_slope_of_the_loss(activation, loss):
    loss, y = LOSSES[loss]
    net = mb.mlp([5, 4, 3, 3], activation=activation, dtype="float64", seed=1)
    net.flat += np.where(net.flat == 0, 0, 0.01)
    weights = np.linspace(0, 2, N)
    assert_gradient_is_the_slope_of_the_loss(net, loss, Batches(X, y, weights, None, N))


def test_gradient_goes_through_dropout_input_operations_and_layers_without_bias():
    net = mb.Sequential(
        mb.Tanh(), mb.Dropout(0.2), mb.Linear(5, 6, bias=False), mb.Dropout(0.3), mb.GELU(), mb.Dropout(0.4),
        mb.Linear(6, 3), mb.ELU(0.7), dtype="float64",
    )  # fmt: skip
    assert_gradient_is_the_slope_of_the_loss(net, "cross_entropy", Batches(X, LABELS, None, RNG.permutation(N), 5, 0.5))


def test_every_activation_has_a_reference():
    assert set(ACTIVATIONS) == set(nn.ACTIVATIONS)


def test_relu_has_slope_0_at_0_and_lets_nan_through():
    a, d = ACTIVATIONS["relu"](np.array([-1, 0, 1, np.nan]), 0.0)
    assert d[:3].tolist() == [0, 0, 1]
    assert np.isnan(a[3])


@pytest.mark.parametrize("name", nn.ACTIVATIONS)
def test_activations_are_finite_and_warn_of_nothing_far_out(name):
    z = np.array([-700.0, -50, -1e-300, 0, 1e-300, 50, 700])
    for values in ACTIVATIONS[name](z, 0.5):
        assert np.isfinite(values).all()


@BUILT
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_step_worked_by_hand(executor, dtype):
    # x1 = [1, 2], x2 = [3, -1];  W0 = [[1, -1], [1/2, 2]], b0 = [0, 1];  W1 = [[2], [-1]], b1 = [1/2]
    # z0 = x W0 + b0:   x1: [1 + 1, -1 + 4 + 1] = [2, 4]         x2: [3 - 1/2, -3 - 2 + 1] = [5/2, -4]
    # a  = relu(z0):    x1: [2, 4]                               x2: [5/2, 0]
    # z1 = a W1 + b1:   x1: 4 - 4 + 1/2 = 1/2                    x2: 5 + 1/2 = 11/2
    # y = [1, 5]: errors -1/2 and 1/2, losses 1/4 and 1/4;  dz1 = 2 error / 2 rows = -1/2 and 1/2
    # dW1 = a' dz1 = [2 (-1/2) + 5/2 (1/2), 4 (-1/2)] = [1/4, -2];  db1 = 0
    # dz0 = dz1 W1' where z0 > 0:   x1: [-1, 1/2]                x2: [1, 0]
    # dW0 = x' dz0 = [[-1 + 3, 1/2], [-2 - 1, 1]] = [[2, 1/2], [-3, 1]];  db0 = [0, 1/2]
    # With lr = 1/2, all numbers are sums of few powers of 2: exact in any order and dtype.
    net = mb.Sequential(
        mb.Linear(2, 2, init=[[1, -1], [0.5, 2]], bias_init=[0, 1]),
        mb.ReLU(),
        mb.Linear(2, 1, init=[[2], [-1]], bias_init=[0.5]),
        dtype=dtype,
    )
    optimizer = mb.SGD(lr=0.5)
    one, _ = build(net, "mse", optimizer, batch_size=2, executor=executors.load(executor))
    batches = Batches(np.array([[1.0, 2], [3, -1]]), np.array([[1.0], [5]]), None, None, 2)
    flat, _ = gradient(one, net, batches)
    grads = mb.plan.views(flat, net.plan)
    assert grads["0.weight"].tolist() == [[2, 0.5], [-3, 1]]
    assert grads["0.bias"].tolist() == [0, 0.5]
    assert grads["2.weight"].tolist() == [[0.25], [-2]]
    assert grads["2.bias"].tolist() == [0]
    done, sums = run(one, batches, optimizer, 1)
    assert done == 1
    assert sums.tolist() == [[0.5, 2]]
    weights = net.parameters()
    assert weights["0.weight"].tolist() == [[0, -1.25], [2, 1.5]]
    assert weights["0.bias"].tolist() == [0, 0.75]
    assert weights["2.weight"].tolist() == [[1.875], [0]]
    assert weights["2.bias"].tolist() == [0.5]


@pytest.mark.parametrize(
    ("kind", "c", "states", "w", "after"),
    [  # w = 4, g = 2, weight decay 1/2: g = 2 + 4/2 = 4
        ("sgd", [0.5, 0.5], [], 2, []),
        ("momentum", [0.5, 0.5, 0.5, 0.25], [6], 4 - 0.5 * 4, [4]),  # m = 3 + 1
        ("nesterov", [0.5, 0.5, 0.5, 0.25], [6], 4 - 0.5 * (4 + 0.5 * 4), [4]),
        # m = 8 + (4 - 8)/4 = 7; v = 36 * 3/4 + 16/4 = 31; w = 4/2 - m/(sqrt(v) + 1)
        ("adam", [1, 0.5, 0.5, 0.25, 0.75, 0.25, 1], [8, 36], 2 - 7 / (31**0.5 + 1), [7, 31]),
        ("amsgrad", [1, 0.5, 0.5, 0.25, 0.75, 0.25, 1], [8, 36, 49], 2 - 7 / 8, [7, 31, 49]),
        ("amsgrad", [1, 0.5, 0.5, 0.25, 0.75, 0.25, 1], [8, 36, 25], 2 - 7 / (31**0.5 + 1), [7, 31, 31]),
        # v = 60 * 3/4 + 16/4 = 49; direction = 4/(7 + 1)
        ("rmsprop", [2, 0.5, 0.75, 0.25, 1, 0], [60], 4 - 2 * 4 / 8, [49]),
        ("rmsprop_momentum", [2, 0.5, 0.75, 0.25, 1, 0.5], [60, 3], 4 - 2 * 2, [49, 2]),
        # a = 4 + (4 - 4)/4 = 4; v = 28 * 3/4 + 4 = 25; sqrt(25 - 16) = 3
        ("rmsprop_centered", [2, 0.5, 0.75, 0.25, 1, 0], [28, 4], 4 - 2 * 4 / 4, [25, 4]),
        ("rmsprop_centered_momentum", [2, 0.5, 0.75, 0.25, 1, 0.5], [28, 4, 2], 4 - 2 * 2, [25, 4, 2]),
        ("adagrad", [2, 0.5, 1], [9], 4 - 2 * 4 / 6, [25]),
        # m = 8 + (4 - 8)/4 = 7; v = 44 * 3/4 + 16/4 = 37 - 1; w = 4/2 - (3 * 4 + 2 * 7)/(6 + 1)
        ("nadam", [2, 0.5, 0.5, 0.25, 0.75, 0.1875, 1, 3], [8, 44], 2 - 26 / 7, [7, 36]),
        ("radam", [2, 0.5, 0.5, 0.25, 0.75, 0.1875, 1, 1], [8, 44], 2 - 2 * 7 / 7, [7, 36]),
        ("radam", [2, 0.5, 0.5, 0.25, 0.75, 0.1875, 1, 0], [8, 44], 2 - 2 * 7, [7, 36]),
        ("adamax", [2, 0.5, 0, 0.25, 0.75, 0.5], [8, 4], 4 - 2 * 7 / 4.5, [7, 4.5]),
        ("adamax", [2, 0.5, 0, 0.25, 0.75, 0.5], [8, 8], 4 - 2 * 7 / 6, [7, 6]),
        # v = 56 * 3/4 + 16/4 = 46; step = 4 sqrt(16 / 49); d = 3/4 * 13 + step^2 / 4
        ("adadelta", [2, 0.5, 0.75, 0.25, 3], [56, 13], 4 - 2 * 16 / 7, [46, 9.75 + (16 / 7) ** 2 / 4]),
        # 3/4 (-2) + 4/4 < 0
        ("lion", [2, 0.5, 0.5, 0.25, 0.75, 0.5, 0.25], [-2], 2 + 2, [2 - 0.5]),
        ("lion", [2, 0.5, 0.5, 0.5, 0.25, 0.5, 0.25], [-8], 2, [2 - 2]),
    ],
)
def test_updates_worked_by_hand(kind, c, states, w, after):
    c = [*c, *[np.nan] * (8 - len(c))]
    weight, states = np.array([4.0]), np.array(states, dtype=np.float64).reshape(-1, 1)
    update(kind, c, weight, np.array([2.0]), states)
    assert weight.tolist() == [w]
    assert states.ravel().tolist() == after


def test_centered_rmsprop_survives_a_gradient_that_stays_the_same():
    w, states = np.zeros(1), np.zeros((2, 1))
    for _ in range(5000):  # v - a^2 tends to 0, and rounding takes it below
        update("rmsprop_centered", [1e-9, 0, 0.99, 0.01, 1e-8, 0], w, np.array([0.1]), states)
    assert np.isfinite(w).all()


def test_mini_batches_take_their_rows_in_the_order_given_and_the_last_may_be_smaller():
    net, other = (mb.mlp([5, 4, 3], dropout=0.5, dtype="float64") for _ in range(2))
    order = RNG.permutation(N)
    whole = Batches(X, LABELS, np.arange(1.0, N + 1), order, 3)
    executor, _ = build(net, "cross_entropy", batch_size=3)
    done, sums = run(executor, whole, "sgd", 3)
    assert done == whole.n_batches == 3
    for k, rows in enumerate((order[:3], order[3:6], order[6:])):
        one, _ = build(other, "cross_entropy")
        _, alone = run(one, Batches(X[rows], LABELS[rows], 1.0 + rows, None, N), "sgd", 1, t=k)
        assert np.array_equal(alone[0], sums[k])
    assert np.array_equal(net.flat, other.flat)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "uint8", "int64", "bool"])
def test_rows_of_any_dtype_and_strides_count_as_their_values(dtype):
    data = RNG.integers(0, 2, size=(5, 2 * N)).astype(dtype)
    data.flags.writeable = False
    strided = data.T[::2]
    net = mb.mlp([5, 3], dtype="float64")
    executor, _ = build(net, "cross_entropy")
    expected = gradient(executor, net, Batches(strided.astype(np.float64) * 0.5, LABELS, None, None, N))
    found = gradient(executor, net, Batches(strided, LABELS, None, None, N, 0.5))
    assert np.array_equal(found[0], expected[0])


@BUILT
def test_a_loss_that_is_not_finite_stops_before_its_update(executor):
    data = X.copy()
    data[4] = np.inf
    net = mb.mlp([5, 3], dtype="float64", seed=2)
    optimizer = mb.Adam()
    one, state = build(net, "mse", optimizer, batch_size=1, executor=executors.load(executor))
    done, sums = run(one, Batches(data, TARGETS, None, None, 1), optimizer, 4)
    assert done == 4
    params, states = net.flat.copy(), state.copy()
    done, sums = run(one, Batches(data, TARGETS, None, None, 1), optimizer, 3, first=4, t=4)
    assert done == 0
    assert not np.isfinite(sums[0, 0])
    assert np.array_equal(net.flat, params)
    assert np.array_equal(state, states)


@BUILT
def test_a_run_stops_after_an_update_when_its_seconds_are_over(executor):
    net = mb.mlp([5, 3], dtype="float64")
    one, _ = build(net, "mse", batch_size=1, executor=executors.load(executor))
    before = net.flat.copy()
    start = time.perf_counter()
    done, sums = run(one, Batches(X, TARGETS, None, None, 1), "sgd", N, seconds=0.0)
    assert 1 <= done <= N
    assert np.isfinite(sums[:done]).all()
    assert not np.array_equal(net.flat, before)
    assert time.perf_counter() - start < 60


@BUILT
def test_a_mini_batch_without_weight_has_gradient_0(executor):
    net = mb.mlp([5, 4, 3], dtype="float64")
    one, _ = build(net, "cross_entropy", executor=executors.load(executor))
    out, sums = np.full(net.plan.size, np.nan), np.full((1, 2), np.nan)
    one.gradients(Batches(X, LABELS, np.zeros(N), None, N), 0, out, sums)
    assert not out.any()
    assert sums.tolist() == [[0, 0]]


def test_dropout_masks_are_those_of_the_step_and_absent_from_evaluation():
    net = mb.Sequential(mb.Dropout(0.5), mb.Linear(5, 3, init="normal"), dtype="float64")
    executor, _ = build(net, "mse", seed=9)
    batches = Batches(X, TARGETS, None, None, N)
    plain = mb.Sequential(mb.Linear(5, 3, init="normal"), dtype="float64")
    other, _ = build(plain, "mse")
    for t in (0, 5):
        masked = X * dropout_mask(9, t, 0, N, 5, 0.5, np.dtype("float64"))
        expected = gradient(other, plain, Batches(masked, TARGETS, None, None, N))[0]
        assert np.array_equal(gradient(executor, net, batches, t)[0], expected)
    out, row_losses, weights = np.full((N, 3), np.nan), np.full(N, np.nan), np.full(N, np.nan)
    executor.evaluate(batches, out, row_losses, weights)
    assert np.array_equal(out, plain(X)) or np.allclose(out, plain(X), rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(row_losses, ((out - TARGETS) ** 2).mean(axis=1), rtol=1e-14)


@pytest.mark.parametrize("loss", LOSSES)
def test_evaluation_gives_the_loss_of_training_row_by_row_in_their_own_order(loss):
    loss, y = LOSSES[loss]
    net = mb.mlp([5, 4, 3], dtype="float64")
    executor, _ = build(net, loss)
    weights = np.linspace(0, 2, N)
    batches = Batches(X, y, weights, RNG.permutation(N), N)
    out, row_losses, row_weights = np.full((N, 3), np.nan), np.full(N, np.nan), np.full(N, np.nan)
    executor.evaluate(batches, out, row_losses, row_weights)
    raw = np.full((N, 3), np.nan)
    executor.forward(X, 1.0, raw)
    assert np.array_equal(out, raw)
    _, mean = gradient(executor, net, batches)
    np.testing.assert_allclose(row_losses.sum() / row_weights.sum(), mean, rtol=1e-14)


def test_forward_takes_more_rows_than_it_converts_at_a_time():
    net = mb.mlp([5, 4, 3], dtype="float64")
    many = np.tile(X, (2 * ROWS // N + 1, 1))
    out = np.full((len(many), 3), np.nan)
    NumpyExecutor(net.plan, net.flat).forward(many, 1.0, out)
    expected = np.full((N, 3), np.nan)
    NumpyExecutor(net.plan, net.flat).forward(X, 1.0, expected)
    np.testing.assert_allclose(out, np.tile(expected, (len(many) // N, 1)), rtol=1e-13, atol=1e-15)


def test_float32_parameters_and_state_are_the_float64_results_rounded():
    single, double = (mb.mlp([5, 4, 3], dtype=dtype) for dtype in ("float32", "float64"))
    double.flat[:] = single.flat
    optimizer = mb.SGD(lr=0.5, momentum=0.5)
    batches = Batches(X, LABELS, None, None, N)
    states = []
    for net in (single, double):
        executor, state = build(net, "cross_entropy", optimizer)
        run(executor, batches, optimizer, 1)
        states.append(state)
    assert np.array_equal(single.flat, double.flat.astype(np.float32))
    assert np.array_equal(states[0], states[1].astype(np.float32))
