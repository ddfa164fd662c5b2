"""Every executor computes what the reference computes; `native` and `numba` the same bits however they are run.

The reference is the `numpy` executor in float64, itself checked by finite differences in test_reference.py. The
rounding errors of a sum of K products, each at most half an ulp, add up like a random walk: sqrt(K) u relative to the
sum's size. The tolerances below are that with K of the largest sum in the case, times the stages that an error passes
through and `SLACK` for what activations and losses add.
"""

import hashlib
import itertools

import numpy as np
import pytest

import fastmb as mb
from fastmb import threads
from fastmb.data import Batches
from fastmb.executors import Training, native
from fastmb.executors.native import NativeExecutor
from fastmb.executors.numba import NumbaExecutor
from fastmb.executors.reference import NumpyExecutor
from fastmb.plan import views
from fastmb.rng import _permutation

ISAS = native.available_isas()
FMA_ISAS = [isa for isa in ISAS if isa != "v2"]
COMPILED = [f"native {isa}" for isa in ISAS] + [f"numba {ISAS[-1]}"]  # executor and instruction set
FMA_COMPILED = [f"{executor} {isa}" for executor in ("native", "numba") for isa in FMA_ISAS]
LAST = [f"{executor} {ISAS[-1]}" for executor in ("native", "numba")]
CLASSES = {"native": NativeExecutor, "numba": NumbaExecutor}
DTYPES = ["float32", "float64"]
ACTIVATIONS = ["relu", "leaky_relu", "elu", "selu", "gelu", "gelu_tanh", "silu", "mish", "softplus", "tanh", "sigmoid"]
LOSSES = {
    "cross_entropy": mb.CrossEntropy(),
    "cross_entropy, smoothed and weighted": mb.CrossEntropy(
        label_smoothing=0.1, class_weight=[0.5, 1.0, 2.0, 0.0, 1.5]
    ),
    "bce_with_logits": mb.BCEWithLogits(),
    "bce_with_logits, weighted": mb.BCEWithLogits(pos_weight=[0.5, 1.0, 2.0, 3.0, 1.5]),
    "mse": mb.MSE(),
    "mae": mb.MAE(),
    "huber": mb.Huber(delta=0.7),
}
OPTIMIZERS = {
    "sgd": mb.SGD(lr=0.1, weight_decay=0.01),
    "momentum": mb.SGD(lr=0.1, momentum=0.9, dampening=0.1),
    "nesterov": mb.SGD(lr=0.1, momentum=0.9, nesterov=True),
    "adam": mb.Adam(lr=0.01, weight_decay=0.01),
    "amsgrad": mb.Adam(lr=0.01, amsgrad=True),
    "adamw": mb.AdamW(lr=0.01),
    "rmsprop": mb.RMSprop(),
    "rmsprop, momentum": mb.RMSprop(momentum=0.9),
    "rmsprop, centered": mb.RMSprop(centered=True),
    "rmsprop, centered, momentum": mb.RMSprop(centered=True, momentum=0.9),
    "adagrad": mb.Adagrad(lr_decay=0.1),
    "nadam": mb.NAdam(weight_decay=0.1),
    "nadam, decoupled": mb.NAdam(weight_decay=0.1, decoupled_weight_decay=True),
    "radam": mb.RAdam(betas=(0.9, 0.6), weight_decay=0.1),
    "radam, rectified": mb.RAdam(betas=(0.9, 0.9), decoupled_weight_decay=True),
    "adamax": mb.Adamax(weight_decay=0.1),
    "adadelta": mb.Adadelta(weight_decay=0.1),
    "lion": mb.Lion(weight_decay=0.1),
    "groups": mb.AdamW(lr=0.01, groups={"*.bias": {"weight_decay": 0}, "[01].*": {"lr": 0.5}}),
    "groups, a bias apart": mb.SGD(
        lr=0.1, momentum=0.9, groups={"[34].bias": {"lr": 0, "momentum": 0.5}, "[01].bias": {"lr": 3}, "*": {"lr": 2}}
    ),
    "schedules": mb.AdamW(
        lr=mb.OneCycleLR(0.01, 100),
        betas=(mb.OneCycleLR(0.85, 100, div_factor=0.9, final_div_factor=1), 0.99),
        weight_decay=mb.LinearLR(0.1, total_iters=50),
    ),
}
ODD = [1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 65, 97]
SLACK = 8


@pytest.fixture
def any_thread_count(monkeypatch):
    """As many threads as asked for, whatever the machine has."""
    monkeypatch.setattr(threads, "limit", lambda: 16)


def targets(loss, n, n_out, rng, rows=False):
    if loss.kind == "cross_entropy":
        return rng.dirichlet(np.ones(n_out), n) if rows else rng.integers(0, n_out, n)
    if loss.kind == "bce_with_logits":
        return rng.integers(0, 2, (n, n_out))
    return rng.standard_normal((n, n_out))


def executors(net, loss, optimizer, batch_size, compiled, n_threads=1, seed=3):
    """A compiled executor and the reference, each on its own copy of the network."""
    name, isa = compiled.split()
    built = []
    for build in (lambda *a: CLASSES[name](*a, n_threads, isa), NumpyExecutor):
        state = np.zeros((optimizer.n_states, net.plan.size), net.plan.dtype)
        optimizer.init_state(state)
        flat = net.flat.copy()
        built.append((build(net.plan, flat, Training(loss, optimizer, state, batch_size, seed)), flat, state))
    return built


def gradients(executor, net, batches):
    out, sums = np.full(net.plan.size, np.nan, net.plan.dtype), np.full((1, 2), np.nan)
    executor.gradients(batches, 5, out, sums)
    return out, sums


def compare_gradients(net, loss, batches, compiled, n_threads=1):
    u = np.finfo(net.plan.dtype).eps
    (ours, _, _), (reference, _, _) = executors(net, loss, mb.SGD(), batches.batch_size, compiled, n_threads)
    (got, sums), (expected, expected_sums) = (gradients(e, net, batches) for e in (ours, reference))
    depth = max(len(batches.X), *(max(s.n_in, s.n_out) for s in net.plan.stages))
    tolerance = SLACK * len(net.plan.stages) * np.sqrt(depth) * u
    np.testing.assert_allclose(sums, expected_sums, rtol=tolerance)
    for name, gradient in views(got, net.plan).items():
        expect = views(expected, net.plan)[name]
        size = max(1e-3, np.abs(expect).max())
        np.testing.assert_allclose(gradient, expect, rtol=0, atol=tolerance * size, err_msg=name)


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_the_reference(activation, loss, dtype, compiled):
    rng = np.random.default_rng(1)
    net = mb.mlp([13, 18, 7, 5], activation=activation, dtype=dtype, seed=2)
    X = rng.standard_normal((37, 13)).astype(dtype)
    y, weight = targets(LOSSES[loss], 37, 5, rng), rng.random(37)
    compare_gradients(net, LOSSES[loss], Batches(X, y, weight, None, 37), compiled)


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ODD)
@pytest.mark.parametrize("n_threads", [1, 3])
def test_any_batch_size_and_width(rows, dtype, compiled, n_threads, any_thread_count):
    rng = np.random.default_rng(rows)
    for n_in, hidden, n_out in [(rows, 17, 3), (5, rows, 33), (34, 15, rows)]:
        net = mb.mlp([n_in, hidden, n_out], activation="tanh", dtype=dtype, seed=2)
        X, y = rng.standard_normal((rows, n_in)).astype(dtype), rng.standard_normal((rows, n_out))
        compare_gradients(net, mb.MSE(), Batches(X, y, None, None, rows), compiled, n_threads)


@pytest.mark.parametrize("compiled", COMPILED)
def test_every_kind_of_network(compiled):
    rng = np.random.default_rng(0)
    linear, act, drop = mb.Linear, mb.ReLU, mb.Dropout
    for modules in [
        [linear(6, 4)],
        [linear(6, 4, bias=False)],
        [linear(6, 9), linear(9, 4)],
        [linear(6, 9, bias=False), act(), linear(9, 4)],
        [drop(0.3), linear(6, 9), act(), drop(0.5), linear(9, 4)],
        [mb.Tanh(), linear(6, 9), act(), mb.Tanh(), drop(0.2), linear(9, 4)],
        [linear(6, 20), act(), linear(20, 20), mb.GELU(), drop(0.2), linear(20, 4), mb.Sigmoid()],
        [linear(6, 20), act(), linear(20, 4), act()],
    ]:
        net = mb.Sequential(*modules, seed=1, dtype="float64")
        X, y = rng.standard_normal((40, 6)), rng.standard_normal((40, 4))
        compare_gradients(net, mb.MSE(), Batches(X, y, None, None, 40), compiled)


@pytest.mark.parametrize("compiled", COMPILED)
def test_probability_rows_as_targets(compiled):
    rng = np.random.default_rng(0)
    net = mb.mlp([6, 9, 5], dtype="float64")
    X = rng.standard_normal((40, 6))
    for loss in (mb.CrossEntropy(), LOSSES["cross_entropy, smoothed and weighted"]):
        y = targets(loss, 40, 5, rng, rows=True)
        compare_gradients(net, loss, Batches(X, y, rng.random(40), None, 40), compiled)


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_epochs_are_those_of_the_reference(name, compiled):
    rng = np.random.default_rng(1)
    optimizer = OPTIMIZERS[name]
    dropout = mb.Dropout(0.2), mb.Dropout(mb.LinearLR(0.5, total_iters=7))
    net = mb.Sequential(mb.Linear(13, 33), mb.SiLU(), *dropout, mb.Linear(33, 5), seed=2, dtype="float64")
    X, y, order = rng.standard_normal((70, 13)), rng.integers(0, 5, 70), rng.permutation(70)
    batches = Batches(X, y, rng.random(70), order, 16)
    steps = batches.n_batches
    results = []
    for executor, flat, state in executors(net, mb.CrossEntropy(), optimizer, 16, compiled):
        sums = np.full((steps, 2), np.nan)
        for t in (0, steps):
            coefficients = optimizer.coefficients(t, steps, optimizer.learning_rates(t, steps))
            assert executor.run(batches, 0, t, coefficients, sums, 1e9) == steps
        results.append((flat, state, sums))
    for got, expected in zip(*results, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_centered_variance_never_falls_below_zero(momentum, dtype):
    net = mb.Sequential(mb.Linear(50, 1), dtype=dtype)
    trainer = mb.Trainer(net, loss="mae", optimizer=mb.RMSprop(centered=True, momentum=momentum), batch_size=4)
    trainer.fit(np.full((4 * 4000, 50), 0.3), np.full(4 * 4000, 1e9), max_epochs=1, verbose=0)
    assert np.isfinite(net.flat).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?"])
def test_data_of_any_dtype_and_layout_give_the_same_bits(source, dtype):
    rng = np.random.default_rng(4)
    X = rng.integers(0, 2 if source == "?" else 100, (83, 75)).astype(source)
    y, order = rng.standard_normal((83, 3)), rng.permutation(83)
    net = mb.mlp([75, 20, 3], dtype=dtype)
    wide = np.zeros((166, 150), source)
    wide[::2, ::2] = X
    backward = np.ascontiguousarray(X[::-1, ::-1])[::-1, ::-1]
    unaligned = np.frombuffer(b"\0" + X.tobytes(), np.uint8)[1:].view(source).reshape(X.shape)
    digests = set()
    plain = X.astype(dtype) * np.dtype(dtype).type(0.01)
    for data, scale in [(plain, 1.0)] + [
        (x, 0.01) for x in (X, np.asfortranarray(X), wide[::2, ::2], backward, unaligned)
    ]:
        for executor in CLASSES:
            (built, _, _), _ = executors(net, mb.MSE(), mb.SGD(), 83, f"{executor} {ISAS[-1]}")
            out, _ = gradients(built, net, Batches(data, y, None, order, 83, scale))
            digests.add(hashlib.sha256(out.tobytes()).hexdigest())
    assert len(digests) == 1


def train(n_threads, compiled, dtype, batch_size, by_step, monkeypatch, optimizer, n_features=19):
    executor, isa = compiled.split()
    monkeypatch.setenv("FASTMB_ISA", isa)
    rng = np.random.default_rng(1)
    X, y = rng.standard_normal((150, n_features)).astype(dtype), rng.integers(0, 10, 150)
    net = mb.Sequential(
        mb.Dropout(0.1),
        mb.Linear(n_features, 40),
        mb.GELU(),
        mb.Dropout(mb.CyclicLR(0.0, 0.5, step_size_up=5)),
        mb.Linear(40, 33),
        mb.ReLU(),
        mb.Linear(33, 10),
        seed=2,
        dtype=dtype,
    )
    trainer = mb.Trainer(
        net,
        optimizer=optimizer,
        batch_size=batch_size,
        seed=7,
        n_threads=n_threads,
        shuffle=not by_step,
        executor=executor,
    )
    for _ in range(2):
        if by_step == "step":
            for start in range(0, 150, batch_size):
                trainer.step(X[start : start + batch_size], y[start : start + batch_size])
        else:
            trainer.fit(X, y, max_epochs=1, verbose=0)
    return hashlib.sha256(net.flat.tobytes()).hexdigest()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 16, 33, 64, 65, 150, 1000])
def test_same_bits_for_any_thread_count_and_instruction_set(batch_size, dtype, monkeypatch, any_thread_count):
    digests = {
        train(n, compiled, dtype, batch_size, "", monkeypatch, mb.Adam(lr=0.01))
        for compiled in FMA_COMPILED
        for n in ([1, 2, 3, 4, 7] if "native" in compiled else [1, 3])
    }
    assert len(digests) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_size", [1, 6, 7, 33, 64, 100])
def test_a_relayed_first_stage_changes_no_bit(batch_size, dtype, monkeypatch, any_thread_count):
    """With many features and few rows a thread has rows of the first weights of its own: other tests have too few."""
    digests = {
        train(n, compiled, dtype, batch_size, "", monkeypatch, mb.Adam(lr=0.01), n_features=701)
        for compiled in FMA_COMPILED
        for n in ([1, 2, 3, 7] if "native" in compiled else [1, 2])
    }
    assert len(digests) == 1


@pytest.mark.parametrize("executor", CLASSES)
@pytest.mark.parametrize("width", [65, 200, 800])  # blocks one by one, in groups, and with weights that are packed
@pytest.mark.parametrize(
    ("norm", "options"),
    [
        (mb.BatchNorm1d, {"accumulate_steps": 3}),
        (mb.BatchNorm1d, {}),
        (mb.LayerNorm, {"gradient_stats": True, "max_grad_norm": 0.5}),
        (mb.LayerNorm, {"gradient_stats": True, "clip_per_example": 0.1, "noise_multiplier": 1.0}),
    ],
)
def test_whatever_else_a_step_does_goes_with_a_relayed_first_stage(norm, options, width, executor, any_thread_count):
    rng = np.random.default_rng(1)
    X, y = rng.integers(0, 256, (300, 1402), np.uint8)[:, ::2], rng.integers(0, 10, 300)
    found = set()
    for n_threads in (1, 2, 3):
        around = mb.Residual(mb.Linear(width, width), mb.ReLU())
        net = mb.Sequential(mb.Linear(701, width), norm(width), mb.Tanh(), around, mb.Linear(width, 10), seed=0)
        options = options | {"batch_size": 130, "input_scale": 1 / 255, "n_threads": n_threads, "executor": executor}
        history = mb.Trainer(net, seed=1, **options).fit(X, y, max_epochs=2, verbose=0)
        figures = {name: history[name] for name in history if "second" not in name}
        found.add(net.digest() + repr(figures))
    assert len(found) == 1


@pytest.mark.parametrize("rows", [63, 97, 290])
def test_weights_that_leave_the_caches_change_no_bit(rows, any_thread_count):
    """Blocks in groups, weights packed for them, tiles in groups of panels: other tests are too small for these."""
    rng = np.random.default_rng(0)
    net = mb.mlp([1027, 530, 523, 3], seed=0)  # 2.2 MB, which are packed, and 1.1 MB
    batches = Batches(rng.standard_normal((rows, 1027), np.float32), rng.integers(0, 3, rows), None, None, rows, 1.0)
    compare_gradients(net, mb.CrossEntropy(), batches, COMPILED[0])
    found = set()
    for compiled, n_threads in [*itertools.product(FMA_COMPILED[: len(FMA_ISAS)], [1, 2, 3]), (LAST[1], 2)]:
        (ours, _, _), _ = executors(net, mb.CrossEntropy(), mb.SGD(), rows, compiled, n_threads)
        out, sums = gradients(ours, net, batches)
        outputs = np.full((rows, 3), np.nan, np.float32)
        ours.forward(batches.X, 1.0, outputs)
        found.add(hashlib.sha256(out.tobytes() + sums.tobytes() + outputs.tobytes()).hexdigest())
    assert len(found) == 1


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("options", [{}, {"gradient_stats": True}, {"clip_per_example": 0.5}, {"max_grad_norm": 0.1}])
@pytest.mark.parametrize("norm", [None, mb.LayerNorm])
def test_weights_that_are_kept_as_tiles_change_no_bit(norm, options, isa, monkeypatch, any_thread_count):
    """`fit` keeps large weights twice and `step` doesn't; the last mini-batch has one row."""
    monkeypatch.setenv("FASTMB_ISA", isa)
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((5 * 70 + 1, 541), np.float32), rng.integers(0, 3, 5 * 70 + 1)
    found = set()
    for how in (1, 2, 3, "step"):
        between = [mb.ReLU()] if norm is None else [norm(397), mb.Tanh(), mb.Residual(mb.Linear(397, 397), mb.GELU())]
        last = [mb.Linear(397, 353), mb.Dropout(0.1), mb.Linear(353, 3)]
        net = mb.Sequential(mb.Linear(541, 397), *between, *last, seed=0)  # 0.9 and 0.6 MB
        options = options | {"batch_size": 70, "shuffle": False, "n_threads": 2 if how == "step" else how}
        trainer = mb.Trainer(net, "cross_entropy", mb.Adam(), **options)
        if how == "step":
            for start in [*range(0, len(X), 70)] * 2:
                trainer.step(X[start : start + 70], y[start : start + 70])
        else:
            trainer.fit(X, y, max_epochs=2, verbose=0)
        found.add(net.digest())
    assert len(found) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_mini_batches_smaller_than_the_first_change_no_bit(dtype, any_thread_count):
    """Room is made for the largest so far; a smaller one may be cut into more blocks, if so many have room."""
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((200, 19)).astype(dtype), rng.integers(0, 3, 200)
    net, found = mb.mlp([19, 33, 17, 3], seed=0, dtype=dtype), set()
    for compiled, n_threads in [*itertools.product(FMA_COMPILED[: len(FMA_ISAS)], [1, 2, 3]), (LAST[1], 2)]:
        (ours, _, _), _ = executors(net, mb.CrossEntropy(), mb.SGD(), 200, compiled, n_threads)
        digest = hashlib.sha256()
        for rows in [*range(66, 0, -1), 200, 130, 110, 100]:
            out, sums = gradients(ours, net, Batches(X[:rows], y[:rows], None, None, rows, 1.0))
            digest.update(out.tobytes() + sums.tobytes())
        found.add(digest.hexdigest())
    assert len(found) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_same_bits_for_fit_and_step(name, dtype, monkeypatch, any_thread_count):
    digests = {
        train(n, compiled, dtype, 16, how, monkeypatch, OPTIMIZERS[name])
        for n, how, compiled in itertools.product([1, 3], ["step", "fit"], LAST)
    }
    assert len(digests) == 1


@pytest.mark.parametrize("compiled", COMPILED)
def test_outputs_and_losses_in_inference_are_those_of_the_reference(compiled, any_thread_count):
    rng = np.random.default_rng(1)
    for rows, n_threads in itertools.product(ODD, [1, 3]):
        net = mb.Sequential(mb.Dropout(0.5), mb.Linear(9, 33), mb.GELU(), mb.Linear(33, 5), dtype="float64")
        X, y = rng.standard_normal((rows, 9)), rng.integers(0, 5, rows)
        weight, order = rng.random(rows), rng.permutation(rows)  # the order is not looked at
        loss = LOSSES["cross_entropy, smoothed and weighted"]
        results = []
        for executor, _, _ in executors(net, loss, mb.SGD(), 16, compiled, n_threads):
            out, losses, weights = np.full((rows, 5), np.nan), np.full(rows, np.nan), np.full(rows, np.nan)
            executor.forward(X, 0.5, out)
            results.append(out.copy())
            out[:] = np.nan
            executor.evaluate(Batches(X, y, weight, order, 16, 0.5), out, losses, weights)
            results += [out, losses, weights]
        for got, expected in zip(results[:4], results[4:], strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("loss", [mb.CrossEntropy(), mb.CrossEntropy(class_weight=[1.0, 2.0, 3.0])])
def test_a_class_whose_output_is_minus_infinity_adds_nothing(loss, compiled):
    net = mb.Sequential(mb.Linear(2, 3), dtype="float64", seed=0)
    net.parameters()["0.bias"][1] = -np.inf
    rng = np.random.default_rng(0)
    X, labels = rng.standard_normal((37, 2)), rng.choice([0, 2], 37)
    for y in (labels, np.eye(3)[labels]):
        found = []
        for executor, _, _ in executors(net, loss, mb.SGD(), 16, compiled, 1):
            losses = np.full(37, np.nan)
            executor.evaluate(Batches(X, y, None, None, 16, 1.0), np.zeros((37, 3)), losses, np.zeros(37))
            found.append(losses)
        np.testing.assert_allclose(*found, rtol=1e-12)


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_any_width_and_layout_come_through_as_they_are(dtype, compiled):
    name, isa = compiled.split()
    rng = np.random.default_rng(1)
    for n in range(1, 37):  # features: whole vectors of every set and dtype, and any rest of them
        net = mb.Sequential(mb.Linear(n, n, bias=False), dtype=dtype)
        net.parameters()["0.weight"][:] = np.eye(n)
        executor = CLASSES[name](net.plan, net.flat, None, 1, isa)
        for rows in (1, 3, 4, 8, 15, 16, 17, 32, 33):
            X = rng.standard_normal((rows, n)).astype(np.float32)
            within = np.full((rows, n + 3), np.nan, dtype)
            within[:, 1:-2] = X
            for given in (X.astype(dtype), X.astype("float64"), np.asfortranarray(X), X[::-1][::-1], within[:, 1:-2]):
                out = np.full((rows, n), np.nan, dtype)
                executor.forward(given, 1.0, out)
                np.testing.assert_array_equal(out, X)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_shuffles_alike(isa):
    for n in [0, 1, 2, 63, 64, 65, 66, 128, 129, 130, 5000]:
        assert native.permutation(n, 77, isa).tolist() == _permutation(n, 77).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_denormals_are_zero_inside_a_sweep_and_left_alone_outside(dtype):
    denormal = np.array([[np.finfo(dtype).smallest_normal / 4]], dtype)
    net = mb.Sequential(mb.Linear(1, 1, bias=False), dtype=dtype)
    one = np.ones((1, 1), dtype)
    net.parameters()["0.weight"][:] = denormal
    assert net(one) == 0
    trainer = mb.Trainer(net, loss="mse", optimizer=mb.SGD(lr=1.0), batch_size=1)
    trainer.step(one, one * 0)
    assert denormal * 2 > denormal > 0
