"""Stages that are no product: BatchNorm, LayerNorm, PReLU, identity; and what is skipped to. Included by native.pyx.

Such a stage keeps its input in `x`, [block][feature + 1][rb], and its output gradient in `dz`, [block][feature][rb]; a
normalisation its statistics in `stats`: of each row [block][mean, rstd][rb], or of each feature, the rows of
`Statistic`. From these, xhat = (x - mean) rstd is worked out again where it is wanted.
"""

cdef enum Statistic:    # of a batch normalisation, [n] each; DWEIGHT and DBIAS are the sums over rows of dz xhat and dz
    MEAN, RSTD, VARIANCE, DWEIGHT, DBIAS, ACROSS, ALONG, N_STATISTICS


cdef inline char *_statistic(Engine *e, Stage *s, int which) noexcept nogil:
    return s.stats + which * s.n_in * e.size


cdef void _normalisation(Engine *e, Stage *s, char *mean, char *rstd, fmb_norm *norm) noexcept nogil:
    norm.mean, norm.rstd = mean, rstd
    norm.weight = s.w if s.rows > 0 else NULL
    norm.bias = s.w + s.n_in * e.size if s.rows > 1 else NULL
    norm.by_feature = s.kind == BATCH_NORM


cdef void _layer(Engine *e, Stage *s, Mini *mini, int64_t first, int64_t blocks, char *x, int64_t x_block, char *out,
                 int64_t out_block, int64_t low, int64_t high, Worker *me, int inference, int part,
                 int parts) noexcept nogil:
    """Features low .. high of out = f(x), for each block."""
    cdef int64_t b
    cdef char *stats
    cdef fmb_norm norm
    if s.kind == LINEAR:
        _forward(e, s, mini, me, first, blocks, x, x_block, out, out_block, 0, s.rows, low, high)
        return
    for b in range(blocks):
        if s.kind == LAYER_NORM:
            stats = me.stats if inference else s.stats + (first + b) * 2 * e.rb * e.size
            if part == 0:
                e.k.row_moments(s.n_in, s.eps, x, stats, stats + e.rb * e.size)
            fmb_barrier_wait(&e.barrier, part, parts)
            _normalisation(e, s, stats, stats + e.rb * e.size, &norm)
            e.k.normalize(&norm, low, high, x, out)
        elif s.kind == BATCH_NORM:
            if inference:
                _normalisation(e, s, s.buffers, s.running_rstd, &norm)
            else:
                _normalisation(e, s, _statistic(e, s, MEAN), _statistic(e, s, RSTD), &norm)
            e.k.normalize(&norm, low, high, x, out)
        elif s.kind == PRELU:
            e.k.prelu(s.w, s.columns > 1, low, high, x, out)
        else:
            memcpy(out + low * e.rb * e.size, x + low * e.rb * e.size, (high - low) * e.rb * e.size)
        x += x_block * e.size
        out += out_block * e.size


cdef void _layer_dz(Engine *e, Stage *s, int64_t block, char *da, char *d, int64_t low, int64_t high) noexcept nogil:
    """A block's output gradient, features low .. high, from the one behind the operations: to `dz`, or in place."""
    cdef char *dz = da if s.kind == IDENTITY else s.dz + (block * s.n_out + low) * e.rb * e.size
    if dz != da or d != NULL:
        e.k.multiply((high - low) * e.rb, da, d, s.derivative == SIGN, dz)


cdef void _layer_dx(Engine *e, Stage *s, Worker *home, int64_t block, char *dx, int64_t low, int64_t high, int part,
                    int parts) noexcept nogil:
    """A block's input gradient, features low .. high of dx."""
    cdef char *x = s.x + block * s.x_block * e.size
    cdef char *dz = s.dz + block * s.n_out * e.rb * e.size
    cdef int64_t row = e.rb * e.size
    cdef char *stats
    cdef fmb_norm norm
    if s.kind == LAYER_NORM:
        stats = s.stats + block * 2 * row
        _normalisation(e, s, stats, stats + row, &norm)
        if part == 0:
            e.k.row_means(&norm, s.n_in, x, dz, home.stats + 2 * row, home.stats + 3 * row)
        fmb_barrier_wait(&e.barrier, part, parts)
        e.k.normalize_backward(&norm, home.stats + 2 * row, home.stats + 3 * row, low, high, x, dz, dx)
    elif s.kind == BATCH_NORM:
        _normalisation(e, s, _statistic(e, s, MEAN), _statistic(e, s, RSTD), &norm)
        e.k.normalize_backward(&norm, _statistic(e, s, ACROSS), _statistic(e, s, ALONG), low, high, x, dz, dx)
    elif s.kind == PRELU:
        e.k.prelu_backward(s.w, s.columns > 1, low, high, x, dz, dx)


# ---- the whole mini-batch ------------------------------------------------------------------------------------------

cdef fmb_rows _all_rows(Engine *e, Stage *s, Mini *mini) noexcept nogil:
    cdef fmb_rows rows
    rows.x_block, rows.dz_block, rows.stats_block = s.x_block, s.n_out * e.rb, 2 * e.rb
    rows.block_rows, rows.rows = mini.block_rows, mini.rows
    return rows


cdef void _meet(Engine *e, Mini *mini, int phase, int tid, int threads) noexcept nogil:
    """Between two phases of a row sweep: what a batch normalisation needs of all rows, each thread for some features;
    and the blocks are there to be taken again."""
    cdef Worker *me = &e.workers[tid]
    cdef int forward = phase <= e.n_cuts
    cdef Stage *s = &e.stages[e.cuts[phase - 1 if forward else 2 * e.n_cuts - phase]]
    cdef int64_t f, low, high
    cdef double weight
    cdef fmb_norm norm
    cdef fmb_rows rows = _all_rows(e, s, mini)
    fmb_barrier_wait(&e.barrier, tid, threads)
    _share(&me.next_block, &me.last_block, mini.blocks, tid, threads)
    _panels(&low, &high, s.n_in, e.rb, tid, threads)
    if not e.dropout:   # as in inference, where the rows don't depend on each other
        for f in range(low, high):
            _put(_statistic(e, s, MEAN), f, _get(s.buffers, f, e.size), e.size)
            _put(_statistic(e, s, RSTD), f, 1 / sqrt(_get(s.buffers, s.n_in + f, e.size) + s.eps), e.size)
            _put(_statistic(e, s, ACROSS), f, 0, e.size)
            _put(_statistic(e, s, ALONG), f, 0, e.size)
    elif forward:
        e.k.column_moments(&rows, s.eps, low, high, s.x, _statistic(e, s, MEAN), _statistic(e, s, VARIANCE),
                           _statistic(e, s, RSTD))
    else:
        _normalisation(e, s, _statistic(e, s, MEAN), _statistic(e, s, RSTD), &norm)
        e.k.column_sums(&rows, &norm, low, high, s.x, s.dz, _statistic(e, s, DWEIGHT) + low * e.size,
                        _statistic(e, s, DBIAS) + low * e.size)
        for f in range(low, high):
            weight = (_get(s.w, f, e.size) if s.rows > 0 else 1.0) / mini.rows
            _put(_statistic(e, s, ACROSS), f, weight * _get(_statistic(e, s, DBIAS), f, e.size), e.size)
            _put(_statistic(e, s, ALONG), f, weight * _get(_statistic(e, s, DWEIGHT), f, e.size), e.size)
    fmb_barrier_wait(&e.barrier, tid, threads)


cdef void _layer_gradient(Engine *e, Stage *s, Mini *mini, int64_t f, int64_t columns, int64_t stride,
                          char *out) noexcept nogil:
    """The gradients of a stage's parameters, columns f .. f + columns of its matrix, a row every `stride`."""
    cdef fmb_norm norm
    cdef fmb_rows rows = _all_rows(e, s, mini)
    cdef double total = 0
    cdef int64_t i, n
    if s.kind == BATCH_NORM:
        memcpy(out, _statistic(e, s, DWEIGHT) + f * e.size, columns * e.size)
        memcpy(out + stride * e.size, _statistic(e, s, DBIAS) + f * e.size, columns * e.size)
    elif s.kind == LAYER_NORM:
        _normalisation(e, s, s.stats, s.stats + e.rb * e.size, &norm)
        e.k.column_sums(&rows, &norm, f, f + columns, s.x, s.dz, out, out + stride * e.size if s.rows > 1 else NULL)
    else:
        norm.mean = NULL
        if s.columns == s.n_out:
            e.k.column_sums(&rows, &norm, f, f + columns, s.x, s.dz, out, NULL)
            return
        while f < s.n_out:      # one weight for all features
            n = min(<int64_t> e.rb, s.n_out - f)
            e.k.column_sums(&rows, &norm, f, f + n, s.x, s.dz, out, NULL)
            for i in range(n):
                total += _get(out, i, e.size)
            f += n
        _put(out, 0, total, e.size)


cdef void _running_statistics(Engine *e, Mini *mini) noexcept nogil:
    """Moves the running statistics towards the mini-batch's."""
    cdef int i
    cdef int64_t f
    cdef double share, unbiased = mini.rows / (mini.rows - 1.0)
    cdef char *mean
    cdef char *variance
    cdef Stage *s
    for i in range(e.n_cuts):
        s = &e.stages[e.cuts[i]]
        mean, variance = s.buffers, s.buffers + s.n_in * e.size
        share = _get(variance, s.n_in, e.size) + 1
        _put(variance, s.n_in, share, e.size)
        share = s.momentum if s.momentum >= 0 else 1 / share
        for f in range(s.n_in):
            _put(mean, f, (1 - share) * _get(mean, f, e.size)
                 + share * _get(_statistic(e, s, MEAN), f, e.size), e.size)
            _put(variance, f, (1 - share) * _get(variance, f, e.size)
                 + share * unbiased * _get(_statistic(e, s, VARIANCE), f, e.size), e.size)


cdef void _infer_statistics(Engine *e) noexcept nogil:
    """What inference multiplies by, from the running variances as they are now."""
    cdef int i
    cdef int64_t f
    cdef Stage *s
    for i in range(e.n_cuts):
        s = &e.stages[e.cuts[i]]
        for f in range(s.n_in):
            _put(s.running_rstd, f, 1 / sqrt(_get(s.buffers, s.n_in + f, e.size) + s.eps), e.size)


# ---- rows' own gradients -------------------------------------------------------------------------------------------

cdef void _layer_terms(Engine *e, Stage *s, int64_t block, char *terms) noexcept nogil:
    """Each row's own gradient of a stage's weight, [columns][rb]."""
    cdef int64_t f
    cdef char *row = s.stats + block * 2 * e.rb * e.size
    cdef fmb_norm norm
    norm.mean = NULL
    if s.kind == BATCH_NORM:
        _normalisation(e, s, _statistic(e, s, MEAN), _statistic(e, s, RSTD), &norm)
    elif s.kind == LAYER_NORM:
        _normalisation(e, s, row, row + e.rb * e.size, &norm)
    e.k.row_terms(&norm, s.n_in, s.x + block * s.x_block * e.size, s.dz + block * s.n_out * e.rb * e.size, terms)
    if s.columns == 1:      # one weight for all features
        for f in range(1, s.n_in):
            e.k.add(e.rb, terms + f * e.rb * e.size, terms)


cdef void _layer_squares(Engine *e, Stage *s, Worker *home, int64_t block, char *terms, char *total) noexcept nogil:
    """Adds the squares of each row's own gradient to `total`, [rb]."""
    if s.rows == 0:
        return
    _layer_terms(e, s, block, terms)
    e.k.row_squares(terms, s.columns, NULL, home.factors)
    e.k.add(e.rb, home.factors, total)
    if s.rows > 1:
        e.k.row_squares(s.dz + block * s.n_out * e.rb * e.size, s.n_out, NULL, home.factors)
        e.k.add(e.rb, home.factors, total)


cdef void _layer_shorten(Engine *e, Stage *s, int64_t block, char *factor) noexcept nogil:
    """A block's rows of dz times their factors."""
    cdef int64_t f
    cdef char *dz = s.dz + block * s.n_out * e.rb * e.size
    for f in range(s.n_out if s.rows > 0 else 0):
        e.k.multiply(e.rb, dz + f * e.rb * e.size, factor, 0, dz + f * e.rb * e.size)


cdef void _layer_whole(Engine *e, Run *run, Stage *s, int i, int64_t block, int rows, int64_t place,
                       char *terms) noexcept nogil:
    """Rows' own gradients of a stage's weight and bias, where the caller wants them."""
    if s.rows == 0:
        return
    _layer_terms(e, s, block, terms)
    e.k.scatter(terms, s.columns, rows, run.whole[2 * i] + place * s.columns * e.size, s.columns)
    if s.rows > 1:
        e.k.scatter(s.dz + block * s.n_out * e.rb * e.size, s.n_out, rows,
                    run.whole[2 * i + 1] + place * s.n_out * e.size, s.n_out)
