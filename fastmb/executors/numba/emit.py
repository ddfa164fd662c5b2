"""Formulas become LLVM IR: vectors with Python's operators.

A kernel is a Python function that takes an `Emitter` and the kernel's arguments as `Value`s, and writes with them what
is to be computed; nothing is computed then. Values are integers of 64 bits (sizes and addresses), numbers of the
kernel's dtype T, or vectors of them; a number meets a vector as one that holds it in every lane. Only `fma` is fused,
and no fast-math flag is ever set: the arithmetic is what is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from .target import Target

I1, I32, I64 = ir.IntType(1), ir.IntType(32), ir.IntType(64)
_SOURCES = {"i1": 8, "i2": 16, "i4": 32, "i8": 64, "u1": 8, "u2": 16, "u4": 32, "u8": 64, "b1": 8}
_FLOATS = {"f2": ir.HalfType(), "f4": ir.FloatType(), "f8": ir.DoubleType()}


def _splat(builder: ir.IRBuilder, value: Any, count: int) -> Any:
    if isinstance(value, ir.Constant):
        return ir.Constant(ir.VectorType(value.type, count), [value.constant] * count)
    one = builder.insert_element(
        ir.Constant(ir.VectorType(value.type, count), ir.Undefined), value, ir.Constant(I32, 0)
    )
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, count), [0] * count))


def _constant(type_: Any, number: float) -> Any:
    if isinstance(type_, ir.VectorType):
        return ir.Constant(type_, [_constant(type_.element, number).constant] * type_.count)
    if isinstance(type_, ir.IntType):
        return ir.Constant(type_, int(number) & ((1 << type_.width) - 1))
    return ir.Constant(type_, float(np.float32(number)) if isinstance(type_, ir.FloatType) else float(number))


class Value:
    """An LLVM value with operators."""

    __slots__ = ("builder", "v")

    def __init__(self, builder: ir.IRBuilder, v: Any) -> None:
        self.builder, self.v = builder, v

    def alike(self, other: Value | float) -> tuple[Any, Any]:
        """Both as LLVM values of one type: a number becomes a constant, a scalar fills a vector."""
        if not isinstance(other, Value):
            return self.v, _constant(self.v.type, other)
        a, b = self.v, other.v
        if isinstance(a.type, ir.VectorType) and not isinstance(b.type, ir.VectorType):
            b = _splat(self.builder, b, a.type.count)
        elif isinstance(b.type, ir.VectorType) and not isinstance(a.type, ir.VectorType):
            a = _splat(self.builder, a, b.type.count)
        return a, b

    @property
    def is_float(self) -> bool:
        element = getattr(self.v.type, "element", self.v.type)
        return not isinstance(element, ir.IntType)

    def _binary(self, other: Value | float, for_float: str, for_int: str, swap: bool = False) -> Value:
        a, b = self.alike(other)
        if swap:
            a, b = b, a
        return Value(self.builder, getattr(self.builder, for_float if self.is_float else for_int)(a, b))

    def __add__(self, other: Value | float) -> Value:
        return self._binary(other, "fadd", "add")

    def __radd__(self, other: float) -> Value:
        return self._binary(other, "fadd", "add", True)

    def __sub__(self, other: Value | float) -> Value:
        return self._binary(other, "fsub", "sub")

    def __rsub__(self, other: float) -> Value:
        return self._binary(other, "fsub", "sub", True)

    def __mul__(self, other: Value | float) -> Value:
        return self._binary(other, "fmul", "mul")

    def __rmul__(self, other: float) -> Value:
        return self._binary(other, "fmul", "mul", True)

    def __truediv__(self, other: Value | float) -> Value:
        return self._binary(other, "fdiv", "sdiv")

    def __rtruediv__(self, other: float) -> Value:
        return self._binary(other, "fdiv", "sdiv", True)

    def __floordiv__(self, other: Value | int) -> Value:
        return self._binary(other, "frem", "sdiv")

    def __mod__(self, other: Value | int) -> Value:
        return self._binary(other, "frem", "srem")

    def __and__(self, other: Value | int) -> Value:
        return self._binary(other, "and_", "and_")

    def __or__(self, other: Value | int) -> Value:
        return self._binary(other, "or_", "or_")

    def __xor__(self, other: Value | int) -> Value:
        return self._binary(other, "xor", "xor")

    def __lshift__(self, other: int) -> Value:
        return self._binary(other, "shl", "shl")

    def __rshift__(self, other: int) -> Value:
        """Of unsigned numbers."""
        return self._binary(other, "lshr", "lshr")

    def __neg__(self) -> Value:
        return Value(self.builder, self.builder.fneg(self.v) if self.is_float else self.builder.neg(self.v))

    def compare(self, sign: str, other: Value | float) -> Value:
        """Of floats (false where one is NaN, but for !=) or signed integers."""
        a, b = self.alike(other)
        if not self.is_float:
            return Value(self.builder, self.builder.icmp_signed(sign, a, b))
        compare = self.builder.fcmp_unordered if sign == "!=" else self.builder.fcmp_ordered
        return Value(self.builder, compare(sign, a, b))

    def __lt__(self, other: Value | float) -> Value:
        return self.compare("<", other)

    def __le__(self, other: Value | float) -> Value:
        return self.compare("<=", other)

    def __gt__(self, other: Value | float) -> Value:
        return self.compare(">", other)

    def __ge__(self, other: Value | float) -> Value:
        return self.compare(">=", other)

    def equals(self, other: Value | float) -> Value:
        return self.compare("==", other)


class Variable:
    """A place for a value that changes; LLVM keeps it in a register."""

    def __init__(self, builder: ir.IRBuilder, value: Value) -> None:
        self.builder, self.place = builder, cgutils.alloca_once(builder, value.v.type)
        self.set(value)

    def set(self, value: Value) -> None:
        self.builder.store(value.v, self.place)

    def get(self) -> Value:
        return Value(self.builder, self.builder.load(self.place))


class Emitter:
    """What a kernel of one `Target` is written with."""

    def __init__(self, builder: ir.IRBuilder, target: Target) -> None:
        self.builder = builder
        self.target = target
        self.double = target.itemsize == 8
        self.lanes, self.rb, self.mr = target.lanes, target.rb, target.mr
        self.T = ir.DoubleType() if self.double else ir.FloatType()

    # ---- values ---------------------------------------------------------------------------------------------------

    def integer(self, number: int) -> Value:
        return Value(self.builder, ir.Constant(I64, number))

    def number(self, single: float, double: float | None = None) -> Value:
        """A constant of T; `double` where T is double and has another one."""
        return Value(self.builder, _constant(self.T, double if double is not None and self.double else single))

    def zeros(self, count: int) -> Value:
        return self.fill(0.0, count)

    def fill(self, number: Value | float, count: int) -> Value:
        """`count` lanes of the same number of T (count 1: the number)."""
        scalar = number if isinstance(number, Value) else self.number(number)
        return scalar if count == 1 else Value(self.builder, _splat(self.builder, scalar.v, count))

    def type(self, count: int = 1) -> Any:
        """`count` numbers of T."""
        return self.T if count == 1 else ir.VectorType(self.T, count)

    def variable(self, value: Value) -> Variable:
        return Variable(self.builder, value)

    # ---- arithmetic -----------------------------------------------------------------------------------------------

    def _call(self, name: str, *values: Value | float) -> Value:
        """An LLVM function of values of one type, the widest of theirs."""
        given = [value for value in values if isinstance(value, Value)]
        widest = max(given, key=lambda value: getattr(value.v.type, "count", 1))
        arguments = [widest.alike(value)[1] for value in values]
        type_ = widest.v.type
        signature = ir.FunctionType(type_, [type_] * len(arguments))
        lanes = f"v{type_.count}" if isinstance(type_, ir.VectorType) else ""
        full = f"{name}.{lanes}f{8 * self.target.itemsize}"
        function = cgutils.get_or_insert_function(self.builder.module, signature, full)
        return Value(self.builder, self.builder.call(function, arguments))

    def fma(self, a: Value | float, b: Value | float, c: Value | float) -> Value:
        """A b + c, rounded once where the target can."""
        if self.target.fma:
            return self._call("llvm.fma", a, b, c)
        product = a * b
        assert isinstance(product, Value)
        return product + c

    def sqrt(self, x: Value) -> Value:
        return self._call("llvm.sqrt", x)

    def abs(self, x: Value) -> Value:
        return self._call("llvm.fabs", x)

    def copysign(self, x: Value, sign: Value) -> Value:
        return self._call("llvm.copysign", x, sign)

    def select(self, condition: Value, yes: Value | float, no: Value | float) -> Value:
        """`yes` in the lanes where the condition holds, else `no`."""
        if (isinstance(yes, Value) and isinstance(no, Value)) or isinstance(yes, Value):
            a, b = yes.alike(no)
        elif isinstance(no, Value):
            b, a = no.alike(yes)
        else:
            type_ = self.type(getattr(condition.v.type, "count", 1))
            a, b = _constant(type_, yes), _constant(type_, no)
        count = getattr(condition.v.type, "count", 1)
        if count > 1 and not isinstance(a.type, ir.VectorType):
            a, b = _splat(self.builder, a, count), _splat(self.builder, b, count)
        return Value(self.builder, self.builder.select(condition.v, a, b))

    def at_least(self, x: Value, low: Value | float) -> Value:
        """The larger of the two; x where x is NaN."""
        return self.select(x < low, low, x)

    def at_most(self, x: Value, high: Value | float) -> Value:
        """The smaller of the two; x where x is NaN."""
        return self.select(x > high, high, x)

    def minimum(self, a: Value, b: Value | int) -> Value:
        """Of integers."""
        return self.select(a < b, a, b)

    def bits(self, x: Value) -> Value:
        """The bits of numbers of T, as integers."""
        return self._recast(x, ir.IntType(64 if self.double else 32))

    def from_bits(self, i: Value) -> Value:
        return self._recast(i, self.T)

    def _recast(self, x: Value, element: Any) -> Value:
        type_ = ir.VectorType(element, x.v.type.count) if isinstance(x.v.type, ir.VectorType) else element
        return Value(self.builder, self.builder.bitcast(x.v, type_))

    def truncate(self, x: Value, bits: int) -> Value:
        type_ = ir.IntType(bits)
        return Value(
            self.builder,
            self.builder.trunc(x.v, ir.VectorType(type_, x.v.type.count) if hasattr(x.v.type, "count") else type_),
        )

    def unsigned_at_least(self, x: Value, low: Value) -> Value:
        a, b = x.alike(low)
        return Value(self.builder, self.builder.icmp_unsigned(">=", a, b))

    def to_number(self, x: Value) -> Value:
        """A signed integer, or a number of any float type, as T."""
        if not x.is_float:
            return Value(self.builder, self.builder.sitofp(x.v, self.T))
        return self.convert(x, "f8" if isinstance(x.v.type, ir.DoubleType) else "f4")

    def as_integer(self, x: Value) -> Value:
        """A double, not negative, without its fraction."""
        return Value(self.builder, self.builder.fptosi(x.v, I64))

    def as_double(self, x: Value) -> Value:
        """A signed integer as a double."""
        return Value(self.builder, self.builder.sitofp(x.v, ir.DoubleType()))

    def convert(self, x: Value, source: str) -> Value:
        """A value of a NumPy type (kind and size) as T."""
        count = getattr(x.v.type, "count", 1)
        to, builder = self.type(count), self.builder
        if source in _FLOATS:
            here, there = _FLOATS[source], self.T
            if here == there:
                return x
            wider = here == _FLOATS["f2"] or self.double
            return Value(builder, (builder.fpext if wider else builder.fptrunc)(x.v, to))
        return Value(builder, (builder.sitofp if source[0] == "i" else builder.uitofp)(x.v, to))

    def from_int32(self, x: Value) -> Value:
        """Signed integers of 32 bits as T."""
        return Value(self.builder, self.builder.sitofp(x.v, self.type(getattr(x.v.type, "count", 1))))

    def widen(self, x: Value) -> Value:
        """Numbers of T as doubles."""
        count = getattr(x.v.type, "count", 1)
        double = ir.DoubleType()
        to = double if count == 1 else ir.VectorType(double, count)
        return x if self.double else Value(self.builder, self.builder.fpext(x.v, to))

    def doubles(self, number: float, count: int) -> Value:
        double = ir.DoubleType()
        return Value(self.builder, _constant(double if count == 1 else ir.VectorType(double, count), number))

    def lane(self, x: Value, i: int) -> Value:
        return Value(self.builder, self.builder.extract_element(x.v, ir.Constant(I32, i)))

    # ---- vectors --------------------------------------------------------------------------------------------------

    def shuffle(self, a: Value, b: Value, lanes: Sequence[int]) -> Value:
        mask = ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
        return Value(self.builder, self.builder.shuffle_vector(a.v, b.v, mask))

    def lane_numbers(self, bits: int, count: int, first: int = 0) -> Value:
        return Value(
            self.builder, ir.Constant(ir.VectorType(ir.IntType(bits), count), list(range(first, first + count)))
        )

    def broadcast_int(self, x: Value, bits: int, count: int) -> Value:
        """The lower `bits` of a 64-bit integer in every lane."""
        narrow = x.v if bits == 64 else self.builder.trunc(x.v, ir.IntType(bits))
        return Value(self.builder, _splat(self.builder, narrow, count))

    # ---- memory ---------------------------------------------------------------------------------------------------

    def _pointer(self, address: Value, index: Value | int, type_: Any, element: Any) -> Any:
        base = self.builder.inttoptr(address.v, ir.PointerType(element))
        at = index.v if isinstance(index, Value) else ir.Constant(I64, index)
        return self.builder.bitcast(self.builder.gep(base, [at]), ir.PointerType(type_))

    def load(self, address: Value, index: Value | int = 0, count: int = 1) -> Value:
        """`count` numbers of T from element `index` on; any alignment."""
        pointer = self._pointer(address, index, self.type(count), self.T)
        return Value(self.builder, self.builder.load(pointer, align=self.target.itemsize))

    def store(self, value: Value | float, address: Value, index: Value | int = 0) -> None:
        value = value if isinstance(value, Value) else self.number(value)
        pointer = self._pointer(address, index, value.v.type, self.T)
        self.builder.store(value.v, pointer, align=self.target.itemsize)

    def load_as(self, source: str, address: Value, count: int = 1) -> Value:
        """`count` elements of a NumPy type, at any address."""
        element = _FLOATS[source] if source in _FLOATS else ir.IntType(_SOURCES[source])
        type_ = element if count == 1 else ir.VectorType(element, count)
        pointer = self.builder.inttoptr(address.v, ir.PointerType(type_))
        return Value(self.builder, self.builder.load(pointer, align=1))

    def _store_at(self, value: Value, address: Value) -> None:
        self.builder.store(value.v, self.builder.inttoptr(address.v, ir.PointerType(value.v.type)), align=4)

    def store_doubles(self, value: Value, address: Value) -> None:
        self._store_at(value, address)

    def store_words(self, value: Value, address: Value) -> None:
        """Integers of 32 bits."""
        self._store_at(value, address)

    def field(self, record: np.dtype[Any], address: Value, name: str) -> Value:
        """A field of a record: a signed integer (widened to 64 bits), or a double."""
        assert record.fields is not None
        type_, offset = record.fields[name][:2]
        kind = type_.kind + str(type_.itemsize)
        loaded = self.load_as(kind, address + offset)
        if kind[0] == "i" and kind != "i8":
            return Value(self.builder, self.builder.sext(loaded.v, I64))
        return loaded

    def label(self, labels: Value, row: Value) -> Value:
        """labels[row] of int32."""
        return Value(self.builder, self.builder.sext(self.load_as("i4", labels + row * 4).v, I64))

    def scratch(self, count: int) -> Value:
        """The address of room for `count` numbers of T, for as long as the kernel runs."""
        place = cgutils.alloca_once(self.builder, ir.ArrayType(self.T, count))
        place.align = 64
        return Value(self.builder, self.builder.ptrtoint(place, I64))

    def scratch_integers(self, count: int) -> Value:
        """The same for `count` integers."""
        place = cgutils.alloca_once(self.builder, ir.ArrayType(I64, count))
        return Value(self.builder, self.builder.ptrtoint(place, I64))

    def store_integer(self, value: Value, address: Value) -> None:
        self.builder.store(value.v, self.builder.inttoptr(address.v, ir.PointerType(I64)))

    def call_back(self, function: Value, a: Value, b: Value, n: Value, mode: int) -> None:
        """A user's own function, compiled for blocks: void f(T *a, T *b, int64 n, int64 mode)."""
        pointer = ir.PointerType(self.T)
        type_ = ir.FunctionType(ir.VoidType(), [pointer, pointer, I64, I64])
        places = [self.builder.inttoptr(x.v, pointer) for x in (a, b)]
        callee = self.builder.inttoptr(function.v, ir.PointerType(type_))
        self.builder.call(callee, [*places, n.v, ir.Constant(I64, mode)])

    def prefetch(self, address: Value) -> None:
        byte = ir.PointerType(ir.IntType(8))
        type_ = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
        function = self.builder.module.declare_intrinsic("llvm.prefetch", [byte], type_)
        flags = [ir.Constant(I32, n) for n in (0, 3, 1)]  # to read, to keep, data
        self.builder.call(function, [self.builder.inttoptr(address.v, byte), *flags])

    # ---- control --------------------------------------------------------------------------------------------------

    @contextmanager
    def loop(self, start: Value | int, stop: Value | int, step: int = 1, unroll: bool = True) -> Iterator[Value]:
        """As over range(start, stop, step); with `unroll` False LLVM leaves the loop as it is."""
        builder = self.builder
        begin = start if isinstance(start, Value) else self.integer(start)
        end = stop if isinstance(stop, Value) else self.integer(stop)
        before = builder.block
        head, body, after = (builder.append_basic_block(name) for name in ("head", "body", "after"))
        builder.branch(head)
        builder.position_at_end(head)
        i = builder.phi(I64)
        i.add_incoming(begin.v, before)
        builder.cbranch(builder.icmp_signed("<", i, end.v), body, after)
        builder.position_at_end(body)
        yield Value(builder, i)
        i.add_incoming(builder.add(i, ir.Constant(I64, step)), builder.block)
        back = builder.branch(head)
        if not unroll:
            module = builder.module
            mark = module.add_metadata([ir.MetaDataString(module, "llvm.loop.unroll.disable")])
            name = module.add_metadata([mark, ir.MetaDataString(module, head.name)])
            name.operands = (name, mark)  # a loop's name begins with itself
            back.set_metadata("llvm.loop", name)
        builder.position_at_end(after)

    def spans(self, n: Value, each: Callable[[Value, int], None], most: int | None = None) -> None:
        """each(at, count) over n >= 0 numbers: vectors of `most` (rb), then of half as many, and so on to one."""
        count = most or self.rb
        whole = n & -count
        with self.loop(0, whole, count) as i:
            each(i, count)
        done = self.variable(whole)
        while count := count // 2:
            with self.when(n - done.get() >= count):
                each(done.get(), count)
                done.set(done.get() + count)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        with self.builder.if_then(condition.v):
            yield

    @contextmanager
    def either(self, condition: Value) -> Iterator[tuple[Any, Any]]:
        """With e.either(condition) as (yes, no): with yes: ...; with no: ..."""
        with self.builder.if_else(condition.v) as branches:
            yield branches

    @contextmanager
    def choice(self, number: Value) -> Iterator[Any]:
        """With e.choice(number) as case: with case(3): ...; with case(5): ..."""
        builder = self.builder
        after = builder.append_basic_block("chosen")
        switch = builder.switch(number.v, after)

        @contextmanager
        def case(value: int) -> Iterator[None]:
            block = builder.append_basic_block(f"case{value}")
            switch.add_case(ir.Constant(I64, value), block)
            builder.position_at_end(block)
            yield
            builder.branch(after)

        yield case
        builder.position_at_end(after)
