"""csrc/ops.h as Cython sees it."""

from libc.stdint cimport int64_t

cdef extern from "ops.h" nogil:
    ctypedef struct fmb_product:
        int64_t m, n, k
        int64_t a_m, a_k, b_k, b_n, c_m, c_n, bias_m, bias_n
        int64_t a_next, b_next, c_next, bias_next
        const char *a
        const char *b
        const char *bias
        char *c
        double alpha, beta
        int activation
        double value
        int scattered
    ctypedef struct fmb_ops:
        int isa_rows, isa_columns
        int64_t scratch
        void (*product)(const fmb_product *p, int64_t count, int64_t r0, int64_t r1, int64_t c0, int64_t c1,
                        void *scratch) noexcept nogil
        void (*forward)(int kind, double value, const void *z, void *a, int64_t n) noexcept nogil
        void (*backward)(int kind, double value, int from_output, const void *da, const void *x, void *out, int64_t n,
                         int stream) noexcept nogil
        void (*reduce)(const char *stack, int64_t stride, int64_t S, const void *weights, double divisor, void *out,
                       int64_t n, int stream) noexcept nogil
        void (*scale)(const void *x, double factor, void *out, int64_t n) noexcept nogil
        void (*collect)(const char *x, int64_t stride, void *out, int64_t n) noexcept nogil
        void (*spread)(const void *x, char *out, int64_t stride, int64_t n) noexcept nogil
    const fmb_ops *fmb_ops_for(int isa, int dtype)
