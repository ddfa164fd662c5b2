/* What one core does to one block: the kernels that the native executor is made of.
 *
 * No threads, no allocation, no Python here. A kernel's body is written once, in a file *.inc, and compiled once for
 * each instruction set and dtype (isa.inc tells how); a table of function pointers per pair is what the executor sees.
 *
 * Shapes. A block is up to `rb` rows of a mini-batch, stored feature by feature: [feature][rb], contiguous, so that
 * vectors run over rows. Lanes beyond the block's last row hold finite values that nobody reads.
 */
#ifndef FASTMB_H
#define FASTMB_H

#include <stdint.h>
#include <string.h>

enum fmb_isa { FMB_V2, FMB_V3, FMB_V4, FMB_NEON, FMB_ISAS };
enum fmb_dtype { FMB_F32, FMB_F64 };

enum fmb_activation {
    FMB_IDENTITY, FMB_RELU, FMB_LEAKY_RELU, FMB_ELU, FMB_SELU, FMB_GELU, FMB_GELU_TANH, FMB_SILU, FMB_MISH,
    FMB_SOFTPLUS, FMB_TANH, FMB_SIGMOID
};

enum fmb_loss { FMB_CROSS_ENTROPY, FMB_BCE_WITH_LOGITS, FMB_MSE, FMB_MAE, FMB_HUBER, FMB_LINEAR, FMB_CUSTOM_LOSS };

/* A user's own function, compiled for blocks of T, elementwise and in place on n values. An activation: a = f(a), and
 * with FMB_SLOPE d = f'(a), with FMB_TIMES_SLOPE d *= f'(a); d may be NULL with FMB_VALUE. A loss: b = f(a, b), and
 * unless FMB_VALUE a = df/da. */
enum fmb_mode { FMB_VALUE, FMB_SLOPE, FMB_TIMES_SLOPE };
typedef void (*fmb_callback)(void *a, void *b, int64_t n, int64_t mode);

enum fmb_update {
    FMB_GRADIENT, FMB_ACCUMULATE, FMB_SGD, FMB_MOMENTUM, FMB_NESTEROV, FMB_ADAM, FMB_AMSGRAD, FMB_RMSPROP,
    FMB_RMSPROP_MOMENTUM, FMB_RMSPROP_CENTERED, FMB_RMSPROP_CENTERED_MOMENTUM, FMB_ADAGRAD, FMB_NADAM, FMB_RADAM,
    FMB_ADAMAX, FMB_ADADELTA, FMB_LION
};

/* What is going to be needed soon, as a product asks for it: with each k a cache line, `step` bytes after the one before. */
typedef struct fmb_ask {
    const char *at;
    int64_t step;
    const struct fmb_ask *next; /* in the next block of the sum, or NULL: on in all that follow */
} fmb_ask;

/* A product of tiles: C[m][v] (+)= sum over blocks, over k, of A[m][k] * B[k][v], each element one chain of fused
 * multiply-adds in the order of k. A is read element by element, at a[m * a_m + k * a_k]; B vector by vector, at
 * b[k * b_k + v]; block i of the sum starts at a + i * a_block and b + i * b_block. Strides are in elements. */
typedef struct {
    int64_t a_m, a_k, a_block;
    int64_t b_k, b_block;
    int64_t c_m;
    int64_t blocks, k, k_last; /* products in a block, and in the last one */
    const char *ask;           /* see fmb_ask; in the first block of the sum, */
    int64_t ask_step;
    const fmb_ask *asks;       /* in those that follow, or NULL */
    void *squares;             /* if not NULL, receives T[4] that add up to the sum of C's squares; vectors 1 or 2 */
} fmb_gemm;

/* The loss of one block. Row r of the block has output z[c * rb + r], c < n. */
typedef struct {
    enum fmb_loss kind;
    int64_t n;              /* outputs */
    int indices;            /* cross-entropy: class indices in `labels`, else rows in `target` */
    double smoothing;       /* cross-entropy: label smoothing */
    double delta;           /* huber */
    const void *weight;     /* T[n]: class weights (cross-entropy) or pos_weight (bce), or NULL for ones */
    fmb_callback function;  /* FMB_CUSTOM_LOSS: the loss of one output */
} fmb_loss_spec;

/* Where a column of a user's array lies: element (row, column) is at data + row * row_stride + column * col_stride
 * (bytes, any alignment), of type `type`: a NumPy kind character and size. */
enum fmb_type { FMB_I1, FMB_I2, FMB_I4, FMB_I8, FMB_U1, FMB_U2, FMB_U4, FMB_U8, FMB_H, FMB_F, FMB_D };
typedef struct {
    const char *data;
    int64_t row_stride, col_stride, columns;
    enum fmb_type type;
} fmb_source;

/* The integer in column 0 of row `row`, a class index. */
static inline int64_t fmb_label(const fmb_source *s, int64_t row)
{
    const char *p = s->data + row * s->row_stride;
    switch (s->type) {
        case FMB_I1: return (int8_t)*p;
        case FMB_U1: return (uint8_t)*p;
        case FMB_I2: { int16_t x; memcpy(&x, p, 2); return x; }
        case FMB_U2: { uint16_t x; memcpy(&x, p, 2); return x; }
        case FMB_I4: { int32_t x; memcpy(&x, p, 4); return x; }
        case FMB_U4: { uint32_t x; memcpy(&x, p, 4); return x; }
        default: { int64_t x; memcpy(&x, p, 8); return x; } /* of uint64, what is too large is negative */
    }
}

/* Rows first .. last - 1 of an order (NULL: of the set), the first from byte `at` on. */
typedef struct {
    int64_t first, last, at;
} fmb_cursor;

/* Asks for the next `lines` cache lines of rows that a later gather will read, so that they are near by then. */
static inline void fmb_prefetch_rows(const fmb_source *s, const int64_t *order, fmb_cursor *c, int64_t lines)
{
    const int64_t bytes = s->columns * s->col_stride;
    for (; lines > 0 && c->first < c->last; lines--) {
        __builtin_prefetch(s->data + (order ? order[c->first] : c->first) * s->row_stride + c->at, 0, 2);
        c->at += 64;
        if (c->at >= bytes) {
            c->at = 0;
            c->first++;
        }
    }
}

/* Asks for `rows` rows of `bytes` bytes that will be written, `stride` bytes apart. */
static inline void fmb_prefetch_tile(char *p, int64_t rows, int64_t bytes, int64_t stride)
{
    for (int64_t r = 0; r < rows; r++, p += stride)
        for (int64_t at = 0; at < bytes; at += 64)
            __builtin_prefetch(p + at, 1, 3);
    __asm__ __volatile__(""); /* or a function that does nothing else does nothing at all, and is left out */
}

/* Takes the lines of rows that are going to be written from other cores, which have read them: a word of each row's lines
 * is written as it stands. So few stores wait in the store buffer while a product goes on, where those of its results
 * would be waited for. Asking doesn't do it: after PREFETCHW a line that was here already is as shared as before (AMD
 * Zen 4). Nobody else may write these rows at the time. */
static inline void fmb_claim_tile(char *p, int64_t rows, int64_t bytes, int64_t stride)
{
    for (int64_t r = 0; r < rows; r++, p += stride)
        for (int64_t at = 0; at < bytes; at += 64) {
            int32_t *word = (int32_t *)(p + at);
            __atomic_store_n(word, __atomic_load_n(word, __ATOMIC_RELAXED), __ATOMIC_RELAXED);
        }
}

/* The same where nothing that is there counts any more: a zero needn't wait for the line, as what stands in it would. */
static inline void fmb_clear_tile(char *p, int64_t rows, int64_t bytes, int64_t stride)
{
    for (int64_t r = 0; r < rows; r++, p += stride)
        for (int64_t at = 0; at < bytes; at += 64)
            __atomic_store_n((int32_t *)(p + at), 0, __ATOMIC_RELAXED);
}

/* A normalisation: what is subtracted and multiplied by, of a feature or of a row of the block; NULL weight: 1, bias: 0. */
typedef struct {
    const void *mean, *rstd; /* T[n] if by_feature, else T[rb] */
    const void *weight, *bias; /* T[n] */
    int by_feature;
} fmb_norm;

/* The rows of a mini-batch in blocks: where the next block of x, of dz and of rows' statistics is, in elements; rows of a
 * block (rb or lanes), and of all blocks together. */
typedef struct {
    int64_t x_block, dz_block, stats_block, block_rows, rows;
} fmb_rows;

/* The kernels of one instruction set and dtype (T is float or double). */
typedef struct {
    int rb;    /* rows of a block: two vectors */
    int lanes; /* elements of a vector */
    int mr;    /* rows of the largest tile */

    /* The tile products: `gemm` has tiles of rows x (vectors * lanes), vectors 1 or 2, rows 1 .. mr; or 4
     * and rows up to mr / 2; or 8 and rows up to mr / 4. With `load` the chain goes on from what C holds, else it starts at 0. */
    void (*gemm)(const fmb_gemm *g, int rows, int vectors, int load, const void *a, const void *b, void *c);

    /* The data gradient of `rows` <= few_rows rows of a block: dx[i][r] = sum over o < k of w[i * stride + o] dz[o][r], the
     * chains of `gemm`, i < n, a multiple of `lanes`; dx and dz are blocks [.][rb], of dx the first vectors are written. */
    int few_rows;
    void (*few)(const void *w, int64_t stride, int64_t n, int64_t k, int rows, const void *dz, void *dx);

    /* k rows x n columns of weights, a row every `stride` elements, for tiles of `mr` columns: in panels, [row][mr] each, one
     * every `panel` elements. The first column is column `first` < mr of the first panel; nothing else is written. */
    void (*pack)(const void *w, int64_t stride, int64_t k, int64_t n, int first, void *out, int64_t panel);

    /* `steps` rounds of 2 mr independent multiply-adds on registers alone, 4 mr `lanes` operations each: the machine's
     * peak. `out` receives a vector, so that nothing is left out. */
    void (*peak)(int64_t steps, void *out);

    /* z -> f(z) in place on n contiguous values. `d`: if NULL, inference, not written; else receives f'(z) when
     * `first`, and is multiplied by f'(z) when not (an earlier operation of the same stage wrote it). */
    void (*activation)(enum fmb_activation kind, double value, void *a, void *d, int64_t n, int first);

    /* Dropout of a block [n][rb]: a *= mask, d = mask or d *= mask (d NULL: left out); mask is 0 or 1/(1-p). `threshold` =
     * floor(p 2^32), `scale` = 1/(1-p). Row r of the block is row `row` + r of the mini-batch, feature j is unit `unit` + j
     * of the layer; `unit` is a multiple of 4. */
    void (*dropout)(uint64_t seed, uint64_t t, int index, int64_t row, int64_t unit, uint32_t threshold, double scale,
                    void *a, void *d, int64_t n, int first);

    /* The loss of `rows` rows. In: z [n][rb]; labels [rb] or target T[n][rb]; s T[rb], the rows' sample weights divided by
     * the mini-batch's sum of weights (0 beyond `rows`). Out: dz T[n][rb] = s * dl/dz, unless dz is NULL (dz may be z);
     * loss T[rb], the rows' own losses l_i (class weights in, sample weights not). dz of lanes beyond `rows` is 0. */
    void (*loss)(const fmb_loss_spec *spec, int rows, const void *z, const int32_t *labels, const void *target,
                 const void *s, void *dz, void *loss);

    /* The optimiser's update of rows x n weights w, a row every `stride` elements (of the states too), whose gradients g
     * stand every `g_stride`; s0, s1, s2 are its states (NULL where it has fewer), coef its coefficients of this step
     * already rounded to T. FMB_GRADIENT: s0 = g; FMB_ACCUMULATE: s0 += g. */
    void (*update)(enum fmb_update kind, const void *coef, void *w, void *s0, void *s1, void *s2, const void *g,
                   int64_t rows, int64_t n, int64_t stride, int64_t g_stride);

    /* The same for rows x n contiguous weights and the gradient of a single row of a mini-batch, x[r * rb] dz_j, j in
     * panels as `backward` lays them out. */
    void (*update_outer)(enum fmb_update kind, const void *coef, void *w, void *s0, void *s1, void *s2, const void *x,
                         const void *dz, int64_t panel_stride, int64_t rows, int64_t n);

    /* A running average a of rows x n weights w, a row of both every `stride` elements: a += weight (w - a). */
    void (*average)(double weight, const void *w, void *a, int64_t rows, int64_t n, int64_t stride);

    /* Rows of a user's array into a block: out[c * rb + r] = T(source(index[r], c)) * scale, r < rows; lanes beyond
     * `rows` become 0. `index` NULL stands for first, first + 1, ... */
    void (*gather)(const fmb_source *source, const int64_t *index, int64_t first, int rows, double scale, void *out);

    /* The way back of the gradient through a stage's activation, and its transposition: dz = da * d, elementwise on
     * [n][rb] (d NULL: dz = da; `relu`: d holds the outputs a, and dz = da where a > 0, else 0). dz is written in place of
     * da when `keep`; and in every case to `panels`, for the weight gradient: panel p holds features p * pw ..,
     * panels[p * panel_stride + r * pw + j], pw = 2 * lanes, r < rows; features beyond n are 0. */
    void (*backward)(void *da, const void *d, int relu, int keep, int64_t n, int rows, void *panels,
                     int64_t panel_stride);

    /* The first of the rows first .. last - 1 that holds a NaN or an infinity, or -1. */
    int64_t (*nonfinite)(const fmb_source *source, int64_t first, int64_t last);

    /* A block [n][rb] back to rows: out[r * out_stride + c], r < rows, strides in elements. */
    void (*scatter)(const void *block, int64_t n, int rows, void *out, int64_t out_stride);

    /* A block's normalisation, forward and back, features low .. high - 1 of x, out, dz, dx [n][rb]; norms.inc has the
     * formulas. dx may be dz. */
    void (*normalize)(const fmb_norm *norm, int64_t low, int64_t high, const void *x, void *out);
    void (*normalize_backward)(const fmb_norm *norm, const void *across, const void *along, int64_t low, int64_t high,
                               const void *x, const void *dz, void *dx);

    /* A row's mean and rstd over n features; and the means over them that its way back needs. All T[rb]. */
    void (*row_moments)(int64_t n, double eps, const void *x, void *mean, void *rstd);
    void (*row_means)(const fmb_norm *norm, int64_t n, const void *x, const void *dz, void *across, void *along);

    /* A feature's mean, (biased) variance and rstd over all rows, features low .. high - 1 of T[n]. */
    void (*column_moments)(const fmb_rows *rows, double eps, int64_t low, int64_t high, const void *x, void *mean,
                           void *variance, void *rstd);

    /* The gradients of features low .. high - 1: dweight[f - low] = sum over all rows of dz xhat, dbias (unless NULL) that
     * of dz; with norm->mean NULL those of PReLU, dweight = sum of min(x, 0) dz. */
    void (*column_sums)(const fmb_rows *rows, const fmb_norm *norm, int64_t low, int64_t high, const void *x,
                        const void *dz, void *dweight, void *dbias);

    /* Each row's own gradient of a normalisation's weight, dz xhat, or (norm->mean NULL) of PReLU's, min(x, 0) dz: out
     * T[n][rb]. */
    void (*row_terms)(const fmb_norm *norm, int64_t n, const void *x, const void *dz, void *out);

    /* x where x > 0, else weight x, and its way back; `step` 0: one weight for all features. dx may be dz. */
    void (*prelu)(const void *weight, int step, int64_t low, int64_t high, const void *x, void *out);
    void (*prelu_backward)(const void *weight, int step, int64_t low, int64_t high, const void *x, const void *dz,
                           void *dx);

    /* n values: out += x; dz = da * d, as `backward` understands d and `relu`. dz may be da. */
    void (*add)(int64_t n, const void *x, void *out);
    void (*multiply)(int64_t n, const void *da, const void *d, int relu, void *dz);

    /* Of rows' own gradients: out T[rb] (or NULL), the sums of squares of a block [n][rb] over its features; `chains`
     * T[4][rb], unless NULL, are their four chains up to these features, and then up to what follows; */
    void (*row_squares)(const void *block, int64_t n, void *chains, void *out);
    /* the sum of n numbers, and of the squares of n numbers; */
    double (*total)(const void *a, int64_t n);
    double (*squares)(const void *g, int64_t n);
    /* row r < rows of every panel (as `backward` lays them out) times f[r]; */
    void (*scale_rows)(void *panels, int64_t n_panels, int64_t panel_stride, int rows, const void *f);
    /* the gradient of a matrix by one row: out[i * n_out + o] = x[i * rb] * dz_o, o in panels. */
    void (*outer)(const void *x, int64_t n_in, const void *dz, int64_t n_out, int64_t panel_stride, void *out);

    /* Of a stored gradient: g = g * factor, then cut to -limit .. limit; */
    void (*limit)(void *g, int64_t n, double factor, double limit);
    /* g += deviation times normal numbers `at` .. (a multiple of 128) of this matrix and step, or those that random
     * `bits` give (n rounded up to 128). */
    void (*noise)(uint64_t seed, uint64_t t, int64_t matrix, const uint32_t *bits, double deviation, void *g, int64_t at,
                  int64_t n);

    /* 0 .. n - 1 in the order of an epoch. */
    void (*shuffle)(uint64_t key, int64_t n, int64_t *order);
} fmb_kernels;

/* The table for an instruction set and dtype; NULL where this build or this CPU has no such set. */
const fmb_kernels *fmb_kernels_for(enum fmb_isa isa, enum fmb_dtype dtype);

#endif
