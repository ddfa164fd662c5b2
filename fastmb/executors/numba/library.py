"""Compiled code by name: kernels, and the entries of the sweeps, as addresses of C functions.

Each is a `cfunc` of its own, compiled when first asked for and kept in Numba's cache on disk. All of them have one
signature, ARGUMENTS int64 in and nothing out; an emitter, or an entry, takes as many as it needs.

The cache. Numba looks whether the file that defines a function has changed, not the files of what it calls. So every
compiled function closes over a string, which is part of Numba's key: it names the kernel and ends in a digest of all
source files of this package. Whatever is edited, old code isn't found any more. The string is the function's name,
too: Numba numbers the code of functions of one name in one file, which it doesn't lock, so that two processes could
give two kernels the same number.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from llvmlite import binding, ir
from numba import types
from numba.core.compiler_lock import global_compiler_lock
from numba.extending import intrinsic

from ... import _cached
from . import activations, columns, dropout, few, gemm, gradients, layout, losses, norms, updates
from .applied import apply_stored
from .emit import Emitter, Value
from .inference import infer
from .records import ARGUMENTS
from .sweeps import train
from .sync import dismiss, lead, serve
from .target import Target

SIGNATURE = types.void(*[types.int64] * ARGUMENTS)

#: Kernels by name; a key's further words are their first arguments.
KERNELS: dict[str, Callable[..., None]] = {
    "activation": activations.activation,
    "dropout": dropout.dropout,
    "loss": losses.loss,
    "custom": activations.custom,
    "update": updates.update,
    "average": updates.average,
    "gather": layout.gather,
    "scatter": layout.scatter,
    "backward": layout.backward,
    "gemm": gemm.gemm,
    "few": few.few,
    "row_squares": gradients.row_squares,
    "squares": gradients.squares,
    "total": gradients.total,
    "scale_rows": gradients.scale_rows,
    "limit": gradients.limit,
    "outer": gradients.outer,
    "noise": gradients.noise,
    "normalize": norms.normalize,
    "normalize_backward": norms.normalize_backward,
    "row_moments": norms.row_moments,
    "row_means": norms.row_means,
    "row_terms": norms.row_terms,
    "prelu": norms.prelu,
    "prelu_backward": norms.prelu_backward,
    "add": norms.add,
    "multiply": norms.multiply,
    "column_moments": columns.column_moments,
    "column_sums": columns.column_sums,
}
#: How many arguments an emitter takes beside its words and the `Emitter`.
TAKES = {
    "activation": 7,
    "dropout": 7,
    "loss": 8,
    "update": 10,
    "gather": 5,
    "scatter": 5,
    "backward": 6,
    "gemm": 7,
    "few": 7,
    "custom": 7,
    "average": 6,
    "row_squares": 4,
    "squares": 3,
    "total": 3,
    "scale_rows": 5,
    "limit": 3,
    "outer": 6,
    "noise": 8,
    "normalize": 8,
    "normalize_backward": 10,
    "row_moments": 5,
    "row_means": 8,
    "row_terms": 6,
    "prelu": 6,
    "prelu_backward": 7,
    "add": 3,
    "multiply": 4,
    "column_moments": 8,
    "column_sums": 9,
}


def _digest() -> str:
    """Of all source files that compiled code is made from, and of the processor that it is made for."""
    found = hashlib.sha256(f"{numba.__version__} {binding.get_host_cpu_name()}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


DIGEST = _digest()  # now: the files may change while this process runs what it has imported


@intrinsic
def _emit(typing_context: Any, key: Any, arguments: Any) -> Any:
    """The kernel that the string `key` names."""
    if not isinstance(key, types.StringLiteral):
        return None  # Numba asks again, with the string itself
    words, isa, itemsize, _ = key.literal_value.split("|")
    name, *options = words.split()
    NOTICE.compiling()

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        emitter = Emitter(builder, Target(isa, int(itemsize)))
        given = [Value(builder, builder.extract_value(values[1], i)) for i in range(TAKES[name])]
        KERNELS[name](*options, emitter, *given)
        return context.get_dummy_value()

    return types.void(key, arguments), codegen


def _kernel(key: str) -> Callable[..., None]:
    def kernel(a, b, c, d, e, f, g, h, i, j):
        _emit(key, (a, b, c, d, e, f, g, h, i, j))

    return kernel


@intrinsic
def _stamp(typing_context: Any, key: Any) -> Any:
    """Nothing; an entry says with it which sources it was made from."""
    NOTICE.compiling()
    return types.void(key), lambda context, *_: context.get_dummy_value()


# What an entry calls must be a global: Numba's key for what a function closes over would differ in every process.


def _train(key: str) -> Callable[..., None]:
    def entry(engine, run, tid, threads, e, f, g, h, i, j):
        _stamp(key)
        train(engine, run, tid, threads)

    return entry


def _apply(key: str) -> Callable[..., None]:
    def entry(engine, run, tid, threads, e, f, g, h, i, j):
        _stamp(key)
        apply_stored(engine, run, tid, threads)

    return entry


def _infer(key: str) -> Callable[..., None]:
    def entry(engine, run, tid, threads, e, f, g, h, i, j):
        _stamp(key)
        infer(engine, run, tid, threads)

    return entry


def _serve(key: str) -> Callable[..., None]:
    def entry(seat, b, c, d, e, f, g, h, i, j):
        _stamp(key)
        serve(seat)

    return entry


def _lead(key: str) -> Callable[..., None]:
    def entry(seats, threads, function, engine, run, f, g, h, i, j):
        _stamp(key)
        lead(seats, threads, function, engine, run)

    return entry


def _dismiss(key: str) -> Callable[..., None]:
    def entry(seats, threads, c, d, e, f, g, h, i, j):
        _stamp(key)
        dismiss(seats, threads)

    return entry


_ENTRIES = {"train": _train, "apply": _apply, "infer": _infer, "serve": _serve, "lead": _lead, "dismiss": _dismiss}


class Notice:
    """Says once that code is being compiled, and how long it took; what comes from the cache passes in silence."""

    def __init__(self) -> None:
        self.said = False
        self.started: float | None = None

    def compiling(self) -> None:
        if not self.said:
            self.said, self.started = True, time.perf_counter()
            later = "; later processes take them from its cache" if _cached.keeps else ""
            print(f"fastmb: compiling kernels with Numba{later}", file=sys.stderr)

    def done(self) -> None:
        if self.started is not None:
            seconds, self.started = time.perf_counter() - self.started, None
            print(f"fastmb: compiled in {seconds:.1f} s", file=sys.stderr)


NOTICE = Notice()
_compiled: dict[str, Any] = {}  # keeps the machine code
if hasattr(os, "register_at_fork"):  # a child has no thread that would end what is being compiled
    release = global_compiler_lock.release
    os.register_at_fork(before=global_compiler_lock.acquire, after_in_parent=release, after_in_child=release)


def _address(key: str, make: Callable[[str], Callable[..., None]]) -> int:
    if key not in _compiled:
        with global_compiler_lock:
            if key not in _compiled:
                function = make(key)
                function.__qualname__ = re.sub(r"\W+", ".", key)
                _compiled[key] = _cached.cached(numba.cfunc, SIGNATURE)(function)
    return int(_compiled[key].address)


def kernel(words: str, target: Target) -> int:
    """The address of a kernel, such as "activation gelu none"."""
    return _address(f"{words}|{target.isa}|{target.itemsize}|{DIGEST}", _kernel)


def entry(name: str) -> int:
    """The address of an entry: "train", "infer", or what threads are run with."""
    return _address(f"{name}|||{DIGEST}", _ENTRIES[name])


def function(address: int) -> Callable[..., None]:
    """A Python function of ARGUMENTS integers that runs what is at an address, without the GIL."""
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * ARGUMENTS)(address)
