"""The digits that ship with the package, and the reader of IDX files."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from fastmb import datasets


def idx(array: np.ndarray, code: int = 8) -> bytes:
    return bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """A tiny data set in the four files, one plain and three gzipped."""
    for part, n in ("train", 6), ("t10k", 2):
        images = np.arange(n * 12, dtype=np.uint8).reshape(n, 3, 4)
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        labels = idx(np.arange(n, dtype=np.uint8))
        if part == "train":
            (tmp_path / "train-labels-idx1-ubyte").write_bytes(labels)
        else:
            (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    return tmp_path


def test_the_digits_are_all_there():
    X, y = datasets.load_digits()
    assert (X.shape, X.dtype, X.min(), X.max()) == ((1797, 64), np.uint8, 0, 16)
    assert (y.shape, y.dtype) == ((1797,), np.int64)
    assert np.bincount(y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert int(X.astype(np.int64).sum()) == 561718  # of scikit-learn's copy
    np.testing.assert_array_equal(X[0, :16], [0, 0, 5, 13, 9, 1, 0, 0, 0, 0, 13, 15, 10, 15, 5, 0])


def test_the_digits_come_with_their_licence():
    text = Path(datasets.__file__).with_name("digits.txt").read_text()
    for expected in "CC BY 4.0", "10.24432/C50P49", "Alpaydin", "Kaynak", "UCI Machine Learning Repository":
        assert expected in text


def test_fashion_mnist_is_read_from_plain_and_gzipped_files(fashion):
    X, y, X_test, y_test = datasets.load_fashion_mnist(fashion)
    assert (X.shape, X.dtype, X_test.shape) == ((6, 12), np.uint8, (2, 12))
    np.testing.assert_array_equal(X, np.arange(72).reshape(6, 12))
    assert (y.dtype, y.tolist(), y_test.tolist()) == (np.int64, [0, 1, 2, 3, 4, 5], [0, 1])


def test_a_missing_file_is_named_and_so_is_what_there_is(fashion, tmp_path_factory):
    (fashion / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither t10k-images-idx3-ubyte nor .*\.gz is in .*it holds t10k-lab"):
        datasets.load_fashion_mnist(fashion)
    with pytest.raises(FileNotFoundError, match="it holds nothing"):
        datasets.load_fashion_mnist(tmp_path_factory.mktemp("empty"))
    with pytest.raises(FileNotFoundError, match="no such directory"):
        datasets.load_fashion_mnist(fashion / "nowhere")


def test_files_that_dont_belong_together_are_refused(fashion):
    (fashion / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(5, np.uint8)))
    with pytest.raises(ValueError, match=r"train files in .* hold 6 images but 5 labels"):
        datasets.load_fashion_mnist(fashion)
    (fashion / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros((5, 2), np.uint8)))
    with pytest.raises(ValueError, match="must hold 1-D uint8 data; it holds 2-D uint8"):
        datasets.load_fashion_mnist(fashion)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is no IDX file: it must start with 00 00, a type and a rank; got $"),
        (b"PK\3\4....", r"is no IDX file.*got 50 4b 03 04"),
        (b"\0\0\7\1....", r"is no IDX file.*got 00 00 07 01"),
        (b"\0\0\x08\3\0\0\0\1", r"is truncated: its header takes 16 bytes, it has 8"),
        (idx(np.zeros((3, 4), np.uint8))[:-1], r"is truncated: its header says \(3, 4\), 24 bytes; it has 23"),
        (idx(np.zeros((3, 4), np.uint8)) + b"!", r"is too long: its header says \(3, 4\), 24 bytes; it has 25"),
        (gzip.compress(idx(np.zeros(500, np.uint8)))[:-9], "is a damaged gzip file"),
        (b"\x1f\x8b" + b"?" * 20, "is a damaged gzip file"),
    ],
)
def test_a_damaged_file_is_refused_with_what_was_found(content, message, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        datasets.read_idx(path)


@pytest.mark.parametrize(("code", "dtype"), [(8, "u1"), (9, "i1"), (11, ">i2"), (12, ">i4"), (13, ">f4"), (14, ">f8")])
def test_every_idx_type_is_read(code, dtype, tmp_path):
    values = np.arange(6).reshape(2, 3)
    (tmp_path / "file").write_bytes(idx(values.astype(dtype), code))
    array = datasets.read_idx(tmp_path / "file")
    assert array.dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(array, values)
