"""fastmb trains neural networks by mini-batch gradient descent on the CPU, in compiled code, on all cores.

The public names, and nothing else. `docs/architecture.md` tells how the package is built.

>>> import fastmb as mb
>>> X, y = mb.datasets.load_digits()
>>> net = mb.Sequential(mb.Linear(64, 32), mb.ReLU(), mb.Linear(32, 10), seed=0)
>>> trainer = mb.Trainer(net, loss="cross_entropy", optimizer=mb.SGD(lr=0.1, momentum=0.9), input_scale=1 / 16)
>>> history = trainer.fit(X, y, max_epochs=10, verbose=0)
>>> trainer.evaluate(X, y)["accuracy"] > 0.9
True
"""

from . import datasets
from ._config import show_config
from ._version import __version__
from .callbacks import Callback, CSVLogger, EarlyStopping, ModelCheckpoint
from .checkpoint import load
from .history import History
from .losses import MAE, MSE, BCEWithLogits, CrossEntropy, Huber
from .modules import (
    ELU,
    GELU,
    SELU,
    Dropout,
    Identity,
    LeakyReLU,
    Linear,
    Mish,
    ReLU,
    Sigmoid,
    SiLU,
    Softmax,
    Softplus,
    Tanh,
)
from .nn import Sequential, mlp
from .optim import SGD, Adagrad, Adam, AdamW, RMSprop
from .schedules import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    SequentialLR,
    StepLR,
    WarmUp,
)
from .trainer import Trainer

__all__ = [
    "ELU",
    "GELU",
    "MAE",
    "MSE",
    "SELU",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "BCEWithLogits",
    "CSVLogger",
    "Callback",
    "ChainedScheduler",
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "CrossEntropy",
    "CyclicLR",
    "Dropout",
    "EarlyStopping",
    "ExponentialLR",
    "History",
    "Huber",
    "Identity",
    "LeakyReLU",
    "Linear",
    "LinearLR",
    "Mish",
    "ModelCheckpoint",
    "MultiStepLR",
    "OneCycleLR",
    "PolynomialLR",
    "RMSprop",
    "ReLU",
    "Sequential",
    "SequentialLR",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Softplus",
    "StepLR",
    "Tanh",
    "Trainer",
    "WarmUp",
    "__version__",
    "datasets",
    "load",
    "mlp",
    "show_config",
]
