"""Muon and Adafactor: torch's, and all that the other optimisers can in spite of going step by step."""

from __future__ import annotations

import copy
import pickle
import signal
from typing import Any

import numpy as np
import pytest

import fastmb as mb
from fastmb import executors, memory, threads
from fastmb.optim import matrices

RNG = np.random.default_rng(0)
X = RNG.standard_normal((60, 7))
Y = RNG.integers(0, 3, 60)
OPTIMIZERS = [mb.Muon(0.05), mb.Muon(0.02, adamw_names=["0.*"]), mb.Adafactor(0.1)]
each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o.kind)


def make(optimizer: Any, executor: str = "native", dtype: str = "float64", **options: Any) -> mb.Trainer:
    net = mb.Sequential(mb.Linear(7, 12), mb.Tanh(), mb.Dropout(0.2), mb.Linear(12, 3), seed=1, dtype=dtype)
    return mb.Trainer(net, optimizer=optimizer, executor=executor, **{"batch_size": 16, "seed": 5} | options)


def fit(trainer: mb.Trainer, epochs: int, **options: Any) -> mb.History:
    return trainer.fit(X, Y, max_epochs=epochs, verbose=0, **options)


def everything(trainer: mb.Trainer) -> tuple[Any, ...]:
    return trainer.net.flat.tobytes(), trainer.state.tobytes(), trainer.t, trainer.history["loss"]


# ---- Muon ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (5, 8), (8, 5), (33, 33)])
def test_the_iteration_makes_a_matrix_nearly_orthogonal(shape):
    g = np.random.default_rng(1).standard_normal(shape)
    singular = np.linalg.svd(matrices.orthogonalized(g, (3.4445, -4.775, 2.0315), 1e-7, 8), compute_uv=False)
    assert ((singular > 0.6) & (singular < 1.3)).all()
    u, _, vt = np.linalg.svd(g, full_matrices=False)
    exact = matrices.orthogonalized(g, (15 / 8, -10 / 8, 3 / 8), 1e-7, 60)  # this one converges
    np.testing.assert_allclose(exact, u @ vt, rtol=0, atol=1e-9)


def test_a_gradient_of_zeros_is_left_alone():
    assert not matrices.orthogonalized(np.zeros((3, 4)), (3.4445, -4.775, 2.0315), 1e-7, 5).any()


def torchs_muon(net: mb.Sequential, muon: dict[str, Any], adamw: dict[str, Any], steps: int) -> dict[str, np.ndarray]:
    """Torch's matrices by Muon, its vectors by AdamW, after some steps on all rows."""
    torch = pytest.importorskip("torch", reason="compares with PyTorch, which is too large for the test extra")
    model = torch.nn.Sequential(torch.nn.Linear(7, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3)).double()
    named = dict(zip(net.parameters(), model.parameters(), strict=True))
    for name, array in net.parameters().items():
        named[name].data[:] = torch.tensor(array.T)
    optimizers = [
        torch.optim.Muon([p for p in named.values() if p.ndim == 2], **muon),
        torch.optim.AdamW([p for p in named.values() if p.ndim == 1], **adamw),
    ]
    for _ in range(steps):
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(torch.tensor(X)), torch.tensor(Y)).backward()
        for optimizer in optimizers:
            optimizer.step()
    return {name: p.detach().numpy().T for name, p in named.items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 0.02, "weight_decay": 0.5, "momentum": 0.8, "nesterov": False},
        {
            "lr": 0.02,
            "adjust_lr_fn": "match_rms_adamw",
            "ns_steps": 3,
            "ns_coefficients": (2.0, -1.5, 0.5),
            "eps": 1e-3,
        },
    ],
)
def test_muon_is_torchs(options, executor, monkeypatch):
    torch = pytest.importorskip("torch", reason="compares with PyTorch, which is too large for the test extra")
    net = mb.mlp([7, 12, 3], activation="tanh", dtype="float64", seed=1)
    rounded = torchs_muon(net, options, {"lr": 0.003}, 10)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # what torch rounds to
    expected = torchs_muon(net, options, {"lr": 0.003}, 10)
    trainer = mb.Trainer(net, optimizer=mb.Muon(**options, adamw_lr=0.003), executor=executor, batch_size=60)
    for _ in range(10):
        trainer.step(X, Y)
    for name, array in net.parameters().items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-8, atol=1e-9, err_msg=name)
        np.testing.assert_allclose(array, rounded[name], rtol=0.1, atol=0.05, err_msg=name)


def test_the_matrices_named_are_adamws(executor):
    trainers = [make(mb.Muon(0.05, adamw_lr=0.01, adamw_names=["*"]), executor), make(mb.AdamW(0.01), executor)]
    for trainer in trainers:
        fit(trainer, 3)
    np.testing.assert_allclose(trainers[0].net.flat, trainers[1].net.flat, rtol=1e-10, atol=1e-12)
    muon = make(mb.Muon(0.05, adamw_lr=0.01, adamw_names=["0.*"]), executor)
    muon.step(X, Y)
    trainers[1] = make(mb.AdamW(0.01), executor)
    trainers[1].step(X, Y)
    for name, array in muon.net.parameters().items():
        same = np.allclose(array, trainers[1].net.parameters()[name], rtol=1e-10, atol=1e-12)
        assert same == (name != "3.weight"), name


def test_groups_hold_for_both(executor):
    groups = {"0.*": {"lr": 0}, "3.weight": {"momentum": 0, "weight_decay": 0}}
    before = make("sgd").net.parameters()
    trainer = make(mb.Muon(0.05, groups=groups), executor)
    fit(trainer, 2)
    after = trainer.net.parameters()
    assert [name for name in before if (before[name] == after[name]).all()] == ["0.weight", "0.bias"]


def test_large_matrices_have_the_same_bits_for_any_number_of_threads(monkeypatch):
    monkeypatch.setattr(threads, "limit", lambda: 3)
    wide = np.random.default_rng(2).standard_normal((60, 300))
    found = set()
    for n_threads in (1, 2, 3, None):
        trainer = mb.Trainer(mb.mlp([300, 200, 3]), optimizer=mb.Muon(0.05), n_threads=n_threads)
        trainer.step(wide, Y)
        found.add(trainer.net.digest())
    assert len(found) == 1


def test_products_are_the_same_in_whatever_backend_a_block_of_code_uses(executor):
    plain, within = (make(mb.Muon(0.05), executor, "float32") for _ in range(2))
    fit(plain, 2)
    with mb.use_backend("numpy"):
        fit(within, 2)
    assert plain.net.digest() == within.net.digest()


@pytest.mark.parametrize(("n_threads", "most"), [(1, 1), (3, 3), (7, 5), (None, 5)])
def test_products_take_no_more_threads_than_the_trainer_may(n_threads, most, monkeypatch):
    monkeypatch.setattr(threads, "limit", lambda: 5)
    seen = []

    def orthogonalized(g, *options):
        seen.append(threads.resolve(None, 1e12))
        return g

    monkeypatch.setattr(matrices, "orthogonalized", orthogonalized)
    make(mb.Muon(0.05), n_threads=n_threads).step(X, Y)
    assert seen == [most, most]
    assert threads.resolve(None, 1e12) == 5


# ---- both ------------------------------------------------------------------------------------------------------------


@each_optimizer
@pytest.mark.parametrize("t0", [0, 1020])
def test_one_row_of_coefficients_has_the_bits_that_it_has_among_others(optimizer, t0):
    lrs = np.linspace(0.01, 0.3, 9)
    rows = optimizer.coefficients(t0, 9, lrs)
    single = [optimizer.coefficients(t0 + j, 1, lrs[j : j + 1]) for j in range(9)]
    assert rows.tobytes() == np.concatenate(single).tobytes()


@each_optimizer
def test_the_executors_agree(optimizer):
    flats = []
    for name in executors.NAMES:
        trainer = make(optimizer, name, average=mb.EMA(0.9, every=2), max_grad_norm=0.5, clip_per_example=1.0)
        fit(trainer, 3)
        flats.append(np.concatenate([trainer.net.flat, trainer.averaged_net().flat]))
    for flat in flats[1:]:
        np.testing.assert_allclose(flat, flats[0], rtol=1e-8, atol=1e-9)


@each_optimizer
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_fit_and_step_make_the_same_bits(optimizer, dtype, executor):
    fitted, stepped = (make(optimizer, executor, dtype, shuffle=False) for _ in range(2))
    fit(fitted, 2)
    for _ in range(2):
        for start in range(0, 60, 16):
            stepped.step(X[start : start + 16], Y[start : start + 16])
    assert fitted.net.flat.tobytes() == stepped.net.flat.tobytes()
    assert fitted.state.tobytes() == stepped.state.tobytes()


@each_optimizer
@pytest.mark.parametrize("way", ["checkpoint", "pickle", "copy"])
def test_a_resumed_fit_has_the_bits_of_one_never_stopped(optimizer, way, executor, tmp_path):
    whole, stopped = make(optimizer, executor), make(optimizer, executor)
    fit(whole, 4)
    fit(stopped, 1)
    fit(stopped, 1, max_seconds=0)
    assert stopped._current.done == 1
    if way == "checkpoint":
        stopped.save(tmp_path / "file")
        stopped = mb.load(tmp_path / "file")
    else:
        stopped = pickle.loads(pickle.dumps(stopped)) if way == "pickle" else copy.deepcopy(stopped)
    assert stopped.optimizer == optimizer
    fit(stopped, 3)
    assert everything(stopped) == everything(whole)


@each_optimizer
def test_a_fit_that_diverges_goes_back(optimizer, executor):
    trainer = make(optimizer, executor, shuffle=False, average=mb.EMA(0.9, every=1))
    fit(trainer, 1)
    before = everything(trainer)
    bad = X.copy()
    bad[50] = np.nan
    with pytest.raises(FloatingPointError, match=r"the loss became nan in epoch 2 at step 4 of 4"):
        trainer.fit(bad, Y, max_epochs=1, verbose=0, check_finite=False)
    assert everything(trainer) == before
    fresh = make(optimizer, executor, shuffle=False)
    with pytest.raises(FloatingPointError):
        fresh.fit(bad, Y, max_epochs=1, verbose=0, check_finite=False)
    assert everything(fresh) == everything(make(optimizer, executor, shuffle=False))


@each_optimizer
def test_it_learns(optimizer):
    digits, labels = mb.datasets.load_digits()
    optimizer = type(optimizer)(lr=0.02)
    trainer = mb.Trainer(mb.mlp([64, 32, 10]), optimizer=optimizer, input_scale=1 / 16)
    trainer.fit(digits[:1500], labels[:1500], max_epochs=20, verbose=0)
    assert trainer.evaluate(digits[1500:], labels[1500:])["accuracy"] > 0.9


def test_gradients_accumulated_and_applied_are_those_of_a_step(executor):
    stepped, applied = make(mb.Muon(0.05), executor), make(mb.Muon(0.05), executor)
    stepped.step(X, Y)
    applied.accumulate(X[:40], Y[:40])
    applied.accumulate(X[40:], Y[40:])
    applied.apply()
    np.testing.assert_allclose(applied.net.flat, stepped.net.flat, rtol=1e-9, atol=1e-11)


def test_memory_is_foretold_with_the_gradient():
    net = mb.mlp([500, 500, 10])
    states = {name: memory.forecast(net.plan, 64, n).states for name, n in [("muon", 3), ("adam", 2)]}
    for name, size in states.items():
        assert f"states {size / 2**20:,.1f}" in net.summary(64, name)


@pytest.mark.parametrize(
    ("make_it", "error", "message"),
    [
        (lambda: mb.Muon(momentum=1), ValueError, r"momentum must be a number in \[0, 1\); got 1"),
        (lambda: mb.Muon(ns_steps=100), ValueError, "ns_steps must be an integer from 1 to 99"),
        (lambda: mb.Muon(ns_coefficients=(1, 2)), TypeError, "ns_coefficients must be three numbers"),
        (lambda: mb.Muon(adjust_lr_fn="old"), ValueError, "adjust_lr_fn must be one of 'original'"),
        (lambda: mb.Muon(adamw_names="0.*"), TypeError, "adamw_names must be a sequence of patterns"),
        (lambda: mb.Muon(adamw_names=5), TypeError, r"adamw_names must be a sequence of patterns such as .*; got 5"),
        (lambda: mb.Muon(adamw_names=None), TypeError, r"adamw_names must be a sequence of patterns .*; got None"),
        (lambda: mb.Muon(adamw_betas=(0.9, 1)), ValueError, r"adamw_betas\[1\] must be a number in \[0, 1\); got 1"),
        (lambda: mb.Muon(adamw_lr=-1), ValueError, "adamw_lr must be a number in"),
        (lambda: mb.Muon(adamw_lr=mb.ReduceLROnPlateau(0.1)), TypeError, "adamw_lr must be a number or a function"),
        (
            lambda: make(mb.Muon(adamw_names=["7.*"])),
            ValueError,
            r"adamw_names: '7\.\*' matches no parameter; there are 0.weight, 0.bias, 3.weight, 3.bias",
        ),
        (
            lambda: fit(make(mb.Muon(adamw_lr=mb.OneCycleLR(0.1, 3))), 1),
            ValueError,
            "adamw_lr: OneCycleLR ends after 3",
        ),
        (lambda: mb.Adafactor(d=0.5), ValueError, r"d must be a number in \[1, inf\); got 0.5"),
        (lambda: mb.Adafactor(beta2_decay=0.1), ValueError, r"beta2_decay must be a number in \[-1, 0\]"),
        (lambda: mb.Adafactor(eps=1e-3), TypeError, "eps must be two numbers, or None and a number"),
    ],
)
def test_misuse_is_named(make_it, error, message):
    with pytest.raises(error, match=message):
        make_it()


@each_optimizer
@pytest.mark.parametrize("call", ["step", "apply"])
def test_ctrl_c_within_an_update_waits_until_it_is_whole(optimizer, call, monkeypatch):
    interrupted, undisturbed = make(optimizer), make(optimizer)
    for trainer in (undisturbed, interrupted):
        if call == "apply":
            trainer.accumulate(X, Y)

    def update(trainer):
        trainer.step(X, Y) if call == "step" else trainer.apply()

    update(undisturbed)
    kind, real, seen = type(optimizer), type(optimizer).update, []

    def interrupt(self, name, *arguments):
        seen.append(name)
        if len(seen) == 2:
            signal.raise_signal(signal.SIGINT)
        real(self, name, *arguments)

    monkeypatch.setattr(kind, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        update(interrupted)
    assert interrupted.t == undisturbed.t == 1
    assert np.array_equal(interrupted.net.flat, undisturbed.net.flat)
    assert np.array_equal(interrupted.state, undisturbed.state)
