"""A user's function compiled by Numba into a callback that takes a block.

`jit` compiles one function of numbers. float32 stays float32: constants of the code are as weak as NumPy says
(``0.5 * x`` has x's dtype), where Numba by itself would go on in float64. Nothing is fused but what says fma, and
nothing is reordered, so an element has the same bits wherever in a block it stands.

Callbacks are C functions, one per dtype (T):

- an activation, ``void f(T *a, T *d, int64 n, int64 mode)``: a = f(a). Mode 0 leaves d alone (it may be NULL), 1 sets
  d = f'(a), 2 multiplies d by f'(a).
- a loss, ``void f(T *z, T *y, int64 n, int64 mode)``: y = f(z, y), and z = df/dz unless mode is 0.

Where a function raises an exception, value and slope are NaN.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np

from .._errors import missing_extra

try:
    import numba
except ImportError:
    raise missing_extra("numba", "numba", "a user's own function in the native executor") from None

from numba.core import ir
from numba.core.ccallback import CFunc
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import FunctionPass, register_pass
from numba.core.untyped_passes import InlineClosureLikes
from numba.extending import overload

from . import Function
from .rebind import rebind


@register_pass(mutates_CFG=False, analysis_only=False)
class OwnArithmetic(FunctionPass):
    """Makes ``**`` the power of `maths`, and makes constants adopt float32 where the function was given it: floats as
    float32, small integers as int16, which float32 takes in.
    """

    _name = "fastmb_own_arithmetic"

    def __init__(self) -> None:
        FunctionPass.__init__(self)

    def run_pass(self, state: Any) -> bool:
        from .maths import FUNCTIONS

        single = any("float32" in str(argument) for argument in state.args)
        changed = False
        for a in (a for block in state.func_ir.blocks.values() for a in block.find_insts(ir.Assign)):
            value = a.value
            binary = isinstance(value, ir.Expr) and value.op in ("binop", "inplace_binop")
            if binary and value.fn in (operator.pow, operator.ipow):
                value.fn = FUNCTIONS["power"]
                changed = True
            if not single:
                continue
            if isinstance(value, ir.Arg) and isinstance(state.args[value.index], numba.types.Omitted):
                value = a.value = ir.Const(state.args[value.index].value, a.loc)  # a parameter's default
            if not isinstance(value, (ir.Const, ir.Global, ir.FreeVar)):
                continue
            if isinstance(value.value, (float, np.float64)):
                value.value = np.float32(value.value)
                changed = True
            elif type(value.value) is int and abs(value.value) < 2**15:
                value.value = np.int16(value.value)
                changed = True
        return changed


class _Compiler(CompilerBase):
    def define_pipelines(self) -> list[Any]:
        passes = DefaultPassBuilder.define_nopython_pipeline(self.state)
        passes.add_pass_after(OwnArithmetic, InlineClosureLikes)
        passes.finalize()
        return [passes]


OPTIONS = {"pipeline_class": _Compiler, "error_model": "numpy", "forceinline": True, "boundscheck": True}
jit = partial(numba.njit, **OPTIONS)
overloaded = partial(overload, jit_options=OPTIONS, strict=False)  # strict: typers may not be annotated


def user_jit(f: Callable[..., Any]) -> Any:
    """`f` compiled, with the functions of `maths` in the place of NumPy's, and what it calls compiled too."""
    from .maths import FUNCTIONS

    return rebind(f, FUNCTIONS, jit)


@lru_cache(maxsize=256)
def compiled(function: Function, dtype: str, looked_up: tuple[Any, ...]) -> CFunc:
    """What `Function.compiled` does; `looked_up` tells one state of the function's surroundings from another."""
    T = numba.float32 if dtype == "float32" else numba.float64
    cast = np.dtype(dtype).type
    value, both = (_of_one if function.arity == 1 else _of_two)(function, cast)
    nan = cast(np.nan)
    value, both = _or_else(value, nan), _or_else(both, (nan, nan))
    block = numba.njit(error_model="numpy")((_activation_block if function.arity == 1 else _loss_block)(value, both))
    pointer = numba.types.CPointer(T)
    signature = numba.void(pointer, pointer, numba.int64, numba.int64)
    try:
        return numba.cfunc(signature, error_model="numpy")(lambda a, b, n, mode: block(a, b, n, mode))
    except Exception as error:  # Numba lets errors of many kinds through
        raise TypeError(f"{function.name} can't be compiled by numba: {error}") from error


def _or_else(function: Any, otherwise: Any) -> Any:
    """`function`, and `otherwise` where it raises an exception, which would end the block unseen."""

    def guarded(*numbers):
        try:
            return function(*numbers)
        except Exception:
            return otherwise

    return jit(guarded)


def _of_one(function: Function, cast: Any) -> tuple[Any, Any]:
    """The value of an activation, and the value with the slope, of a number."""
    from .duals import dual, slope_of, value_of

    f = user_jit(function.f)
    value = jit(lambda x: cast(f(x)))
    if function.df is None:

        def differentiated(x):
            pair = f(dual(x, cast(1)))
            return cast(value_of(pair)), cast(slope_of(pair))

        return value, jit(differentiated)
    df = user_jit(function.df)

    def from_value(x):
        v = value(x)
        return v, cast(df(x, v))

    return value, jit(from_value if function.takes_value else lambda x: (value(x), cast(df(x))))


def _of_two(function: Function, cast: Any) -> tuple[Any, Any]:
    """The same of a loss, of output and target."""
    from .duals import dual, slope_of, value_of

    f = user_jit(function.f)
    value = jit(lambda z, y: cast(f(z, y)))
    if function.df is None:

        def differentiated(z, y):
            pair = f(dual(z, cast(1)), y)
            return cast(value_of(pair)), cast(slope_of(pair))

        return value, jit(differentiated)
    df = user_jit(function.df)

    def from_value(z, y):
        v = value(z, y)
        return v, cast(df(z, y, v))

    return value, jit(from_value if function.takes_value else lambda z, y: (value(z, y), cast(df(z, y))))


def _activation_block(value: Any, both: Any) -> Callable[..., None]:
    def block(a_, d_, n, mode):
        a, d = numba.carray(a_, n), numba.carray(d_, n)
        if mode == 0:
            for i in range(n):
                a[i] = value(a[i])
        elif mode == 1:
            for i in range(n):
                a[i], d[i] = both(a[i])
        else:
            for i in range(n):
                a[i], slope = both(a[i])
                d[i] *= slope

    return block


def _loss_block(value: Any, both: Any) -> Callable[..., None]:
    def block(z_, y_, n, mode):
        z, y = numba.carray(z_, n), numba.carray(y_, n)
        if mode == 0:
            for i in range(n):
                y[i] = value(z[i], y[i])
        else:
            for i in range(n):
                y[i], z[i] = both(z[i], y[i])

    return block
