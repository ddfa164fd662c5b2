/* The kernels of fastmb.ops: what one core does for a call of a function on the user's own arrays.
 *
 * Unlike those of fastmb.h they take rows as NumPy lays them out, with strides in bytes. */
#ifndef FASTMB_OPS_H
#define FASTMB_OPS_H

#include "fastmb.h"

/* A product of matrices: C = act(alpha A B + beta C + bias), A [m][k], B [k][n], C [m][n], `count` of them one after
 * the other. Strides are in bytes, those of the inputs any; of C, c_n is sizeof(T) unless `scattered`. Element (i, j) of
 * the bias is at bias + i * bias_m + j * bias_n; bias_n is sizeof(T), or 0 for one value a row. */
typedef struct {
    int64_t m, n, k;
    int64_t a_m, a_k, b_k, b_n, c_m, c_n, bias_m, bias_n;
    int64_t a_next, b_next, c_next, bias_next; /* from one product to the next */
    const char *a, *b, *bias;                  /* bias NULL: none */
    char *c;
    double alpha, beta;
    enum fmb_activation activation;
    double value;
    int scattered;
} fmb_product;

/* How large the pieces of a product are: fixed per instruction set, so that no bit depends on who works. */
typedef struct {
    int isa_rows, isa_columns; /* of a tile */
    int64_t scratch;           /* bytes that `product` needs */

    /* Rows r0 .. r1 - 1 and columns c0 .. c1 - 1 of `count` products. `scratch`: 64-byte aligned. */
    void (*product)(const fmb_product *p, int64_t count, int64_t r0, int64_t r1, int64_t c0, int64_t c1, void *scratch);

    /* a = f(z) on n contiguous values; a may be z. */
    void (*forward)(enum fmb_activation kind, double value, const void *z, void *a, int64_t n);

    /* out = da * f'(z) on n contiguous values, from x = z, or from x = f(z) where `from_output`. out may be da or x.
     * `stream`: out is not to stay in the cache, and overlaps neither. */
    void (*backward)(enum fmb_activation kind, double value, int from_output, const void *da, const void *x, void *out,
                     int64_t n, int stream);

    /* out[i] = (sum over s < S, in order, of weights[s] * stack[s * stride + i]) / divisor, for n contiguous values;
     * `weights` NULL: ones. `stride` in bytes. */
    void (*reduce)(const char *stack, int64_t stride, int64_t S, const void *weights, double divisor, void *out,
                   int64_t n, int stream);

    /* out = x * factor on n contiguous values; out may be x. */
    void (*scale)(const void *x, double factor, void *out, int64_t n);

    /* n values `stride` bytes apart to contiguous ones, and back. */
    void (*collect)(const char *x, int64_t stride, void *out, int64_t n);
    void (*spread)(const void *x, char *out, int64_t stride, int64_t n);
} fmb_ops;

/* The table for an instruction set, which the CPU must have, and dtype. */
const fmb_ops *fmb_ops_for(enum fmb_isa isa, enum fmb_dtype dtype);

#endif
