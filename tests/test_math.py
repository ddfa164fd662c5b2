"""The elementwise kernels, each instruction set that this CPU has: activations, dropout, losses, updates.

The reference is reference_math.py: mpmath for what rounds, plain integers and fractions for what must not differ by a
bit. Errors are in units in the last place (ulp).
"""

from __future__ import annotations

import functools
import math
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mpf

native = pytest.importorskip("fastmb.executors.native", reason="built without the extension")

# Not on sys.path: pytest imports test modules by themselves.
ref = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("reference_math.py"))))

ISAS = native.available_isas()
FUSED = [isa for isa in ISAS if isa != "v2"]  # v2 has no fused multiply-add: its bits differ
DTYPES = ("float32", "float64")
LENGTHS = (1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 65, 97)

# Largest errors of value and derivative, and the size below which an error counts as one of a value of that size:
# 0 where every result is relatively exact, 1/8 where a derivative passes through 0 (or, gelu_tanh, in a tail whose
# exponent is itself rounded).
BOUNDS = {
    "identity": (0, 0, 0, 0),
    "relu": (0, 0, 0, 0),
    "leaky_relu": (0.5, 0, 0, 0),
    "elu": (1.3, 0, 1.3, 0),
    "selu": (2, 0, 2, 0),
    "gelu": (10, 0, 5.5, 1 / 8),
    "gelu_tanh": (3.5, 1 / 8, 5.5, 1 / 8),
    "silu": (3.5, 0, 3.5, 1 / 8),
    "mish": (4.5, 0, 6.5, 1 / 8),
    "softplus": (2.3, 0, 2.5, 0),
    "tanh": (2, 0, 4.5, 0),
    "sigmoid": (2.4, 0, 3.5, 0),
}
VALUES = {"leaky_relu": 1 / 64, "elu": 1.0}

each_isa = pytest.mark.parametrize("isa", ISAS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def activate(name: str, z: np.ndarray, isa: str) -> tuple[np.ndarray, np.ndarray]:
    return native.kernel_activation(ref.ACTIVATIONS.index(name), VALUES.get(name, 0.0), z, isa)


def sweep(dtype: str, n: int = 240) -> np.ndarray:
    """Where functions bend, where they end, and all magnitudes between."""
    rng = np.random.default_rng(0)
    far = 80 if dtype == "float32" else 690
    magnitudes = np.geomspace(1e-20, far, n // 2)
    parts = (rng.uniform(-6, 6, n), rng.uniform(-far, far, n // 2), magnitudes, -magnitudes)
    return np.concatenate(parts).astype(dtype)


@functools.cache
def expected_activation(name: str, dtype: str) -> tuple[list[mpf], list[mpf]]:
    pairs = [ref.activation(name, mpf(x), VALUES.get(name, 0.0)) for x in sweep(dtype).tolist()]
    return [f for f, _ in pairs], [df for _, df in pairs]


def assert_same_bits(a: Any, b: Any) -> None:
    for x, y in zip(a, b, strict=True):
        assert np.ascontiguousarray(x).tobytes() == np.ascontiguousarray(y).tobytes()


# ---- activations -----------------------------------------------------------------------------------------------------


@each_isa
@each_dtype
@pytest.mark.parametrize("name", ref.ACTIVATIONS)
def test_activation_and_its_derivative_are_within_their_ulps(name: str, dtype: str, isa: str) -> None:
    a, d = activate(name, sweep(dtype), isa)
    f, df = expected_activation(name, dtype)
    bound, floor, d_bound, d_floor = BOUNDS[name]
    assert ref.ulps(a, f, floor) <= bound
    assert ref.ulps(d, df, d_floor) <= d_bound


@each_isa
@each_dtype
@pytest.mark.parametrize("name", ref.ACTIVATIONS)
def test_activation_has_its_limits_at_zero_and_infinity(name: str, dtype: str, isa: str) -> None:
    big = np.finfo(dtype).max
    z = np.array([0.0, -0.0, big, np.inf, -big, -np.inf], dtype)
    a, d = activate(name, z, isa)
    f0, df0 = ref.activation(name, mpf(0), VALUES.get(name, 0.0))
    assert ref.ulps(a[:2], [f0, f0]) <= 0.5
    assert ref.ulps(d[:2], [df0, df0]) <= 1
    scale = 1.0507009873554805 if name == "selu" else 1.0
    bounded = name in ("tanh", "sigmoid")
    assert a[3] == (1 if bounded else np.inf)
    np.testing.assert_array_equal(d[2:4], np.array(0 if bounded else scale, dtype))
    if not bounded and name != "selu":
        assert a[2] == big
    lowest = {"identity": -np.inf, "leaky_relu": -np.inf, "elu": -1.0, "selu": -1.7580993408473768, "tanh": -1.0}
    slope = {"identity": 1.0, "leaky_relu": 1 / 64}
    np.testing.assert_array_equal(a[5], np.array(lowest.get(name, 0.0), dtype))
    np.testing.assert_array_equal(d[4:], np.array(slope.get(name, 0.0), dtype))


@each_isa
@each_dtype
@pytest.mark.parametrize("name", ref.ACTIVATIONS)
def test_activation_passes_nan_on(name: str, dtype: str, isa: str) -> None:
    payload = np.array([0x7FC00001] if dtype == "float32" else [0x7FF8000000000001], f"u{np.dtype(dtype).itemsize}")
    z = np.concatenate((np.array([np.nan, -np.nan], dtype), payload.view(dtype)))
    assert np.isnan(activate(name, z, isa)[0]).all()


@each_isa
@each_dtype
@pytest.mark.parametrize("name", ["tanh", "elu", "selu", "gelu", "silu", "mish"])
def test_activation_keeps_tiny_arguments(name: str, dtype: str, isa: str) -> None:
    """No 1 + x - 1 anywhere: f(x) / x has its limit down to the smallest normal numbers."""
    z = np.geomspace(np.finfo(dtype).tiny * 4, 1e-10, 33).astype(dtype)
    z = np.concatenate((z, -z))
    a, _ = activate(name, z, isa)
    _, slope = ref.activation(name, mpf("-1e-45"), VALUES.get(name, 0.0))
    _, slope_above = ref.activation(name, mpf("1e-45"), VALUES.get(name, 0.0))
    want = [mpf(x) * (slope_above if x > 0 else slope) for x in z.tolist()]
    eps = float(np.finfo(dtype).eps)
    assert all(abs(mpf(g) - w) <= (3 * eps + abs(x)) * abs(w) for g, w, x in zip(a.tolist(), want, z, strict=True))


@each_dtype
@pytest.mark.parametrize("name", ref.ACTIVATIONS)
def test_same_activation_bits_on_every_fused_instruction_set(name: str, dtype: str) -> None:
    rng = np.random.default_rng(1)
    z = (rng.standard_normal(100_000) * rng.choice([1e-3, 1, 10, 300], 100_000)).astype(dtype)
    first, *others = [activate(name, z, isa) for isa in FUSED] or [None]
    for other in others:
        assert_same_bits(first, other)


@each_isa
@each_dtype
@pytest.mark.parametrize("name", ref.ACTIVATIONS)
def test_activation_does_not_depend_on_its_neighbours(name: str, dtype: str, isa: str) -> None:
    z = sweep(dtype)[: max(LENGTHS)]
    whole = activate(name, z, isa)
    for n in LENGTHS:
        assert_same_bits(activate(name, z[:n], isa), (whole[0][:n], whole[1][:n]))


@given(x=st.floats(-30, 30), step=st.floats(1e-3, 5))
@settings(max_examples=50, deadline=None)
def test_monotone_activations_are_monotone(x: float, step: float) -> None:
    for name in ("relu", "leaky_relu", "elu", "selu", "softplus", "tanh", "sigmoid"):
        for isa in ISAS:
            a, d = activate(name, np.array([x, x + step], np.float32), isa)
            assert a[0] <= a[1]
            assert (d >= 0).all()


# ---- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter: Any, key: Any, words: Any) -> None:
    assert tuple(ref.philox(counter, key)) == words


@each_isa
@each_dtype
def test_dropout_cuts_exactly_at_its_word(dtype: str, isa: str) -> None:
    """The first known answer is the first four units of row 0: kept at a threshold of the word, dropped one above."""
    for unit, word in enumerate((0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)):
        for above in (0, 1):
            p = (word + above) / 2**32
            mask = native.kernel_dropout(0, 0, 0, 0, p, 4, 1, dtype, isa)
            assert mask[unit, 0] == (0 if above else np.dtype(dtype).type(1 / (1 - p)))


@each_isa
@each_dtype
@pytest.mark.parametrize(
    ("seed", "t", "index", "row"),
    [(1, 0, 0, 0), (2**64 - 1, 2**32 + 5, 3, 1000), (0x0123456789ABCDEF, 7 * 2**32 + 2**31, 255, 2**31)],
)
def test_dropout_mask_is_that_of_plain_integers(dtype: str, isa: str, seed: int, t: int, index: int, row: int) -> None:
    n, rows, p = 13, 4, 0.3
    words = ref.dropout_words(seed, t, index, row, n, rows)
    mask = native.kernel_dropout(seed, t, index, row, p, n, rows, dtype, isa)
    np.testing.assert_array_equal(mask, np.where(words >= math.floor(p * 2**32), 1 / (1 - p), 0).astype(dtype))


@each_isa
def test_dropout_rows_do_not_depend_on_where_a_block_begins(isa: str) -> None:
    whole = native.kernel_dropout(5, 9, 1, 0, 0.5, 8, 8, "float32", isa)
    for row in range(1, 5):
        part = native.kernel_dropout(5, 9, 1, row, 0.5, 8, 4, "float32", isa)
        np.testing.assert_array_equal(part, whole[:, row : row + 4])


# ---- losses ----------------------------------------------------------------------------------------------------------

ROWS = 4  # a block has at least so many in every instruction set
WEIGHT = [0.5, 2.0, 1.0, 0.25, 3.0, 1.5, 0.75]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "indices": ("cross_entropy", {}),
    "indices_smoothed": ("cross_entropy", {"smoothing": 0.125}),
    "indices_weighted": ("cross_entropy", {"weight": WEIGHT}),
    "indices_weighted_smoothed": ("cross_entropy", {"weight": WEIGHT, "smoothing": 0.25}),
    "rows": ("cross_entropy", {}),
    "rows_weighted_smoothed": ("cross_entropy", {"weight": WEIGHT, "smoothing": 0.125}),
    "bce": ("bce_with_logits", {}),
    "bce_pos_weight": ("bce_with_logits", {"weight": WEIGHT}),
    "mse": ("mse", {}),
    "mae": ("mae", {}),
    "huber": ("huber", {"delta": 0.75}),
}
each_case = pytest.mark.parametrize("case", CASES)


def outputs_and_targets(case: str, dtype: str, spread: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    n = len(WEIGHT)
    z = (spread * rng.standard_normal((ROWS, n))).astype(dtype)
    name, _ = CASES[case]
    if case.startswith("indices"):
        return z, rng.integers(0, n, ROWS).astype(np.int32)
    if name == "cross_entropy":
        return z, rng.dirichlet(np.ones(n), ROWS).astype(dtype)
    if name == "bce_with_logits":
        return z, np.where(rng.random(z.shape) < 0.7, rng.random(z.shape) < 0.5, rng.random(z.shape)).astype(dtype)
    y = rng.standard_normal(z.shape).astype(dtype)
    y[0, 0] = z[0, 0]
    return z, y


def lose(case: str, z: np.ndarray, y: np.ndarray, s: np.ndarray, isa: str) -> tuple[np.ndarray, np.ndarray]:
    name, options = CASES[case]
    return native.kernel_loss(ref.LOSSES.index(name), z, y, s, isa, **options)


@each_isa
@each_dtype
@each_case
def test_loss_and_gradient_are_the_formulas(case: str, dtype: str, isa: str) -> None:
    """Within 8 rounding errors of the largest term: what a gradient is a difference of is at most max(weight), and
    cross-entropy's log(sum) and z are rounded at the size of 1 or more."""
    z, y = outputs_and_targets(case, dtype)
    s = np.array([0.5, 0.125, 0.0, 1.7], dtype)
    name, options = CASES[case]
    losses, dz = lose(case, z, y, s, isa)
    eps = float(np.finfo(dtype).eps)
    for r in range(ROWS):
        target = int(y[r]) if y.ndim == 1 else y[r].tolist()
        expected, gradient = ref.loss(name, z[r].tolist(), target, **options)
        assert abs(mpf(float(losses[r])) - expected) <= 8 * eps * max(abs(expected), name == "cross_entropy")
        largest = max(3.0 if "weight" in options else 1.0, *(abs(g) for g in gradient))
        for c, g in enumerate(gradient):
            assert abs(mpf(float(dz[r, c])) - float(s[r]) * g) <= 8 * eps * float(s[r]) * largest


@each_isa
@each_case
def test_gradient_is_the_slope_of_the_loss(case: str, isa: str) -> None:
    z, y = outputs_and_targets(case, "float64", spread=1.0)
    if case == "mae":
        z[0, 0] += 0.5  # off the kink
    s, h = np.array([1.0, 0.5, 2.0, 0.25]), 1e-5
    _, dz = lose(case, z, y, s, isa)
    for c in range(z.shape[1]):
        up, down = z.copy(), z.copy()
        up[:, c] += h
        down[:, c] -= h
        slope = s * (lose(case, up, y, s, isa)[0] - lose(case, down, y, s, isa)[0]) / (2 * h)
        np.testing.assert_allclose(dz[:, c], slope, rtol=1e-8, atol=1e-9)


@each_isa
@each_dtype
@each_case
def test_row_of_weight_zero_has_gradient_zero(case: str, dtype: str, isa: str) -> None:
    for spread in (1.0, 1e3, 1e30):
        z, y = outputs_and_targets(case, dtype, spread)
        _, dz = lose(case, z, y, np.array([1, 0, 0, 1], dtype), isa)
        assert (dz[1:3] == 0).all()
        assert np.isfinite(dz).all()


@each_isa
@each_dtype
def test_confident_outputs_neither_overflow_nor_vanish(dtype: str, isa: str) -> None:
    """Right by 10^4, wrong by 10^4: loss 0 and 10^4, gradient 0 and +-1, in cross-entropy as in bce."""
    s = np.ones(2, dtype)
    z = np.array([[1e4, 0.0], [1e4, 0.0]], dtype)
    losses, dz = native.kernel_loss(0, z, np.array([0, 1], np.int32), s, isa)
    np.testing.assert_array_equal(losses, np.array([0, 1e4], dtype))
    np.testing.assert_array_equal(dz, np.array([[0, 0], [1, -1]], dtype))
    losses, dz = native.kernel_loss(1, z[:, :1], np.array([[1.0], [0.0]], dtype), s, isa)
    np.testing.assert_array_equal(losses, np.array([0, 1e4], dtype))
    np.testing.assert_array_equal(dz, np.array([[0], [1]], dtype))


@each_isa
def test_bce_keeps_small_losses(isa: str) -> None:
    """log(1 + exp(-30)) is 9.4e-14, far below the rounding of 30."""
    losses, dz = native.kernel_loss(1, np.array([[30.0], [-30.0]], np.float32), np.array([[1], [0]], np.float32),
                                    np.ones(2, np.float32), isa)  # fmt: skip
    np.testing.assert_allclose(losses, math.exp(-30), rtol=1e-6)
    np.testing.assert_allclose(dz[:, 0], [-math.exp(-30), math.exp(-30)], rtol=1e-6)


@each_isa
@each_dtype
@each_case
def test_nan_output_gives_nan_loss_in_its_row_alone(case: str, dtype: str, isa: str) -> None:
    z, y = outputs_and_targets(case, dtype)
    for c in (0, 3):
        bad = z.copy()
        bad[1, c] = np.nan
        losses, _ = lose(case, bad, y, np.ones(ROWS, dtype), isa)
        assert np.isnan(losses).tolist() == [False, True, False, False]


@each_dtype
@each_case
def test_same_loss_bits_on_every_fused_instruction_set(case: str, dtype: str) -> None:
    z, y = outputs_and_targets(case, dtype)
    s = np.array([0.3, 0.1, 0.7, 0.9], dtype)
    first, *others = [lose(case, z, y, s, isa) for isa in FUSED] or [None]
    for other in others:
        assert_same_bits(first, other)


@given(shift=st.integers(-1000, 1000), seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_cross_entropy_does_not_see_a_shift_of_all_outputs(shift: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    z = rng.integers(-512, 512, (ROWS, 5)) / 64  # the shift is exact
    y, s = rng.integers(0, 5, ROWS).astype(np.int32), np.ones(ROWS)
    for isa in ISAS:
        assert_same_bits(native.kernel_loss(0, z, y, s, isa), native.kernel_loss(0, z + shift, y, s, isa))


# ---- updates ---------------------------------------------------------------------------------------------------------

COEF = np.array([0.01, 0.003, 0.9, 0.1, 0.99, 0.01, 1e-7, 0.75])


def weights(name: str, n: int, dtype: str, seed: int = 3) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Weights, states (squares of means are below means of squares), gradients."""
    rng = np.random.default_rng(seed)
    w, g = rng.standard_normal((2, n)).astype(dtype)
    state = [(0.1 + 0.01 * rng.random(n)).astype(dtype) for _ in range(ref.STATES[name])]
    return w, state, g


@each_isa
@pytest.mark.parametrize("name", ref.UPDATES)
def test_update_is_its_formula_to_the_bit(name: str, isa: str) -> None:
    for n in LENGTHS:
        w, state, g = weights(name, n, "float64")
        fma = ref.plain_fma if isa == "v2" else ref.exact_fma
        expected = [
            ref.update(name, COEF.tolist(), float(w[i]), [float(s[i]) for s in state], float(g[i]), fma)
            for i in range(n)
        ]
        native.kernel_update(ref.UPDATES.index(name), COEF, w, state, g, isa)
        assert w.tolist() == [new for new, _ in expected]
        for k, s in enumerate(state):
            assert s.tolist() == [new[k] for _, new in expected]


@each_isa
@pytest.mark.parametrize("name", ref.UPDATES)
def test_update_in_single_precision_is_the_formula_rounded(name: str, isa: str) -> None:
    """Within 8 roundings of the float64 result; the centred variance is a difference, which may magnify them."""
    w, state, g = weights(name, 97, "float32")
    coef = COEF.astype(np.float32).astype(np.float64)
    wide = [w.astype(np.float64), [s.astype(np.float64) for s in state], g.astype(np.float64)]
    native.kernel_update(ref.UPDATES.index(name), COEF, w, state, g, isa)
    native.kernel_update(ref.UPDATES.index(name), coef, *wide, isa)
    for narrow, exact in zip((w, *state), (wide[0], *wide[1]), strict=True):
        assert narrow.dtype == np.float32
        np.testing.assert_allclose(narrow, exact, rtol=8 * 2**-24, atol=8 * 2**-24)


@each_dtype
@pytest.mark.parametrize("name", ref.UPDATES)
def test_same_update_bits_on_every_fused_instruction_set(name: str, dtype: str) -> None:
    results = []
    for isa in FUSED:
        w, state, g = weights(name, 10_007, dtype)
        native.kernel_update(ref.UPDATES.index(name), COEF, w, state, g, isa)
        results.append((w, *state))
    for other in results[1:]:
        assert_same_bits(results[0], other)


@each_isa
@each_dtype
@pytest.mark.parametrize("name", ref.UPDATES)
def test_update_writes_nothing_outside_its_weights(name: str, dtype: str, isa: str) -> None:
    """At an odd address, between guards."""
    for n in LENGTHS:
        w, state, g = weights(name, n, dtype)
        guarded = []
        for a in (w, *state):
            buffer = np.full(n + 2, np.nan, dtype)
            buffer[1:-1] = a
            guarded.append(buffer)
        inner = [a[1:-1] for a in guarded]
        native.kernel_update(ref.UPDATES.index(name), COEF, inner[0], inner[1:], g, isa)
        native.kernel_update(ref.UPDATES.index(name), COEF, w, state, g, isa)
        assert_same_bits(inner, (w, *state))
        assert all(np.isnan(a[[0, -1]]).all() for a in guarded)
