"""Optimisers: hyper-parameters checked, coefficients right and the same bits however many are asked for."""

import math
import pickle
import re
from dataclasses import replace

import numpy as np
import pytest

import fastmb as mb
from fastmb import optim
from fastmb._arithmetic import power

VARIANTS = [
    (mb.SGD(weight_decay=0.1), "sgd", 0),
    (mb.SGD(momentum=0.9, dampening=0.3), "momentum", 1),
    (mb.SGD(momentum=0.9, nesterov=True), "nesterov", 1),
    (mb.Adam(weight_decay=0.1), "adam", 2),
    (mb.Adam(betas=(0.0, 0.0)), "adam", 2),
    (mb.Adam(betas=(0.8, 0.99999), amsgrad=True), "amsgrad", 3),
    (mb.AdamW(), "adam", 2),
    (mb.RMSprop(), "rmsprop", 1),
    (mb.RMSprop(momentum=0.5), "rmsprop_momentum", 2),
    (mb.RMSprop(centered=True), "rmsprop_centered", 2),
    (mb.RMSprop(momentum=0.5, centered=True), "rmsprop_centered_momentum", 3),
    (mb.Adagrad(lr_decay=0.3), "adagrad", 1),
    (mb.NAdam(), "nadam", 2),
    (mb.NAdam(betas=(0.0, 0.0), weight_decay=0.1, decoupled_weight_decay=True), "nadam", 2),
    (mb.NAdam(betas=(0.999, 0.9), momentum_decay=1), "nadam", 2),
    (mb.RAdam(), "radam", 2),
    (mb.RAdam(betas=(0.9, 0.6), weight_decay=0.1, decoupled_weight_decay=True), "radam", 2),
    (mb.Adamax(), "adamax", 2),
    (mb.Adadelta(), "adadelta", 2),
    (mb.Lion(weight_decay=0.1), "lion", 1),
    (mb.SGD(momentum=mb.ExponentialLR(0.9, 0.99)), "momentum", 1),
    (mb.NAdam(betas=(lambda t: 0.9 + 0.05 / (1 + t), 0.99), weight_decay=lambda t: 1 / (1 + t)), "nadam", 2),
    (mb.Adam(betas=(0.9, mb.LinearLR(0.99)), groups={"*": {"lr": 0.3}}), "adam", 2),
    (mb.SGD(groups=[("a", {"lr": 2}), ("b", {"weight_decay": 0})]), "sgd", 0),
]
each_variant = pytest.mark.parametrize(("optimizer", "kind", "n_states"), VARIANTS, ids=[repr(v[0]) for v in VARIANTS])


def test_every_kind_is_tested_here():
    assert {kind for _, kind, _ in VARIANTS} == set(optim.KINDS)


@each_variant
def test_kind_and_states_follow_from_the_options(optimizer, kind, n_states):
    assert (optimizer.kind, optimizer.n_states) == (kind, n_states)


@each_variant
@pytest.mark.parametrize("t0", [0, 1020, 2**31 - 5, 2**40])
def test_one_row_of_coefficients_has_the_bits_that_it_has_among_others(optimizer, kind, n_states, t0):
    n = 9
    lrs = np.linspace(0.01, 0.3, n)
    rows = optimizer.coefficients(t0, n, lrs)
    single = [optimizer.coefficients(t0 + j, 1, lrs[j : j + 1]) for j in range(n)]
    assert rows.dtype == np.float64
    assert rows.shape == (n, 8 * (1 + len(optimizer.groups)))
    assert rows.flags.c_contiguous
    assert rows.tobytes() == np.concatenate(single).tobytes()
    assert np.isfinite(rows).all()
    many = optimizer.coefficients(t0, 1500, np.concatenate([lrs, np.full(1500 - n, 0.1)]))
    assert rows.tobytes() == many[:n].tobytes()


@each_variant
def test_no_steps_have_no_coefficients(optimizer, kind, n_states):
    assert optimizer.coefficients(5, 0, np.zeros(0)).shape == (0, 8 * optimizer.n_groups)


@pytest.mark.parametrize("t", [1, 2, 10, 1023, 1024, 1025, 54321])
def test_adam_has_the_published_bias_corrections(t):
    beta1, beta2, eps, lr = 0.9, 0.999, 1e-8, 0.1
    c = mb.Adam(lr).coefficients(t - 1, 1, np.array([lr]))[0]
    bc1, bc2 = -math.expm1(t * math.log(beta1)), -math.expm1(t * math.log(beta2))
    np.testing.assert_allclose(c[0], lr * math.sqrt(bc2) / bc1, rtol=1e-12)  # 1 - beta2^t loses up to 1000 ulp
    np.testing.assert_allclose(c[6], eps * math.sqrt(bc2), rtol=1e-12)
    assert c[1:6].tolist() == [0, 1, 1 - beta1, beta2, 1 - beta2]


def test_powers_by_repeated_squaring_are_exact_to_an_ulp_per_product():
    t = np.array([0, 1, 2, 3, 100, 12345])
    np.testing.assert_allclose(power(0.999, t), [math.pow(0.999, e) for e in t], rtol=14 * 2**14 * 2.0**-53)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("base", [0.0, 0.5, 0.9, 0.999, 1.0, 10.0])
def test_a_power_has_the_same_bits_alone_and_in_any_company(base):
    rng = np.random.default_rng(0)
    for start, n in [(0, 300), (1000, 300), (12345, 5000)] if base <= 1 else [(0, 100)]:
        t = start + np.append(np.arange(100), rng.integers(0, n, 50))
        alone = [power(base, t[i : i + 1])[0] for i in range(len(t))]
        np.testing.assert_array_equal(power(base, t), alone)
        np.testing.assert_array_equal(power(np.full(len(t), base), t), alone)


def test_adamw_shrinks_the_weights_instead_of_adding_to_the_gradient():
    c = mb.AdamW(lr=0.1, weight_decay=0.5).coefficients(0, 1, np.array([0.1]))[0]
    assert (c[1], c[2]) == (0, 1 - 0.1 * 0.5)


def test_dampening_starts_with_the_second_step():
    rows = mb.SGD(momentum=0.9, dampening=0.3).coefficients(0, 3, np.ones(3))
    assert rows[:, 3].tolist() == [1, 0.7, 0.7]


def test_adagrad_divides_by_the_updates_made():
    rows = mb.Adagrad(lr_decay=0.5).coefficients(0, 3, np.ones(3))
    assert rows[:, 0].tolist() == [1, 1 / 1.5, 1 / 2]


def test_a_learning_rate_may_be_a_function_of_the_updates_made():
    assert mb.SGD(lr=lambda t: 1 / (1 + t)).learning_rates(3, 2).tolist() == [1 / 4, 1 / 5]
    assert mb.SGD(lr=0.25).learning_rates(3, 2).tolist() == [0.25, 0.25]


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(
    ("rate", "error"),
    [
        *((rate, ValueError) for rate in (-1, math.nan, math.inf, 10**400)),
        *((rate, TypeError) for rate in ("a", "0.1", None, [0.1], 1j)),
    ],
    ids=lambda parameter: repr(parameter)[:9],
)
def test_a_function_that_gives_no_learning_rate_is_named_with_its_step(rate, error, n):
    optimizer = mb.SGD(lr=lambda t: rate if t == 4 else np.array(0.1))
    with pytest.raises(error, match=r"^lr\(4\) must be a number in \[0, inf\); got ") as found:
        optimizer.learning_rates(5 - n, n)
    assert len(str(found.value)) < 80


def test_state_starts_at_zero_but_adagrads_at_its_initial_value():
    state = np.full((1, 3), np.nan)
    mb.SGD(momentum=0.9).init_state(state)
    assert state.tolist() == [[0, 0, 0]]
    mb.Adagrad(initial_accumulator_value=0.5).init_state(state)
    assert state.tolist() == [[0.5, 0.5, 0.5]]


def test_names_repr_equality_and_pickle():
    for name in ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta", "Lion"):
        assert type(optim.get(name.lower())) is getattr(mb, name) is optim.OPTIMIZERS[name.lower()]
    adam = mb.Adam(lr=1, betas=[0.8, 0.9])
    assert repr(adam) == "Adam(lr=1.0, betas=(0.8, 0.9), eps=1e-08, weight_decay=0.0, amsgrad=False)"
    assert pickle.loads(pickle.dumps(adam)) == adam == optim.get(adam)
    assert adam != mb.Adam(lr=2)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: optim.get("adamm"), ValueError, "optimizer must be one of .*; got 'adamm'; did you mean 'adam'"),
        (lambda: optim.get(mb.Adam), TypeError, r"optimizer must be a name or an Optimizer such as Adam\(lr=1e-3\)"),
        (lambda: mb.SGD(lr=-1), ValueError, r"lr must be a number in \[0, inf\); got -1"),
        (lambda: mb.SGD(lr=math.nan), ValueError, "lr must be a number in .*; got nan"),
        (lambda: mb.SGD(lr="fast"), TypeError, "lr must be a number in .*; got 'fast'"),
        (
            lambda: mb.SGD(lr=mb.StepLR),
            TypeError,
            r"lr must be a number in \[0, inf\), or a schedule; got the class StepLR, no instance",
        ),
        (lambda: mb.SGD(mb.ReduceLROnPlateau), TypeError, "lr must be .*; got the class ReduceLROnPlateau"),
        (lambda: mb.Muon(mb.StepLR), TypeError, "lr must be .*; got the class StepLR"),
        (lambda: mb.SGD(momentum=float), TypeError, "momentum must be .*; got the class float"),
        (lambda: mb.Adam(betas=(mb.StepLR, 0.9)), TypeError, r"betas\[0\] must be .*; got the class StepLR"),
        (lambda: mb.Dropout(mb.StepLR), TypeError, r"p must be a number in \[0, 1\), or .*; got the class StepLR"),
        (lambda: mb.SGD(momentum=1), ValueError, r"momentum must be a number in \[0, 1\); got 1"),
        (lambda: mb.SGD(momentum=True), TypeError, "momentum must be a number in .*; got True"),
        (
            lambda: mb.SGD(nesterov=True),
            ValueError,
            "nesterov takes a momentum > 0 and a dampening of 0; got momentum=0",
        ),
        (lambda: mb.SGD(momentum=0.9, dampening=0.1, nesterov=True), ValueError, "dampening=0.1"),
        (lambda: mb.Adam(betas=0.9), TypeError, "betas must be two numbers"),
        (lambda: mb.Adam(betas=(0.9, 1.0)), ValueError, r"betas\[1\] must be a number in \[0, 1\); got 1.0"),
        (lambda: mb.Adam(eps=0), ValueError, r"eps must be a number in \(0, inf\); got 0"),
        (lambda: mb.AdamW(weight_decay=-1), ValueError, "weight_decay must be a number in"),
        (lambda: mb.RMSprop(alpha=1), ValueError, "alpha must be a number in"),
        (lambda: mb.Adagrad(lr_decay=-1), ValueError, "lr_decay must be a number in"),
        (lambda: mb.Adagrad(initial_accumulator_value=math.inf), ValueError, "initial_accumulator_value must be"),
    ],
)
def test_misuse_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


FLAGS = [
    (lambda flag: mb.SGD(momentum=0.9, nesterov=flag), "nesterov"),
    (lambda flag: mb.Adam(amsgrad=flag), "amsgrad"),
    (lambda flag: mb.AdamW(amsgrad=flag), "amsgrad"),
    (lambda flag: mb.NAdam(decoupled_weight_decay=flag), "decoupled_weight_decay"),
    (lambda flag: mb.RAdam(decoupled_weight_decay=flag), "decoupled_weight_decay"),
    (lambda flag: mb.RMSprop(centered=flag), "centered"),
    (lambda flag: mb.Muon(nesterov=flag), "nesterov"),
    (lambda flag: mb.Linear(2, 3, bias=flag), "bias"),
    (lambda flag: mb.BatchNorm1d(3, affine=flag), "affine"),
    (lambda flag: mb.LayerNorm(3, elementwise_affine=flag), "elementwise_affine"),
    (lambda flag: mb.LayerNorm(3, bias=flag), "bias"),
    (lambda flag: mb.EMA(validate=flag), "validate"),
    (lambda flag: mb.SWA(3, validate=flag), "validate"),
    (lambda flag: mb.OneCycleLR(0.1, total_steps=5, three_phase=flag), "three_phase"),
    *(
        (lambda flag, name=name: mb.Trainer(mb.mlp([2, 3, 2]), **{name: flag}), name)
        for name in ("shuffle", "drop_last", "secure", "gradient_stats")
    ),
]


@pytest.mark.parametrize(("make", "name"), FLAGS)
def test_a_flag_is_true_or_false(make, name):
    for flag in True, False:
        assert getattr(make(flag), name) is flag
        assert getattr(make(np.bool_(flag)), name) is flag
    for wrong in "False", "", 0, 1, None, np.array([True, False]):
        with pytest.raises(TypeError, match=re.escape(f"{name} must be True or False; got {wrong!r}")):
            make(wrong)


def test_numpys_flags_can_be_saved(tmp_path):
    sgd = mb.SGD(0.1, momentum=0.9, nesterov=np.bool_(True))
    mb.Trainer(mb.mlp([2, 3, 2]), optimizer=sgd, shuffle=np.bool_(False)).save(tmp_path / "trainer")
    assert mb.load(tmp_path / "trainer").optimizer == sgd


def test_a_number_that_no_float_holds_is_refused_in_one_line():
    for number, shown in ((10**400, "an integer of 1329 bits"), (-(10**5000), "an integer of 16610 bits")):
        with pytest.raises(ValueError, match=re.escape(f"lr must be a number in [0, inf); got {shown}")):
            mb.SGD(number)
    with pytest.raises(ValueError, match=r"seed must be an integer from 0 to .*; got an integer of 16610 bits"):
        mb.Trainer(mb.mlp([2, 3, 2]), seed=10**5000)


@pytest.mark.parametrize(
    "optimizer",
    [
        mb.SGD(lr=0.1, momentum=0.9, dampening=0.5),
        mb.Adam(groups={"*.bias": {"lr": 0.5}}),
        mb.RAdam(),
        mb.Adafactor(),
        mb.Muon(),
        mb.Muon(adamw_lr=mb.schedules.OneCycleLR(0.1, total_steps=2000)),
        mb.Adam(mb.schedules.OneCycleLR(0.1, total_steps=2000)),
    ],
    ids=lambda optimizer: f"{type(optimizer).__name__}{'' if optimizer.constant else ', scheduled'}",
)
def test_updates_take_the_coefficients_of_their_own_number(optimizer):
    """Those of constant hyper-parameters are made many updates at a time."""
    trainer = mb.Trainer(mb.mlp([4, 3, 2]), optimizer=optimizer)
    for chosen in (optimizer, replace(optimizer, groups={"0.weight": {"lr": 0.25}})):
        trainer.optimizer = chosen
        for trainer.t, n in (
            (0, 1),
            (1, 300),
            (301, 723),
            (1024, 1),
            (1025, 2),
            (1023, 1),
            (600, 1400),
            (5, 1),
            (6, 40),
        ):
            rates = chosen.learning_rates(trainer.t, n)
            for found, expected in zip(
                trainer._coefficients(n), (rates, chosen.coefficients(trainer.t, n, rates)), strict=True
            ):
                np.testing.assert_array_equal(found, expected)


def test_coefficients_of_short_epochs_are_not_made_in_each(monkeypatch):
    made = []
    coefficients = mb.Adam.coefficients
    monkeypatch.setattr(mb.Adam, "coefficients", lambda self, t, n, lr: made.append(n) or coefficients(self, t, n, lr))
    trainer = mb.Trainer(mb.mlp([4, 3, 2]), optimizer=mb.Adam(), batch_size=1)
    X, y = np.ones((100, 4), np.float32), np.zeros(100, np.int64)
    trainer.fit(X, y, max_epochs=10, verbose=0)
    for _ in range(24):
        trainer.step(X, y)
    assert made == [1024]


def test_a_function_of_the_step_is_called_at_its_step():
    lr = {0: 0.1}
    trainer = mb.Trainer(mb.mlp([4, 3, 2]), optimizer=mb.SGD(lr.__getitem__))
    X, y = np.ones((2, 4), np.float32), np.array([0, 1])
    for trained in range(1, 4):
        trainer.step(X, y)
        lr[trained] = 0.1
    assert trainer.t == 3
