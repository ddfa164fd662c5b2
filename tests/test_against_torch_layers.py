"""Normalisations, PReLU and residual blocks do what PyTorch's do: output, gradients, ten steps, running statistics."""

import numpy as np
import pytest

import fastmb as mb
from fastmb import nn

torch = pytest.importorskip(
    "torch", reason="compares with PyTorch, which is too large for the test extra: pip install torch"
)

STEPS, N, N_IN, HIDDEN, C = 10, 12, 6, 8, 4
RNG = np.random.default_rng(1)
X = RNG.normal(size=(STEPS, N, N_IN)).astype(np.float32)  # float32, so that either dtype trains on the same numbers
Y = RNG.integers(0, C, size=(STEPS, N))
# As in test_against_torch: rounding units a step times steps. A normalisation adds those of its divisions and sums.
TOLERANCE = {"float32": 480 * 2.0**-24, "float64": 480 * 2.0**-53}

linear, bn, ln, prelu, residual = mb.Linear, mb.BatchNorm1d, mb.LayerNorm, mb.PReLU, mb.Residual
NETWORKS = {
    "batch_norm": [linear(N_IN, HIDDEN, bias=False), bn(HIDDEN), mb.Tanh(), linear(HIDDEN, C)],
    "batch_norm, options": [bn(N_IN, eps=1e-2, momentum=0.3), linear(N_IN, C), bn(C, affine=False)],
    "batch_norm, cumulative": [linear(N_IN, HIDDEN), bn(HIDDEN, momentum=None), mb.Tanh(), linear(HIDDEN, C)],
    "layer_norm": [linear(N_IN, HIDDEN), ln(HIDDEN), mb.Tanh(), linear(HIDDEN, C)],
    "layer_norm, options": [ln(N_IN, eps=1e-2, bias=False), linear(N_IN, C), ln(C, elementwise_affine=False)],
    "prelu": [linear(N_IN, HIDDEN), prelu(), linear(HIDDEN, HIDDEN), prelu(HIDDEN, init=0.1), linear(HIDDEN, C)],
    "residual": [
        linear(N_IN, HIDDEN), residual(mb.Tanh(), linear(HIDDEN, HIDDEN), mb.SiLU(), linear(HIDDEN, HIDDEN)),
        mb.Tanh(), residual(ln(HIDDEN), residual(linear(HIDDEN, HIDDEN)), mb.SiLU()), linear(HIDDEN, C),
    ],
    "all": [
        linear(N_IN, HIDDEN), bn(HIDDEN), mb.SiLU(), residual(linear(HIDDEN, HIDDEN), bn(HIDDEN), prelu()), ln(HIDDEN),
        residual(bn(HIDDEN), mb.Tanh(), linear(HIDDEN, HIDDEN)), linear(HIDDEN, C),
    ],
}  # fmt: skip

on_every_executor = pytest.mark.parametrize("executor", ["native", "numpy"])
in_either_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])


class TorchResidual(torch.nn.Sequential):
    def forward(self, x):
        return super().forward(x) + x


def theirs(module):
    """The module of torch's that one of ours stands for."""
    options = {key: value for key, value in vars(module).items() if key != "bias_init"}
    if isinstance(module, mb.Residual):
        return TorchResidual(*map(theirs, module.modules))
    if isinstance(module, mb.Linear):
        return torch.nn.Linear(module.in_features, module.out_features, bias=module.bias)
    return getattr(torch.nn, type(module).__name__)(**options)


def make(name, dtype):
    """Our network and torch's, with the same numbers in it."""
    net = mb.Sequential(*NETWORKS[name], seed=4, dtype=dtype)
    rng = np.random.default_rng(5)
    for array in net.parameters().values():
        array += rng.uniform(-0.2, 0.2, array.shape)
    model = torch.nn.Sequential(*map(theirs, NETWORKS[name])).double()
    state = {key: torch.tensor(array.T.astype(np.float64)) for key, array in net.parameters().items()}
    state |= {key: value for key, value in model.state_dict().items() if key not in state}
    model.load_state_dict(state)
    return net, model


def compare(ours, theirs, dtype):
    assert ours.keys() == theirs.keys()
    for key, array in ours.items():
        expected = theirs[key].detach().numpy().T
        size = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(array, expected, rtol=0, atol=TOLERANCE[dtype] * size, err_msg=key)


def test_every_layer_is_tested_here():
    def kinds(modules):
        return {type(module) for module in modules} | {
            kind for module in modules if isinstance(module, mb.Residual) for kind in kinds(module.modules)
        }

    layers = {cls for cls in vars(nn).values() if isinstance(cls, type) and issubclass(cls, nn.Layer)} - {nn.Layer}
    assert layers | {mb.Residual} <= {kind for modules in NETWORKS.values() for kind in kinds(modules)}


@on_every_executor
@in_either_dtype
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients(executor, dtype, name):
    net, model = make(name, dtype)
    trainer = mb.Trainer(net, batch_size=N, executor=executor)
    loss, gradients = trainer.gradients(X[0], Y[0])
    expected = torch.nn.functional.cross_entropy(model(torch.tensor(X[0]).double()), torch.tensor(Y[0]))
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=TOLERANCE[dtype])
    compare(gradients, {key: value.grad for key, value in model.named_parameters()}, dtype)


@on_every_executor
@in_either_dtype
@pytest.mark.parametrize("name", NETWORKS)
def test_ten_steps_and_what_is_predicted_then(executor, dtype, name):
    net, model = make(name, dtype)
    trainer = mb.Trainer(net, optimizer=mb.SGD(lr=0.05, momentum=0.9), batch_size=N, executor=executor)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for x, y in zip(X, Y, strict=True):
        loss = torch.nn.functional.cross_entropy(model(torch.tensor(x).double()), torch.tensor(y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        np.testing.assert_allclose(trainer.step(x, y), loss.item(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    compare(net.parameters(), dict(model.named_parameters()), dtype)
    buffers = dict(model.named_buffers())
    compare({key: array.reshape(buffers[key].shape) for key, array in net.buffers().items()}, buffers, dtype)
    model.eval()
    out = model(torch.tensor(X[0]).double())
    compare({"out": net(X[0])}, {"out": out.T}, dtype)
    expected = torch.nn.functional.cross_entropy(out, torch.tensor(Y[0])).item()
    np.testing.assert_allclose(trainer.evaluate(X[0], Y[0])["loss"], expected, rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["BatchNorm1d", "LayerNorm", "PReLU"])
def test_defaults_are_those_of_torch(name):
    module, torchs = (HIDDEN,) * (name != "PReLU"), getattr(torch.nn, name)
    ours, theirs = getattr(mb, name)(*module), torchs(*module)
    for key, value in vars(ours).items():
        if key not in ("normalized_shape", "bias", "init"):
            assert getattr(theirs, key) == value, key
    net = mb.Sequential(mb.Linear(N_IN, HIDDEN), ours)
    for key, array in (net.parameters() | net.buffers()).items():
        if key.startswith("1."):
            expected = dict(theirs.state_dict())[key.partition(".")[2]].numpy()
            assert np.array_equal(array.reshape(expected.shape), expected), key


def test_one_row_is_refused_as_by_torch():
    net, model = make("batch_norm", "float32")
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.tensor(X[0][:1]).double())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        mb.Trainer(net).step(X[0][:1], Y[0][:1])
