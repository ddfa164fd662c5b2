"""What one call from Python takes: a training step, and a prediction, of 1, 8 and 64 rows that come as NumPy arrays.

Nothing is compiled into a loop here: this is for who trains or predicts on what arrives. A step returns the loss as a
Python float, a prediction the class of every row as a NumPy array. The error is that of the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from .peer import thread_counts
from .peers import JAX, PEERS, FastMB, NumPy, PyTorch, ScikitLearn, missing
from .turns import Contender, fastest, in_turn, looped
from .workloads import WORKLOADS

CASES = ("small", "mnist")
Call = Callable[[], Any]


@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("what", ["step", "predict"])
def test_latency(benchmark: Any, what: str, case: str, rows: int, threads: int) -> None:
    work = replace(WORKLOADS[case], batch=rows, rows=rows)
    exact = NumPy(work, "float64", 1)
    expected = exact.step(np.arange(rows)) if what == "step" else None
    contenders, errors, left_out = {}, {}, []
    for name, peer in PEERS.items():
        if name != "fastmb" and (why := missing(peer)):
            left_out.append(why)
            continue
        if expected is not None:
            errors[name] = abs(CALLS[name](peer(work, threads=threads), what, 1)() / expected - 1)
        built = peer(work, threads=threads)
        packages = tuple(package for package in peer.packages if "." not in package)
        counts = thread_counts(threads) if peer is PyTorch else [threads]
        ways = [Contender(looped(CALLS[name](built, what, n)), 1, {"threads": n}, packages) for n in counts]
        contenders[name] = ways[0] if benchmark.disabled else fastest(ways, 0.02)
    benchmark.group = f"latency of a {what}"
    in_turn(
        benchmark,
        contenders,
        case=f"{case}, {rows} row{'s'[: rows > 1]}",
        shape=f"{work.shape}, {rows}",
        dtype="float32",
        threads=threads,
        flops=work.flops if what == "step" else 2 * rows * sum(W.size for W, _ in work.weights()),
        errors=errors,
        left_out=left_out,
        seconds=0.02,
    )


def fastmb(peer: FastMB, what: str, _: int) -> Call:
    if what == "predict":
        return partial(peer.trainer.net.predict, peer.X)
    return partial(peer.trainer.step, peer.X, peer.y)


def numpy(peer: NumPy, what: str, _: int) -> Call:
    rows = np.arange(peer.work.batch)

    def predict() -> np.ndarray:
        x, params = peer.X, peer.params
        for i in range(0, len(params) - 2, 2):
            x = np.maximum(x @ params[i] + params[i + 1], 0)
        return (x @ params[-2] + params[-1]).argmax(axis=1)

    return predict if what == "predict" else partial(peer.step, rows)


def torch(peer: PyTorch, what: str, threads: int) -> Call:
    torch, loss, optimizer = peer.torch, peer.loss, peer.optimizers[True]

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        value = loss(peer.net(torch.from_numpy(peer.X)), torch.from_numpy(peer.y))
        value.backward()
        optimizer.step()
        return value.item()

    def predict() -> np.ndarray:
        with torch.inference_mode():
            return peer.net(torch.from_numpy(peer.X)).argmax(1).numpy()

    def limited(call: Call) -> Any:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        return call()

    return partial(limited, predict if what == "predict" else step)


def jax(peer: JAX, what: str, _: int) -> Call:
    def one_step(carry: Any, x: Any, y: Any) -> Any:
        params, m, v, t = carry
        loss, grads = peer.jax.value_and_grad(peer._objective)(params, x, y)
        return peer._update(params, grads, m, v, t + 1), loss

    def outputs(params: Any, x: Any) -> Any:
        for W, b in params[:-1]:
            x = peer.jax.nn.relu(x @ W + b)
        return (x @ params[-1][0] + params[-1][1]).argmax(1)

    compiled_step, compiled_outputs = peer.jax.jit(one_step, donate_argnums=0), peer.jax.jit(outputs)
    y = peer.y.astype(np.int32)

    def step() -> float:
        peer.carry, loss = compiled_step(peer.carry, peer.X, y)
        return float(loss)

    return step if what == "step" else lambda: np.asarray(compiled_outputs(peer.carry[0], peer.X))


def sklearn(peer: ScikitLearn, what: str, _: int) -> Call:
    return partial(peer.model.predict, peer.X) if what == "predict" else partial(peer._fit, slice(None))


CALLS: dict[str, Callable[[Any, str, int], Call]] = {
    "fastmb": fastmb,
    "numpy": numpy,
    "torch": torch,
    "jax": jax,
    "sklearn": sklearn,
}
