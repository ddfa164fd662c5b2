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
