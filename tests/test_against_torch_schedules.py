"""Every step of every schedule has the learning rate that PyTorch's has.

PyTorch multiplies the last rate, step after step, and rounds each time: after n steps its error is up to some n ulps.
For the cosine it divides by 1 + cos(pi t / T_max), which turns an ulp into T_max^2 of them near the end.
"""

import warnings

import numpy as np
import pytest

import fastmb as mb

torch = pytest.importorskip(
    "torch", reason="compares with PyTorch, which is too large for the test extra: pip install torch"
)
from torch.optim import lr_scheduler as theirs  # noqa: E402

N, LR, EPS = 60, 0.3, 2.0**-53
OPTIONS = [
    ("ConstantLR", {}),
    ("ConstantLR", {"factor": 0.25, "total_iters": 7}),
    ("LinearLR", {}),
    ("LinearLR", {"start_factor": 0.1, "end_factor": 0.7, "total_iters": 17}),
    ("StepLR", {"step_size": 7}),
    ("StepLR", {"step_size": 1, "gamma": 1.03}),
    ("MultiStepLR", {"milestones": [3, 20, 20, 41], "gamma": 0.5}),
    ("MultiStepLR", {"milestones": [0, 5]}),
    ("ExponentialLR", {"gamma": 0.93}),
    ("PolynomialLR", {}),
    ("PolynomialLR", {"total_iters": 50, "power": 2.7}),
    ("PolynomialLR", {"total_iters": 80, "power": 0.5}),
    ("CosineAnnealingLR", {"T_max": 70}),
    ("CosineAnnealingLR", {"T_max": 13, "eta_min": 0.02}),
    ("CosineAnnealingLR", {"T_max": 1}),
    ("CosineAnnealingWarmRestarts", {"T_0": 7}),
    ("CosineAnnealingWarmRestarts", {"T_0": 3, "T_mult": 2, "eta_min": 0.02}),
    ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 7}),
    ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 5, "step_size_down": 8, "mode": "triangular2"}),
    ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 5, "mode": "exp_range", "gamma": 0.95}),
    ("OneCycleLR", {"max_lr": 0.1, "total_steps": N}),
    ("OneCycleLR", {"max_lr": 0.1, "epochs": 4, "steps_per_epoch": 15, "anneal_strategy": "linear", "div_factor": 3}),
    ("OneCycleLR", {"max_lr": 0.1, "total_steps": N, "pct_start": 0.23, "three_phase": True, "final_div_factor": 7}),
    ("OneCycleLR", {"max_lr": 0.1, "total_steps": N + 1, "pct_start": 0.5, "three_phase": True}),
    ("OneCycleLR", {"max_lr": 0.1, "total_steps": N, "pct_start": 0.0}),
]


def schedule_of(name, options):
    own_rate = name in ("CyclicLR", "OneCycleLR")
    return getattr(mb, name)(**options) if own_rate else getattr(mb, name)(LR, **options)


def scheduler_of(name, options, optimizer):
    more = {"cycle_momentum": False} if name in ("CyclicLR", "OneCycleLR") else {}
    return getattr(theirs, name)(optimizer, **options, **more)


def torch_rates(make):
    """The rates of N steps; `make` takes the optimiser."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a sequence uses what PyTorch itself deprecates
        scheduler = make(optimizer)
        rates = []
        for _ in range(N):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    return rates


def check(schedule, make, amplified=1):
    np.testing.assert_allclose(schedule.rates(0, N), torch_rates(make), rtol=8 * N * EPS, atol=8 * amplified * EPS)


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=[f"{name} {options}" for name, options in OPTIONS])
def test_every_step_is_torchs(name, options):
    amplified = N * options.get("T_max", 1) ** 2
    check(schedule_of(name, options), lambda optimizer: scheduler_of(name, options, optimizer), amplified)


PARTS = [
    [("LinearLR", {"total_iters": 9}), ("CosineAnnealingLR", {"T_max": 60})],
    [("ConstantLR", {"total_iters": 9}), ("StepLR", {"step_size": 4}), ("ExponentialLR", {"gamma": 0.9})],
    [("PolynomialLR", {"total_iters": 40, "power": 2}), ("MultiStepLR", {"milestones": [3, 20]})],
]
RESTARTS = [("LinearLR", {}), ("CosineAnnealingWarmRestarts", {"T_0": 9}), ("StepLR", {"step_size": 4})]


@pytest.mark.parametrize("parts", [*PARTS, RESTARTS])
def test_sequences_are_torchs(parts):
    milestones = [8, 30][: len(parts) - 1]
    schedule = mb.SequentialLR([schedule_of(*part) for part in parts], milestones)

    def make(optimizer):
        return theirs.SequentialLR(optimizer, [scheduler_of(*part, optimizer) for part in parts], milestones)

    check(schedule, make, N * 60**2)


@pytest.mark.parametrize("parts", PARTS)
def test_chains_are_torchs(parts):
    schedule = mb.ChainedScheduler([schedule_of(*part) for part in parts])
    check(schedule, lambda o: theirs.ChainedScheduler([scheduler_of(*part, o) for part in parts]), N * 60**2)


@pytest.mark.parametrize("part", [("ExponentialLR", {"gamma": 0.9}), ("CosineAnnealingLR", {"T_max": 70})])
def test_warm_up_is_torchs_chain_with_a_line(part):
    warm = ("LinearLR", {"start_factor": 0.2, "total_iters": 12})
    schedule = mb.WarmUp(schedule_of(*part), **warm[1])
    check(schedule, lambda o: theirs.ChainedScheduler([scheduler_of(*p, o) for p in (warm, part)]), N * 70**2)


MOMENTA = [
    ("OneCycleLR", {"max_lr": 0.1, "total_steps": N}),
    ("OneCycleLR", {"max_lr": 0.1, "total_steps": N, "anneal_strategy": "linear", "pct_start": 0.23}),
    ("OneCycleLR", {"max_lr": 0.1, "total_steps": N, "three_phase": True}),
    ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 7}),
    ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 5, "step_size_down": 8, "mode": "triangular2"}),
    ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 5, "mode": "exp_range", "gamma": 0.95}),
]


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("limits", [{}, {"base_momentum": 0.3, "max_momentum": 0.7}])
@pytest.mark.parametrize(("name", "options"), MOMENTA, ids=[f"{name} {options}" for name, options in MOMENTA])
def test_every_momentum_of_a_cycle_is_torchs(name, options, limits, adam):
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.Adam(parameters) if adam else torch.optim.SGD(parameters, lr=LR, momentum=0.9)
    scheduler = getattr(theirs, name)(optimizer, **options, **limits)
    expected = []
    for _ in range(N):
        group = optimizer.param_groups[0]
        expected.append(group["betas"][0] if adam else group["momentum"])
        optimizer.step()
        scheduler.step()
    schedule = getattr(mb, name)(**options).momentum(**limits)
    np.testing.assert_allclose(schedule.rates(0, N), expected, rtol=8 * N * EPS)


@pytest.mark.parametrize("executor", ["native", "numpy"])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax"])
def test_a_network_is_trained_as_torch_trains_it_with_a_cycle_of_rate_and_momentum(name, executor):
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((16, 5)), rng.integers(0, 3, 16)
    net = mb.mlp([5, 8, 3], activation="tanh", dtype="float64")
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    model.load_state_dict({key: torch.tensor(array.T.copy()) for key, array in net.parameters().items()})
    options = {"weight_decay": 0.1}
    torch.set_default_dtype(torch.float64)
    try:
        optimizer = getattr(torch.optim, name)(
            model.parameters(), lr=0.1, **options, **({"momentum": 0.9} if name == "SGD" else {})
        )
        scheduler = theirs.OneCycleLR(optimizer, 0.1, total_steps=20)
        for _ in range(20):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(torch.tensor(X)), torch.tensor(y)).backward()
            optimizer.step()
            scheduler.step() if _ < 19 else None
    finally:
        torch.set_default_dtype(torch.float32)
    cycle = mb.OneCycleLR(0.1, total_steps=20)
    momentum = {"momentum": cycle.momentum()} if name == "SGD" else {"betas": (cycle.momentum(), 0.999)}
    trainer = mb.Trainer(
        net, optimizer=getattr(mb, name)(lr=cycle, **options, **momentum), executor=executor, batch_size=16
    )
    trainer.fit(X, y, max_epochs=20, verbose=0)
    for key, array in dict(model.named_parameters()).items():
        found = net.parameters()[key]
        np.testing.assert_allclose(found, array.detach().numpy().T, rtol=1e-8, atol=1e-10, err_msg=key)


def test_a_weight_decay_that_varies_is_torchs():
    w = torch.nn.Parameter(torch.tensor([[2.0]], dtype=torch.float64))
    optimizer = torch.optim.AdamW([w], lr=0.1)
    schedule = mb.ExponentialLR(0.5, gamma=0.8)
    net = mb.Sequential(mb.Linear(1, 1, bias=False, init=[[2.0]]), dtype="float64")
    trainer = mb.Trainer(net, "mse", mb.AdamW(0.1, weight_decay=schedule))
    for step in range(10):
        optimizer.param_groups[0]["weight_decay"] = schedule(step)
        optimizer.zero_grad()
        ((w * 3 - 1) ** 2).sum().backward()
        optimizer.step()
        trainer.step([[3.0]], [[1.0]])
        np.testing.assert_allclose(net.flat[0], w.item(), rtol=1e-12)
