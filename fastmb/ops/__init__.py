"""The kernels as functions: products, activations, losses, reductions and updates on NumPy arrays.

All take float32 or float64 arrays of any strides, write into `out` if that is given, and return their result. Every
function exists in three backends: ``native`` (compiled kernels on all cores), ``numba`` (compiled when first called;
``pip install 'fastmb[numba]'``) and ``numpy`` (float64 inside, plain, slow: the reference). A call's own `backend`
counts first, then `use_backend`; else ``native`` is taken; where the extension was not built ``numba``, or ``numpy``.

Bad arguments raise a `TypeError` or a `ValueError` that names them, before anything is written. So do arrays of other
classes than NumPy's own and its memory maps, such as masked ones and `numpy.matrix`, and an activation that is a
function of your own, ``Activation(f)``: these functions have the built-in ones.

With ``native`` the bits of a result don't depend on the number of threads: an element of a product is one chain of
fused multiply-adds in index order, and a reduction adds its gradients in their order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any

import numpy as np

from .._errors import missing_extra, unknown_name
from ..executors import default_name
from . import _check

__all__ = [
    "activation_backward",
    "activation_forward",
    "clip_by_global_norm",
    "linear_backward_bias",
    "linear_backward_data",
    "linear_backward_weight",
    "linear_forward",
    "matmul",
    "optimizer_update",
    "reduce_gradients",
    "softmax_cross_entropy",
    "use_backend",
]

BACKENDS = ("native", "numba", "numpy")

_loaded: dict[str | None, Any] = {}  # the modules of the backends that were used; None: the default one
_chosen: ContextVar[Any] = ContextVar("fastmb_backend", default=None)


def _load(name: str | None) -> Any:
    """The module of a backend."""
    if (name is None or isinstance(name, str)) and name in _loaded:
        return _loaded[name]
    if name is None:
        module = _load(default_name())
    elif name not in BACKENDS:
        raise unknown_name("backend", name, BACKENDS)
    else:
        try:
            module = import_module(f"._{name}", __name__)
        except ModuleNotFoundError as error:
            if name == "numba" and error.name == "numba":
                raise missing_extra("numba", "numba", "backend 'numba'") from error
            if error.name == f"{__name__}._native":
                message = "backend 'native' needs the compiled extension, which this build of fastmb left out"
                raise ImportError(message) from error
            raise
    _loaded[name] = module
    return module


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Calls within ``with use_backend(...)`` take this backend, in this thread or task alone.

    Parameters
    ----------
    backend : {"native", "numba", "numpy"}
        Loaded at once; a `ValueError` names those there are, an `ImportError` the extra that is missing.

    Examples
    --------
    >>> import numpy as np
    >>> from fastmb import ops
    >>> with ops.use_backend("numpy"):
    ...     ops.matmul(np.eye(2), np.ones((2, 1)))
    array([[1.],
           [1.]])
    """
    token = _chosen.set(_load(backend))
    try:
        yield
    finally:
        _chosen.reset(token)


def _backend(name: str | None) -> Any:
    """The module that a call takes."""
    return (_chosen.get() or _loaded.get(None) or _load(None)) if name is None else _load(name)


def matmul(
    a: np.ndarray,
    b: np.ndarray,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    bias: np.ndarray | None = None,
    activation: Any = None,
    alpha: float = 1,
    beta: float = 0,
    out: np.ndarray | None = None,
    backend: str | None = None,
) -> np.ndarray:
    """Products of matrices: ``out = activation(alpha a b + beta out + bias)``.

    Parameters
    ----------
    a : ndarray (..., m, k), or (..., k, m) with `transpose_a`
    b : ndarray (..., k, n), or (..., n, k) with `transpose_b`
        Of one dtype, float32 or float64. Leading dimensions broadcast, as in `numpy.matmul`.
    transpose_a, transpose_b : bool, default False
        Take the last two dimensions in exchanged order.
    bias : ndarray, optional
        Broadcast to the result's shape: (n,) adds one value to each column.
    activation : str or Activation, optional
        A name such as ``"relu"``, or a built-in module such as ``LeakyReLU(0.1)``.
    alpha, beta : float, default 1 and 0
        A beta other than 0 needs an `out`; with 0, what `out` holds is not looked at.
    out : ndarray (..., m, n), optional
        Overlaps no input.
    backend : {"native", "numba", "numpy"}, optional

    Returns
    -------
    ndarray (..., m, n)
        `out`, or a new array.

    Examples
    --------
    >>> import numpy as np
    >>> matmul(np.ones((5, 2, 3)), np.ones((3, 4)), bias=np.full(4, -4.0), activation="relu").shape
    (5, 2, 4)
    """
    return _backend(backend).matmul(a, b, transpose_a, transpose_b, bias, activation, alpha, beta, out)


def linear_forward(
    X: np.ndarray,
    W: np.ndarray,
    b: np.ndarray | None = None,
    *,
    activation: Any = None,
    out: np.ndarray | None = None,
    backend: str | None = None,
) -> np.ndarray:
    """A dense layer: ``activation(X W + b)``.

    Parameters
    ----------
    X : ndarray (..., B, in)
    W : ndarray (..., in, out)
    b : ndarray (out,), optional
    activation, out, backend : as in `matmul`

    Returns
    -------
    ndarray (..., B, out)
    """
    return _backend(backend).matmul(X, W, False, False, b, activation, 1, 0, out, ("X", "W", "b"))


def linear_backward_data(
    dY: np.ndarray, W: np.ndarray, *, out: np.ndarray | None = None, backend: str | None = None
) -> np.ndarray:
    """The gradient with respect to a dense layer's input: ``dX = dY W'``.

    Parameters
    ----------
    dY : ndarray (..., B, out)
    W : ndarray (..., in, out)
    out : ndarray (..., B, in), optional
    backend : {"native", "numba", "numpy"}, optional

    Returns
    -------
    ndarray (..., B, in)
    """
    return _backend(backend).matmul(dY, W, False, True, None, None, 1, 0, out, ("dY", "W", "bias"))


def linear_backward_weight(
    X: np.ndarray, dY: np.ndarray, *, out: np.ndarray | None = None, backend: str | None = None
) -> np.ndarray:
    """The gradient with respect to a dense layer's weights: ``dW = X' dY``, summed over the rows in their order.

    Parameters
    ----------
    X : ndarray (..., B, in)
    dY : ndarray (..., B, out)
    out : ndarray (..., in, out), optional
    backend : {"native", "numba", "numpy"}, optional

    Returns
    -------
    ndarray (..., in, out)
    """
    return _backend(backend).matmul(X, dY, True, False, None, None, 1, 0, out, ("X", "dY", "bias"))


def linear_backward_bias(dY: np.ndarray, *, out: np.ndarray | None = None, backend: str | None = None) -> np.ndarray:
    """The gradient with respect to a dense layer's bias: the sum of the rows of dY in their order.

    Parameters
    ----------
    dY : ndarray (..., B, out)
        At least one row.
    out : ndarray (..., out), optional
    backend : {"native", "numba", "numpy"}, optional

    Returns
    -------
    ndarray (..., out)
    """
    return _backend(backend).reduce_gradients(_check.rows_first("dY", dY), None, False, out, "dY")


def activation_forward(
    z: np.ndarray, activation: Any, *, out: np.ndarray | None = None, backend: str | None = None
) -> np.ndarray:
    """``f(z)``, elementwise.

    Parameters
    ----------
    z : ndarray
        Any shape.
    activation : str or Activation
        A name such as ``"gelu"``, or a built-in module such as ``LeakyReLU(0.1)``.
    out : ndarray, optional
        May be `z` itself.
    backend : {"native", "numba", "numpy"}, optional

    Returns
    -------
    ndarray
        Like `z`.
    """
    return _backend(backend).activation_forward(z, activation, out)


def activation_backward(
    da: np.ndarray,
    activation: Any,
    *,
    z: np.ndarray | None = None,
    a: np.ndarray | None = None,
    out: np.ndarray | None = None,
    backend: str | None = None,
) -> np.ndarray:
    """``da f'(z)``, elementwise, from the activation's input z or from its output ``a = f(z)``.

    Parameters
    ----------
    da : ndarray
        The gradient with respect to the output, any shape.
    activation : str or Activation
        As in `activation_forward`.
    z, a : ndarray, one of the two
        Like `da`. The output `a` suffices for identity, relu, leaky_relu (of a slope >= 0), elu, selu, softplus, tanh
        and sigmoid; near where the function is flat, the input gives more digits.
    out : ndarray, optional
        May be `da`, `z` or `a` itself.
    backend : {"native", "numba", "numpy"}, optional

    Returns
    -------
    ndarray
        Like `da`.

    Examples
    --------
    >>> import numpy as np
    >>> activation_backward(np.array([1.0, 2.0]), "relu", z=np.array([-3.0, 3.0]))
    array([0., 2.])
    """
    return _backend(backend).activation_backward(da, activation, z, a, out)


def softmax_cross_entropy(
    z: np.ndarray,
    y: np.ndarray,
    *,
    sample_weight: np.ndarray | None = None,
    class_weight: np.ndarray | None = None,
    label_smoothing: float = 0.0,
    out: np.ndarray | None = None,
    backend: str | None = None,
) -> tuple[float, np.ndarray]:
    """The mean cross-entropy of ``softmax(z)``, and its gradient, in one pass. `fastmb.CrossEntropy` has the formula.

    A z of -inf takes its class out: it adds nothing to the loss of a row whose target gives the class no share.

    Parameters
    ----------
    z : ndarray (n, C)
    y : ndarray (n,) of class indices, or (n, C) of probabilities in z's dtype
    sample_weight : ndarray (n,), optional
    class_weight : ndarray (C,), optional
    label_smoothing : float, default 0
        In [0, 1].
    out : ndarray (n, C), optional
        May be `z` itself.
    backend : {"native", "numba", "numpy"}, optional

    Returns
    -------
    loss : float
        The weighted mean over the rows; 0 where the weights sum to 0.
    dz : ndarray (n, C)
        Its gradient with respect to z.
    """
    return _backend(backend).softmax_cross_entropy(z, y, sample_weight, class_weight, label_smoothing, out)


def reduce_gradients(
    stack: np.ndarray,
    weights: np.ndarray | None = None,
    mean: bool = True,
    *,
    out: np.ndarray | None = None,
    backend: str | None = None,
) -> np.ndarray:
    """The (weighted) mean or sum of S gradients, added in their order.

    ``out = (w_0 g_0 + w_1 g_1 + ...) / d``; of a mean, d is the sum of the weights, of a sum 1.

    Parameters
    ----------
    stack : ndarray (S, ...)
        S gradients, at least one.
    weights : ndarray (S,), optional
        In the stack's dtype; ones if not given. Those of a mean must not sum to 0.
    mean : bool, default True
    out : ndarray (...), optional
    backend : {"native", "numba", "numpy"}, optional

    Returns
    -------
    ndarray (...)

    Examples
    --------
    >>> import numpy as np
    >>> reduce_gradients(np.array([[1.0, 2.0], [3.0, 6.0]]))
    array([2., 4.])
    """
    return _backend(backend).reduce_gradients(stack, weights, mean, out)


def optimizer_update(
    optimizer: Any,
    w: np.ndarray,
    g: np.ndarray,
    state: np.ndarray,
    t: int = 0,
    *,
    out: np.ndarray | None = None,
    backend: str | None = None,
) -> np.ndarray:
    """One step of an optimiser, such as ``fastmb.Adam(lr=1e-3)``. `fastmb.optim` has the formulas.

    Those that look at whole matrices, `fastmb.Adafactor` and `fastmb.Muon`, are computed in w's dtype and as in a
    trainer, whatever the backend.

    Parameters
    ----------
    optimizer : Optimizer
        Its `groups`, which go by parameters' names, are not looked at.
    w, g : ndarray
        Weights, any shape (for `fastmb.Muon` of two dimensions at most), and their gradient.
    state : ndarray ``(optimizer.n_states, *w.shape)``
        Changed in place. Before the first step it is what ``optimizer.init_state(state)`` makes it.
    t : int, default 0
        Steps made so far, up to 2**53: bias corrections and schedules depend on it.
    out : ndarray, optional
        Receives the new weights; without it `w` is changed in place.
    backend : {"native", "numba", "numpy"}, optional

    Returns
    -------
    ndarray
        The new weights: `out`, or `w`.

    Examples
    --------
    >>> import fastmb, numpy as np
    >>> w = np.ones(2)
    >>> optimizer_update(fastmb.SGD(lr=0.5), w, np.array([1.0, -1.0]), np.empty((0, 2)))
    array([0.5, 1.5])
    """
    return _backend(backend).optimizer_update(optimizer, w, g, state, t, out)


def clip_by_global_norm(
    grads: np.ndarray | Sequence[np.ndarray],
    max_norm: float,
    *,
    out: Any = None,
    backend: str | None = None,
) -> tuple[Any, float]:
    """Gradients scaled by ``min(1, max_norm / norm)``, where norm is that of all together (Pascanu et al. 2013).

    Parameters
    ----------
    grads : ndarray or sequence of ndarray
    max_norm : float
        Greater than 0.
    out : ndarray or sequence of ndarray, optional
        May be `grads` themselves.
    backend : {"native", "numba", "numpy"}, optional

    Returns
    -------
    clipped : ndarray or list of ndarray
    norm : float
        The norm before, summed in float64. Where it is infinite or NaN, all results are NaN.
    """
    return _backend(backend).clip_by_global_norm(grads, max_norm, out)
