"""What a network trains on: the checks of X, y and sample weights, their mini-batches, and the order of an epoch.

A user's arrays come in through `check_X`, `check_y` and `check_weights`, once, and go on as a `Batches`, which
executors read row by row. No array of a supported dtype is copied: strided, read-only and memory-mapped data stay where
they are, and rows are converted as they are gathered. Only byte-swapped arrays are converted whole (to native byte
order), and what is no array (a list, a data frame) becomes one.

Everything that can be wrong with data is found here, and said with the argument's name, what was expected and what
came.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._extension import compiled
from .rng import permutation as permutation  # the order of an epoch, drawn with the other random numbers

DTYPES = frozenset(np.dtype(name) for name in ["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"])
_WIDEST = np.dtype("f8")
_LARGEST = {dtype: float(np.finfo(dtype).max) for dtype in (np.dtype("f4"), _WIDEST)}  # numbers that networks may have
_WEIGHTS = (1e-280, 1e280)
_FEW = 1 << 11  # labels of a mini-batch, which one by one take less time than a call of NumPy
_CHUNK = 1 << 20  # elements that a check may look at, and make temporaries of, at a time


@dataclass(slots=True)
class Batches:
    """Checked data and how it is cut into mini-batches; what an executor reads.

    Mini-batch k holds the rows ``order[k * batch_size : (k + 1) * batch_size]``; the last one may be smaller.
    """

    X: np.ndarray  # (n, n_features), any of `DTYPES`, any strides
    y: np.ndarray | None  # (n,) integer class indices, or (n, C) of any of `DTYPES`; None for prediction
    sample_weight: np.ndarray | None  # (n,) float64, C-contiguous
    order: np.ndarray | None  # (n,) int64, or (offsets[-1],); None stands for 0, 1, ... n - 1
    batch_size: int
    scale: float = 1.0  # what X is multiplied by
    offsets: np.ndarray | None = None  # (k + 1,) int64: mini-batch k is order[offsets[k] : offsets[k + 1]] instead

    @property
    def n_batches(self) -> int:
        """Mini-batches, the last and smaller one included."""
        return -(-len(self.X) // self.batch_size)


def check_X(
    X: Any, n_features: int, check_finite: bool = True, name: str = "X", dtype: np.dtype = _WIDEST
) -> np.ndarray:
    """`X` as an array (n, n_features), n at least 1, of one of `DTYPES`, finite in `dtype`, the network's.

    Raises
    ------
    TypeError
        For what can't be an array of numbers.
    ValueError
        For a wrong shape, no rows, NaN, infinity, or a number that `dtype` has no room for.
    """
    array = numbers(X, name)
    if array.ndim != 2:
        hint = ""
        if array.ndim == 1 and n_features == 1:
            hint = f": use {name}.reshape(-1, 1)"
        elif array.ndim == 1 and len(array) == n_features:
            hint = f": use {name}.reshape(1, -1) for one row"
        elif array.ndim > 2:
            hint = f": use {name}.reshape(len({name}), -1)"
        raise ValueError(f"{name} must have shape (n, {n_features}); got {array.shape}{hint}")
    if array.shape[1] != n_features:
        raise ValueError(f"{name} has {array.shape[1]} features; the network takes {n_features}")
    if not len(array):
        raise ValueError(f"{name} has no rows")
    if check_finite:
        _check_finite(array, name, dtype)
    return array


def check_y(
    y: Any,
    X: np.ndarray,
    task: str,
    n_outputs: int,
    check_finite: bool = True,
    name: str = "y",
    X_name: str = "X",
    dtype: np.dtype = _WIDEST,
) -> np.ndarray:
    """`y` as executors take it: (n,) class indices, or (n, C) numbers, with as many rows as `X`.

    What is allowed depends on `task`:

    - ``"classification"``: integers or booleans, (n,) or (n, 1), from 0 to C - 1; or rows of C probabilities, (n, C);
    - ``"multilabel"``: (n, C), or (n,) if C is 1, from 0 to 1;
    - ``"regression"``: (n, C), or (n,) if C is 1.

    Raises TypeError and ValueError as `check_X` does.
    """
    array = numbers(y, name, task == "classification")
    indices = task == "classification" and array.ndim > 0 and array.size == len(array)
    if array.ndim == 1 and (n_outputs == 1 or indices):
        array = array if indices else array[:, None]
    elif array.ndim == 2 and indices:
        array = array[:, 0]
    elif array.ndim != 2 or array.shape[1] != n_outputs:
        also = "(n,) or " if n_outputs == 1 or task == "classification" else ""
        raise ValueError(f"{name} must have shape {also}(n, {n_outputs}); got {array.shape}")
    if len(array) != len(X):
        raise ValueError(f"{name} has {len(array)} rows; {X_name} has {len(X)}")
    if indices:
        _check_labels(array, n_outputs, name)
        return array
    if check_finite:
        _check_finite(array, name, dtype)
    if task != "regression":
        _check_probabilities(array, task == "classification", name)
    return array


def flat(y: Any) -> bool:
    """Whether targets, which have been checked, were given without a dimension of outputs."""
    return (y.ndim if type(y) is np.ndarray else np.ndim(y)) == 1


def check_weights(
    sample_weight: Any, X: np.ndarray, name: str = "sample_weight", X_name: str = "X", zeros: bool = False
) -> np.ndarray:
    """`sample_weight` as an array (n,), float64, contiguous: finite, none negative, not all zero unless `zeros`.

    The largest is in `_WEIGHTS`, so that sums of weights, and of weighted losses, are neither denormal nor infinite.
    """
    array = numbers(sample_weight, name)
    if array.shape != (len(X),):
        raise ValueError(f"{name} must have shape ({len(X)},), one weight for each row of {X_name}; got {array.shape}")
    array = np.ascontiguousarray(array, dtype=np.float64)
    _check_finite(array[:, None], name)
    if array.min() < 0:
        row = int(array.argmin())
        raise ValueError(f"{name} must not be negative; got {array[row]} in row {row}")
    (least, most), largest = _WEIGHTS, float(array.max())
    if not zeros and not largest:
        raise ValueError(f"{name} is zero in every row")
    if largest and not least <= largest <= most:
        row = int(array.argmax())
        raise ValueError(f"{name} must be from {least} to {most} where it is largest; got {array[row]} in row {row}")
    return array


def copy_in(values: Any, array: np.ndarray, name: str) -> None:
    """Copy `values`, which are assigned to `name`, into the array that stays there, if they have its shape."""
    values = numbers(values, name)
    if values.shape != array.shape:
        raise ValueError(f"{name} must have shape {array.shape}; got {values.shape}")
    array[...] = values


def check_rows(rows: Any, n: int) -> np.ndarray:
    """Row numbers of a set of `n` rows, int64; negative ones count from the end."""
    array = np.asarray(rows)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise TypeError(f"rows must be a list of row numbers; got {array.dtype} of shape {array.shape}")
    wrong = (array < -n) | (array >= n)
    if wrong.any():
        raise IndexError(f"rows holds {array[wrong][0]}; X has {n} rows")
    array = array.astype(np.int64)
    return np.where(array < 0, array + n, array)


def check_output_gradients(gradients: Any, X: np.ndarray, n_outputs: int) -> np.ndarray:
    """Gradients with respect to outputs, (n, n_outputs), finite, for the rows of `X`."""
    name = "output_gradients"
    array = numbers(gradients, name)
    if array.ndim == 1 and n_outputs == 1:
        array = array[:, None]
    if array.shape != (len(X), n_outputs):
        raise ValueError(f"{name} must have shape {(len(X), n_outputs)}; got {array.shape}")
    _check_finite(array, name)
    return array


def numbers(values: Any, name: str, classes: bool = False) -> np.ndarray:
    """`values`, which may stand for `classes`, as an array of one of `DTYPES`, uncopied where it is one."""
    if type(values) is np.ndarray and values.dtype in DTYPES:
        return values
    masked = sys.modules.get("numpy.ma")  # NumPy loads it when it is first used, which takes some milliseconds
    if masked is not None and isinstance(values, masked.MaskedArray):
        raise TypeError(f"{name} is a masked array; fill or drop what is masked, and give a plain array")
    if hasattr(values, "toarray") and not hasattr(values, "__array__"):
        raise TypeError(f"{name} is sparse ({type(values).__name__}); give a dense array: {name}.toarray()")
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:  # of NumPy's, or of whoever makes the array
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"{name} can't be made an array: {error}") from None
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.dtype not in DTYPES:
        hint = ""
        if classes and array.dtype.kind in "OSUT":
            hint = f": np.unique({name}, return_inverse=True) numbers classes"
        elif array.dtype.kind == "O" and array.ndim:
            hint = f": use np.asarray({name}, float) if all are numbers"
        raise TypeError(
            f"{name} must hold booleans, integers or floats of at most 64 bits; got dtype {array.dtype}{hint}"
        )
    return array


def first_nonfinite(array: np.ndarray) -> int:
    """The first row of `array`, (n, m), that holds NaN or infinity; -1 if none does."""
    if array.size <= _CHUNK and np.isfinite(array).all():  # sooner done than threads are called together
        return -1
    row: int = (compiled("first_nonfinite") or _first_nonfinite)(array)
    return row


def _first_nonfinite(array: np.ndarray) -> int:
    for rows in _chunks(array):
        finite = np.isfinite(array[rows]).all(axis=1)
        if not finite.all():
            return rows.start + int(finite.argmin())
    return -1


def all_finite(array: np.ndarray) -> bool:
    """Whether `array`, (n,), holds neither NaN nor infinity."""
    step = 1 << 16
    return all(np.logical_and.reduce(np.isfinite(array[at : at + step])) for at in range(0, len(array), step))


def _first_beyond(array: np.ndarray, most: float) -> int:
    """The first row of `array`, (n, m), that holds NaN or a number outside of -`most` .. `most`; -1 if none does."""
    for rows in _chunks(array):
        chunk = array[rows]
        if not (np.maximum.reduce(chunk, axis=None) <= most and np.minimum.reduce(chunk, axis=None) >= -most):
            return rows.start + int((np.abs(chunk) <= most).all(axis=1).argmin())
    return -1


def _check_finite(array: np.ndarray, name: str, dtype: np.dtype = _WIDEST) -> None:
    """Raise a `ValueError` if there is NaN, infinity, or a number that `dtype` would make infinite."""
    if array.dtype.kind != "f":
        return
    most = _LARGEST[dtype]
    row = _first_beyond(array, most) if array.dtype.itemsize > dtype.itemsize else first_nonfinite(array)
    if row < 0:
        return
    column = int((np.abs(array[row].astype(np.float64)) <= most).argmin())
    where = f"row {row}" if array.shape[1] == 1 else f"row {row}, column {column}"
    value = array[row, column]
    expected = f"fit in {dtype}, the network's dtype" if np.isfinite(value) else "be finite"
    raise ValueError(f"{name} must {expected}; got {value} in {where}")


def _check_labels(labels: np.ndarray, n_classes: int, name: str) -> None:
    if labels.dtype.kind == "f":
        raise TypeError(
            f"{name} must hold class labels, integers from 0 to {n_classes - 1}; got dtype {labels.dtype}: "
            f"use {name}.astype(int) if it does"
        )
    first_outside = (compiled("first_outside") if labels.size <= _FEW else None) or _first_outside
    if (row := first_outside(labels, n_classes)) >= 0:
        raise ValueError(f"{name} must hold class labels from 0 to {n_classes - 1}; got {labels[row]} in row {row}")


def _first_outside(labels: np.ndarray, n_classes: int) -> int:
    """The first of some integers, (n,), that isn't 0 .. `n_classes` - 1; -1 if all are."""
    if labels.min() >= 0 and labels.max() < n_classes:
        return -1
    for rows in _chunks(labels):
        outside = (labels[rows] < 0) | (labels[rows] >= n_classes)
        if outside.any():
            return rows.start + int(outside.argmax())
    return -1


def _check_probabilities(array: np.ndarray, sum_to_one: bool, name: str) -> None:
    """Whether all are from 0 to 1 and, up to rounding (1e-3, for float16 rows too), rows sum to 1."""
    for rows in _chunks(array):
        chunk = array[rows]
        inside = ((chunk >= 0) & (chunk <= 1)).all(axis=1)
        if not inside.all():
            row = int(inside.argmin())
            raise ValueError(f"{name} must be from 0 to 1; got {chunk[row]} in row {rows.start + row}")
        if sum_to_one:
            totals = chunk.sum(axis=1, dtype=np.float64)
            wrong = np.abs(totals - 1) > 1e-3
            if wrong.any():
                row = int(wrong.argmax())
                came = f"{totals[row]:.6g} in row {rows.start + row}"
                raise ValueError(f"{name} must hold probabilities that sum to 1 in each row; got {came}")


def _chunks(array: np.ndarray) -> list[slice]:
    """Slices of rows, few enough in each to bound temporaries."""
    step = max(1, _CHUNK * len(array) // max(1, array.size))
    return [slice(start, min(start + step, len(array))) for start in range(0, len(array), step)]
