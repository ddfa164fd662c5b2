"""What layers between the linear ones cost: a 784-512-512-10 network with them beside one without, in turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import fastmb as mb

from .turns import Contender, in_turn
from .workloads import WORKLOADS

WORK = WORKLOADS["mid"]
LAYERS: dict[str, Callable[[int], list[Any]]] = {
    "BatchNorm1d": lambda n: [mb.BatchNorm1d(n), mb.ReLU()],
    "LayerNorm": lambda n: [mb.LayerNorm(n), mb.ReLU()],
    "PReLU": lambda n: [mb.PReLU(n)],
}
ASKED = {"BatchNorm1d": 1.15, "LayerNorm": 1.15}


def fit(between: Callable[[int], list[Any]], batch: int, threads: int) -> Contender:
    """Epochs of the network with these layers between the linear ones; a unit is a mini-batch."""
    modules: list[Any] = []
    for n_in, n_out in zip(WORK.sizes, WORK.sizes[1:], strict=False):
        modules += [mb.Linear(n_in, n_out), *between(n_out)]
    net = mb.Sequential(*modules[: -len(between(1))])
    trained = mb.Trainer(net, WORK.loss, mb.Adam(WORK.lr), batch_size=batch, n_threads=threads)
    X, y = WORK.data()
    return Contender(lambda epochs: trained.fit(X, y, max_epochs=epochs, verbose=0), -(-WORK.rows // batch))


@pytest.mark.parametrize("batch", [128, 256])
@pytest.mark.parametrize("name", LAYERS)
def test_layer(benchmark: Any, name: str, batch: int, threads: int) -> None:
    benchmark.group = "layers between the linear ones"
    in_turn(
        benchmark,
        {
            "fastmb": fit(LAYERS[name], batch, threads),
            "plain step": fit(lambda _: [mb.ReLU()], batch, threads),
        },
        case=f"{name}, batch {batch}",
        shape=f"{WORK.shape}, batch {batch}, adam",
        dtype="float32",
        threads=threads,
        baseline="plain step",
        asked=ASKED.get(name),
    )
