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

from importlib import import_module
from typing import TYPE_CHECKING

from . import datasets
from ._version import __version__
from .history import History
from .layers import BatchNorm1d, LayerNorm, PReLU, Residual
from .losses import MAE, MSE, BCEWithLogits, CrossEntropy, Huber, Loss
from .modules import (
    ELU,
    GELU,
    SELU,
    Activation,
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
from .optim import SGD, Adam, AdamW
from .trainer import Trainer

if TYPE_CHECKING:
    from . import ops
    from ._config import show_config
    from .averaging import EMA, SWA
    from .batch_size import BatchSizeAdvice, advise_batch_size, branch_test
    from .callbacks import Callback, CSVLogger, EarlyStopping, ModelCheckpoint
    from .checkpoint import load
    from .integrations import MLflow, OptunaPruning, TensorBoard
    from .lr_finder import LRFinder, find_lr
    from .ops import use_backend
    from .optim import Adadelta, Adafactor, Adagrad, Adamax, Lion, Muon, NAdam, RAdam, RMSprop
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
        ReduceLROnPlateau,
        SequentialLR,
        StepLR,
        WarmUp,
    )

__all__ = [
    "ELU",
    "EMA",
    "GELU",
    "MAE",
    "MSE",
    "SELU",
    "SGD",
    "SWA",
    "Activation",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "BCEWithLogits",
    "BatchNorm1d",
    "BatchSizeAdvice",
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
    "LRFinder",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "LinearLR",
    "Lion",
    "Loss",
    "MLflow",
    "Mish",
    "ModelCheckpoint",
    "MultiStepLR",
    "Muon",
    "NAdam",
    "OneCycleLR",
    "OptunaPruning",
    "PReLU",
    "PolynomialLR",
    "RAdam",
    "RMSprop",
    "ReLU",
    "ReduceLROnPlateau",
    "Residual",
    "Sequential",
    "SequentialLR",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Softplus",
    "StepLR",
    "Tanh",
    "TensorBoard",
    "Trainer",
    "WarmUp",
    "__version__",
    "advise_batch_size",
    "branch_test",
    "datasets",
    "find_lr",
    "load",
    "mlp",
    "ops",
    "show_config",
    "use_backend",
]

# Imported when first used: not every training needs them, and `import fastmb` is to be quick.
_LAZY = {
    "_config": ("show_config",),
    "batch_size": ("BatchSizeAdvice", "advise_batch_size", "branch_test"),
    "averaging": ("EMA", "SWA"),
    "callbacks": ("CSVLogger", "Callback", "EarlyStopping", "ModelCheckpoint"),
    "checkpoint": ("load",),
    "integrations": ("MLflow", "OptunaPruning", "TensorBoard"),
    "lr_finder": ("LRFinder", "find_lr"),
    "optim": ("Adadelta", "Adafactor", "Adagrad", "Adamax", "Lion", "Muon", "NAdam", "RAdam", "RMSprop"),
    "schedules": tuple(name for name in __all__ if name.endswith(("LR", "Scheduler", "Restarts", "WarmUp", "Plateau"))),
    "ops": ("use_backend",),
}


def __getattr__(name: str) -> object:
    if name == "ops":
        return import_module(".ops", __name__)
    for module, names in _LAZY.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
