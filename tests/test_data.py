"""The checks of data: what is let through as it is, what is converted, what is refused and with which words."""

from __future__ import annotations

import re

import numpy as np
import pytest

from fastmb import data
from fastmb.data import Batches, check_weights, check_X, check_y

DTYPES = ["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"]
NO_NUMBERS = "X must hold booleans, integers or floats of at most 64 bits; got dtype "
X5 = np.zeros((5, 3), np.float32)


def says(error: type[Exception], message: str):
    return pytest.raises(error, match="^" + re.escape(message))


@pytest.mark.parametrize("dtype", DTYPES)
def test_supported_dtypes_are_never_copied(dtype):
    base = np.zeros((12, 8), dtype)
    frozen = base.copy()
    frozen.flags.writeable = False
    for array in base[:, :3], base[::-2, ::-3], np.asfortranarray(base)[:, :3], frozen[:, :3], base.T[:3].T:
        assert np.shares_memory(check_X(array, 3), array)
        assert np.shares_memory(check_y(array, array, "regression", 3), array)


def test_a_memmap_stays_one(tmp_path):
    X = np.memmap(tmp_path / "X", np.float32, "w+", shape=(10, 3))
    assert np.shares_memory(check_X(X, 3), X)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if np.dtype(dtype).itemsize > 1])
def test_byte_swapped_arrays_are_converted(dtype):
    values = np.arange(6).reshape(2, 3)
    swapped = values.astype(np.dtype(dtype).newbyteorder())
    X = check_X(swapped, 3)
    assert X.dtype == np.dtype(dtype)
    assert X.dtype.isnative
    np.testing.assert_array_equal(X, values)


def test_lists_and_frames_become_arrays():
    import pandas

    np.testing.assert_array_equal(check_X([[1, 2], [3, 4]], 2), [[1, 2], [3, 4]])
    frame = pandas.DataFrame({"a": [1.5, 2.5], "b": [3, 4]})
    np.testing.assert_array_equal(check_X(frame, 2), [[1.5, 3], [2.5, 4]])
    np.testing.assert_array_equal(check_y(pandas.Series([1, 0]), frame, "classification", 2), [1, 0])


@pytest.mark.parametrize(
    ("X", "error", "message"),
    [
        (np.zeros((4, 2)), ValueError, "X has 2 features; the network takes 3"),
        (np.zeros((0, 3)), ValueError, "X has no rows"),
        (np.zeros(5), ValueError, "X must have shape (n, 3); got (5,)"),
        (np.zeros(3), ValueError, "X must have shape (n, 3); got (3,): use X.reshape(1, -1) for one row"),
        (np.zeros((4, 1, 3)), ValueError, "X must have shape (n, 3); got (4, 1, 3): use X.reshape(len(X), -1)"),
        (1.0, ValueError, "X must have shape (n, 3); got ()"),
        (None, TypeError, NO_NUMBERS + "object"),
        (np.zeros((4, 3), complex), TypeError, NO_NUMBERS + "complex128"),
        (np.zeros((4, 3), "U3"), TypeError, NO_NUMBERS + "<U3"),
        (np.zeros((4, 3), "M8[s]"), TypeError, NO_NUMBERS + "datetime64[s]"),
        (np.zeros((4, 3), np.longdouble), TypeError, NO_NUMBERS),
        ([[1, 2, 3], [4, 5]], ValueError, "X can't be made an array: "),
        (np.ma.zeros((4, 3)), TypeError, "X is a masked array"),
    ],
)
def test_a_wrong_X_is_refused_and_named(X, error, message):
    with says(error, message):
        check_X(X, 3)


def test_a_sparse_X_is_refused():
    class Sparse:
        def toarray(self): ...

    with says(TypeError, "X is sparse (Sparse); give a dense array: X.toarray()"):
        check_X(Sparse(), 3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("fallback", [False, True])
def test_nan_and_infinity_are_found_with_their_row(value, dtype, order, fallback, monkeypatch):
    if fallback:  # the same without the extension, in chunks of a few rows
        monkeypatch.setattr(data, "_CHUNK", 100)
        monkeypatch.setattr(data, "compiled", lambda name: None)
    X = np.zeros((1000, 7), dtype, order=order)
    check_X(X, 7)
    for row, column in (999, 6), (613, 2), (0, 0):
        X[row, column] = value
        with says(ValueError, f"X must be finite; got {value} in row {row}, column {column}"):
            check_X(X, 7)
        with says(ValueError, f"y_val must be finite; got {value} in row {row}"):
            check_y(X[:, column], X, "regression", 1, name="y_val")
        check_X(X, 7, check_finite=False)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("chunk", [100, data._CHUNK])
def test_numbers_that_the_networks_dtype_has_no_room_for_are_found_with_their_row(order, chunk, monkeypatch):
    monkeypatch.setattr(data, "_CHUNK", chunk)
    f4, most = np.dtype("f4"), float(np.finfo("f4").max)
    X = np.zeros((1000, 7), order=order)
    X[5] = most, -most, 0, 1, 0, 0, 0
    for array in X, X[::-3, ::-2]:
        check_X(array, array.shape[1], dtype=f4)
    for value in 1e39, -1e300:
        X[613, 2] = value
        with says(ValueError, f"X must fit in float32, the network's dtype; got {value} in row 613, column 2"):
            check_X(X, 7, dtype=f4)
        with says(ValueError, f"y must fit in float32, the network's dtype; got {value} in row 613"):
            check_y(X[:, 2], X, "regression", 1, dtype=f4)
        check_X(X, 7)
        check_X(X, 7, check_finite=False, dtype=f4)
    for value in np.nan, np.inf, -np.inf:  # those are called by their names
        X[700, 1] = X[600, 3] = value
        with says(ValueError, f"X must be finite; got {value} in row 600, column 3"):
            check_X(X, 7, dtype=f4)
    check_X(np.full((5, 3), 65504, "f2"), 3, dtype=f4)


def test_what_objects_could_become_is_hinted():
    import pandas

    to_float = "; got dtype object: use np.asarray({0}, float) if all are numbers"
    frames = [
        pandas.DataFrame({"a": [1.5, 2.5], "b": [True, False]}),
        pandas.DataFrame({"a": pandas.array([1, 2], "Int64"), "b": [0.5, 1.0]}),
    ]
    for frame in frames:
        with pytest.raises(TypeError, match=re.escape(to_float.format("X")) + "$"):
            check_X(frame, 2)
        for task in "regression", "multilabel":
            with pytest.raises(TypeError, match=re.escape(to_float.format("y_val")) + "$"):
                check_y(frame, X5[:2], task, 2, name="y_val")
        assert check_X(np.asarray(frame, float), 2).dtype == np.float64
    with pytest.raises(TypeError, match=re.escape(": np.unique(y_val, return_inverse=True) numbers classes")):
        check_y(pandas.Series(list("ab"), dtype=object), X5[:2], "classification", 2, name="y_val")
    with pytest.raises(TypeError, match=r"got dtype <U1$"):
        check_y(np.array(list("abcde")), X5, "regression", 1)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype[0] != "f"])
def test_class_labels_may_have_any_integer_dtype(dtype):
    y = np.array([1, 0, 1, 1, 0], dtype)
    for given in y, y[:, None], np.repeat(y, 2)[::2]:
        checked = check_y(given, X5, "classification", 2)
        assert checked.shape == (5,)
        assert np.shares_memory(checked, given)
        np.testing.assert_array_equal(checked, y)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype[0] in "iu"])
@pytest.mark.parametrize("fallback", [False, True])
def test_labels_out_of_range_are_found_with_their_row(dtype, fallback, monkeypatch):
    if fallback:
        monkeypatch.setattr(data, "_CHUNK", 2)
        monkeypatch.setattr(data, "_FEW", 1)  # what is done with many labels, and without the extension
    y = np.array([0, 1, 2, 3, 1], dtype)
    check_y(y, X5, "classification", 4)
    with says(ValueError, "y must hold class labels from 0 to 2; got 3 in row 3"):
        check_y(y, X5, "classification", 3)
    if dtype[0] == "i":
        y[2] = -1
        for n_classes in 4, 300:  # more than the dtype has numbers
            with says(ValueError, f"y must hold class labels from 0 to {n_classes - 1}; got -1 in row 2"):
                check_y(y, X5, "classification", n_classes)
    y[2] = np.iinfo(dtype).max
    with says(ValueError, f"y must hold class labels from 0 to 99; got {y[2]} in row 1"):
        check_y(y[::2], X5[::2], "classification", 100)


@pytest.mark.parametrize(
    ("y", "task", "n_outputs", "error", "message"),
    [
        (np.zeros(4, int), "classification", 3, ValueError, "y has 4 rows; X has 5"),
        (np.zeros(0, int), "classification", 3, ValueError, "y has 0 rows; X has 5"),
        (
            np.zeros(5),
            "classification",
            3,
            TypeError,
            "y must hold class labels, integers from 0 to 2; got dtype float64",
        ),
        (
            np.array(list("abcde")),
            "classification",
            3,
            TypeError,
            "y must hold booleans, integers or floats of at most",
        ),
        (np.zeros((5, 2)), "classification", 3, ValueError, "y must have shape (n,) or (n, 3); got (5, 2)"),
        (np.zeros((5, 1, 1), int), "classification", 3, ValueError, "y must have shape (n,) or (n, 3); got (5, 1, 1)"),
        (
            np.zeros((5, 3)),
            "classification",
            3,
            ValueError,
            "y must hold probabilities that sum to 1 in each row; got 0",
        ),
        (
            np.full((5, 3), [2, -1, 0]),
            "classification",
            3,
            ValueError,
            "y must be from 0 to 1; got [ 2 -1  0] in row 0",
        ),
        (np.full((5, 2), 1.5), "multilabel", 2, ValueError, "y must be from 0 to 1; got [1.5 1.5] in row 0"),
        (np.zeros(5), "multilabel", 2, ValueError, "y must have shape (n, 2); got (5,)"),
        (np.zeros((5, 3)), "regression", 2, ValueError, "y must have shape (n, 2); got (5, 3)"),
        (np.zeros((5, 3)), "regression", 1, ValueError, "y must have shape (n,) or (n, 1); got (5, 3)"),
        (np.array(3.0), "regression", 1, ValueError, "y must have shape (n,) or (n, 1); got ()"),
    ],
)
def test_a_wrong_y_is_refused_and_named(y, task, n_outputs, error, message):
    with says(error, message):
        check_y(y, X5, task, n_outputs)


def test_probability_rows_may_be_rounded_and_may_be_one_hot():
    rows = np.random.default_rng(0).dirichlet(np.ones(3), 5)
    for dtype in "f2", "f4", "f8":
        assert check_y(rows.astype(dtype), X5, "classification", 3).shape == (5, 3)
    assert check_y(np.eye(3, dtype=bool)[[0, 1, 2, 1, 0]], X5, "classification", 3).shape == (5, 3)


def test_targets_get_a_column_per_output():
    y = np.zeros(5)
    for task in "regression", "multilabel":
        assert check_y(y, X5, task, 1).shape == (5, 1)
        assert check_y(y[:, None], X5, task, 1).shape == (5, 1)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (np.ones(4), ValueError, "sample_weight must have shape (5,), one weight for each row of X; got (4,)"),
        (np.ones((5, 1)), ValueError, "sample_weight must have shape (5,), one weight for each row of X; got (5, 1)"),
        (np.array([1, 0, -2, 1, 1]), ValueError, "sample_weight must not be negative; got -2.0 in row 2"),
        (np.array([1, 0, 0, np.nan, 1]), ValueError, "sample_weight must be finite; got nan in row 3"),
        (np.zeros(5), ValueError, "sample_weight is zero in every row"),
        (
            np.array([0, 0, 0, 1e-310, 0]),
            ValueError,
            "sample_weight must be from 1e-280 to 1e+280 where it is largest; got 1e-310 in row 3",
        ),
        (
            np.array([0, 1e306, 0, 0, 0]),
            ValueError,
            "sample_weight must be from 1e-280 to 1e+280 where it is largest; got 1e+306 in row 1",
        ),
        (
            ["1"] * 5,
            TypeError,
            "sample_weight must hold booleans, integers or floats of at most 64 bits; got dtype <U1",
        ),
    ],
)
def test_wrong_weights_are_refused_and_named(weights, error, message):
    with says(error, message):
        check_weights(weights, X5)


def test_tiny_and_huge_weights_are_taken_up_to_their_limits():
    for weight in (1e-280, 1e280):
        assert check_weights(np.full(5, weight), X5)[0] == weight
    assert not check_weights(np.zeros(5), X5, zeros=True).any()


@pytest.mark.parametrize("error", [TypeError, RuntimeError])
def test_what_refuses_to_be_an_array_is_named(error):
    class Tensor:
        def __array__(self, dtype=None, copy=None):
            raise error("this tensor requires grad")

    with says(TypeError, "X can't be made an array: this tensor requires grad"):
        check_X(Tensor(), 3)


def test_torchs_tensors_are_named():
    torch = pytest.importorskip("torch", reason="compares with PyTorch, which is too large for the test extra")
    assert check_X(torch.ones(5, 3), 3).shape == (5, 3)
    for tensor in torch.ones(5, 3, requires_grad=True), torch.ones(5, 3, dtype=torch.bfloat16):
        with says(TypeError, "X can't be made an array: "):
            check_X(tensor, 3)
        with says(TypeError, "y can't be made an array: "):
            check_y(tensor, X5, "regression", 3)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype[0] in "iu"])
def test_rows_that_are_not_there_are_named_as_they_were_given(dtype):
    most = np.iinfo(dtype).max
    assert data.check_rows(np.array([0, 4], dtype), 5).tolist() == [0, 4]
    for n in 5, 1000:
        for row in {most, np.iinfo(dtype).min}:
            if not -n <= row < n:
                with says(IndexError, f"rows holds {row}; X has {n} rows"):
                    data.check_rows(np.array([0, row], dtype), n)


def test_weights_become_contiguous_doubles():
    weights = check_weights(np.arange(10, dtype=np.int8)[::2], X5)
    assert weights.dtype == np.float64
    assert weights.flags.c_contiguous


@pytest.mark.parametrize(("n", "size", "expected"), [(1, 64, 1), (64, 64, 1), (65, 64, 2), (5, 1, 5)])
def test_the_last_mini_batch_may_be_smaller(n, size, expected):
    assert Batches(np.zeros((n, 1)), None, None, None, size).n_batches == expected


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rows", [[0], [150], [40_000], [20_000, 59_999], [7, 59_999]])
def test_whoever_finds_what_is_not_finite_the_first_row_is_named(rows, dtype):
    X = np.zeros((60_000, 64), dtype)  # some threads look at parts of it
    X[rows, 5] = np.inf
    for _ in range(20):
        with pytest.raises(ValueError, match=f"must be finite; got inf in row {rows[0]}, column 5"):
            check_X(X, 64, dtype=X.dtype)
