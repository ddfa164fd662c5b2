"""Dual numbers for Numba: the type, its operators and how plain numbers become one of it. See `dual.py`."""

from __future__ import annotations

import operator
from typing import Any

from numba.core import types
from numba.core.imputils import lower_cast
from numba.core.typeconv import Conversion
from numba.extending import intrinsic, models, register_model

from .compiler import jit, overloaded


class DualType(types.Type):
    """Value and slope, both of type `dtype`."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(name=f"Dual({dtype})")

    def can_convert_from(self, typingctx: Any, other: Any) -> Any:
        return Conversion.safe if isinstance(other, (types.Number, types.Boolean, DualType)) else None

    def unify(self, typingctx: Any, other: Any) -> Any:
        if isinstance(other, DualType):
            return max(self, other, key=lambda pair: pair.dtype.bitwidth)
        return self if isinstance(other, (types.Number, types.Boolean)) else None


@register_model(DualType)
class _Model(models.StructModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, [("value", fe_type.dtype), ("slope", fe_type.dtype)])


def _made(context: Any, builder: Any, typ: Any, value: Any, slope: Any) -> Any:
    pair = context.data_model_manager[typ].get_value_type()(None)
    return builder.insert_value(builder.insert_value(pair, value, 0), slope, 1)


@lower_cast(types.Number, DualType)
@lower_cast(types.Boolean, DualType)
def _from_number(context: Any, builder: Any, fromty: Any, toty: Any, value: Any) -> Any:
    value = context.cast(builder, value, fromty, toty.dtype)
    return _made(context, builder, toty, value, context.get_constant(toty.dtype, 0))


@lower_cast(DualType, DualType)
def _from_dual(context: Any, builder: Any, fromty: Any, toty: Any, value: Any) -> Any:
    parts = (context.cast(builder, builder.extract_value(value, i), fromty.dtype, toty.dtype) for i in range(2))
    return _made(context, builder, toty, *parts)


@intrinsic
def dual(typingctx: Any, value: Any, slope: Any) -> Any:
    """A dual number of the value's type, which has to be a float's."""
    typ = DualType(value)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _made(context, builder, typ, args[0], context.cast(builder, args[1], signature.args[1], value))

    return typ(value, slope), generate


def _part(index: int) -> Any:
    def part(typingctx: Any, pair: Any) -> Any:
        if not isinstance(pair, DualType):  # a constant
            plain = pair if isinstance(pair, types.Float) else types.float64

            def constant(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                if index:
                    return context.get_constant(plain, 0)
                return context.cast(builder, args[0], signature.args[0], plain)

            return plain(pair), constant

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.extract_value(args[0], index)

        return pair.dtype(pair), generate

    return intrinsic(part)


value_of, slope_of = _part(0), _part(1)


def is_dual(*operands: Any) -> bool:
    return any(isinstance(x, DualType) for x in operands)


def is_number(*operands: Any) -> bool:
    return all(isinstance(x, (DualType, types.Number, types.Boolean)) for x in operands)


def binary(both: Any, left: Any, right: Any) -> Any:
    """What Numba's `overload` takes for a function of (dual, dual), (dual, number) and (number, dual).

    Made from functions of values and slopes, each giving a pair: both(a, da, b, db), left(a, da, b), right(a, b, db).
    """
    both, left, right = jit(both), jit(left), jit(right)

    def by_both(x, y):
        value, slope = both(value_of(x), slope_of(x), value_of(y), slope_of(y))
        return dual(value, slope)

    def by_left(x, y):
        value, slope = left(value_of(x), slope_of(x), y)
        return dual(value, slope)

    def by_right(x, y):
        value, slope = right(x, value_of(y), slope_of(y))
        return dual(value, slope)

    def typer(x: Any, y: Any) -> Any:
        if not (is_number(x, y) and is_dual(x, y)):
            return None
        return by_left if not is_dual(y) else by_right if not is_dual(x) else by_both

    return typer


_ADD = (lambda a, da, b, db: (a + b, da + db), lambda a, da, b: (a + b, da), lambda a, b, db: (a + b, db))
_SUB = (lambda a, da, b, db: (a - b, da - db), lambda a, da, b: (a - b, da), lambda a, b, db: (a - b, -db))
_MUL = (
    lambda a, da, b, db: (a * b, a * db + da * b),
    lambda a, da, b: (a * b, da * b),
    lambda a, b, db: (a * b, a * db),
)


def _divided(a, da, b, db):
    q = a / b
    return q, (da - q * db) / b


def _divides(a, b, db):
    q = a / b
    return q, -q * db / b


_DIV = (_divided, lambda a, da, b: (a / b, da / b), _divides)


def _comparison(compare: Any) -> None:
    def typer(x: Any, y: Any) -> Any:
        if is_dual(x, y) and is_number(x, y):
            return lambda x, y: compare(value_of(x), value_of(y))
        return None

    overloaded(compare)(typer)


def _unary(function: Any) -> Any:
    def typer(x: Any) -> Any:
        return function if isinstance(x, DualType) else None

    return typer


for _plain, _inplace, _functions in (
    (operator.add, operator.iadd, _ADD),
    (operator.sub, operator.isub, _SUB),
    (operator.mul, operator.imul, _MUL),
    (operator.truediv, operator.itruediv, _DIV),
):
    _typer = binary(*_functions)
    overloaded(_plain)(_typer)
    overloaded(_inplace)(_typer)
for _compare in (operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne):
    _comparison(_compare)
overloaded(operator.neg)(_unary(lambda x: dual(-value_of(x), -slope_of(x))))
overloaded(operator.pos)(_unary(lambda x: x))
overloaded(bool)(_unary(lambda x: value_of(x) != 0))
