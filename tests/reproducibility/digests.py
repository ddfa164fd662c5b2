"""The digests of trained networks that docs/reproducibility.md promises, and the trainings behind them.

    python digests.py             # trains here and compares with digests.json; the status says whether all are the same
    python digests.py --write     # a change of arithmetic, made on purpose: writes digests.json

Needs fastmb and NumPy, no pytest: it runs on any Python and any machine that is to be compared. The data are integers
by a formula; the networks have odd sizes, dropout, normal and uniform initial weights; the rows are shuffled.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import pickle
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import fastmb as mb
from fastmb import init, losses, nn, optim, threads
from fastmb.rng import permutation

FILE = Path(__file__).with_name("digests.json")
EPOCHS = 3
ROWS, FEATURES, OUTPUTS, BATCH = 150, 19, 10, 32

RULES: dict[str, dict[str, object]] = {  # what becomes of gradients before the update
    "accumulated": {"batch_size": BATCH // 2, "accumulate_steps": 2},
    "max_grad_norm": {"max_grad_norm": 0.5},
    "clip_value": {"clip_value": 0.01},
    "clip_per_example": {"clip_per_example": 0.5},
    "noise": {"clip_per_example": 0.5, "noise_multiplier": 0.7},
    "Poisson": {"clip_per_example": 0.5, "noise_multiplier": 0.7, "sampling": "poisson"},
}

Way = Callable[[mb.Trainer, np.ndarray, np.ndarray], mb.Trainer]


def integers(rows: int, columns: int, below: int) -> np.ndarray:
    """Whole numbers 0 .. below - 1 that look like noise: (i (i + 7) 2654435761 mod 2^32) mod below."""
    i = np.arange(1, rows * columns + 1, dtype=np.uint64)
    return ((i * (i + 7) * 2654435761 >> 7) % 2**25 % below).astype(np.int64).reshape(rows, columns)


def data(task: str) -> tuple[np.ndarray, np.ndarray]:
    """X as float32, and targets for losses of that task."""
    X = (integers(ROWS, FEATURES, 256) / np.float32(64) - 2).astype(np.float32)
    if task == "classification":
        return X, integers(ROWS, 1, OUTPUTS)[:, 0]
    if task == "multilabel":
        return X, integers(ROWS, OUTPUTS, 2)
    return X, integers(ROWS, OUTPUTS, 64) / 32 - 1


def network(dtype: str, activation: str = "gelu") -> mb.Sequential:
    return mb.Sequential(
        mb.Dropout(0.1),
        mb.Linear(FEATURES, 40, init="kaiming_normal", bias_init="uniform"),
        nn.ACTIVATIONS[activation](),
        mb.Dropout(0.3),
        mb.Linear(40, 33, bias=False),
        mb.ReLU(),
        mb.Linear(33, OUTPUTS),
        seed=2,
        dtype=dtype,
    )


def layers() -> dict[str, list[nn.Module]]:
    """What stands between two `Linear` of 40, by name: every layer that is no product, and all of them."""
    block = [mb.LayerNorm(40), mb.Linear(40, 40), mb.PReLU(), mb.Dropout(0.2)]
    return {
        "BatchNorm1d": [mb.BatchNorm1d(40), mb.ReLU()],
        "BatchNorm1d, mean of all": [mb.BatchNorm1d(40, momentum=None, affine=False), mb.GELU()],
        "LayerNorm": [mb.LayerNorm(40), mb.ReLU()],
        "LayerNorm, no bias": [mb.LayerNorm(40, bias=False), mb.SiLU()],
        "PReLU": [mb.PReLU(40), mb.Dropout(0.2)],
        "PReLU, one weight": [mb.PReLU()],
        "Residual": [mb.Residual(mb.Linear(40, 33), mb.Tanh(), mb.Linear(33, 40)), mb.ReLU()],
        "every layer": [mb.BatchNorm1d(40), mb.PReLU(40), mb.Residual(*block, mb.Residual(mb.BatchNorm1d(40)))],
    }


def layered(dtype: str, name: str) -> mb.Sequential:
    """A network with one of `layers`."""
    first = mb.Linear(FEATURES, 40, bias=False)
    return mb.Sequential(mb.Dropout(0.1), first, *layers()[name], mb.Linear(40, OUTPUTS), seed=2, dtype=dtype)


def optimizers() -> Iterator[tuple[str, optim.Optimizer]]:
    """Every optimiser, with its switches on and off, with momentum and without; weight decay wherever there is one."""
    for cls in optim.OPTIMIZERS.values():
        fields = {field.name: field.default for field in dataclasses.fields(cls)}
        always = {"weight_decay": 0.01} if "weight_decay" in fields else {}
        choices: dict[str, tuple[object, object]] = {
            name: (default, not default) for name, default in fields.items() if isinstance(default, bool)
        }
        if fields.get("momentum") == 0:
            choices["momentum"] = (0.0, 0.9)
        for chosen in itertools.product(*choices.values()):
            options = {name: value for name, value in zip(choices, chosen, strict=True) if value != fields[name]}
            switches = [name if value else f"no {name}" for name, value in options.items()]
            try:
                yield " ".join([cls.__name__, *switches]), cls(**always, **options)
            except ValueError:  # switches that exclude each other
                continue


def recipes() -> dict[str, Callable[..., mb.Trainer]]:
    """Name -> what makes the trainer, of its options."""
    found: dict[str, Callable[..., mb.Trainer]] = {}

    def add(
        name: str,
        net: Callable[[], mb.Sequential],
        loss: str | losses.Loss,
        optimizer: optim.Optimizer,
        **rules: object,
    ) -> None:
        rules = {"batch_size": BATCH, "seed": 7} | rules
        found[name] = lambda **options: mb.Trainer(net(), loss, optimizer, **rules, **options)

    momentum = mb.SGD(lr=0.05, momentum=0.9)
    for dtype in nn.DTYPES:
        for name, optimizer in optimizers():
            add(f"{name} {dtype}", lambda d=dtype: network(d), "cross_entropy", optimizer)
        for activation in nn.ACTIVATIONS:
            add(f"{activation} {dtype}", lambda d=dtype, a=activation: network(d, a), "cross_entropy", momentum)
        for layer in layers():
            add(f"{layer} {dtype}", lambda d=dtype, n=layer: layered(d, n), "cross_entropy", momentum)
        add(f"every layer, Muon {dtype}", lambda d=dtype: layered(d, "every layer"), "cross_entropy", mb.Muon(0.02))
        clipped = RULES["noise"] | RULES["accumulated"]
        add(f"LayerNorm, noise {dtype}", lambda d=dtype: layered(d, "LayerNorm"), "cross_entropy", momentum, **clipped)
        for loss in losses.LOSSES:
            add(f"{loss} {dtype}", lambda d=dtype: network(d), loss, momentum)
        weights = np.arange(OUTPUTS) / 8
        for loss in mb.CrossEntropy(label_smoothing=0.1, class_weight=weights), mb.BCEWithLogits(pos_weight=weights):
            add(f"{loss.kind}, weighted {dtype}", lambda d=dtype: network(d), loss, momentum)
        for name, rules in RULES.items():
            add(f"{name} {dtype}", lambda d=dtype: network(d), "cross_entropy", momentum, **rules)
        schedule = mb.SGD(lr=mb.OneCycleLR(0.1, total_steps=EPOCHS * -(-ROWS // BATCH)))
        add(f"OneCycleLR {dtype}", lambda d=dtype: network(d), "cross_entropy", schedule)
    return found


def in_one_go(trainer: mb.Trainer, X: np.ndarray, y: np.ndarray) -> mb.Trainer:
    trainer.fit(X, y, max_epochs=EPOCHS, verbose=0)
    return trainer


def train(
    way: Way = in_one_go,
    names: set[str] | None = None,
    allowed: int | None = None,
    **options: object,
) -> dict[str, str]:
    """Name -> digest of the trained network, `allowed` threads whatever the machine has; and of the initial weights."""
    limit = threads.limit
    if allowed is not None:
        threads.limit = lambda: allowed
    try:
        found = {}
        for name, trainer in recipes().items():
            if names is None or name in names:
                made = trainer(**options)
                found[name] = way(made, *data(made.loss.task)).net.digest()
    finally:
        threads.limit = limit
    return found


def initial_weights() -> dict[str, str]:
    """Name -> digest of a network that hasn't been trained."""
    return {
        f"initial {name} {dtype}": mb.Sequential(mb.Linear(61, 47, init=name), seed=5, dtype=dtype).digest()
        for dtype in nn.DTYPES
        for name in init.NAMES
    }


def in_pieces(trainer: mb.Trainer, X: np.ndarray, y: np.ndarray) -> mb.Trainer:
    """Every fit is broken off by the clock, most of them in the middle of an epoch."""
    while trainer.epoch < EPOCHS:
        trainer.fit(X, y, max_epochs=1, max_seconds=1e-9, verbose=0)
    return trainer


def by_step(trainer: mb.Trainer, X: np.ndarray, y: np.ndarray) -> mb.Trainer:
    """The rows of a fit that shuffles."""
    for epoch in range(EPOCHS):
        order = permutation(len(X), trainer.seed, epoch)
        for start in range(0, len(X), BATCH):
            rows = order[start : start + BATCH]
            trainer.step(X[rows], y[rows])
    return trainer


def pickled(trainer: mb.Trainer, X: np.ndarray, y: np.ndarray) -> mb.Trainer:
    """Pickled before, in the middle of an epoch, and after."""
    trainer = pickle.loads(pickle.dumps(trainer))
    trainer.fit(X, y, max_epochs=1, max_seconds=1e-9, verbose=0)
    trainer = pickle.loads(pickle.dumps(trainer))
    trainer.fit(X, y, max_epochs=EPOCHS - trainer.epoch, verbose=0)
    return pickle.loads(pickle.dumps(trainer))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write digests.json instead of comparing with it")
    parser.add_argument("--executor", default="native")
    parser.add_argument("--threads", type=int, help="default: as many as fastmb takes by itself")
    options = parser.parse_args()
    if "v2" in mb.show_config().get("instruction set", "").split()[:1]:
        print("this processor has no fused multiply-add: its bits are its own", file=sys.stderr)
        return 2
    found = initial_weights() | train(allowed=options.threads, n_threads=options.threads, executor=options.executor)
    here = f"Python {platform.python_version()}, NumPy {np.__version__}, {mb.show_config().get('instruction set')}"
    if options.write:
        FILE.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        print(f"{len(found)} digests written ({here})")
        return 0
    expected = json.loads(FILE.read_text())
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            print(f"{name}: {found.get(name)}, not {expected.get(name)}")
    same = sum(found.get(name) == digest for name, digest in expected.items())
    print(f"{same} of {len(expected)} digests are the same ({here})")
    return int(found != expected)


if __name__ == "__main__":
    sys.exit(main())
