"""How each library trains a workload at its best: one class each, all with the methods of `Peer`."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from .peer import Peer, batches, thread_counts
from .workloads import Workload

MOMENTUM = 0.9
BETAS = (0.9, 0.999)
EPS = 1e-8


def trainer(work: Workload, dtype: str = "float32", n_threads: int | None = None, **options: Any) -> Any:
    """The `fastmb.Trainer` of a workload, with more options, or another `batch_size`, if they are given."""
    import fastmb as mb

    optimizer: mb.Adam | mb.SGD
    if work.optimizer == "adam":
        optimizer = mb.Adam(lr=work.lr, betas=BETAS, eps=EPS)
    else:
        optimizer = mb.SGD(lr=work.lr, momentum=MOMENTUM * (work.optimizer == "momentum"))
    net = mb.mlp(list(work.sizes), activation=work.activation, dtype=dtype, seed=0)
    values = [array for pair in work.weights(dtype) for array in pair]
    for view, value in zip(net.parameters().values(), values, strict=True):
        view[...] = value
    options = {"batch_size": work.batch, "seed": 0, "n_threads": n_threads} | options
    return mb.Trainer(net, loss=work.loss, optimizer=optimizer, **options)


class FastMB(Peer):
    """As it is: of the threads that it may use it takes as many as pay, and tries that while it trains. Like the others
    it doesn't look for NaN in the data first."""

    name = "fastmb"
    packages = ("fastmb", "fastmb.executors.native")

    def __init__(self, work: Workload, dtype: str = "float32", threads: int = 1) -> None:
        super().__init__(work, dtype, threads)
        self.trainer = trainer(work, dtype)

    def train(self, epochs: int) -> None:
        from fastmb.threads import at_most

        with at_most(self.threads):
            self.trainer.fit(self.X, self.y, max_epochs=epochs, verbose=0, check_finite=False)

    def replay(self, order: np.ndarray) -> np.ndarray:
        return np.array([self.trainer.step(self.X[rows], self.y[rows]) for rows in batches(order, self.work)])

    def parameters(self) -> list[np.ndarray]:
        return list(self.trainer.net.parameters().values())


class NumPy(Peer):
    """Written by hand: no allocation in a step, products by the BLAS, its threads as given or one."""

    name = "numpy"
    packages = ("numpy", "threadpoolctl")

    def __init__(self, work: Workload, dtype: str = "float32", threads: int = 1) -> None:
        from threadpoolctl import ThreadpoolController

        super().__init__(work, dtype, threads)
        self.blas = ThreadpoolController()
        self.rng = np.random.default_rng(0)
        pairs = work.weights(dtype)
        self.params = [array for pair in pairs for array in pair]  # W0, b0, W1, b1, ...
        self.grads = [np.empty_like(p) for p in self.params]
        self.scratch = [np.empty_like(p) for p in self.params]
        self.states = [[np.zeros_like(p), np.zeros_like(p)] for p in self.params]
        self.outputs = [np.empty((work.batch, n), dtype) for n in work.sizes]  # the mini-batch, then every layer's
        self.deltas = [np.empty_like(a) for a in self.outputs]
        self.rows = np.arange(work.batch)
        self.t = 0

    def variants(self) -> list[dict[str, Any]]:
        return [{"threads": n} for n in thread_counts(self.threads)]

    def train(self, epochs: int) -> None:
        with self.blas.limit(limits=self.variant["threads"], user_api="blas"):
            for _ in range(epochs):
                for rows in batches(self.rng.permutation(self.work.rows), self.work):
                    self.step(rows)

    def replay(self, order: np.ndarray) -> np.ndarray:
        return np.array([self.step(rows) for rows in batches(order, self.work)])

    def parameters(self) -> list[np.ndarray]:
        return self.params

    def step(self, rows: np.ndarray) -> float:
        outputs, deltas, params, grads = self.outputs, self.deltas, self.params, self.grads
        tanh, layers = self.work.activation == "tanh", len(params) // 2
        np.take(self.X, rows, axis=0, out=outputs[0], mode="clip")
        for i in range(layers):
            z = np.matmul(outputs[i], params[2 * i], out=outputs[i + 1])
            z += params[2 * i + 1]
            if i < layers - 1:
                _ = np.tanh(z, out=z) if tanh else np.maximum(z, 0, out=z)
        loss = self.loss(outputs[-1], self.y[rows], deltas[-1])
        for i in reversed(range(layers)):
            np.matmul(outputs[i].T, deltas[i + 1], out=grads[2 * i])
            np.sum(deltas[i + 1], axis=0, out=grads[2 * i + 1])
            if i:
                np.matmul(deltas[i + 1], params[2 * i].T, out=deltas[i])
                deltas[i] *= 1 - outputs[i] * outputs[i] if tanh else outputs[i] > 0
        self.t += 1
        for p, g, state, scratch in zip(params, grads, self.states, self.scratch, strict=True):
            self.update(p, g, state, scratch)
        return loss

    def loss(self, z: np.ndarray, y: np.ndarray, dz: np.ndarray) -> float:
        """The mean loss; its gradient into `dz`."""
        if self.work.loss == "mse":
            np.subtract(z, y, out=dz)
            loss = float(np.vdot(dz, dz)) / dz.size
            dz *= 2 / dz.size
            return loss
        z -= z.max(axis=1, keepdims=True)
        np.exp(z, out=dz)
        total = dz.sum(axis=1, keepdims=True)
        loss = float(np.mean(np.log(total[:, 0]) - z[self.rows, y]))
        dz /= total
        dz[self.rows, y] -= 1
        dz /= len(y)
        return loss

    def update(self, p: np.ndarray, g: np.ndarray, state: list[np.ndarray], scratch: np.ndarray) -> None:
        m, v = state
        if self.work.optimizer == "adam":
            m *= BETAS[0]
            m += np.multiply(g, 1 - BETAS[0], out=scratch)
            v *= BETAS[1]
            g *= g
            v += np.multiply(g, 1 - BETAS[1], out=scratch)
            correction = np.sqrt(1 - BETAS[1] ** self.t)
            np.sqrt(v, out=scratch)
            scratch += EPS * float(correction)
            np.divide(m, scratch, out=scratch)
            scratch *= self.work.lr * float(correction) / (1 - BETAS[0] ** self.t)
            p -= scratch
        else:
            if self.work.optimizer == "momentum":
                m *= MOMENTUM
                m += g
                g = m
            p -= np.multiply(g, self.work.lr, out=scratch)


class PyTorch(Peer):
    """Eager, the set as one tensor, optimisers plain and fused."""

    name = "torch"
    packages = ("torch",)

    def __init__(self, work: Workload, dtype: str = "float32", threads: int = 1) -> None:
        import torch

        super().__init__(work, dtype, threads)
        self.torch = torch
        self.tensors = torch.from_numpy(self.X), torch.from_numpy(self.y)
        self.generator = torch.Generator().manual_seed(0)
        activation = torch.nn.Tanh if work.activation == "tanh" else torch.nn.ReLU
        modules: list[Any] = []
        for W, b in work.weights(dtype):
            linear = torch.nn.Linear(*W.shape, dtype=getattr(torch, dtype))
            linear.weight.data = torch.from_numpy(np.ascontiguousarray(W.T))
            linear.bias.data = torch.from_numpy(b)
            modules += [linear, activation()]
        self.net = torch.nn.Sequential(*modules[:-1])
        self.loss = torch.nn.MSELoss() if work.loss == "mse" else torch.nn.CrossEntropyLoss()
        self.optimizers = {fused: self._optimizer(fused) for fused in (False, True)}

    def _optimizer(self, fused: bool) -> Any:
        optim, params, work = self.torch.optim, self.net.parameters(), self.work
        if work.optimizer == "adam":
            return optim.Adam(params, lr=work.lr, betas=BETAS, eps=EPS, fused=fused)
        return optim.SGD(params, lr=work.lr, momentum=MOMENTUM * (work.optimizer == "momentum"), fused=fused)

    def variants(self) -> list[dict[str, Any]]:
        return [{"threads": n, "fused": fused} for n in thread_counts(self.threads) for fused in (True, False)]

    def train(self, epochs: int) -> None:
        before = self.torch.get_num_threads()
        self.torch.set_num_threads(self.variant["threads"])
        for _ in range(epochs):
            order = self.torch.randperm(self.work.rows, generator=self.generator)
            for rows in order.split(self.work.batch):
                self.step(rows)
        self.torch.set_num_threads(before)  # it sets OpenMP's count, which fastmb respects

    def replay(self, order: np.ndarray) -> np.ndarray:
        return np.array([self.step(rows).item() for rows in self.torch.from_numpy(order).split(self.work.batch)])

    def parameters(self) -> list[np.ndarray]:
        return [parameter.detach().numpy().T for parameter in self.net.parameters()]  # a weight is [out, in] here

    def step(self, rows: Any) -> Any:
        X, y = self.tensors
        optimizer = self.optimizers[self.variant["fused"]]
        optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.net(X[rows]), y[rows])
        loss.backward()
        optimizer.step()
        return loss.detach()


class JAX(Peer):
    """The whole epoch compiled: `lax.scan` over its mini-batches, parameters and state donated.

    The permutation is NumPy's, or compiled in ("jit"; it sorts, which is slow on a CPU). Rows are gathered mini-batch
    by mini-batch inside the scan, or all at once before it. How many threads work is XLA's own choice; `turns.in_turn`
    keeps everybody on as many processors as are measured.
    """

    name = "jax"
    packages = ("jax", "jaxlib")

    def __init__(self, work: Workload, dtype: str = "float32", threads: int = 1) -> None:
        import jax

        super().__init__(work, dtype, threads)
        jax.config.update("jax_enable_x64", dtype == "float64")
        self.jax = jax
        self.arrays = jax.device_put((self.X, self.y.astype(np.int32) if work.loss == "cross_entropy" else self.y))
        params = [tuple(map(jax.numpy.asarray, pair)) for pair in work.weights(dtype)]
        zeros = partial(jax.tree.map, jax.numpy.zeros_like)
        self.carry = (params, zeros(params), zeros(params), jax.numpy.zeros((), dtype))
        self.key = jax.random.key(0)
        self.rng = np.random.default_rng(0)
        self.epochs = {
            gather: jax.jit(partial(self._epoch, gather=gather), donate_argnums=0) for gather in ("step", "epoch", None)
        }

    def variants(self) -> list[dict[str, Any]]:
        return [{"shuffle": "numpy", "gather": "step"}, {"shuffle": "numpy", "gather": "epoch"}, {"shuffle": "jit"}]

    def train(self, epochs: int) -> None:
        epoch = self.epochs[self.variant.get("gather")]
        for _ in range(epochs):
            if self.variant["shuffle"] == "jit":
                self.key, order = self.jax.random.split(self.key)
            else:
                order = self.rng.permutation(self.work.rows).astype(np.int32)
            self.carry, losses = epoch(self.carry, order, *self.arrays)
        losses.block_until_ready()

    def replay(self, order: np.ndarray) -> np.ndarray:
        self.carry, losses = self.epochs["step"](self.carry, order.astype(np.int32), *self.arrays)
        return np.asarray(losses, np.float64)

    def parameters(self) -> list[np.ndarray]:
        return [np.asarray(array) for pair in self.carry[0] for array in pair]

    def _epoch(self, carry: Any, order: Any, X: Any, y: Any, gather: str | None) -> Any:
        def take(rows: Any) -> Any:
            return X.at[rows].get(mode="promise_in_bounds"), y.at[rows].get(mode="promise_in_bounds")

        def step(carry: Any, batch: Any) -> Any:
            params, m, v, t = carry
            x, target = batch if gather == "epoch" else take(batch)
            loss, grads = self.jax.value_and_grad(self._objective)(params, x, target)
            return self._update(params, grads, m, v, t + 1), loss

        if gather is None:
            order = self.jax.random.permutation(order, self.work.rows)  # a key came
        rows = order.reshape(self.work.steps, self.work.batch)
        return self.jax.lax.scan(step, carry, take(rows) if gather == "epoch" else rows)

    def _objective(self, params: Any, x: Any, y: Any) -> Any:
        jnp, nn = self.jax.numpy, self.jax.nn
        activation = jnp.tanh if self.work.activation == "tanh" else nn.relu
        for W, b in params[:-1]:
            x = activation(x @ W + b)
        W, b = params[-1]
        z = x @ W + b
        if self.work.loss == "mse":
            return jnp.mean((z - y) ** 2)
        return -jnp.mean(jnp.take_along_axis(nn.log_softmax(z), y[:, None], 1))

    def _update(self, params: Any, grads: Any, m: Any, v: Any, t: Any) -> Any:
        jnp, each, lr = self.jax.numpy, self.jax.tree.map, self.work.lr
        if self.work.optimizer == "adam":
            m = each(lambda m, g: BETAS[0] * m + (1 - BETAS[0]) * g, m, grads)
            v = each(lambda v, g: BETAS[1] * v + (1 - BETAS[1]) * g * g, v, grads)
            c = jnp.sqrt(1 - BETAS[1] ** t)
            rate = lr * c / (1 - BETAS[0] ** t)
            params = each(lambda p, m, v: p - rate * m / (jnp.sqrt(v) + EPS * c), params, m, v)
        elif self.work.optimizer == "momentum":
            m = each(lambda m, g: MOMENTUM * m + g, m, grads)
            params = each(lambda p, m: p - lr * m, params, m)
        else:
            params = each(lambda p, g: p - lr * g, params, grads)
        return params, m, v, t


class ScikitLearn(Peer):
    """`MLPClassifier` and `MLPRegressor`, an epoch for each call of `partial_fit`."""

    name = "sklearn"
    packages = ("sklearn", "threadpoolctl")

    def __init__(self, work: Workload, dtype: str = "float32", threads: int = 1) -> None:
        from sklearn.neural_network import MLPClassifier, MLPRegressor
        from threadpoolctl import ThreadpoolController

        super().__init__(work, dtype, threads)
        self.blas = ThreadpoolController()
        if work.loss == "mse" and work.sizes[-1] == 1:
            self.y = self.y[:, 0]
        # Its squared error is halved and its gradient summed over the outputs; the rate and epsilon undo that.
        self.factor = work.sizes[-1] / 2 if work.loss == "mse" else 1.0
        adam = work.optimizer == "adam"
        self.model = (MLPRegressor if work.loss == "mse" else MLPClassifier)(
            hidden_layer_sizes=work.sizes[1:-1],
            activation=work.activation,
            solver="adam" if adam else "sgd",
            learning_rate_init=work.lr if adam else work.lr / self.factor,
            momentum=MOMENTUM if work.optimizer == "momentum" else 0.0,
            nesterovs_momentum=False,
            beta_1=BETAS[0],
            beta_2=BETAS[1],
            epsilon=EPS * self.factor,
            alpha=0.0,
            batch_size=work.batch,
            random_state=0,
        )
        self._fit(slice(work.batch))  # makes the weights, which are then replaced, and an optimiser, which is forgotten
        for i, (W, b) in enumerate(work.weights(dtype)):
            self.model.coefs_[i][...], self.model.intercepts_[i][...] = W, b
        del self.model._optimizer

    def _fit(self, rows: Any) -> float:
        classes = {"classes": np.arange(self.work.sizes[-1])} if self.work.loss == "cross_entropy" else {}
        self.model.partial_fit(self.X[rows], self.y[rows], **classes)
        return float(self.model.loss_)

    def variants(self) -> list[dict[str, Any]]:
        return [{"threads": n} for n in thread_counts(self.threads)]

    def train(self, epochs: int) -> None:
        self.model.shuffle = True
        with self.blas.limit(limits=self.variant["threads"], user_api="blas"):
            for _ in range(epochs):
                self._fit(slice(None))

    def replay(self, order: np.ndarray) -> np.ndarray:
        self.model.shuffle = False
        scale = 2.0 if self.work.loss == "mse" else 1.0
        return np.array([scale * self._fit(rows) for rows in batches(order, self.work)])

    def parameters(self) -> list[np.ndarray]:
        pairs = zip(self.model.coefs_, self.model.intercepts_, strict=True)
        return [array for pair in pairs for array in pair]


PEERS: dict[str, type[Peer]] = {peer.name: peer for peer in (FastMB, NumPy, PyTorch, JAX, ScikitLearn)}


def missing(peer: type[Peer]) -> str | None:
    """What keeps a peer from running, or None."""
    for package in peer.packages:
        try:
            import_module(package)
        except ImportError as error:
            return f"{peer.name} left out: {error}"
    return None


def version(package: str) -> str:
    """The version of a package, or Python's."""
    return platform.python_version() if package == "python" else str(import_module(package).__version__)


def versions(peers: Iterable[type[Peer]]) -> dict[str, str]:
    """The versions of all packages that these peers import, and Python's."""
    packages = dict.fromkeys(package for peer in peers for package in peer.packages if "." not in package)
    return {package: version(package) for package in ("python", *packages)}
