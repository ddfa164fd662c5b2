"""The machine's own operations, for compiled Python: memory by address, calls by address, atomics, the clock.

Addresses are int64. A record at an address is read and written by the names of its fields.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .records import ARGUMENTS

jit = partial(numba.njit, error_model="numpy", nogil=True)

_I8, _I32, _I64, _F32, _F64 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType()
_BYTES = ir.PointerType(_I8)


@intrinsic
def at(typing_context: Any, dtype: Any, address: Any) -> Any:
    """The record of type `dtype` at an address."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[1], context.get_value_type(signature.return_type))

    return dtype.dtype(dtype, types.int64), codegen


@intrinsic
def item(typing_context: Any, dtype: Any, base: Any, i: Any) -> Any:
    """Record i of an array of records of type `dtype`."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = builder.add(values[1], builder.mul(values[2], ir.Constant(_I64, dtype.dtype.size)))
        return builder.inttoptr(place, context.get_value_type(signature.return_type))

    return dtype.dtype(dtype, types.int64, types.int64), codegen


@intrinsic
def address(typing_context: Any, record: Any) -> Any:
    """Where a record stands."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.ptrtoint(values[0], _I64)

    return types.int64(record), codegen


@intrinsic
def call(typing_context: Any, function: Any, arguments: Any) -> Any:
    """Calls a kernel by its address, with a tuple of integers; those it doesn't get are 0."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        given = [builder.extract_value(values[1], i) for i in range(len(arguments))]
        given = [context.cast(builder, v, t, types.int64) for v, t in zip(given, arguments, strict=True)]
        given += [ir.Constant(_I64, 0)] * (ARGUMENTS - len(given))
        type_ = ir.FunctionType(ir.VoidType(), [_I64] * ARGUMENTS)
        builder.call(builder.inttoptr(values[0], ir.PointerType(type_)), given)
        return context.get_dummy_value()

    return types.void(types.int64, arguments), codegen


# ---- memory --------------------------------------------------------------------------------------------------------


def _loader(element: Any, extend: str) -> Any:
    returned = types.float64 if extend in ("fpext", "") and not isinstance(element, ir.IntType) else types.int64

    @intrinsic
    def load(typing_context: Any, where: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            found = builder.load(builder.inttoptr(values[0], ir.PointerType(element)), align=1)
            if not extend:
                return found
            return getattr(builder, extend)(found, _F64 if extend == "fpext" else _I64)

        return returned(types.int64), codegen

    return load


load_u1, load_u2, load_i4 = _loader(_I8, "zext"), _loader(ir.IntType(16), "zext"), _loader(_I32, "sext")
load_i8, load_f4, load_f8 = _loader(_I64, ""), _loader(_F32, "fpext"), _loader(_F64, "")


def _storer(element: Any, shorten: str) -> Any:
    taken = types.int64 if isinstance(element, ir.IntType) else types.float64

    @intrinsic
    def store(typing_context: Any, where: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            v = getattr(builder, shorten)(values[1], element) if shorten else values[1]
            builder.store(v, builder.inttoptr(values[0], ir.PointerType(element)), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, taken), codegen

    return store


store_i4, store_i8 = _storer(_I32, "trunc"), _storer(_I64, "")
store_f4, store_f8 = _storer(_F32, "fptrunc"), _storer(_F64, "")


@jit
def get(where, i, size):
    """Element i of numbers of `size` bytes, as a double."""
    return load_f8(where + 8 * i) if size == 8 else load_f4(where + 4 * i)


@jit
def put(where, i, value, size):
    """Sets it."""
    if size == 8:
        store_f8(where + 8 * i, value)
    else:
        store_f4(where + 4 * i, value)


def _prefetcher(write: int, locality: int) -> Any:
    @intrinsic
    def prefetch(typing_context: Any, where: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            type_ = ir.FunctionType(ir.VoidType(), [_BYTES, _I32, _I32, _I32])
            function = cgutils.get_or_insert_function(builder.module, type_, "llvm.prefetch.p0")
            flags = [ir.Constant(_I32, n) for n in (write, locality, 1)]
            builder.call(function, [builder.inttoptr(values[0], _BYTES), *flags])
            return context.get_dummy_value()

        return types.void(types.int64), codegen

    return prefetch


prefetch_rows, prefetch_write = _prefetcher(0, 2), _prefetcher(1, 3)


@intrinsic
def claim_line(typing_context: Any, where: Any) -> Any:
    """Takes the line of `where` from other cores, which have read it: a word is written as it stands. See fastmb.h."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = builder.inttoptr(values[0], ir.PointerType(_I32))
        builder.store_atomic(builder.load_atomic(place, "monotonic", 4), place, "monotonic", 4)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def clear_line(typing_context: Any, where: Any) -> Any:
    """The same where nothing that is there counts any more: a zero waits for nothing."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = builder.inttoptr(values[0], ir.PointerType(_I32))
        builder.store_atomic(ir.Constant(_I32, 0), place, "monotonic", 4)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


# ---- atomics -------------------------------------------------------------------------------------------------------


def _atomic(emit: Callable[..., Any], n: int) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        found = emit(builder, builder.inttoptr(values[0], ir.PointerType(_I64)), *values[1:])
        return context.get_dummy_value() if found is None else found

    def typed(*arguments: Any) -> Any:
        returned = types.void if n == 2 and emit is _store else types.int64
        return returned(*[types.int64] * n), codegen

    if n == 1:
        return intrinsic(lambda typing_context, where: typed(typing_context, where))
    if n == 2:
        return intrinsic(lambda typing_context, where, value: typed(typing_context, where, value))
    return intrinsic(lambda typing_context, where, old, new: typed(typing_context, where, old, new))


def _store(builder: Any, where: Any, value: Any) -> None:
    builder.store_atomic(value, where, "release", 8)


#: (address), acquiring; (address, value), releasing; (address, count), the old value; (address, value), the old
#: value; (address, old, new), the old value, `new` being stored if it was `old`.
atomic_load = _atomic(lambda builder, where: builder.load_atomic(where, "acquire", 8), 1)
atomic_store = _atomic(_store, 2)
atomic_add = _atomic(lambda builder, where, n: builder.atomic_rmw("add", where, n, "acq_rel"), 2)
atomic_swap = _atomic(lambda builder, where, n: builder.atomic_rmw("xchg", where, n, "acq_rel"), 2)
atomic_exchange = _atomic(
    lambda builder, where, old, new: builder.extract_value(builder.cmpxchg(where, old, new, "acq_rel", "acquire"), 0), 3
)

# ---- the operating system and the processor ------------------------------------------------------------------------


def _external(builder: Any, name: str, returned: Any, *arguments: Any) -> Any:
    type_ = ir.FunctionType(returned, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, type_, name), arguments)


def _timespec(builder: Any, nanoseconds: int = 0) -> Any:
    place = cgutils.alloca_once(builder, ir.ArrayType(_I64, 2))
    builder.store(ir.Constant(ir.ArrayType(_I64, 2), [0, nanoseconds]), place)
    return place


@intrinsic
def now(typing_context: Any) -> Any:
    """The monotonic clock, in seconds: that of `time.monotonic`."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = _timespec(builder)
        _external(
            builder, "clock_gettime", _I32, ir.Constant(_I32, time.CLOCK_MONOTONIC), builder.bitcast(place, _BYTES)
        )
        both = builder.load(place)
        seconds, rest = (builder.sitofp(builder.extract_value(both, i), _F64) for i in range(2))
        return builder.fadd(seconds, builder.fmul(rest, ir.Constant(_F64, 1e-9)))

    return types.float64(), codegen


@intrinsic
def give_way(typing_context: Any) -> Any:
    """Another thread may have this processor."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        _external(builder, "sched_yield", _I32)
        return context.get_dummy_value()

    return types.void(), codegen


def _semaphore(name: str, *rest: int) -> Any:
    @intrinsic
    def semaphore(typing_context: Any, where: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            numbers = [ir.Constant(_I32, n) for n in rest]
            _external(builder, name, _I32, builder.inttoptr(values[0], _BYTES), *numbers)
            return context.get_dummy_value()

        return types.void(types.int64), codegen

    return semaphore


#: A semaphore at an address, up to 64 bytes: made, with 0 in it; waited for, unless a signal comes; one added.
make_semaphore, sleep, wake = _semaphore("sem_init", 0, 0), _semaphore("sem_wait"), _semaphore("sem_post")


@intrinsic
def nap(typing_context: Any) -> Any:
    """Sleeps 50 microseconds."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = builder.bitcast(_timespec(builder, 50_000), _BYTES)
        _external(builder, "nanosleep", _I32, place, ir.Constant(_BYTES, None))
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def entropy(typing_context: Any, where: Any, size: Any) -> Any:
    """Random bytes of the operating system, up to 256; 0 if all went well."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        found = _external(builder, "getentropy", _I32, builder.inttoptr(values[0], _BYTES), values[1])
        return builder.sext(found, _I64)

    return types.int64(types.int64, types.int64), codegen


def _x86(builder: Any) -> bool:
    return builder.module.triple.startswith(("x86_64", "i686"))


@intrinsic
def pause(typing_context: Any) -> Any:
    """A moment's rest inside a loop that waits."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        if _x86(builder):
            _external(builder, "llvm.x86.sse2.pause", ir.VoidType())
        else:
            _external(builder, "llvm.aarch64.hint", ir.VoidType(), ir.Constant(_I32, 1))
        return context.get_dummy_value()

    return types.void(), codegen


_LINUX = sys.platform == "linux"
CPU_SET = 128  # bytes of a set of processors


@intrinsic
def processor(typing_context: Any) -> Any:
    """The number of the processor that this thread runs on, or -1."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        if not _LINUX:
            return ir.Constant(_I64, -1)
        return builder.sext(_external(builder, "sched_getcpu", _I32), _I64)

    return types.int64(), codegen


def _affinity(name: str) -> Any:
    @intrinsic
    def affinity(typing_context: Any, where: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            if not _LINUX:
                return ir.Constant(_I64, -1)
            where = builder.inttoptr(values[0], _BYTES)
            found = _external(builder, name, _I32, ir.Constant(_I32, 0), ir.Constant(_I64, CPU_SET), where)
            return builder.sext(found, _I64)

        return types.int64(types.int64), codegen

    return affinity


#: The processors that this thread may run on, CPU_SET bytes; 0 if all went well.
get_affinity, set_affinity = _affinity("sched_getaffinity"), _affinity("sched_setaffinity")


def _register(builder: Any, place: Any, name: str) -> None:
    _external(builder, name, ir.VoidType(), builder.bitcast(place, _BYTES))


@intrinsic
def flush_denormals(typing_context: Any) -> Any:
    """Makes denormals zero in this thread; returns what `restore_denormals` takes."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        if not _x86(builder):
            old = _external(builder, "llvm.aarch64.get.fpcr", _I64)
            _external(builder, "llvm.aarch64.set.fpcr", ir.VoidType(), builder.or_(old, ir.Constant(_I64, 1 << 24)))
            return old
        place = cgutils.alloca_once(builder, _I32)
        _register(builder, place, "llvm.x86.sse.stmxcsr")
        old = builder.load(place)
        builder.store(builder.or_(old, ir.Constant(_I32, 0x8040)), place)  # FTZ and DAZ
        _register(builder, place, "llvm.x86.sse.ldmxcsr")
        return builder.zext(old, _I64)

    return types.int64(), codegen


@intrinsic
def restore_denormals(typing_context: Any, old: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        if _x86(builder):
            place = cgutils.alloca_once(builder, _I32)
            builder.store(builder.trunc(values[0], _I32), place)
            _register(builder, place, "llvm.x86.sse.ldmxcsr")
        else:
            _external(builder, "llvm.aarch64.set.fpcr", ir.VoidType(), values[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen
