"""Networks: a `Sequential` of modules holds the numbers and computes outputs.

It cuts its modules into a plan (`fastmb.plan`), lays all parameters in one flat vector, draws their initial values
(`fastmb.init`), and runs them by an executor (`fastmb.executors`). Training is the business of `fastmb.trainer`. The
modules, from `fastmb.modules`, have their public place here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from . import _checks, executors, memory, optim
from ._errors import unknown_name
from ._planning import check_modules, layers, leaves, make_plan
from .data import Batches, check_X, copy_in, numbers
from .layers import BatchNorm1d, LayerNorm, PReLU, Residual
from .modules import (
    ACTIVATIONS,
    ELU,
    GELU,
    SELU,
    Activation,
    Dropout,
    Identity,
    Layer,
    LeakyReLU,
    Linear,
    Mish,
    Module,
    ReLU,
    Sigmoid,
    SiLU,
    Softmax,
    Softplus,
    Tanh,
)
from .optim import Optimizer
from .plan import buffer_views, views
from .rng import Stream

__all__ = [
    "ACTIVATIONS",
    "ELU",
    "GELU",
    "SELU",
    "Activation",
    "BatchNorm1d",
    "Dropout",
    "Identity",
    "Layer",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "Mish",
    "Module",
    "PReLU",
    "ReLU",
    "Residual",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Softplus",
    "Tanh",
    "mlp",
]

DTYPES = ("float32", "float64")
_CACHE_LINE = 64  # bytes
_VECTORS = ("flat", "flat_buffers")
_FIXED = frozenset(("modules", "dtype", "softmax", "plan", *_VECTORS))


class Sequential:
    """A network: modules, one after the other.

    Parameters
    ----------
    *modules : Module
        `Linear`, `BatchNorm1d`, `LayerNorm`, activations, `Dropout`, `Residual`; `Softmax` at the end or not at all.
    seed : int, default 0
        Of the initial weights: one stream of random numbers for all parameters, in their order.
    dtype : {"float32", "float64"}, default "float32"
        Of parameters and arithmetic.

    Attributes
    ----------
    flat : ndarray
        All parameters in one vector, with gaps of zeros; `parameters` are views into it. What is assigned is copied in.
    flat_buffers : ndarray
        What training changes besides, running statistics, in another one; `buffers` are views into it.
    plan : fastmb.plan.Plan
        What executors run.
    task : {"classification", "multilabel", "regression"} or None
        What `predict` returns: the loss of the `Trainer` that trained last decides it, before that the first one's.
    squeeze : bool
        Whether `predict`, and `predict_proba` of a label, drop the output dimension, (n,) for (n, 1): a `Trainer` sets
        it if y was (n,).
    input_scale : float
        What inputs are multiplied by before anything else: that of the same `Trainer`.

    Examples
    --------
    >>> net = Sequential(Linear(784, 128), ReLU(), Dropout(0.1), Linear(128, 10), seed=0)
    >>> net.parameters()["3.weight"].shape
    (128, 10)
    """

    def __init__(self, *modules: Module, seed: int = 0, dtype: Any = "float32") -> None:
        self.modules = check_modules(modules)
        self.seed = _checks.seed(seed)
        self.dtype = _check_dtype(dtype)
        self.task: str | None = None
        self.squeeze = False
        self.input_scale = 1.0
        self._build()
        self._initialise()

    def _build(self, flat: np.ndarray | None = None, flat_buffers: np.ndarray | None = None) -> None:
        """What follows from the modules and the dtype; parameters and buffers are copied from vectors like ours."""
        self.softmax = isinstance(self.modules[-1], Softmax)
        self.plan = make_plan(self.modules, self.dtype)
        self.flat = _aligned_zeros(self.plan.size, self.dtype)
        self.flat_buffers = _aligned_zeros(self.plan.buffer_size, self.dtype)
        if flat is not None:
            self.flat[:] = flat
        if flat_buffers is not None:
            self.flat_buffers[:] = flat_buffers
        self._parameters = _Views(views(self.flat, self.plan))
        self._buffers = _Views(buffer_views(self.flat_buffers, self.plan))
        self._executor: executors.Executor | None = None

    def _initialise(self) -> None:
        stream = Stream(self.seed)
        found = layers(self.modules)
        for name, array in self._parameters.items():
            module, _, what = name.rpartition(".")
            layer, gain = found[module]
            array[:] = layer.draw(what, gain, stream)
        for name, array in self._buffers.items():
            array[:] = name.endswith("var")

    def __getstate__(self) -> dict[str, Any]:
        kept = ("modules", "seed", "dtype", "task", "squeeze", "input_scale", "flat", "flat_buffers")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        flat, flat_buffers = state.pop("flat"), state.pop("flat_buffers", None)
        self.__dict__.update(state)
        self._build(flat, flat_buffers)

    def __setattr__(self, name: str, value: Any) -> None:
        """What a network is made of stays what it is; its vectors take others' numbers."""
        if name not in _FIXED or not hasattr(self, "_executor"):
            object.__setattr__(self, name, value)
        elif name in _VECTORS:
            copy_in(value, getattr(self, name), name)
        else:
            raise AttributeError(f"{name} can't be replaced: make a new Sequential")

    def parameters(self) -> dict[str, np.ndarray]:
        """The parameters by name ("0.weight", "0.bias", ...), as views: writing to one changes the network.

        So that is how they are assigned to, ``net.parameters()["0.weight"][:] = W``: to put another array in the place
        of one is a `TypeError`. Copies and unions, ``net.parameters() | net.buffers()``, are plain dicts. The weight of
        a `Linear` is [in_features, out_features], the transpose of torch's.
        """
        return _Views(self._parameters)

    def buffers(self) -> dict[str, np.ndarray]:
        """The running statistics by name ("1.running_mean", "1.running_var", "1.num_batches_tracked"), as views.

        A network without `BatchNorm1d` has none.
        """
        return _Views(self._buffers)

    @property
    def _learned(self) -> list[np.ndarray]:
        """The vectors that training changes: `flat`, and `flat_buffers` if there are buffers."""
        return [self.flat, self.flat_buffers][: 1 + (self.flat_buffers.size > 0)]

    def __call__(self, X: Any) -> np.ndarray:
        """The network's output, without dropout: raw values, or probabilities if it ends in `Softmax`.

        Parameters
        ----------
        X : array-like (n, n_features) or (n_features,)
            Rows, or one row. NaN and infinity are let through.

        Returns
        -------
        ndarray (n, n_outputs) or (n_outputs,), of the network's dtype
        """
        return self._output(X, False, softmax_ if self.softmax else None)

    def predict(self, X: Any) -> np.ndarray:
        """What the network says of each row, by its `task`.

        The most probable class, int64 ``(n,)``, after training with cross-entropy; which labels are more probable than
        not, int64 ``(n, n_outputs)``, after binary cross-entropy; else the output, ``(n, n_outputs)``. Of the last two,
        ``(n,)`` where the network has one output and was trained with y of shape ``(n,)``: see `squeeze`. Takes rows,
        or one row, whose n is left out; finite.
        """
        if self.task == "classification":
            classes: np.ndarray = self._output(X, True, None).argmax(axis=-1)
            return classes
        if self.task == "multilabel":
            return self._squeezed((self._output(X, True, None) > 0).astype(np.int64))
        return self._squeezed(self._output(X, True, softmax_ if self.softmax else None))

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability of each class or label, ``(n, n_outputs)``, or of one row ``(n_outputs,)``.

        Where the network has one output and was trained by binary cross-entropy with y of shape ``(n,)``, it is that of
        the label 1, ``(n,)``: see `squeeze`.

        Raises
        ------
        ValueError
            If X has a wrong shape, NaN or infinity; if the network knows no probabilities, that is, neither ends in
            `Softmax` nor was trained with cross-entropy or binary cross-entropy.
        """
        if self.softmax or self.task == "classification":
            return self._output(X, True, softmax_)
        if self.task == "multilabel":
            return self._squeezed(self._output(X, True, sigmoid_))
        raise ValueError(
            "predict_proba takes a network that ends in Softmax() or was trained with cross_entropy or "
            f"bce_with_logits; this one's task is {self.task!r}"
        )

    def jacobian(self, X: Any) -> np.ndarray:
        """The derivatives of every output by every input, row by row, as in prediction: without dropout.

        Of what ``net(X)`` returns: of probabilities if the network ends in `Softmax`; with respect to `X` as it is
        given (``input_scale`` is in it). Takes one pass forward and back for each output.

        Parameters
        ----------
        X : array-like (n, n_features) or (n_features,)
            Rows, or one row, finite.

        Returns
        -------
        ndarray (n, n_outputs, n_features) or (n_outputs, n_features), of the network's dtype

        Examples
        --------
        >>> net = mlp([3, 8, 2], activation="tanh", dtype="float64")
        >>> x, e = np.array([0.1, 0.2, 0.3]), np.array([0, 1e-6, 0])
        >>> J = net.jacobian(x)
        >>> np.allclose(J[:, 1], (net(x + e) - net(x - e)) / 2e-6)
        True
        """
        X = numbers(X, "X")
        one_row = X.ndim == 1
        X = check_X(X[None] if one_row else X, self.plan.n_features, dtype=self.dtype)
        executor = executors.default()(self.plan, self.flat, None, None, buffers=self.flat_buffers)
        n, n_out = len(X), self.plan.n_outputs
        found = np.empty((n, n_out, self.plan.n_features), self.dtype)
        back = np.empty((n, self.plan.n_features), self.dtype)
        for i, unit in enumerate(np.eye(n_out)):
            batches = Batches(X, np.broadcast_to(unit, (n, n_out)), None, None, n, self.input_scale)
            executor.per_example(batches, 0, np.zeros((1, 2)), inputs=back)
            found[:, i] = back
        if self.softmax:  # dp_i = p_i (dz_i - sum_j p_j dz_j)
            p = self._output(X, False, softmax_)[:, :, None]
            found = p * (found - (p * found).sum(axis=1, keepdims=True))
        return found[0] if one_row else found

    def _output(self, X: Any, check_finite: bool, link: Callable[[np.ndarray], None] | None) -> np.ndarray:
        """The plan's output for `X`, through `link` in place."""
        X = numbers(X, "X")
        one_row = X.ndim == 1
        X = check_X(X[None] if one_row else X, self.plan.stages[0].n_in, check_finite, dtype=self.dtype)
        if self._executor is None:
            self._executor = executors.default()(self.plan, self.flat, None, None, buffers=self.flat_buffers)
        out = np.empty((len(X), self.plan.stages[-1].n_out), self.dtype)
        self._executor.forward(X, self.input_scale, out)
        if link is not None:
            link(out)
        return out[0] if one_row else out

    def _squeezed(self, out: np.ndarray) -> np.ndarray:
        return out[..., 0] if self.squeeze and self.plan.n_outputs == 1 else out

    def digest(self) -> str:
        """A short name for what training changes, so that two people can compare theirs over the telephone.

        It is the same for two networks exactly if all parameters and buffers (running statistics) have the same names,
        shapes, dtype and values, to the bit (but for one chance in 2^64).

        Returns
        -------
        str
            The first 16 hexadecimal digits of the SHA-256 (FIPS 180-4) of, for each parameter in the order of
            `parameters` and then each buffer in the order of `buffers`, the line ``name shape dtype`` in ASCII, such
            as ``0.weight 784x128 <f4``, ended by a newline, and its values, little-endian, in C order.

        Examples
        --------
        >>> mlp([4, 3, 2], seed=0).digest() == mlp([4, 3, 2], seed=0).digest()
        True
        >>> mlp([4, 3, 2], seed=0).digest() == mlp([4, 3, 2], seed=1).digest()
        False
        """
        import hashlib

        sha = hashlib.sha256()
        for name, array in (self._parameters | self._buffers).items():
            values = np.ascontiguousarray(array, self.dtype.newbyteorder("<"))
            sha.update(f"{name} {'x'.join(map(str, array.shape))} {values.dtype.str}\n".encode())
            sha.update(values.view(np.uint8).data)
        return sha.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.modules)

    def __iter__(self) -> Iterator[Module]:
        return iter(self.modules)

    def __getitem__(self, index: int) -> Module:
        return self.modules[index]

    def __repr__(self) -> str:
        lines = (f"  ({i}): {module!r}" for i, module in enumerate(self.modules))
        return "\n".join(["Sequential(", *lines, ")"])

    def _repr_html_(self) -> str:
        from ._html import network

        return network(self)

    def summary(self, batch_size: int | None = None, optimizer: str | Optimizer | None = None) -> str:
        """A table of the modules, the shapes of their outputs and their parameters.

        With a `batch_size`, the shapes have it, and two lines tell the floating-point operations of a training step and
        the peak memory of a fit with `optimizer` (a name or an instance; default: Adam), data not counted.
        """
        rows = "n" if batch_size is None else str(_checks.integer("batch_size", batch_size, 1))
        table = self._table(rows)
        a, b, c, d = (max(map(len, column)) for column in zip(*table, strict=True))
        lines = [f"{i:<{a}}  {module:<{b}}  {shape:<{c}}  {count:>{d}}".rstrip() for i, module, shape, count in table]
        lines.append(self._size())
        if batch_size is not None:
            lines.append(f"{self.plan.flops(batch_size) / 1e6:,.3f} MFLOP a training step of {batch_size} rows")
            chosen = optim.Adam() if optimizer is None else optim.get(optimizer)
            name = type(chosen).__name__
            states = chosen.n_states + (not chosen.fused)  # and the gradient
            lines.append(f"{memory.forecast(self.plan, batch_size, states)} in a fit with {name}")
        return "\n".join(lines)

    def _table(self, rows: str) -> list[tuple[str, str, str, str]]:
        """Heads, then one line a module: its number, itself, the shape of its output, its parameters."""
        table = [("", "module", "output", "parameters")]
        width = self.plan.n_features
        counts = {stage.name: stage.size for stage in self.plan.stages}
        for name, module in leaves(self.modules, blocks=True):
            width = (isinstance(module, Layer) and module.gives) or width
            count = counts.get(name, 0)
            what = f"Residual of {len(module.modules)}:" if isinstance(module, Residual) else repr(module)
            table.append((name, what, f"({rows}, {width})", f"{count:,}" if count else ""))
        return table

    def _size(self) -> str:
        total = self.plan.n_parameters
        return f"{total:,} parameters, {self.dtype}, {total * self.dtype.itemsize / 1024:,.1f} KiB"


class _Views(dict[str, np.ndarray]):
    """Views into a network's vector by name; none is put in the place of another. A copy is a plain dict."""

    def __setitem__(self, name: str, value: Any) -> None:
        raise TypeError(
            f"write to the array, [{name!r}][:] = values; an array that is put in its place is none of the network's"
        )

    def update(self, *others: Any, **named: Any) -> None:
        for name, value in dict(*others, **named).items():
            self[name] = value

    def __ior__(self, others: Any) -> Any:  # type: ignore[misc]
        self.update(others)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def mlp(
    sizes: Sequence[int],
    activation: str | Activation = "relu",
    dropout: float = 0.0,
    dtype: Any = "float32",
    seed: int = 0,
    bias: bool = True,
) -> Sequential:
    """A network of `Linear` layers with the same activation, and dropout if there is any, between them.

    Parameters
    ----------
    sizes : sequence of int
        Features, hidden units of each layer, outputs.
    activation : str or Activation, default "relu"
        A name in `ACTIVATIONS`, or a module such as ``LeakyReLU(0.2)`` or an `Activation` of your own.
    dropout : float, default 0
        Probability of `Dropout` after each activation.
    dtype, seed
        As for `Sequential`.
    bias : bool, default True
        As for `Linear`.

    Examples
    --------
    >>> mlp([784, 128, 10], dropout=0.1)
    Sequential(
      (0): Linear(784, 128)
      (1): ReLU()
      (2): Dropout(p=0.1)
      (3): Linear(128, 10)
    )
    """
    if isinstance(sizes, str) or not isinstance(sizes, Iterable):
        raise TypeError(f"sizes must be a sequence of integers such as [784, 128, 10]; got {sizes!r}")
    sizes = [_checks.integer(f"sizes[{i}]", size, 1) for i, size in enumerate(sizes)]
    if len(sizes) < 2:
        raise ValueError(f"sizes must have at least 2 values, features and outputs; got {sizes!r}")
    if not isinstance(activation, (str, Activation)):
        raise TypeError(f"activation must be a name or a module such as Activation(f); got {activation!r}")
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise unknown_name("activation", activation, ACTIVATIONS)
        activation = ACTIVATIONS[activation]()
    p = _checks.number_or_schedule("dropout", dropout, "[0, 1)")
    between = [activation, *([Dropout(p)] if p else [])]
    modules: list[Module] = []
    for n_in, n_out in pairwise(sizes):
        modules += [Linear(n_in, n_out, bias), *between]
    return Sequential(*modules[: -len(between)], seed=seed, dtype=dtype)


def softmax_(z: np.ndarray) -> None:
    """Softmax of each row, in place."""
    z -= z.max(axis=1, keepdims=True)
    np.exp(z, out=z)
    z /= z.sum(axis=1, keepdims=True)


def sigmoid_(z: np.ndarray) -> None:
    """The sigmoid, in place, as (1 + tanh(z / 2)) / 2, which can't overflow."""
    z *= 0.5
    np.tanh(z, out=z)
    z += 1
    z *= 0.5


def _check_dtype(dtype: Any) -> np.dtype:
    try:
        found: np.dtype = np.dtype(dtype)
    except TypeError:
        raise unknown_name("dtype", dtype, DTYPES) from None
    if dtype is None or found.name not in DTYPES or not found.isnative:  # NumPy takes None for float64
        raise unknown_name("dtype", dtype, DTYPES)
    return found


def _aligned_zeros(n: int, dtype: np.dtype) -> np.ndarray:
    """`n` zeros that start at a cache line."""
    memory = np.zeros(n * dtype.itemsize + _CACHE_LINE, dtype=np.uint8)
    start = -memory.ctypes.data % _CACHE_LINE
    return memory[start : start + n * dtype.itemsize].view(dtype)
