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
        "residual that starts with operations": [mb.Dropout(0.2), res(act(), mb.Dropout(0.3), linear(5, 5)), linear(5, 3)],
        "residual that ends with operations": [linear(5, 4), res(linear(4, 4), mb.Dropout(0.2)), mb.Tanh(), linear(4, 3)],
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
    out, sums = np.full(net.plan.size, np.nan, net.dtype), np.full(2, np.nan)
    executor.gradients(batches, t, out, sums)
    return out, sums[0] / sums[1]


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
