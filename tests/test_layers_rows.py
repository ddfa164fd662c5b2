"""Rows' own gradients, Jacobians and gradients in parts, through normalisations, PReLU and Residual."""

from __future__ import annotations

import numpy as np
import pytest

import fastmb as mb
from fastmb import executors

RNG = np.random.default_rng(0)
N, N_IN, C = 37, 5, 3
X = RNG.normal(size=(N, N_IN))
Y = RNG.integers(0, C, N)


def network(batch_norm: bool, dtype: str = "float64") -> mb.Sequential:
    norm = mb.BatchNorm1d if batch_norm else mb.LayerNorm
    net = mb.Sequential(
        mb.Tanh(), norm(N_IN), mb.Linear(N_IN, 8), norm(8), mb.ReLU(), mb.PReLU(),
        mb.Residual(mb.SiLU(), mb.Linear(8, 8), norm(8), mb.PReLU(8)), mb.LayerNorm(8, bias=False),
        mb.LayerNorm(8, elementwise_affine=False), mb.Residual(mb.Linear(8, 8)), mb.Linear(8, C), seed=1, dtype=dtype,
    )  # fmt: skip
    rng = np.random.default_rng(2)
    for array in (net.parameters() | net.buffers()).values():
        array += rng.uniform(0, 0.3, array.shape)
    return net


def trainer(executor: str, batch_norm: bool = False, dtype: str = "float64", **options) -> mb.Trainer:
    options = {"optimizer": mb.SGD(0.1), "n_threads": 2, "batch_size": 16} | options
    return mb.Trainer(network(batch_norm, dtype), executor=executor, **options)


def test_rows_own_gradients_are_those_of_the_rows_alone(executor):
    one = trainer(executor)
    each, norms = one.per_example_gradients(X, Y), one.per_example_norms(X, Y)
    assert {name: array.shape[1:] for name, array in each.items()} == {
        name: array.shape for name, array in one.net.parameters().items()
    }
    for i in range(N):
        _, alone = one.gradients(X[i : i + 1], Y[i : i + 1])
        for name, array in alone.items():
            np.testing.assert_allclose(each[name][i], array, rtol=1e-10, atol=1e-13, err_msg=name)
        np.testing.assert_allclose(norms[i], np.sqrt(sum((array**2).sum() for array in alone.values())), rtol=1e-10)


def test_rows_own_gradients_of_the_input_are_the_slope_of_their_loss(executor):
    one, h = trainer(executor, input_scale=0.5), 1e-5
    found = one.input_gradients(X, Y)
    for j in range(N_IN):
        step = h * np.eye(N_IN)[j]
        slope = (one.per_example_losses(X + step, Y) - one.per_example_losses(X - step, Y)) / (2 * h)
        np.testing.assert_allclose(found[:, j], slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rows_are_shortened_alike(dtype):
    flats = []
    for executor in executors.NAMES:
        one = trainer(executor, dtype=dtype, clip_per_example=0.5, gradient_stats=True)
        one.fit(X, Y, max_epochs=2, verbose=0)
        flats.append(one.net.flat)
    tolerance = 1e-9 if dtype == "float64" else 2e-4
    for found in flats[:-1]:
        np.testing.assert_allclose(found, flats[-1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("options", [{"accumulate_steps": 2}, {"max_grad_norm": 0.3}, {"clip_value": 0.02}], ids=str)
def test_gradients_in_parts_and_limited_are_those_of_the_reference(options, batch_norm):
    nets = []
    for executor in executors.NAMES:
        one = trainer(executor, batch_norm, batch_size=7, **options)
        one.fit(X, Y, max_epochs=2, verbose=0)
        nets.append(one.net)
    for net in nets[:-1]:
        np.testing.assert_allclose(net.flat, nets[-1].flat, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(net.flat_buffers, nets[-1].flat_buffers, rtol=1e-10)


def test_each_part_of_a_mini_batch_moves_the_running_statistics(executor):
    one = trainer(executor, True, accumulate_steps=2, batch_size=8)
    before = one.net.buffers()["1.num_batches_tracked"].item()
    one.accumulate(X, Y)
    np.testing.assert_allclose(one.net.buffers()["1.num_batches_tracked"], before + 1)
    one.apply()
    one.step(X[:16], Y[:16])
    np.testing.assert_allclose(one.net.buffers()["1.num_batches_tracked"], before + 3)
    kept = one.net.flat_buffers.copy()
    bad = X[:16].copy()
    bad[12] = np.nan  # in the second part
    with pytest.raises(FloatingPointError):
        one.step(bad, Y[:16])
    np.testing.assert_array_equal(one.net.flat_buffers, kept)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_output_gradients_go_back_to_the_input(executor, batch_norm):
    one, h = trainer(executor, batch_norm), 1e-5
    found = one.backward(X, np.ones((N, C)))
    if not batch_norm:
        slopes = [(one.net(X + h * e) - one.net(X - h * e)).sum(axis=1) / (2 * h) for e in np.eye(N_IN)]
        np.testing.assert_allclose(found, np.transpose(slopes), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found, trainer("numpy", batch_norm).backward(X, np.ones((N, C))), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_jacobians_are_those_of_what_is_predicted(batch_norm):
    net, h = network(batch_norm), 1e-5
    found = net.jacobian(X)
    for j in range(N_IN):
        step = h * np.eye(N_IN)[j]
        np.testing.assert_allclose(found[:, :, j], (net(X + step) - net(X - step)) / (2 * h), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(net.jacobian(X[0]), found[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: trainer("native", True, clip_per_example=1.0), "clip_per_example"),
        (lambda: trainer("native", True, gradient_stats=True), "gradient_stats"),
        (lambda: trainer("native", True, sampling="poisson"), "sampling='poisson'"),
        (lambda: trainer("native", True).per_example_norms(X, Y), "per_example_norms"),
        (lambda: trainer("native", True).per_example_gradients(X, Y), "per_example_gradients"),
        (lambda: trainer("native", True).input_gradients(X, Y), "input_gradients"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_batch_normalisation_leaves_rows_no_gradients_of_their_own(call, name):
    with pytest.raises(ValueError, match=rf"{name} needs every row's own gradient; .* BatchNorm1d \(module 1\) mixes"):
        call()


def test_one_row_has_a_loss_of_its_own(executor):
    assert trainer(executor, True).per_example_losses(X[:1], Y[:1]).shape == (1,)
    for call in ("accumulate", "gradients", "step"):
        with pytest.raises(ValueError, match="BatchNorm1d needs more than 1 row"):
            getattr(trainer(executor, True), call)(X[:1], Y[:1])
    with pytest.raises(ValueError, match="the last mini-batch of 6 would have 1"):
        trainer(executor, True, accumulate_steps=2, batch_size=6).fit(X, Y, verbose=0)


def test_groups_and_averages_take_every_layer_in(executor):
    groups = {"*.bias": {"lr": 0.0}, "5.*": {"lr": 0.0}}
    one = trainer(executor, True, optimizer=mb.SGD(0.1, groups=groups), average=mb.EMA(0.9))
    before = {name: array.copy() for name, array in one.net.parameters().items()}
    one.fit(X[:32], Y[:32], max_epochs=1, verbose=0)
    for name, array in one.net.parameters().items():
        same = name.endswith("bias") or name.startswith("5.")
        assert np.array_equal(array, before[name]) == same, name
    with one.averaged() as net:
        assert np.isfinite(net(X)).all()
