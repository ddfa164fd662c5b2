/* Trains small networks by the kernels alone, on one thread, as the native executor does: blocks of rows forward and
 * backward, then tiles of the weight gradients with the update under them.
 *
 *     train ISA < cases > results
 *
 * test_aarch64.py writes the cases (plan, data, coefficients: `Case.write` has the order of the fields), and compares
 * the results of every instruction set, here and on another processor, with each other and with the executor's: of
 * each case parameters, state, loss sums, outputs, and then what the kernels that training doesn't need make of them.
 * All numbers are int64, double or of the case's dtype, little-endian. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "fastmb.h"
#include "sync.h"

enum { DROPOUT = -1, KC = 13 }; /* KC is so small that products of many inputs are cut, as the executor cuts long ones */
enum derivative { NONE, FACTOR, SIGN };

typedef struct {
    int64_t kind, index, threshold;
    double value, scale;
} op;

typedef struct {
    int64_t n_in, n_out, rows, offset, n_ops;
    op *ops;
    enum derivative derivative;
    char *x, *dz, *d; /* input [block][n_in + 1][rb], output gradient [panel][row][rb], derivatives [n_out][rb] */
    int64_t x_block, panels, panel_stride;
} stage;

static const fmb_kernels *k;
static int64_t size, rb, n_stages, n_input_ops, n_outputs;
static stage *stages;
static op *input_ops;
static char *params, *state[3], *da[2], *tile, *target, *s, *loss, *outputs;
static int32_t *labels;
static double *row_loss;
static fmb_loss_spec spec;
static fmb_source X, y;
static uint64_t seed;

/* ---- reading and writing ---------------------------------------------------------------------------------------- */

static void need(int condition, const char *what)
{
    if (!condition) {
        fprintf(stderr, "train: %s\n", what);
        exit(1);
    }
}

static void *zeros(int64_t bytes)
{
    void *p = NULL;
    need(!posix_memalign(&p, 64, (size_t)bytes + 64), "no memory");
    return memset(p, 0, (size_t)bytes + 64);
}

static void *array(int64_t bytes)
{
    void *p = zeros(bytes);
    need(fread(p, 1, (size_t)bytes, stdin) == (size_t)bytes, "the case ends early");
    return p;
}

static int64_t integer(void)
{
    int64_t x;
    need(fread(&x, sizeof x, 1, stdin) == 1, "the case ends early");
    return x;
}

static double real(void)
{
    double x;
    need(fread(&x, sizeof x, 1, stdin) == 1, "the case ends early");
    return x;
}

static void put(const void *p, int64_t bytes) { need(fwrite(p, 1, (size_t)bytes, stdout) == (size_t)bytes, "no room"); }

static op *read_ops(int64_t n)
{
    op *ops = zeros(n * (int64_t)sizeof(op));
    for (int64_t i = 0; i < n; i++) {
        ops[i].kind = integer(), ops[i].index = integer(), ops[i].threshold = integer();
        ops[i].value = real(), ops[i].scale = real();
    }
    return ops;
}

static fmb_source read_source(int64_t rows)
{
    fmb_source source;
    source.type = (enum fmb_type)integer();
    source.columns = integer();
    source.col_stride = integer(); /* bytes of an element */
    source.row_stride = source.columns * source.col_stride;
    source.data = array(rows * source.row_stride);
    return source;
}

/* ---- small things ------------------------------------------------------------------------------------------------- */

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static void set(void *p, int64_t i, double value)
{
    if (size == 8)
        ((double *)p)[i] = value;
    else
        ((float *)p)[i] = (float)value;
}

static double get(const void *p, int64_t i) { return size == 8 ? ((const double *)p)[i] : ((const float *)p)[i]; }

static double tree(const double *l) { return ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7])); }

static void apply(op *ops, int64_t n_ops, char *a, char *d, int64_t n, uint64_t t, int64_t row, int training)
{
    int first = 1;
    for (int64_t i = 0; i < n_ops; i++) {
        if (ops[i].kind != DROPOUT)
            k->activation((enum fmb_activation)ops[i].kind, ops[i].value, a, d, n * rb, first);
        else if (training)
            k->dropout(seed, t, (int)ops[i].index, row, 0, (uint32_t)ops[i].threshold, ops[i].scale, a, d, n, first);
        else
            continue;
        first = 0;
    }
}

/* ---- products ----------------------------------------------------------------------------------------------------- */

/* out[m][row] = sum over i of w[m * a_m + i * a_k] x[i][row], m < n, i < depth. */
static void product(const char *w, int64_t a_m, int64_t a_k, const char *x, char *out, int64_t n, int64_t depth, int rows)
{
    fmb_gemm g = {.a_m = a_m, .a_k = a_k, .b_k = rb, .c_m = rb, .blocks = 1, .ask = 0};
    for (int64_t i = 0; i < depth; i += KC) {
        g.k = g.k_last = least(KC, depth - i);
        for (int64_t m = 0; m < n; m += k->mr)
            k->gemm(&g, (int)least(k->mr, n - m), rows > k->lanes ? 2 : 1, i > 0, w + (m * a_m + i * a_k) * size,
                    x + i * rb * size, out + m * rb * size);
    }
}

/* A few rows forward: vectors run over outputs. Returns the first output that is left. */
static int64_t few_rows(const stage *st, const char *x, char *out, int rows)
{
    char buffer[64 * 24] __attribute__((aligned(64)));
    int64_t o = 0;
    fmb_gemm g = {.a_m = 1, .a_k = rb, .b_k = st->n_out, .blocks = 1, .k = st->rows, .k_last = st->rows};
    while (st->n_out - o >= k->lanes) {
        int vectors = 4 * rows <= k->mr ? 8 : 4;
        while (vectors * k->lanes > st->n_out - o)
            vectors /= 2;
        const int64_t width = vectors * k->lanes;
        g.c_m = width;
        k->gemm(&g, rows, vectors, 0, x, params + (st->offset + o) * size, buffer);
        for (int64_t j = 0; j < width; j++)
            for (int r = 0; r < rows; r++)
                memcpy(out + ((o + j) * rb + r) * size, buffer + (r * width + j) * size, (size_t)size);
        o += width;
    }
    return o;
}

static void forward(const stage *st, const char *x, char *out, int rows)
{
    const int64_t o = rows <= k->mr / 2 ? few_rows(st, x, out, rows) : 0;
    product(params + (st->offset + o) * size, 1, st->n_out, x, out + o * rb * size, st->n_out - o, st->rows, rows);
}

/* ---- a step --------------------------------------------------------------------------------------------------------- */

static double class_weight(int64_t row)
{
    return spec.indices && spec.weight ? get(spec.weight, fmb_label(&y, row)) : 1;
}

static void targets(const int64_t *index, int rows)
{
    if (!spec.indices) {
        k->gather(&y, index, 0, rows, 1, target);
        return;
    }
    for (int r = 0; r < rb; r++)
        labels[r] = r < rows ? (int32_t)fmb_label(&y, index[r]) : 0;
}

/* One block of rows: forward, loss, backward. */
static void row_sweep(int64_t block, const int64_t *index, int rows, double scale, uint64_t t, double input_scale)
{
    const int64_t row = block * rb;
    char *a = stages[0].x + block * stages[0].x_block * size;
    k->gather(&X, index, 0, rows, input_scale, a);
    apply(input_ops, n_input_ops, a, NULL, stages[0].n_in, t, row, 1);
    for (int64_t i = 0; i < n_stages; i++) {
        stage *st = &stages[i];
        char *out = i + 1 < n_stages ? st[1].x + block * st[1].x_block * size : da[0];
        forward(st, st->x + block * st->x_block * size, out, rows);
        apply(st->ops, st->n_ops, out, st->derivative == FACTOR ? st->d : NULL, st->n_out, t, row, 1);
    }

    for (int r = 0; r < rb; r++)
        set(s, r, r < rows ? scale : 0);
    targets(index, rows);
    k->loss(&spec, rows, da[0], labels, target, s, da[0], loss);
    for (int r = 0; r < rows; r++)
        row_loss[row + r] = get(loss, r);

    for (int64_t i = n_stages - 1, now = 0; i >= 0; i--, now = 1 - now) {
        stage *st = &stages[i];
        char *d = st->derivative == FACTOR ? st->d
                : st->derivative == SIGN   ? st[1].x + block * st[1].x_block * size
                                           : NULL;
        k->backward(da[now], d, st->derivative == SIGN, i > 0, st->n_out, rows, st->dz + block * rb * rb * size,
                    st->panel_stride);
        if (i > 0)
            product(params + st->offset * size, st->n_out, 1, da[now], da[1 - now], st->n_in, st->n_out, rows);
    }
}

/* Tiles of the weight gradients, and the update of the weights under each. */
static void weight_sweep(enum fmb_update kind, int64_t rows, const void *coef)
{
    for (stage *st = stages; st < stages + n_stages; st++) {
        const int64_t last = (rows - 1) / rb;
        const fmb_gemm g = {.a_m = rb, .a_k = 1, .a_block = st->x_block, .b_k = rb, .b_block = rb * rb,
                            .c_m = st->panels == 1 ? st->n_out : rb, .blocks = last + 1, .k = rb, .k_last = rows - last * rb};
        for (int64_t panel = 0; panel < st->panels; panel++)
            for (int64_t m = 0; m < st->rows; m += k->mr) {
                int64_t high = least(k->mr, st->rows - m), columns = least(rb, st->n_out - panel * rb);
                const int64_t at = (st->offset + m * st->n_out + panel * rb) * size;
                k->gemm(&g, (int)high, columns > k->lanes ? 2 : 1, 0, st->x + m * rb * size,
                        st->dz + panel * st->panel_stride * size, tile);
                if (st->panels == 1)
                    columns *= high, high = 1;
                k->update(kind, coef, params + at, state[0] ? state[0] + at : NULL, state[1] ? state[1] + at : NULL,
                          state[2] ? state[2] + at : NULL, tile, high, columns, st->n_out, rb);
            }
    }
}

static void step(enum fmb_update kind, const int64_t *index, int64_t rows, uint64_t t, double input_scale,
                 const double *coefficients, double *sums)
{
    double lanes[8] = {0}, weight = rows;
    if (spec.indices && spec.weight) {
        for (int64_t r = 0; r < rows; r++)
            lanes[r & 7] += class_weight(index[r]);
        weight = tree(lanes);
        memset(lanes, 0, sizeof lanes);
    }
    for (int64_t block = 0; block * rb < rows; block++)
        row_sweep(block, index + block * rb, (int)least(rb, rows - block * rb), weight > 0 ? 1 / weight : 0, t, input_scale);
    for (int64_t r = 0; r < rows; r++)
        lanes[r & 7] += row_loss[r];
    sums[0] = tree(lanes), sums[1] = weight;

    double coef[8] = {0};
    for (int i = 0; i < 8; i++)
        set(coef, i, coefficients[i]);
    weight_sweep(kind, rows, coef);
}

/* ---- inference ---------------------------------------------------------------------------------------------------- */

static void infer(int64_t n, double input_scale, char *result)
{
    for (int64_t row = 0; row < n; row += rb) {
        const int rows = (int)least(rb, n - row);
        k->gather(&X, NULL, row, rows, input_scale, da[0]);
        apply(input_ops, n_input_ops, da[0], NULL, X.columns, 0, 0, 0);
        int now = 0;
        for (stage *st = stages; st < stages + n_stages; st++, now = 1 - now) {
            for (int r = 0; r < rb; r++)
                set(da[now], st->n_in * rb + r, 1);
            forward(st, da[now], da[1 - now], rows);
            apply(st->ops, st->n_ops, da[1 - now], NULL, st->n_out, 0, 0, 0);
        }
        k->scatter(da[now], n_outputs, rows, result + row * n_outputs * size, n_outputs);
    }
}

/* ---- kernels that no step above calls ------------------------------------------------------------------------------ */

/* On the parameters as a gradient, and on what the last step has left in the first stage. */
static void gradient_kernels(int64_t n)
{
    enum { ROWS = 4 };
    const double coef[8] = {0};
    const stage *st = stages;
    char *g = zeros(n * size), *out = zeros(st->n_in * st->n_out * size), *chains = zeros(4 * rb * size);

    k->update(FMB_GRADIENT, coef, params, g, NULL, NULL, params, 1, n, n, n);
    k->update(FMB_ACCUMULATE, coef, params, g, NULL, NULL, params, 1, n, n, n);
    const double squares = k->squares(g, n);
    k->limit(g, n, 0.75, 0.05);
    k->noise(seed, 5, 1, NULL, 0.125, g, 0, n);

    k->gather(&X, NULL, 0, ROWS, 1, da[0]);
    k->row_squares(da[0], 4, chains, NULL); /* in two pieces: the same bits as in one */
    k->row_squares(da[0] + 4 * rb * size, X.columns - 4, chains, s);
    k->scale_rows(st->dz, st->panels, st->panel_stride, ROWS, s);
    k->outer(da[0], st->n_in, st->dz, st->n_out, st->panel_stride, out);

    put(g, n * size);
    put(&squares, sizeof squares);
    put(s, ROWS * size);
    put(out, st->n_in * st->n_out * size);
}

/* ---- a case --------------------------------------------------------------------------------------------------------- */

static int read_and_train(enum fmb_isa isa)
{
    int64_t dtype;
    if (fread(&dtype, sizeof dtype, 1, stdin) != 1)
        return 0;
    k = fmb_kernels_for(isa, (enum fmb_dtype)dtype);
    need(k != NULL, "this processor has no such instruction set");
    size = dtype == FMB_F64 ? 8 : 4, rb = k->rb;

    n_input_ops = integer();
    input_ops = read_ops(n_input_ops);
    n_stages = integer();
    stages = zeros(n_stages * (int64_t)sizeof(stage));
    int64_t widest = 0;
    for (stage *st = stages; st < stages + n_stages; st++) {
        st->n_in = integer(), st->n_out = integer(), st->rows = integer(), st->offset = integer(), st->n_ops = integer();
        st->ops = read_ops(st->n_ops);
        st->derivative = !st->n_ops                                                                            ? NONE
                       : st->n_ops == 1 && st->ops->kind == FMB_RELU && st + 1 < stages + n_stages ? SIGN : FACTOR;
        widest = st->n_in > widest ? st->n_in : widest;
        widest = st->n_out > widest ? st->n_out : widest;
        n_outputs = st->n_out;
    }

    const int64_t n_params = integer(), n_states = integer();
    params = array(n_params * size);
    for (int i = 0; i < 3; i++)
        state[i] = i < n_states ? array(n_params * size) : NULL;

    const int64_t n = integer();
    const double input_scale = real();
    X = read_source(n);
    y = read_source(n);
    spec.kind = (enum fmb_loss)integer(), spec.indices = (int)integer(), spec.n = n_outputs;
    spec.smoothing = real(), spec.delta = real();
    spec.weight = integer() ? array(n_outputs * size) : NULL;
    const enum fmb_update kind = (enum fmb_update)integer();
    seed = (uint64_t)integer();
    const int64_t batch = integer(), epochs = integer(), steps = (n + batch - 1) / batch;
    const double *coefficients = array(epochs * steps * 8 * (int64_t)sizeof(double));
    const int64_t *order = array(epochs * n * (int64_t)sizeof(int64_t));

    const int64_t blocks = (batch + rb - 1) / rb, block = rb * size;
    for (stage *st = stages; st < stages + n_stages; st++) {
        st->x_block = (st->n_in + 1) * rb;
        st->x = zeros(blocks * st->x_block * size);
        for (int64_t b = 0; b < blocks; b++)
            for (int64_t r = 0; r < rb; r++)
                set(st->x + b * st->x_block * size, st->n_in * rb + r, 1);
        st->panels = (st->n_out + rb - 1) / rb;
        st->panel_stride = blocks * rb * rb;
        st->dz = zeros(st->panels * st->panel_stride * size);
        st->d = zeros(st->n_out * block);
    }
    for (int i = 0; i < 2; i++)
        da[i] = zeros((widest + 1) * block);
    tile = zeros((k->mr + 2) * block);
    target = zeros(n_outputs * block);
    s = zeros(block), loss = zeros(block);
    labels = zeros(rb * (int64_t)sizeof(int32_t));
    row_loss = zeros(blocks * rb * (int64_t)sizeof(double));
    outputs = zeros(n * n_outputs * size);
    double *sums = zeros(epochs * steps * 2 * (int64_t)sizeof(double));

    const uint64_t fp = fmb_fp_enter();
    for (int64_t t = 0; t < epochs * steps; t++) {
        const int64_t begin = t % steps * batch;
        step(kind, order + t / steps * n + begin, least(batch, n - begin), (uint64_t)t, input_scale, coefficients + 8 * t,
             sums + 2 * t);
    }
    infer(n, input_scale, outputs);

    put(params, n_params * size);
    for (int64_t i = 0; i < n_states; i++)
        put(state[i], n_params * size);
    put(sums, epochs * steps * 2 * (int64_t)sizeof(double));
    put(outputs, n * n_outputs * size);
    gradient_kernels(n_params);
    fmb_fp_leave(fp);

    const float probe[5] = {1, 2, 3, NAN, 4};
    const fmb_source rows = {(const char *)probe, 4, 4, 1, FMB_F};
    need(k->nonfinite(&rows, 0, 3) == -1 && k->nonfinite(&rows, 0, 5) == 3, "nonfinite is wrong");
    return 1;
}

int main(int argc, char **argv)
{
    static const char *const names[FMB_ISAS] = {[FMB_V2] = "v2", [FMB_V3] = "v3", [FMB_V4] = "v4", [FMB_NEON] = "neon"};
    for (int isa = 0; isa < FMB_ISAS; isa++)
        if (argc == 2 && !strcmp(argv[1], names[isa])) {
            while (read_and_train((enum fmb_isa)isa))
                ;
            return 0;
        }
    need(0, "names no instruction set");
}
