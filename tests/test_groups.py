"""Groups of parameters: each with its own factors, chosen by name."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

import fastmb as mb
from fastmb import threads

RNG = np.random.default_rng(0)
X = RNG.standard_normal((64, 9)).astype(np.float32)
Y = RNG.integers(0, 3, 64)


def trained(optimizer: mb.SGD, executor: str = "native", widths: tuple[int, ...] = (33,), **options: Any) -> mb.Trainer:
    net = mb.mlp([9, *widths, 3], seed=1, dtype="float64")
    trainer = mb.Trainer(net, optimizer=optimizer, batch_size=16, executor=executor, **options)
    trainer.fit(X, Y, max_epochs=2, verbose=0)
    return trainer


def parameters(trainer: mb.Trainer) -> dict[str, np.ndarray]:
    return trainer.net.parameters()


def test_a_learning_rate_of_0_freezes(executor):
    before = mb.mlp([9, 33, 3], seed=1, dtype="float64").parameters()
    after = parameters(trained(mb.Adam(0.1, groups={"0.bias": {"lr": 0}, "2.*": {"lr": 0}}), executor))
    frozen = [name for name in before if (before[name] == after[name]).all()]
    assert frozen == ["0.bias", "2.weight", "2.bias"]


@pytest.mark.parametrize("width", [1, 2, 3, 7, 11, 12, 13, 15, 16, 17, 31, 32, 33, 63, 65, 97])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_a_bias_in_a_group_of_its_own_is_updated_apart_whatever_the_tiles(width, n_threads, monkeypatch):
    """The bias is a row of the stage's matrix: in a tile with other rows, or in one alone."""
    monkeypatch.setattr(threads, "limit", lambda: 16)
    optimizer = mb.SGD(0.1, momentum=0.9, weight_decay=0.1, groups={"*.bias": {"lr": 0.25, "weight_decay": 0}})
    found, expected = (
        trained(optimizer, executor, (width, 12, 11), n_threads=n_threads) for executor in ("native", "numpy")
    )
    for name, array in parameters(found).items():
        np.testing.assert_allclose(array, parameters(expected)[name], rtol=1e-11, atol=1e-13, err_msg=name)


@pytest.mark.parametrize("groups", [{"*": {}}, {"0.*": {"lr": 1}, "*.bias": {"momentum": 1}}])
def test_factors_of_1_change_no_bit(groups):
    plain, grouped = (trained(mb.SGD(0.1, momentum=0.9, groups=g)) for g in ((), groups))
    assert (plain.net.flat == grouped.net.flat).all()


def test_groups_are_torchs(executor):
    torch = pytest.importorskip("torch", reason="compares with PyTorch, which is too large for the test extra")
    groups = {"0.weight": {"lr": 0.5, "momentum": 0.5}, "*.bias": {"weight_decay": 0, "lr": 2}, "0.*": {"lr": 0}}
    with pytest.raises(ValueError, match=r"all that '0\.\*' matches is taken by patterns before it"):
        trained(mb.SGD(0.1, groups=groups, momentum=0.9), executor)
    del groups["0.*"]
    net = mb.mlp([9, 5, 3], seed=1, dtype="float64")
    model = torch.nn.Sequential(torch.nn.Linear(9, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)).double()
    model.load_state_dict({name: torch.tensor(array.T.copy()) for name, array in net.parameters().items()})
    named = dict(model.named_parameters())
    options = [
        {"params": [named["0.weight"]], "lr": 0.05, "momentum": 0.45},
        {"params": [named["0.bias"], named["2.bias"]], "lr": 0.2, "weight_decay": 0.0},
        {"params": [named["2.weight"]]},
    ]
    theirs = torch.optim.SGD(options, lr=0.1, momentum=0.9, weight_decay=0.1)
    ours = mb.SGD(0.1, momentum=0.9, weight_decay=0.1, groups=groups)
    trainer = mb.Trainer(net, optimizer=ours, executor=executor)
    for _ in range(10):
        trainer.step(X, Y)
        theirs.zero_grad()
        torch.nn.functional.cross_entropy(model(torch.tensor(X).double()), torch.tensor(Y)).backward()
        theirs.step()
    for name, array in net.parameters().items():
        np.testing.assert_allclose(array, named[name].detach().numpy().T, rtol=1e-12, atol=1e-13, err_msg=name)


def test_the_first_pattern_that_matches_holds():
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    groups = [("2.bias", {"lr": 2}), ("*.bias", {"lr": 3}), ("2.*", {"weight_decay": 0})]
    assert mb.SGD(groups=groups).parameter_groups(names) == dict(zip(names, (0, 2, 3, 1), strict=True))


def test_groups_are_compared_shown_and_pickled():
    mapping = {"*.bias": {"weight_decay": 0, "lr": 2}, "0.*": {"lr": 0.5}}
    optimizer = mb.AdamW(groups=mapping)
    assert optimizer == mb.AdamW(groups=list(mapping.items())) == pickle.loads(pickle.dumps(optimizer))
    assert optimizer != mb.AdamW(groups=list(mapping.items())[::-1])
    assert hash(optimizer) == hash(mb.AdamW(groups=mapping))
    shown = "groups={'*.bias': {'lr': 2.0, 'weight_decay': 0.0}, '0.*': {'lr': 0.5}})"
    assert repr(optimizer).endswith(shown)
    assert eval("mb." + repr(optimizer)) == optimizer


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: mb.SGD(groups=5), TypeError, "groups must map patterns of names to factors, such as .* got 5"),
        (lambda: mb.SGD(groups={"*": 5}), TypeError, "groups must map patterns"),
        (lambda: mb.SGD(groups={5: {"lr": 1}}), TypeError, "groups must map patterns"),
        (lambda: mb.SGD(groups=["*"]), TypeError, "groups must map patterns"),
        (lambda: mb.SGD(groups=[("a", {}), ("a", {})]), ValueError, "groups has the pattern 'a' twice"),
        (
            lambda: mb.Adam(groups={"*": {"momentum": 0}}),
            ValueError,
            r"groups\['\*'\]: a factor must be one of 'lr', 'weight_decay'; got 'momentum'",
        ),
        (lambda: mb.SGD(groups={"*": {"lrr": 0}}), ValueError, "did you mean 'lr'"),
        (lambda: mb.SGD(groups={"*": {"lr": -1}}), ValueError, r"groups\['\*'\]\['lr'\] must be a number in \[0, inf"),
        (lambda: mb.SGD(groups={"*": {"momentum": 2}}), ValueError, r"\['momentum'\] must be a number in \[0, 1\]"),
        (
            lambda: mb.Trainer(mb.mlp([4, 3, 2]), optimizer=mb.SGD(groups={"1.*": {"lr": 2}})),
            ValueError,
            r"groups: '1\.\*' matches no parameter; there are 0.weight, 0.bias, 2.weight, 2.bias",
        ),
    ],
)
def test_misuse_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_dampening_is_for_momentum_alone():
    x, y = np.random.default_rng(0).standard_normal((8, 3)), np.arange(8) % 2
    plain = mb.SGD(0.1, momentum=0, dampening=0.5)
    for other in (
        mb.SGD(0.1, momentum=0.9, dampening=0.5, groups={"*": {"momentum": 0}}),
        mb.SGD(0.1, momentum=lambda t: 0.0, dampening=0.5),
    ):
        trainers = [mb.Trainer(mb.Sequential(mb.Linear(3, 2), seed=0), optimizer=each) for each in (plain, other)]
        for trainer in trainers:
            for _ in range(3):
                trainer.step(x, y)
        np.testing.assert_allclose(trainers[0].net.flat, trainers[1].net.flat, rtol=1e-6)
