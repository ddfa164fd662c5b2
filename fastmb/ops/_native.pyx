# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The native backend: loops and threads over the kernels of csrc/ops.h.

A call with plain arguments is checked here in a few comparisons; any other goes through `_check`, which raises the
error or says what is to be done. Products are in native_products.pxi, everything elementwise in native_spans.pxi.

Work is cut into jobs by rules that look at shapes and the number of threads; who does a job, and how it was cut,
changes no bit.
"""

import numpy as np

cimport numpy as cnp
from cython.parallel cimport prange
from libc.stdint cimport int32_t, int64_t
from libc.stdlib cimport free
from libc.string cimport memset

from ..executors.kernels cimport (FMB_CROSS_ENTROPY, FMB_F32, FMB_F64, fmb_fp_enter, fmb_fp_leave, fmb_kernels,
                                  fmb_label, fmb_loss_spec, fmb_source, fmb_take, omp_get_thread_num, posix_memalign)
from ..executors.native cimport kernels_for
from .kernels cimport fmb_ops, fmb_ops_for, fmb_product

from .. import modules
from .. import threads as _threads
from ..executors import native as _executor
from . import _check, _numpy

cnp.import_array()

cdef dict ACTIVATIONS = {name: i for i, name in enumerate(_executor.ACTIVATIONS)}
cdef dict UPDATES = {name: i for i, name in enumerate(_executor.UPDATES)}
cdef double FLOPS_PER_THREAD = _threads.CALL_FLOPS_PER_THREAD

cdef const fmb_ops *ops[2]              # by dtype: float32, float64
cdef const fmb_kernels *kernels[2]


def use_isa(name):
    """Go on with the kernels of this instruction set."""
    cdef int i, isa = _executor.ISAS.index(name)
    for i in range(2):
        kernels[i] = kernels_for(isa, i)
        ops[i] = fmb_ops_for(isa, i)


use_isa(_executor.isa())


cdef inline int _dtype(cnp.ndarray x) noexcept:
    return FMB_F64 if cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT64 else FMB_F32


cdef int forced = 0


def force_threads(int n):
    """For tests: so many threads for every call that has as many jobs; 0 puts the rule back."""
    global forced
    forced = n


cdef inline int _threads_for(double flops) except -1:
    """Threads for a call of so many operations. Small ones don't ask: asking takes longer than they do."""
    if forced:
        return forced
    if flops < 2 * FLOPS_PER_THREAD:
        return 1
    return _threads.resolve(None, flops, FLOPS_PER_THREAD)


cdef inline bint _plain(object x, int type_num) noexcept:
    """Whether x is an array of this type, native byte order."""
    return (cnp.PyArray_CheckExact(x) and cnp.PyArray_TYPE(<cnp.ndarray> x) == type_num
            and cnp.PyArray_ISNOTSWAPPED(<cnp.ndarray> x))


cdef inline bint _apart(cnp.ndarray x, cnp.ndarray y) noexcept:
    """Whether two contiguous arrays share no byte."""
    cdef char *p = <char *> cnp.PyArray_DATA(x)
    cdef char *q = <char *> cnp.PyArray_DATA(y)
    return p + cnp.PyArray_NBYTES(x) <= q or q + cnp.PyArray_NBYTES(y) <= p


# ---- scratch -----------------------------------------------------------------------------------------------------

cdef class Scratch:
    """Memory that calls use one after the other, so that none has to ask the system for it."""

    cdef char *memory
    cdef int64_t bytes

    def __cinit__(self):
        self.memory = NULL
        self.bytes = 0

    def __dealloc__(self):
        free(self.memory)

    cdef int reserve(self, int64_t bytes) except -1:
        cdef void *memory = NULL
        if bytes > self.bytes:
            if posix_memalign(&memory, 4096, bytes) != 0:
                raise MemoryError(f"{bytes} bytes of scratch memory")
            free(self.memory)
            self.memory = <char *> memory
            self.bytes = bytes
        return 0


cdef list pool = []     # of Scratch, those that no call uses


cdef Scratch _borrow(int64_t bytes):
    cdef Scratch scratch = pool.pop() if pool else Scratch()
    scratch.reserve(bytes)
    return scratch


include "native_products.pxi"
include "native_spans.pxi"
