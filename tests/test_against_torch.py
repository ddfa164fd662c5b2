"""Ten steps of every activation, loss and optimiser end where PyTorch's end, on every executor and in either dtype."""

from dataclasses import fields

import numpy as np
import pytest

import fastmb as mb
from fastmb import executors, losses, nn, optim
from fastmb.data import Batches
from fastmb.executors import Training

torch = pytest.importorskip(
    "torch", reason="compares with PyTorch, which is too large for the test extra: pip install torch"
)

STEPS, N, N_IN, HIDDEN, C = 10, 12, 6, 8, 4
RNG = np.random.default_rng(1)
X = RNG.normal(size=(STEPS, N, N_IN)).astype(np.float32)  # float32, so that either dtype trains on the same numbers
LABELS = RNG.integers(0, C, size=(STEPS, N))
PROBABILITIES = RNG.dirichlet(np.ones(C), size=(STEPS, N)).astype(np.float32)
BITS = RNG.integers(0, 2, size=(STEPS, N, C)).astype(np.uint8)
TARGETS = RNG.normal(size=(STEPS, N, C)).astype(np.float32)
WEIGHTS = [0.5, 1.0, 2.0, 0.25]  # exact in float32

ACTIVATIONS = {
    "identity": torch.nn.Identity(),
    "relu": torch.nn.ReLU(),
    "leaky_relu": torch.nn.LeakyReLU(),
    "elu": torch.nn.ELU(),
    "selu": torch.nn.SELU(),
    "gelu": torch.nn.GELU(),
    "gelu_tanh": torch.nn.GELU(approximate="tanh"),
    "silu": torch.nn.SiLU(),
    "mish": torch.nn.Mish(),
    "softplus": torch.nn.Softplus(),
    "tanh": torch.nn.Tanh(),
    "sigmoid": torch.nn.Sigmoid(),
}
LOSSES = {  # ours, targets, torch's class and its options
    "cross_entropy": ("cross_entropy", LABELS, torch.nn.CrossEntropyLoss, {}),
    "cross_entropy smoothed": (mb.CrossEntropy(0.1), LABELS, torch.nn.CrossEntropyLoss, {"label_smoothing": 0.1}),
    "cross_entropy weighted": (mb.CrossEntropy(0, WEIGHTS), LABELS, torch.nn.CrossEntropyLoss, {"weight": WEIGHTS}),
    "cross_entropy smoothed, weighted": (
        mb.CrossEntropy(0.1, WEIGHTS), LABELS, torch.nn.CrossEntropyLoss, {"label_smoothing": 0.1, "weight": WEIGHTS},
    ),
    "cross_entropy rows": ("cross_entropy", PROBABILITIES, torch.nn.CrossEntropyLoss, {}),
    "cross_entropy rows, smoothed, weighted": (
        mb.CrossEntropy(0.1, WEIGHTS), PROBABILITIES,
        torch.nn.CrossEntropyLoss, {"label_smoothing": 0.1, "weight": WEIGHTS},
    ),
    "bce_with_logits": ("bce_with_logits", BITS, torch.nn.BCEWithLogitsLoss, {}),
    "bce_with_logits soft": ("bce_with_logits", PROBABILITIES, torch.nn.BCEWithLogitsLoss, {}),
    "bce_with_logits weighted": (mb.BCEWithLogits(WEIGHTS), BITS, torch.nn.BCEWithLogitsLoss, {"pos_weight": WEIGHTS}),
    "mse": ("mse", TARGETS, torch.nn.MSELoss, {}),
    "mae": ("mae", TARGETS, torch.nn.L1Loss, {}),
    "huber": ("huber", TARGETS, torch.nn.HuberLoss, {}),
    "huber delta": (mb.Huber(0.5), TARGETS, torch.nn.HuberLoss, {"delta": 0.5}),
}  # fmt: skip
OPTIMIZERS = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("Adam", {}),
    ("Adam", {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.01, "betas": (0.5, 0.6), "amsgrad": True}),
    ("AdamW", {}),
    ("AdamW", {"lr": 0.01, "weight_decay": 0.5, "amsgrad": True}),
    ("RMSprop", {}),
    ("RMSprop", {"alpha": 0.9, "eps": 1e-3, "weight_decay": 0.1}),
    ("RMSprop", {"momentum": 0.9}),
    ("RMSprop", {"centered": True}),
    ("RMSprop", {"centered": True, "momentum": 0.9, "weight_decay": 0.1}),
    ("Adagrad", {}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-3}),
    ("NAdam", {}),
    ("NAdam", {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1, "momentum_decay": 0.1}),
    ("NAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("RAdam", {}),
    ("RAdam", {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}),
    ("RAdam", {"betas": (0.8, 0.6), "weight_decay": 0.1, "decoupled_weight_decay": True}),  # longest is 4
    ("Adamax", {}),
    ("Adamax", {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}),
    ("Adadelta", {}),
    ("Adadelta", {"lr": 0.1, "rho": 0.5, "eps": 1e-3, "weight_decay": 0.1}),
    ("Adafactor", {}),
    ("Adafactor", {"lr": 0.5, "beta2_decay": -0.5, "eps": (1e-4, 1e-2), "d": 1.5, "weight_decay": 0.1}),
]
# Sums of at most 12 products of size about 1 make errors of at most 12 rounding units a step, and there are ten steps.
TOLERANCE = {"float32": 120 * 2.0**-24, "float64": 120 * 2.0**-53}


@pytest.fixture(autouse=True)
def _torchs_own_scalars_in_float64():
    """NAdam's product of momenta, which PyTorch keeps in its default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


on_every_executor = pytest.mark.parametrize("executor", executors.NAMES)
in_either_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])


def ours(executor, net, loss, optimizer, y, weights=None):
    """The mean losses of ten steps."""
    state = np.full((optimizer.n_states, net.plan.size), np.nan, dtype=net.dtype)
    optimizer.init_state(state)
    training = Training(losses.get(loss), optimizer, state, N, 0)
    one = executors.build(executor, net, training, 2)
    weights = None if weights is None else weights.ravel()
    batches = Batches(X.reshape(-1, N_IN), y.reshape(STEPS * N, *y.shape[2:]), weights, None, N)
    sums = np.full((STEPS, 2), np.nan)
    coefficients = optimizer.coefficients(0, STEPS, optimizer.learning_rates(0, STEPS))
    done = 0
    while done < STEPS:  # an executor may come back early, with at least one step done
        made = one.run(batches, done, done, coefficients[done:], sums[done:], 1e9)
        assert made > 0
        done += made
    return sums[:, 0] / sums[:, 1]


def theirs(net, activation, loss, optimizer, y):
    """The mean losses of torch's ten steps from the same parameters, and where these end, always in float64."""
    net = {name: torch.tensor(array.T.astype(np.float64)) for name, array in net.parameters().items()}
    model = torch.nn.Sequential(torch.nn.Linear(N_IN, HIDDEN), activation, torch.nn.Linear(HIDDEN, C)).double()
    model.load_state_dict(net)
    optimizer = getattr(torch.optim, optimizer[0])(model.parameters(), **optimizer[1])
    found = []
    for step in range(STEPS):
        target = torch.tensor(y[step]) if y.ndim == 2 else torch.tensor(y[step].astype(np.float64))
        value = loss(model(torch.tensor(X[step]).double()), target, step)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        found.append(value.item())
    return found, {name: value.detach().numpy().T for name, value in model.named_parameters()}


def compare(
    executor, dtype, loss, y, torch_loss, optimizer=("SGD", {"lr": 0.1, "momentum": 0.9}), activation="tanh", s=None
):
    net = mb.mlp([N_IN, HIDDEN, C], activation=activation, dtype=dtype, seed=4)
    expected_losses, expected = theirs(net, ACTIVATIONS[activation], torch_loss, optimizer, y)
    found_losses = ours(executor, net, loss, getattr(mb, optimizer[0])(**optimizer[1]), y, s)
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(found_losses, expected_losses, rtol=tolerance, atol=tolerance)
    for name, array in net.parameters().items():
        np.testing.assert_allclose(array, expected[name], rtol=tolerance, atol=tolerance, err_msg=name)


def torch_loss(cls, options, **more):
    tensors = {k: torch.tensor(v, dtype=torch.float64) if isinstance(v, list) else v for k, v in options.items()}
    return cls(**tensors, **more)


@on_every_executor
@in_either_dtype
@pytest.mark.parametrize("activation", nn.ACTIVATIONS)
def test_ten_steps_through_every_activation(executor, dtype, activation):
    loss = torch.nn.CrossEntropyLoss()
    compare(executor, dtype, "cross_entropy", LABELS, lambda z, y, step: loss(z, y), activation=activation)


@on_every_executor
@in_either_dtype
@pytest.mark.parametrize("name", LOSSES)
def test_ten_steps_on_every_loss(executor, dtype, name):
    loss, y, cls, options = LOSSES[name]
    each = torch_loss(cls, options)
    compare(executor, dtype, loss, y, lambda z, y, step: each(z, y))


@on_every_executor
@in_either_dtype
@pytest.mark.parametrize("name", LOSSES)
def test_ten_steps_on_every_loss_with_sample_weights(executor, dtype, name):
    # The mean over the weights, from torch's losses of single rows; with class indices, a row counts by its class too.
    loss, y, cls, options = LOSSES[name]
    each = torch_loss(cls, options, reduction="none")
    s = np.random.default_rng(2).uniform(0, 2, size=(STEPS, N))
    s[:, 0] = 0
    by_class = torch.tensor(options.get("weight", np.ones(C)))

    def weighted(z, y, step):
        rows = each(z, y)
        rows = rows if rows.ndim == 1 else rows.mean(dim=1)
        u = by_class[y] if y.ndim == 1 else torch.ones(N)
        weights = torch.tensor(s[step])
        return (weights * rows).sum() / (weights * u).sum()

    compare(executor, dtype, loss, y, weighted, s=s)


@on_every_executor
@in_either_dtype
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: f"{o[0]} {o[1]}")
def test_ten_steps_of_every_optimizer(executor, dtype, optimizer):
    loss = torch.nn.CrossEntropyLoss()
    compare(executor, dtype, "cross_entropy", LABELS, lambda z, y, step: loss(z, y), optimizer=optimizer)


@pytest.mark.parametrize("name", {name for name, _ in OPTIMIZERS})
def test_defaults_are_those_of_torch(name):
    ours = getattr(mb, name)()
    options = {field.name: getattr(ours, field.name) for field in fields(ours) if field.name != "groups"}
    defaults = getattr(torch.optim, name)([torch.zeros(1)]).defaults
    assert {key: defaults[key] for key in options} == options


def test_all_of_torchs_optimizers_that_are_here_are_compared():
    here = {cls.__name__ for cls in optim.OPTIMIZERS.values() if hasattr(torch.optim, cls.__name__)}
    assert {name for name, _ in OPTIMIZERS} | {"Muon"} == here  # PyTorch's takes matrices alone: test_matrices.py
