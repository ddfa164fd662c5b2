"""The kernels as functions: every backend against float64 NumPy and its own reference, their bits, and their errors."""

from __future__ import annotations

import importlib
import inspect
import itertools
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import fastmb as mb
from fastmb import ops, optim, threads

f32 = np.float32
DTYPES = ("float32", "float64")
SIZES = (1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 65, 97)
KINDS = sorted(mb.nn.ACTIVATIONS)
FROM_OUTPUT = [kind for kind in KINDS if kind in ("relu", "leaky_relu", "elu", "selu", "softplus", "tanh", "sigmoid")]
FUNCTIONS = [name for name in ops.__all__ if not name.startswith(("linear", "use"))]


def backends_here() -> list[str]:
    here = []
    for name in ops.BACKENDS:
        try:
            importlib.import_module(f"fastmb.ops._{name}")
        except ModuleNotFoundError as error:
            if error.name not in ("numba", "fastmb.ops._native", "fastmb.executors.native"):
                raise
        else:
            here.append(name)
    return here


HERE = backends_here()
each_backend = pytest.mark.parametrize("backend", HERE)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
needs_native = pytest.mark.skipif("native" not in HERE, reason="built without the extension")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def two_threads(monkeypatch):
    """Calls take as many threads as they are said to, whatever the work."""

    def use(n):
        native = pytest.importorskip("fastmb.ops._native")
        native.force_threads(n)

    yield use
    if "native" in HERE:
        importlib.import_module("fastmb.ops._native").force_threads(0)


def array(rng, shape, dtype="float32", layout="C"):
    """Values that lie as said: rows or columns first, with gaps, backwards, off the grid of their elements."""
    x = rng.standard_normal(shape).astype(dtype)
    if layout == "F":
        return np.asfortranarray(x)
    if layout == "gaps":
        wide = np.full((*shape[:-1], 2 * shape[-1]), np.nan, dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "backwards":
        return x[..., ::-1]
    if layout == "record":
        records = np.zeros(shape, [("pad", "u1"), ("x", dtype)])
        records["x"] = x
        return records["x"]
    return x


def nan(shape, dtype="float32", layout="C"):
    x = array(np.random.default_rng(0), shape, dtype, layout)
    x[...] = np.nan
    return x


LAYOUTS = ("C", "F", "gaps", "backwards", "record")


def assert_product(found, a, b, expected=None):
    """Within the bound of a chain of k rounded products: (k + 2) eps |a| |b|."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    expected = a @ b if expected is None else expected
    bound = (a.shape[-1] + 2) * np.finfo(found.dtype).eps * (np.abs(a) @ np.abs(b) + np.abs(expected))
    assert found.shape == expected.shape
    assert (np.abs(found - expected) <= bound).all()


# ---- one interface --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_backends_have_the_same_signatures(name):
    """Names, order and defaults; the public function has those names, too, and a backend."""
    modules = [importlib.import_module(f"fastmb.ops._{backend}") for backend in HERE]
    parameters = [
        [(p.name, p.default) for p in inspect.signature(getattr(module, name)).parameters.values()]
        for module in modules
    ]
    assert all(p == parameters[0] for p in parameters)
    public = list(inspect.signature(getattr(ops, name)).parameters)
    assert public == [n for n, _ in parameters[0] if n not in ("names", "name")] + ["backend"]


def test_every_public_function_takes_out_and_backend_by_keyword():
    for name in ops.__all__[:-1]:
        parameters = inspect.signature(getattr(ops, name)).parameters
        for option in ("out", "backend"):
            assert parameters[option].default is None
            assert parameters[option].kind is inspect.Parameter.KEYWORD_ONLY


def test_use_backend_holds_in_its_block_and_thread_alone(monkeypatch):
    seen = {}
    fake = type("fake", (), {"matmul": staticmethod(lambda *_: "fake")})
    monkeypatch.setitem(ops._loaded, "numpy", fake)
    a = np.eye(2)

    def other():
        seen["other"] = ops.matmul(a, a)

    with ops.use_backend("numpy"):
        assert ops.matmul(a, a) == "fake"
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        with ops.use_backend(HERE[0]):
            np.testing.assert_array_equal(ops.matmul(a, a), a)
        assert ops.matmul(a, a) == "fake"
    np.testing.assert_array_equal(ops.matmul(a, a), a)
    np.testing.assert_array_equal(seen["other"], a)


def test_an_unknown_backend_is_an_error_with_those_that_there_are():
    with pytest.raises(ValueError, match=r"backend must be one of 'native', .*got 'nunba'; did you mean 'numba'"):
        ops.matmul(np.eye(2), np.eye(2), backend="nunba")


def test_a_backend_that_is_no_name_is_the_same_error():
    for backend in ([], {}, 5):
        with pytest.raises(ValueError, match=r"backend must be one of 'native', .*got"):
            ops.matmul(np.eye(2), np.eye(2), backend=backend)
        with pytest.raises(ValueError, match=r"backend must be one of 'native', .*got"), ops.use_backend(backend):
            pass


def test_a_missing_extra_is_named():
    code = """
import sys
sys.modules["numba"] = None
from fastmb import ops
try:
    ops.use_backend("numba").__enter__()
except ImportError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'fastmb[numba]'" in run.stdout


def test_fastmb_has_ops_and_use_backend_and_loads_them_when_used():
    code = "import sys, fastmb; print('fastmb.ops' in sys.modules, fastmb.ops.matmul and fastmb.use_backend and 1)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "1"]


# ---- products -------------------------------------------------------------------------------------------------------


@each_backend
@each_dtype
@pytest.mark.parametrize(("transpose_a", "transpose_b"), list(itertools.product((False, True), repeat=2)))
def test_products_of_odd_sizes(rng, backend, dtype, transpose_a, transpose_b):
    sizes = list(SIZES)
    shapes = [(m, k, n) for m, k, n in zip(sizes, sizes[5:] + sizes[:5], sizes[8:] + sizes[:8], strict=True)]
    shapes += [(97, 300, 2), (2, 300, 97), (1, 65, 300), (5, 65, 300), (97, 97, 1), (30, 530, 129)]
    for m, k, n in shapes:
        a, b = array(rng, (m, k), dtype), array(rng, (k, n), dtype)
        given = (a.T.copy() if transpose_a else a, b.T.copy() if transpose_b else b)
        options = {"transpose_a": transpose_a, "transpose_b": transpose_b, "backend": backend}
        out = nan((m, n), dtype)
        assert ops.matmul(*given, out=out, **options) is out
        assert_product(out, a, b)
        np.testing.assert_array_equal(ops.matmul(*given, **options), out)


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_of_any_strides_have_the_same_bits(rng, backend, layout):
    for m, k, n in ((7, 17, 33), (33, 70, 65), (65, 33, 1), (1, 33, 65), (40, 300, 300)):
        a, b = array(rng, (m, k)), array(rng, (k, n))
        expected = ops.matmul(a, b, backend=backend)
        x, y = array(rng, (m, k), layout=layout), array(rng, (k, n), layout=layout)
        x[...], y[...] = a, b
        out = nan((m, n), layout=layout)
        ops.matmul(x, y, out=out, backend=backend)
        np.testing.assert_array_equal(out, expected)
        np.testing.assert_array_equal(ops.matmul(x, y, backend=backend), expected)


@each_backend
@pytest.mark.parametrize(
    ("a_shape", "b_shape"),
    [
        ((5, 3, 4), (4, 2)),
        ((3, 4), (5, 4, 2)),
        ((5, 1, 3, 4), (2, 4, 6)),
        ((2, 3, 5, 4), (2, 3, 4, 7)),
        ((2, 1, 5, 4), (1, 3, 4, 7)),
        ((0, 3, 4), (4, 2)),
        ((3, 0, 4), (4, 2)),
        ((3, 2, 0), (0, 2)),
        ((3, 2, 4), (4, 0)),
        ((1, 1, 1), (1, 1)),
        ((65, 8, 8), (65, 8, 8)),
    ],
)
def test_leading_dimensions_broadcast_as_in_numpy(rng, backend, a_shape, b_shape):
    a, b = array(rng, a_shape, "float64"), array(rng, b_shape, "float64")
    expected = np.matmul(a, b)
    out = nan(expected.shape, "float64")
    assert_product(ops.matmul(a, b, out=out, backend=backend), a, b, expected)
    if a.ndim > 2:
        swapped = array(rng, a_shape, "float64").swapaxes(0, -3)
        assert_product(ops.matmul(swapped.swapaxes(0, -3), b, backend=backend), swapped.swapaxes(0, -3), b)


@each_backend
@each_dtype
@pytest.mark.parametrize("shape", [(5, 7, 3), (33, 300, 65), (4, 9, 40), (200, 40, 9)])
def test_bias_activation_alpha_and_beta_follow_the_sum(rng, backend, dtype, shape):
    m, k, n = shape
    a, b, c = (array(rng, s, dtype) for s in ((m, k), (k, n), (m, n)))
    product = a.astype(np.float64) @ b.astype(np.float64)
    tolerance = 4 * k * np.finfo(dtype).eps * np.sqrt(k)
    for bias_shape in ((n,), (1, n), (m, 1), (m, n), (1, 1), ()):
        bias = array(rng, bias_shape, dtype)[...]
        for alpha, beta, activation in (
            (1, 0, None),
            (1, 0, "relu"),
            (0.5, 0, "tanh"),
            (-2, 0.25, "gelu"),
            (1, 1, None),
        ):
            out = c.copy()
            ops.matmul(a, b, bias=bias, alpha=alpha, beta=beta, activation=activation, out=out, backend=backend)
            z = alpha * product + beta * c + bias
            expected = ops.activation_forward(z, activation or "identity", backend="numpy")
            np.testing.assert_allclose(out, expected, rtol=0, atol=tolerance * 4)
            column = nan((n, m), dtype).T
            column[...] = c
            ops.matmul(a, b, bias=bias, alpha=alpha, beta=beta, activation=activation, out=column, backend=backend)
            np.testing.assert_array_equal(column, out)


@each_backend
def test_without_beta_what_out_holds_is_not_looked_at(rng, backend):
    a, b = array(rng, (40, 300)), array(rng, (300, 40))
    out = np.full((40, 40), np.inf, np.float32)
    assert np.isfinite(ops.matmul(a, b, alpha=2, out=out, backend=backend)).all()


@each_backend
def test_a_bias_for_each_product(rng, backend):
    a, b, bias = array(rng, (6, 3, 4)), array(rng, (6, 4, 5)), array(rng, (6, 1, 5))
    expected = np.matmul(a.astype(np.float64), b) + bias
    np.testing.assert_allclose(ops.matmul(a, b, bias=bias, backend=backend), expected, atol=1e-5)


@needs_native
@each_dtype
def test_an_element_is_one_chain_of_fused_multiply_adds(rng, dtype):
    """The contract's order, whatever the blocks: compared with the chain in exact arithmetic, rounded at each step."""
    from fractions import Fraction

    a, b = array(rng, (3, 700), dtype), array(rng, (700, 2), dtype)
    found = ops.matmul(a, b, backend="native")
    large = ops.matmul(np.tile(a, (40, 1)), np.tile(b, (1, 150)), backend="native")
    if "native" in HERE and mb.executors.native.isa() == "v2":
        pytest.skip("v2 has no fused multiply-add")
    rounded = np.dtype(dtype).type
    for i, j in itertools.product(range(3), range(2)):
        acc = rounded(0)
        for x, y in zip(a[i], b[:, j], strict=True):
            exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(acc))
            acc = nearest(exact, rounded)
        assert found[i, j] == acc
        assert (large[i::3, j::2] == acc).all()


def nearest(exact, rounded):
    """A fraction as the nearest number of the dtype; by way of float64 it could be rounded twice."""
    guess = rounded(float(exact))
    from fractions import Fraction

    near = [guess, np.nextafter(guess, rounded(np.inf)), np.nextafter(guess, rounded(-np.inf))]
    return min(near, key=lambda x: (abs(Fraction(float(x)) - exact), x.view(f"u{x.itemsize}") & 1))


@needs_native
def test_same_bits_for_any_number_of_threads_and_instruction_set_with_fma(rng, two_threads):
    from fastmb.executors import native as executor
    from fastmb.ops import _native

    a, b, stack = array(rng, (37, 300)), array(rng, (300, 520)), array(rng, (9, 50_001))
    many, others = array(rng, (70, 9, 17)), array(rng, (70, 17, 5))
    z, y = array(rng, (1001, 7)), rng.integers(0, 7, 1001)

    def results():
        loss, dz = ops.softmax_cross_entropy(z, y)
        norm = ops.clip_by_global_norm(stack, 1.0)
        return [
            ops.matmul(a, b, bias=b[0].copy(), activation="gelu"),
            ops.matmul(many, others),
            ops.matmul(b, a, transpose_a=True, transpose_b=True),
            ops.reduce_gradients(stack),
            ops.activation_backward(stack, "mish", z=stack),
            dz,
            np.array([loss, norm[1]]),
            norm[0],
        ]

    expected = None
    try:
        for isa in executor.available_isas()[1:]:
            _native.use_isa(isa)
            for n in (1, 2, 3):
                two_threads(n)
                found = results()
                expected = expected or found
                for x, y_ in zip(found, expected, strict=True):
                    np.testing.assert_array_equal(x, y_)
    finally:
        _native.use_isa(executor.isa())


@needs_native
@pytest.mark.parametrize("n", [1, 2, 5])
def test_every_cut_of_the_work_covers_all_of_it(rng, two_threads, n):
    two_threads(n)
    for shape in ((1, 33, 5, 700), (3, 100, 9, 100), (100, 5, 3, 7), (1, 700, 5, 33), (2, 1, 4, 1)):
        count, m, k, p = shape
        a, b = array(rng, (count, m, k)), array(rng, (count, k, p))
        assert_product(ops.matmul(a, b, out=nan((count, m, p))), a, b)


def test_threads_are_asked_for_when_there_is_work(monkeypatch, rng):
    pytest.importorskip("fastmb.ops._native")
    asked = []

    def resolve(n, flops, per_thread):
        asked.append(flops)
        return 1

    monkeypatch.setattr(threads, "resolve", resolve)
    ops.matmul(array(rng, (8, 8)), array(rng, (8, 8)), backend="native")
    assert asked == []
    ops.matmul(array(rng, (100, 100)), array(rng, (100, 100)), backend="native")
    assert asked == [2e6]


@each_backend
def test_linear_layers(rng, backend):
    X, W, b, dY = array(rng, (17, 5)), array(rng, (5, 9)), array(rng, (9,)), array(rng, (17, 9))
    x, w, d = (v.astype(np.float64) for v in (X, W, dY))
    close = {"atol": 1e-5, "rtol": 0}
    np.testing.assert_allclose(ops.linear_forward(X, W, b, backend=backend), x @ w + b, **close)
    relu = ops.linear_forward(X, W, b, activation="relu", backend=backend)
    np.testing.assert_allclose(relu, np.maximum(x @ w + b, 0), **close)
    np.testing.assert_allclose(ops.linear_backward_data(dY, W, backend=backend), d @ w.T, **close)
    np.testing.assert_allclose(ops.linear_backward_weight(X, dY, backend=backend), x.T @ d, **close)
    np.testing.assert_allclose(ops.linear_backward_bias(dY, backend=backend), d.sum(axis=0), **close)


@each_backend
@each_dtype
def test_the_gradient_of_a_bias_is_summed_over_the_rows(rng, backend, dtype):
    for shape in ((3, 17, 9), (2, 3, 5, 4), (1, 1, 1), (2, 40, 1000)):
        for layout in LAYOUTS[:3]:
            dY = array(rng, shape, dtype, layout)
            expected = np.stack([ops.linear_backward_bias(d, backend=backend) for d in dY.reshape(-1, *shape[-2:])])
            out = nan((*shape[:-2], shape[-1]), dtype)
            assert ops.linear_backward_bias(dY, out=out, backend=backend) is out
            np.testing.assert_array_equal(out, expected.reshape(out.shape))


# ---- activations ----------------------------------------------------------------------------------------------------


def values(dtype, n=97):
    rng = np.random.default_rng(1)
    z = np.concatenate((rng.uniform(-6, 6, n), [0.0, -30.0, 30.0]))
    return z.astype(dtype)


@each_backend
@each_dtype
@pytest.mark.parametrize("kind", KINDS)
def test_activations_and_their_way_back(backend, dtype, kind):
    z = values(dtype)
    da = np.random.default_rng(2).standard_normal(z.shape).astype(dtype)
    eps = np.finfo(dtype).eps
    f = ops.activation_forward(z.astype(np.float64), kind, backend="numpy")
    df = ops.activation_backward(np.ones(z.shape), kind, z=z.astype(np.float64), backend="numpy")
    close = {"rtol": 12 * eps, "atol": 2 * eps}
    np.testing.assert_allclose(ops.activation_forward(z, kind, out=nan(z.shape, dtype), backend=backend), f, **close)
    out = ops.activation_backward(da, kind, z=z, out=nan(z.shape, dtype), backend=backend)
    np.testing.assert_allclose(out, da * df, **close)
    if kind in FROM_OUTPUT:
        a = f.astype(dtype)
        out = ops.activation_backward(da, kind, a=a, out=nan(z.shape, dtype), backend=backend)
        np.testing.assert_allclose(out, da * df, rtol=12 * eps, atol=12 * eps)
    step = 1e-6  # and the reference itself against differences
    x = z.astype(np.float64)[np.abs(z) > 1e-3]
    up, down = (ops.activation_forward(x + h, kind, backend="numpy") for h in (step, -step))
    slope = ops.activation_backward(np.ones(x.shape), kind, z=x, backend="numpy")
    np.testing.assert_allclose((up - down) / (2 * step), slope, atol=1e-7)


@each_backend
@pytest.mark.parametrize("size", [0, 1, 3, 17, 65, 1000, 40_000])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_elementwise_functions_take_any_strides_and_work_in_place(rng, backend, size, layout):
    shape = (2, size // 2 or size)
    z, da = array(rng, shape), array(rng, shape)
    a, expected = (
        ops.activation_forward(z, "silu", backend=backend),
        ops.activation_backward(da, "silu", z=z, backend=backend),
    )
    for target in ("out", "da", "z"):
        x, d, out = (nan(shape, layout=layout) for _ in range(3))
        x[...], d[...] = z, da
        written = {"out": out, "da": d, "z": x}[target]
        assert ops.activation_backward(d, "silu", z=x, out=written, backend=backend) is written
        np.testing.assert_array_equal(written, expected)
    x = nan(shape, layout=layout)
    x[...] = z
    assert ops.activation_forward(x, "silu", out=x, backend=backend) is x
    np.testing.assert_array_equal(x, a)


@each_backend
def test_results_past_the_cache_are_right_too(rng, backend):
    n = (1 << 22) + 37
    da, z = array(rng, (n,)), array(rng, (n,))
    out = nan((n + 1,))[1:]
    ops.activation_backward(da, "relu", z=z, out=out, backend=backend)
    np.testing.assert_array_equal(out, np.where(z > 0, da, 0))


@each_backend
def test_modules_carry_their_values(backend):
    z = np.array([-2.0, 2.0])
    np.testing.assert_allclose(ops.activation_forward(z, mb.LeakyReLU(0.25), backend=backend), [-0.5, 2])
    da = ops.activation_backward(np.ones(2), mb.ELU(0.5), z=z, backend=backend)
    np.testing.assert_allclose(da, [0.5 * np.exp(-2), 1])


# ---- losses, reductions, updates ------------------------------------------------------------------------------------


@each_backend
@each_dtype
@pytest.mark.parametrize(("n", "C"), [(1, 1), (3, 2), (17, 10), (65, 33), (200, 3)])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_softmax_cross_entropy(rng, backend, dtype, n, C, rows, weighted):
    z = 3 * array(rng, (n, C), dtype)
    y = rng.dirichlet(np.ones(C), n).astype(dtype) if rows else rng.integers(0, C, n)
    options = {"label_smoothing": 0.1 * weighted}
    if weighted:
        options |= {"sample_weight": rng.uniform(0, 2, n), "class_weight": rng.uniform(0.5, 2, C)}
    out = nan((n, C), dtype)
    loss, dz = ops.softmax_cross_entropy(z, y, out=out, backend=backend, **options)
    assert dz is out
    z64 = z.astype(np.float64)
    logp = z64 - np.log(np.exp(z64).sum(axis=1, keepdims=True))
    target = y if rows else np.eye(C)[y]
    w = options.get("class_weight", np.ones(C))
    q = w * ((1 - options["label_smoothing"]) * target + options["label_smoothing"] / C)
    s = options.get("sample_weight", np.ones(n))
    total = (s * (1 if rows else w[y])).sum()
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(loss, -(s[:, None] * q * logp).sum() / total, rtol=20 * eps, atol=20 * eps)
    expected = (s / total)[:, None] * (np.exp(logp) * q.sum(axis=1, keepdims=True) - q)
    np.testing.assert_allclose(dz, expected, rtol=0, atol=20 * eps * np.abs(expected).max() + eps)
    again = np.asfortranarray(z)
    assert ops.softmax_cross_entropy(again, y, out=again, backend=backend, **options)[0] == loss
    np.testing.assert_array_equal(again, dz)


@each_backend
@each_dtype
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("weight", [None, [1, 0.5, 0, 2]])
def test_classes_of_logit_minus_infinity_have_no_part(rng, backend, dtype, rows, weight):
    z, y = array(rng, (37, 4), dtype), rng.integers(0, 2, 37)
    class_weight = None if weight is None else np.array(weight)
    options = {"class_weight": class_weight if class_weight is None else class_weight[:2], "backend": backend}
    expected, slope = ops.softmax_cross_entropy(z[:, :2].copy(), np.eye(2, dtype=dtype)[y] if rows else y, **options)
    z[:, 2:] = -np.inf
    options["class_weight"] = class_weight
    loss, dz = ops.softmax_cross_entropy(z, np.eye(4, dtype=dtype)[y] if rows else y, **options)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(dz[:, :2], slope, rtol=1e-5, atol=1e-8)
    assert not dz[:, 2:].any()
    z[5, y[5]] = -np.inf
    assert ops.softmax_cross_entropy(z, y, **options)[0] == np.inf
    z[5, y[5]] = np.nan
    assert np.isnan(ops.softmax_cross_entropy(z, y, **options)[0])


@each_backend
def test_a_loss_without_weight_is_nothing(backend):
    loss, dz = ops.softmax_cross_entropy(np.ones((2, 3)), np.array([0, 1]), sample_weight=np.zeros(2), backend=backend)
    assert loss == 0
    np.testing.assert_array_equal(dz, np.zeros((2, 3)))


@each_backend
@each_dtype
@pytest.mark.parametrize("S", [1, 2, 7, 8, 9, 17, 65])
@pytest.mark.parametrize("mean", [True, False])
def test_gradients_are_reduced_in_their_order(rng, backend, dtype, S, mean):
    for shape in ((1,), (63,), (1500,), (3, 97)):
        stack, weights = array(rng, (S, *shape), dtype), rng.uniform(0.5, 2, S).astype(dtype)
        for w in (None, weights):
            found = ops.reduce_gradients(stack, w, mean, out=nan(shape, dtype), backend=backend)
            factor = np.ones(S, dtype) if w is None else w
            expected = np.tensordot(factor.astype(np.float64), stack.astype(np.float64), 1)
            expected /= factor.sum(dtype=np.float64) if mean else 1
            np.testing.assert_allclose(found, expected, atol=4 * S * np.finfo(dtype).eps, rtol=0)
            if w is None and backend != "numpy":
                chain = np.zeros(shape, dtype)
                for g in stack:
                    chain += g
                np.testing.assert_array_equal(found, chain / chain.dtype.type(S) if mean else chain)
            for strided in (
                np.moveaxis(np.moveaxis(stack, 0, -1).copy(), -1, 0),
                stack[..., ::-1].copy()[..., ::-1],
                np.repeat(stack, 2, axis=0)[::2],
            ):
                np.testing.assert_array_equal(
                    ops.reduce_gradients(strided, w, mean, out=nan(shape, dtype, "gaps"), backend=backend), found
                )


@needs_native
def test_native_and_numba_agree_bit_for_bit_on_products_and_reductions(rng):
    if mb.executors.native.isa() == "v2":
        pytest.skip("v2 has no fused multiply-add")
    a, b, stack, w = array(rng, (17, 70)), array(rng, (70, 33)), array(rng, (9, 65)), array(rng, (9,))
    for call in (
        lambda backend: ops.matmul(a, b, bias=b[0].copy(), alpha=0.5, backend=backend),
        lambda backend: ops.reduce_gradients(stack, w, backend=backend),
    ):
        np.testing.assert_array_equal(call("native"), call("numba"))


OPTIMIZERS = [
    mb.SGD(0.1),
    mb.SGD(0.1, momentum=0.9, weight_decay=0.01),
    mb.SGD(0.1, momentum=0.9, nesterov=True),
    mb.Adam(0.1, weight_decay=0.1),
    mb.Adam(0.1, amsgrad=True),
    mb.AdamW(0.1),
    mb.RMSprop(0.1),
    mb.RMSprop(0.1, momentum=0.5),
    mb.RMSprop(0.1, centered=True),
    mb.RMSprop(0.1, centered=True, momentum=0.5),
    mb.Adagrad(0.1, initial_accumulator_value=0.1),
]


def every_optimizer():
    """Those above, and whatever `optim.OPTIMIZERS` has besides, with its defaults."""
    seen = {type(optimizer) for optimizer in OPTIMIZERS}
    return OPTIMIZERS + [cls() for cls in optim.OPTIMIZERS.values() if cls not in seen]


@each_backend
@each_dtype
@pytest.mark.parametrize("optimizer", every_optimizer(), ids=lambda o: o.kind)
def test_updates_are_those_of_the_reference(backend, dtype, optimizer):
    for shape, layout in (((1,), "C"), ((97,), "C"), ((5, 33), "F"), ((3, 700), "gaps")):
        rng = np.random.default_rng(3)
        w, state = array(rng, shape, dtype, layout), np.empty((optimizer.n_states, *shape), dtype)
        optimizer.init_state(state)
        w64, state64 = w.astype(np.float64), state.astype(np.float64)
        for t in range(3):
            g = array(rng, shape, dtype, layout)
            assert ops.optimizer_update(optimizer, w, g, state, t, backend=backend) is w
            ops.optimizer_update(optimizer, w64, g.astype(np.float64), state64, t, backend="numpy")
        eps = np.finfo(dtype).eps
        np.testing.assert_allclose(w, w64, rtol=1e3 * eps, atol=1e3 * eps)
        np.testing.assert_allclose(state, state64, rtol=1e3 * eps, atol=1e3 * eps)
        out, before, states = nan(shape, dtype), w.copy(), state.copy()
        ops.optimizer_update(optimizer, w, g, states, 3, out=out, backend=backend)
        np.testing.assert_array_equal(w, before)
        np.testing.assert_array_equal(ops.optimizer_update(optimizer, w, g, state, 3, backend=backend), out)


@each_backend
@each_dtype
@pytest.mark.parametrize("optimizer", every_optimizer(), ids=lambda o: o.kind)
def test_a_weight_alone_is_updated_as_one_of_many_and_no_weights_as_none(backend, dtype, optimizer):
    ws, gs = [np.ones(shape, dtype) for shape in ((), 1)], [np.full(shape, 0.5, dtype) for shape in ((), 1)]
    states = [np.empty((optimizer.n_states, *w.shape), dtype) for w in ws]
    for w, g, state in zip(ws, gs, states, strict=True):
        optimizer.init_state(state)
        for t in range(3):
            assert ops.optimizer_update(optimizer, w, g, state, t, backend=backend) is w
    assert ws[0] == ws[1] != 1
    np.testing.assert_array_equal(states[0], states[1][:, 0])
    for shape in ((0,), (0, 3), (3, 0)):
        none = np.empty(shape, dtype)
        ops.optimizer_update(
            optimizer, none, none.copy(), np.empty((optimizer.n_states, *shape), dtype), backend=backend
        )


@each_backend
def test_adafactors_least_root_is_the_dtypes(backend):
    w, g = np.full((4, 3), 0.5, f32), np.full((4, 3), 1e-9, f32)
    new = ops.optimizer_update(mb.Adafactor(lr=0.01), w, g, np.zeros((2, 4, 3), f32), backend=backend)
    np.testing.assert_allclose(0.5 - new, 0.01 * 0.5 * 1e-9 / np.finfo(f32).eps, rtol=2e-3)  # torch's: 4.193e-05


@each_backend
@each_dtype
@pytest.mark.parametrize("size", [1, 15, 17, 97, 40_000])
def test_gradients_are_clipped_by_their_common_norm(rng, backend, dtype, size):
    grads = [array(rng, (size,), dtype), array(rng, (3, 5), dtype, "F")]
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads))
    eps = np.finfo(dtype).eps
    for max_norm in (norm / 2, 2 * norm):
        outs = [nan(g.shape, dtype) for g in grads]
        clipped, found = ops.clip_by_global_norm(grads, max_norm, out=outs, backend=backend)
        np.testing.assert_allclose(found, norm, rtol=1e-12)
        for c, o, g in zip(clipped, outs, grads, strict=True):
            assert c is o
            np.testing.assert_allclose(c, g * min(1, max_norm / norm), rtol=max(4 * eps, 1e-12))
    one, found = ops.clip_by_global_norm(grads[0], 1e-3, out=grads[0], backend=backend)
    assert one is grads[0]
    np.testing.assert_allclose(np.linalg.norm(one), 1e-3, rtol=1e-3)


@each_backend
@each_dtype
def test_gradients_are_clipped_where_one_factor_would_be_too_small(backend, dtype):
    large, max_norm = (1e30, 1e-10) if dtype == "float32" else (1e150, 1e-170)
    grads = [np.full(3, large, dtype), np.full(1, large, dtype)]
    clipped, _ = ops.clip_by_global_norm(grads, max_norm, backend=backend)
    for c in clipped:
        np.testing.assert_allclose(c, max_norm / 2, rtol=1e-6)
    one, _ = ops.clip_by_global_norm(grads[0], max_norm, out=grads[0], backend=backend)
    np.testing.assert_allclose(one, max_norm / np.sqrt(3), rtol=1e-6)


@each_backend
@pytest.mark.parametrize(
    ("dtype", "value"),
    [*itertools.product(["float32", "float64"], [np.inf, -np.inf, np.nan]), ("float64", 1e200)],  # whose square is inf
)
def test_where_the_norm_is_no_number_all_results_are_nan(backend, dtype, value):
    grads = [np.array([1, value], dtype), np.ones(3, dtype)]
    clipped, norm = ops.clip_by_global_norm(grads, 1.0, backend=backend)
    assert not np.isfinite(norm)
    assert all(np.isnan(c).all() for c in clipped)


@each_backend
def test_numpys_flags_are_taken(backend):
    a = np.arange(6.0).reshape(2, 3)
    yes, no = np.bool_(True), np.bool_(False)
    found = ops.matmul(a, a, transpose_a=yes, transpose_b=no, backend=backend)
    np.testing.assert_array_equal(found, ops.matmul(a, a, transpose_a=True, backend=backend))
    np.testing.assert_array_equal(ops.reduce_gradients(a, None, no, backend=backend), a.sum(axis=0))


@each_backend
def test_memory_maps_are_arrays(backend, tmp_path):
    mapped = np.memmap(tmp_path / "file", "float32", "w+", shape=(3, 4))
    mapped[:] = np.arange(12).reshape(3, 4)
    plain = np.array(mapped)
    np.testing.assert_array_equal(
        ops.matmul(mapped, mapped, transpose_b=True, backend=backend), ops.matmul(plain, plain.T, backend=backend)
    )
    ops.reduce_gradients(plain, out=mapped[0], backend=backend)
    np.testing.assert_array_equal(mapped[0], plain.mean(axis=0))


# ---- errors ---------------------------------------------------------------------------------------------------------


OWN = mb.Activation(np.tanh)
OWN_IS_REFUSED = r"activation must be built in, such as .*, and no function of your own; got Activation\(tanh\)"


def bad_calls():
    """A call, and what its error says. `out` is the array that must stay as it is."""
    a, b, out = np.ones((3, 4), f32), np.ones((4, 5), f32), np.full((3, 5), 7, f32)
    z, big = np.ones(6, f32), np.ones((9, 9), f32)
    y = np.array([0, 1, 2])
    frozen = np.ones((3, 5), f32)
    frozen.flags.writeable = False
    sgd, momentum = mb.SGD(0.1), mb.SGD(0.1, momentum=0.9)
    four = np.zeros((2, 1, 2, 3), f32)
    masked, matrix = np.ma.array(a, mask=a > 0), a.view(np.matrix)
    return {
        "list": (lambda **k: ops.matmul([[1.0]], b, out=out, **k), "a must be a NumPy array; got list"),
        "int": (lambda **k: ops.matmul(a.astype(int), b, out=out, **k), "a must be float32 or float64; got int64"),
        "big-endian": (
            lambda **k: ops.matmul(a.astype(">f4"), b, out=out, **k),
            "a must be float32 or float64; got >f4",
        ),
        "mixed": (lambda **k: ops.matmul(a, b.astype("f8"), out=out, **k), "b must be float32 as .*got float64"),
        "1-d": (lambda **k: ops.matmul(a, b[0], out=out, **k), r"b must have at least two dim.*got shape \(5,\)"),
        "inner": (lambda **k: ops.matmul(a, a, out=out, **k), r"b must have 4 rows.*\(3, 4\) and \(3, 4\)"),
        "linear": (lambda **k: ops.linear_forward(a, a, out=out, **k), r"W must have 4 rows, as many as X has columns"),
        "batch": (
            lambda **k: ops.matmul(np.ones((2, 3, 4), f32), np.ones((3, 4, 5), f32), out=out, **k),
            "leading dimensions of a and b",
        ),
        "out shape": (lambda **k: ops.matmul(a, b, out=out.T, **k), r"out must have shape \(3, 5\).*got \(5, 3\)"),
        "out dtype": (lambda **k: ops.matmul(a, b, out=out.astype("f8"), **k), "out must be float32 as"),
        "out type": (lambda **k: ops.matmul(a, b, out=[1], **k), "out must be a NumPy array; got list"),
        "read-only": (lambda **k: ops.matmul(a, b, out=frozen, **k), "out is read-only"),
        "overlap": (lambda **k: ops.matmul(big[:3, :4], b, out=big[2:5, 2:7], **k), "out overlaps a in memory"),
        "same": (lambda **k: ops.matmul(big, big, out=big, **k), "out overlaps a in memory"),
        "masked": (
            lambda **k: ops.matmul(masked, b, out=out, **k),
            "a must be a plain NumPy array or a memmap; got MaskedArray",
        ),
        "masked out": (lambda **k: ops.matmul(a, b, out=np.ma.array(out), **k), "out must be a plain NumPy array"),
        "matrix": (lambda **k: ops.reduce_gradients(matrix, **k), "stack must be a plain NumPy array.*got matrix"),
        "masked labels": (
            lambda **k: ops.softmax_cross_entropy(a, np.ma.array(y), **k),
            "y must be a plain NumPy array",
        ),
        "masked weights": (
            lambda **k: ops.softmax_cross_entropy(a, y, sample_weight=np.ma.ones(3), **k),
            "sample_weight must be a plain NumPy array",
        ),
        "transpose_a": (
            lambda **k: ops.matmul(b, b, transpose_a="no", **k),
            "transpose_a must be True or False; got 'no'",
        ),
        "transpose_b": (lambda **k: ops.matmul(a, b, transpose_b=0, out=out, **k), "transpose_b must be True or False"),
        "mean": (lambda **k: ops.reduce_gradients(a, mean="no", **k), "mean must be True or False; got 'no'"),
        "folded": (
            lambda **k: ops.matmul(a, b, out=np.lib.stride_tricks.as_strided(big, (3, 5), (4, 4)), **k),
            "out overlaps itself",
        ),
        "bias": (lambda **k: ops.matmul(a, b, bias=z, out=out, **k), r"bias must broadcast.*\(3, 5\); got \(6,\)"),
        "bias overlap": (lambda **k: ops.matmul(a, b, bias=out[0], out=out, **k), "out overlaps bias in memory"),
        "bias dtype": (lambda **k: ops.matmul(a, b, bias=np.ones(5), out=out, **k), "bias must be float32"),
        "activation": (lambda **k: ops.matmul(a, b, activation="rely", out=out, **k), "did you mean 'relu'"),
        "activation type": (
            lambda **k: ops.activation_forward(z, mb.Linear(2, 2), **k),
            "activation must be a name or",
        ),
        "own activation": (lambda **k: ops.matmul(a, b, activation=OWN, out=out, **k), OWN_IS_REFUSED),
        "own activation forward": (lambda **k: ops.activation_forward(z, OWN, out=z, **k), OWN_IS_REFUSED),
        "own activation backward": (lambda **k: ops.activation_backward(z, OWN, z=z, out=z, **k), OWN_IS_REFUSED),
        "alpha": (lambda **k: ops.matmul(a, b, alpha="2", out=out, **k), "alpha must be a number"),
        "beta": (lambda **k: ops.matmul(a, b, beta=1, **k), "beta=1.0 needs an out"),
        "backward part": (
            lambda **k: ops.activation_backward(z[:5], "relu", z=z[1:], out=z[:5], **k),
            "out overlaps z in memory; it may be z itself",
        ),
        "backward neither": (lambda **k: ops.activation_backward(z, "relu", **k), "either z.*got neither"),
        "backward both": (lambda **k: ops.activation_backward(z, "relu", z=z, a=z, **k), "either z.*got both"),
        "backward output": (lambda **k: ops.activation_backward(z, "gelu", a=z, **k), "'gelu': give z"),
        "backward shape": (lambda **k: ops.activation_backward(z, "relu", z=z[1:], **k), r"z must have shape \(6,\)"),
        "labels": (lambda **k: ops.softmax_cross_entropy(a, y + 2, **k), "from 0 to 3; got 4 at position 2"),
        "labels shape": (lambda **k: ops.softmax_cross_entropy(a, y[:2], **k), r"y must have shape \(3,\)"),
        "z shape": (lambda **k: ops.softmax_cross_entropy(z, y, **k), r"z must have shape \(n, C\)"),
        "class weight": (
            lambda **k: ops.softmax_cross_entropy(a, y, class_weight=-np.ones(4), **k),
            "class_weight must be finite and >= 0; got -1",
        ),
        "no gradients": (lambda **k: ops.reduce_gradients(a[:0], **k), "stack must have at least one row"),
        "weights": (lambda **k: ops.reduce_gradients(a, z, **k), r"weights must have shape \(3,\)"),
        "bias of one row": (lambda **k: ops.linear_backward_bias(z, **k), r"dY must have shape .*B, out\).*got \(6,\)"),
        "bias of a list": (lambda **k: ops.linear_backward_bias([[1.0]], **k), "dY must be a NumPy array; got list"),
        "bias of no rows": (lambda **k: ops.linear_backward_bias(a[None, :0], **k), r"B >= 1; got \(1, 0, 4\)"),
        "zero weights": (lambda **k: ops.reduce_gradients(a, np.zeros(3, f32), **k), "must not sum to 0"),
        "reduce overlap": (lambda **k: ops.reduce_gradients(a, out=a[1], **k), "out overlaps stack"),
        "optimizer": (lambda **k: ops.optimizer_update("sgd", z, z, a, **k), "optimizer must be one such as"),
        "state": (
            lambda **k: ops.optimizer_update(momentum, z, z.copy(), np.empty((0, 6), f32), **k),
            r"state must have shape \(1, 6\)",
        ),
        "w is g": (lambda **k: ops.optimizer_update(sgd, z, z, np.empty((0, 6), f32), **k), "w overlaps g in memory"),
        "t": (
            lambda **k: ops.optimizer_update(sgd, z, z.copy(), np.empty((0, 6), f32), -1, **k),
            "t must be an integer",
        ),
        "late t": (
            lambda **k: ops.optimizer_update(mb.Adam(), z, z.copy(), np.zeros((2, 6), f32), 2**70, **k),
            "t must be an integer from 0 to 9007199254740992; got 1180591620717411303424",
        ),
        "muon's dimensions": (
            lambda **k: ops.optimizer_update(mb.Muon(), z.reshape(1, 2, 3), np.ones((1, 2, 3), f32), four, **k),
            r"w must have no more than 2 dimensions for muon; got shape \(1, 2, 3\)",
        ),
        "max_norm": (lambda **k: ops.clip_by_global_norm(z, 0, **k), "max_norm must be a number"),
        "clip out": (lambda **k: ops.clip_by_global_norm([z, a], 1, out=[z], **k), "out must have 2 arrays"),
        "clip overlap": (lambda **k: ops.clip_by_global_norm([z, z.copy()], 1, out=[z, z], **k), "overlaps"),
    }, (a, b, out, z, big, frozen, y)


@each_backend
@pytest.mark.parametrize("name", bad_calls()[0])
def test_errors_name_the_argument_and_nothing_is_written(backend, name):
    calls, arrays = bad_calls()
    call, message = calls[name]
    before = [x.copy() for x in arrays]
    with pytest.raises((TypeError, ValueError), match=message):
        call(backend=backend)
    for x, y in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(x, y)


@needs_native
def test_a_tiny_product_costs_little():
    """The aim is 1.5 us; the bound here is what even a busy machine keeps."""
    import timeit

    a, b, out = np.ones((8, 8), f32), np.ones((8, 8), f32), np.empty((8, 8), f32)
    ops.matmul(a, b, out=out)
    assert min(timeit.repeat(lambda: ops.matmul(a, b, out=out), number=1000, repeat=20)) / 1000 < 5e-6


@pytest.mark.skipif("numba" not in HERE, reason="needs numba")
def test_processes_that_compile_at_the_same_time_leave_each_its_own_code_in_the_cache(tmp_path):
    """The second has looked into the index before the first writes it, and writes its code after it."""
    code = """
import sys, numpy as np, fastmb as mb
from numba.core.caching import IndexDataCacheFile
transpose, second = "transpose" in sys.argv, "second" in sys.argv
if second:
    IndexDataCacheFile._load_index, IndexDataCacheFile._save_index = lambda self: {}, lambda self, index: None
a = np.arange(9.0).reshape(3, 3)
with mb.use_backend("numba"):
    assert (mb.ops.matmul(a, a, transpose_a=transpose) == (a.T if transpose else a) @ a).all()
"""
    for options in (["transpose"], ["second"], ["transpose"]):
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
        subprocess.run([sys.executable, "-c", code, *options], env=environment, check=True)


def test_a_build_that_left_the_extension_out_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastmb.ops._native", None)
    monkeypatch.delitem(ops._loaded, "native", raising=False)
    message = "backend 'native' needs the compiled extension, which this build of fastmb left out"
    with pytest.raises(ImportError, match=message), mb.use_backend("native"):
        pass
    with pytest.raises(ImportError, match=message):
        ops.matmul(np.ones((2, 2)), np.ones((2, 2)), backend="native")
