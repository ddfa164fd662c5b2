"""The C side as Cython sees it: csrc/fastmb.h (kernels), csrc/sync.h (threads), OpenMP."""

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

cdef extern from "stdlib.h" nogil:
    int posix_memalign(void **memory, size_t alignment, size_t size)

cdef extern from "unistd.h" nogil:
    int getentropy(void *buffer, size_t length)

cdef extern from "omp.h" nogil:
    int omp_get_thread_num()
    int omp_get_num_threads()
    int omp_get_max_threads()
    ctypedef enum omp_pause_resource_t:
        omp_pause_hard
    int omp_pause_resource_all(omp_pause_resource_t kind)

cdef extern from "sync.h" nogil:
    ctypedef struct fmb_barrier:
        int32_t arrived
        int32_t generation
    void fmb_barrier_wait(fmb_barrier *barrier, int tid, int threads) noexcept
    void fmb_wait(fmb_barrier *barrier, int tid, int threads, const int32_t *place, int32_t past) noexcept
    void fmb_advance(int32_t *counter) noexcept
    int64_t fmb_look(const int64_t *place) noexcept
    void fmb_tell(int64_t *place, int64_t value) noexcept
    void fmb_least(int64_t *place, int64_t value) noexcept
    int64_t fmb_take(int64_t *counter, int64_t count) noexcept
    int64_t fmb_take_below(int64_t *counter, int64_t end) noexcept
    double fmb_now() noexcept
    uint64_t fmb_fp_enter() noexcept
    void fmb_fp_leave(uint64_t state) noexcept

cdef extern from "fastmb.h" nogil:
    enum: FMB_ISAS, FMB_F32, FMB_F64, FMB_RELU, FMB_CROSS_ENTROPY, FMB_LINEAR, FMB_GRADIENT, FMB_ACCUMULATE
    enum: FMB_VALUE, FMB_SLOPE, FMB_TIMES_SLOPE
    enum: FMB_I1, FMB_U1, FMB_H
    ctypedef void (*fmb_callback)(void *a, void *b, int64_t n, int64_t mode) noexcept nogil
    ctypedef struct fmb_ask:
        const char *at
        int64_t step
        const fmb_ask *next
    ctypedef struct fmb_gemm:
        int64_t a_m, a_k, a_block, b_k, b_block, c_m, blocks, k, k_last
        const char *ask
        int64_t ask_step
        const fmb_ask *asks
        void *squares
    ctypedef struct fmb_loss_spec:
        int kind
        int64_t n
        int indices
        double smoothing, delta
        const void *weight
        fmb_callback function
    ctypedef struct fmb_source:
        const char *data
        int64_t row_stride, col_stride, columns
        int type
    ctypedef struct fmb_norm:
        const void *mean
        const void *rstd
        const void *weight
        const void *bias
        int by_feature
    ctypedef struct fmb_rows:
        int64_t x_block, dz_block, stats_block, block_rows, rows
    ctypedef struct fmb_kernels:
        int rb, lanes, mr
        int few_rows
        void (*few)(const void *w, int64_t stride, int64_t n, int64_t k, int rows, const void *dz,
                    void *dx) noexcept nogil
        void (*gemm)(const fmb_gemm *g, int rows, int vectors, int load, const void *a, const void *b,
                     void *c) noexcept nogil
        void (*pack)(const void *w, int64_t stride, int64_t k, int64_t n, int first, void *out,
                     int64_t panel) noexcept nogil
        void (*peak)(int64_t steps, void *out) noexcept nogil
        void (*activation)(int kind, double value, void *a, void *d, int64_t n, int first) noexcept nogil
        void (*dropout)(uint64_t seed, uint64_t t, int index, int64_t row, int64_t unit, uint32_t threshold,
                        double scale, void *a, void *d, int64_t n, int first) noexcept nogil
        void (*loss)(const fmb_loss_spec *spec, int rows, const void *z, const int32_t *labels, const void *target,
                     const void *s, void *dz, void *loss) noexcept nogil
        void (*update)(int kind, const void *coef, void *w, void *s0, void *s1, void *s2, const void *g,
                       int64_t rows, int64_t n, int64_t stride, int64_t g_stride) noexcept nogil
        void (*update_outer)(int kind, const void *coef, void *w, void *s0, void *s1, void *s2, const void *x,
                             const void *dz, int64_t panel_stride, int64_t rows, int64_t n) noexcept nogil
        void (*average)(double weight, const void *w, void *a, int64_t rows, int64_t n, int64_t stride) noexcept nogil
        void (*gather)(const fmb_source *source, const int64_t *index, int64_t first, int rows, double scale,
                       void *out) noexcept nogil
        void (*backward)(void *da, const void *d, int relu, int keep, int64_t n, int rows, void *panels,
                         int64_t panel_stride) noexcept nogil
        int64_t (*nonfinite)(const fmb_source *source, int64_t first, int64_t last) noexcept nogil
        void (*scatter)(const void *block, int64_t n, int rows, void *out, int64_t out_stride) noexcept nogil
        void (*normalize)(const fmb_norm *norm, int64_t low, int64_t high, const void *x, void *out) noexcept nogil
        void (*normalize_backward)(const fmb_norm *norm, const void *across, const void *along, int64_t low,
                                   int64_t high, const void *x, const void *dz, void *dx) noexcept nogil
        void (*row_moments)(int64_t n, double eps, const void *x, void *mean, void *rstd) noexcept nogil
        void (*row_means)(const fmb_norm *norm, int64_t n, const void *x, const void *dz, void *across,
                          void *along) noexcept nogil
        void (*column_moments)(const fmb_rows *rows, double eps, int64_t low, int64_t high, const void *x, void *mean,
                               void *variance, void *rstd) noexcept nogil
        void (*column_sums)(const fmb_rows *rows, const fmb_norm *norm, int64_t low, int64_t high, const void *x,
                            const void *dz, void *dweight, void *dbias) noexcept nogil
        void (*row_terms)(const fmb_norm *norm, int64_t n, const void *x, const void *dz, void *out) noexcept nogil
        void (*prelu)(const void *weight, int step, int64_t low, int64_t high, const void *x, void *out) noexcept nogil
        void (*prelu_backward)(const void *weight, int step, int64_t low, int64_t high, const void *x, const void *dz,
                               void *dx) noexcept nogil
        void (*add)(int64_t n, const void *x, void *out) noexcept nogil
        void (*multiply)(int64_t n, const void *da, const void *d, int relu, void *dz) noexcept nogil
        void (*row_squares)(const void *block, int64_t n, void *chains, void *out) noexcept nogil
        double (*total)(const void *a, int64_t n) noexcept nogil
        double (*squares)(const void *g, int64_t n) noexcept nogil
        void (*scale_rows)(void *panels, int64_t n_panels, int64_t panel_stride, int rows,
                           const void *f) noexcept nogil
        void (*outer)(const void *x, int64_t n_in, const void *dz, int64_t n_out, int64_t panel_stride,
                      void *out) noexcept nogil
        void (*limit)(void *g, int64_t n, double factor, double limit) noexcept nogil
        void (*noise)(uint64_t seed, uint64_t t, int64_t matrix, const uint32_t *bits, double deviation, void *g,
                      int64_t at, int64_t n) noexcept nogil
        void (*shuffle)(uint64_t key, int64_t n, int64_t *order) noexcept nogil
    const fmb_kernels *fmb_kernels_for(int isa, int dtype)
    int64_t fmb_label(const fmb_source *source, int64_t row)
    ctypedef struct fmb_cursor:
        int64_t first, last, at
    void fmb_prefetch_rows(const fmb_source *source, const int64_t *order, fmb_cursor *cursor, int64_t lines)
    void fmb_prefetch_tile(char *p, int64_t rows, int64_t bytes, int64_t stride)
    void fmb_claim_tile(char *p, int64_t rows, int64_t bytes, int64_t stride)
    void fmb_clear_tile(char *p, int64_t rows, int64_t bytes, int64_t stride)
