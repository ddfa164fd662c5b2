"""Data to try things on: the digits that ship with the package, and readers of files that are somewhere already.

Nothing here downloads anything.
"""

from __future__ import annotations

import math
import os

import numpy as np

__all__ = ["load_digits", "load_fashion_mnist", "read_idx"]

_IDX_TYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """The handwritten digits that ship with fastmb: 1797 images of 8 x 8 pixels.

    The test set of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998; UCI Machine Learning
    Repository, doi:10.24432/C50P49), CC BY 4.0; `digits.txt` beside the data says more.

    Returns
    -------
    X : ndarray of shape (1797, 64), uint8
        Pixels, row by row, from 0 to 16.
    y : ndarray of shape (1797,), int64
        The digits, 0 to 9.

    Examples
    --------
    >>> from fastmb.datasets import load_digits
    >>> X, y = load_digits()
    >>> X.shape, X.dtype, y[:10].tolist()
    ((1797, 64), dtype('uint8'), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    with np.load(os.path.join(os.path.dirname(__file__), "digits.npz")) as arrays:
        return arrays["X"], arrays["y"].astype(np.int64)


def load_fashion_mnist(
    directory: str | os.PathLike[str],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Fashion-MNIST from its four IDX files, plain or gzipped: 70 000 images of 28 x 28 pixels in ten classes.

    The files are those of H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking
    Machine Learning Algorithms", 2017 (MIT licence). Debian's package ``dataset-fashion-mnist`` installs them. MNIST
    itself has files of the same names and is read as well.

    Parameters
    ----------
    directory : path
        Where ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the two ``t10k-`` files are, each with or
        without ``.gz``.

    Returns
    -------
    X_train, y_train, X_test, y_test : ndarrays
        Images (60000, 784) and (10000, 784), uint8, 0 to 255; labels (60000,) and (10000,), int64, 0 to 9.

    Raises
    ------
    FileNotFoundError, ValueError
        If a file is missing, or isn't what it should be.
    """
    arrays: list[np.ndarray] = []
    for part in "train", "t10k":
        images = _read(directory, f"{part}-images-idx3-ubyte", 3)
        labels = _read(directory, f"{part}-labels-idx1-ubyte", 1)
        if len(images) != len(labels):
            raise ValueError(f"{part} files in {directory} hold {len(images)} images but {len(labels)} labels")
        arrays += images.reshape(len(images), -1), labels.astype(np.int64)
    X_train, y_train, X_test, y_test = arrays
    return X_train, y_train, X_test, y_test


def _read(directory: str | os.PathLike[str], name: str, ndim: int) -> np.ndarray:
    from pathlib import Path

    candidates = [Path(directory, name + suffix) for suffix in ("", ".gz")]
    for path in candidates:
        if path.is_file():
            array = read_idx(path)
            if array.ndim != ndim or array.dtype != np.uint8:
                raise ValueError(f"{path} must hold {ndim}-D uint8 data; it holds {array.ndim}-D {array.dtype}")
            return array
    there = Path(directory)
    found = sorted(entry.name for entry in there.iterdir()) if there.is_dir() else None
    state = "no such directory" if found is None else f"it holds {', '.join(found[:8]) or 'nothing'}"
    raise FileNotFoundError(f"neither {name} nor {name}.gz is in {directory} ({state})")


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """The array in an IDX file (the format of MNIST), plain or gzipped, in native byte order.

    The format: two zero bytes, one for the type (8: uint8), one for the number of dimensions; the dimensions as
    big-endian 32-bit integers; the data, last dimension fastest.

    Raises
    ------
    ValueError
        If the file isn't IDX, is damaged, or is longer or shorter than its header says.
    """
    import gzip
    import zlib

    with open(path, "rb") as file:
        data = file.read()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is a damaged gzip file: {error}") from None
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _IDX_TYPES:
        raise ValueError(f"{path} is no IDX file: it must start with 00 00, a type and a rank; got {data[:4].hex(' ')}")
    dtype, ndim = np.dtype(_IDX_TYPES[data[2]]), data[3]
    start = 4 + 4 * ndim
    if len(data) < start:
        raise ValueError(f"{path} is truncated: its header takes {start} bytes, it has {len(data)}")
    shape = tuple(np.frombuffer(data, ">u4", ndim, 4).tolist())
    expected = start + math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        problem = "truncated" if len(data) < expected else "too long"
        raise ValueError(f"{path} is {problem}: its header says {shape}, {expected} bytes; it has {len(data)}")
    return np.frombuffer(data, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))
