"""Everything that goes through arrays element by element: activations, updates, clipping; reductions over a stack; the
softmax with its loss. Included by _native.pyx.

Arrays of any strides: dimensions that follow each other in all of them are taken as one, and what still isn't
contiguous is collected, and put back, a span of a few kilobytes at a time.
"""

cdef enum:
    MAX_OPERANDS = 5
    SPAN = 1024                 # elements of what is collected at a time
    CHUNK = 16384               # elements of a sum of squares: they are added chunk by chunk
    PIECE = 4096                # elements of a job
    LEAST = 256                 # of a reduction that a thread takes, a multiple of a cache line

cdef enum Kernel:
    FORWARD, BACKWARD, UPDATE, SCALE

cdef int64_t STREAM_BYTES = 1 << 24     # results from here on are written past the cache
cdef double VALUE_FLOPS = 20.0          # what a value costs, in operations of a product, if it is only read and written
cdef double FUNCTION_FLOPS = 60.0       # ... if it goes through a function

cdef struct Walk:
    Kernel kernel
    int operands
    char *data[MAX_OPERANDS]
    int reads[MAX_OPERANDS]
    int writes[MAX_OPERANDS]
    int dims                    # the innermost first
    int64_t shape[MAX_DIMS]
    int64_t strides[MAX_OPERANDS][MAX_DIMS]
    int64_t size                # bytes of an element
    int64_t outer, chunks       # jobs: spans of the innermost dimension, for each index of the others
    # what the kernels want besides
    int kind, from_output, stream
    double value                # an activation's, or the factor
    const void *coefficients


def activation_forward(z, activation, out):
    cdef Walk walk
    z, name, value, out = _check.activation_forward(z, activation, out)
    walk.kernel, walk.kind, walk.value, walk.stream = FORWARD, ACTIVATIONS[name], value, 0
    _lay(&walk, [z, out], 1)
    _go(&walk, FUNCTION_FLOPS)
    return out


def activation_backward(da, activation, z, a, out):
    cdef Walk walk
    cdef cnp.ndarray C
    x = z if a is None else a
    found = NAMED.get(activation) if type(activation) is str else None
    if found is not None and (z is None) != (a is None) and (a is None or activation in _check.FROM_OUTPUT):
        C = _fast_like(out, da, x)
        if C is not None:
            walk.kernel, walk.kind, walk.value, walk.from_output = BACKWARD, found[0], found[1], z is None
            walk.stream = _past_cache(C, da, x)
            _lay_flat(&walk, da, x, C)
            _go(&walk, found[2])
            return C
    da, name, value, x, from_output, out = _check.activation_backward(da, activation, z, a, out)
    walk.kernel, walk.kind, walk.value, walk.from_output = BACKWARD, ACTIVATIONS[name], value, from_output
    walk.stream = _past_cache(out, da, x)
    _lay(&walk, [da, x, out], 1)
    _go(&walk, _cost(name))
    return out


cdef double _cost(name) except -1:
    return VALUE_FLOPS if name in ("identity", "relu", "leaky_relu") else FUNCTION_FLOPS


cdef dict NAMED = {}    # activations by name: the kernel's number, the value, the cost
for _name in ("identity", *modules.ACTIVATIONS):
    _kind, _value = _check.activation(_name)
    NAMED[_name] = (ACTIVATIONS[_kind], _value, _cost(_kind))


cdef cnp.ndarray _fast_like(object out, object x, object y):
    """Where the result goes for two contiguous arrays of one shape, or None if that takes a closer look."""
    cdef cnp.ndarray X, Y, C
    cdef int type_num
    if not cnp.PyArray_CheckExact(x):
        return None
    X = x
    type_num = cnp.PyArray_TYPE(X)
    if (type_num != cnp.NPY_FLOAT32 and type_num != cnp.NPY_FLOAT64) or not _plain(x, type_num) or not _plain(
            y, type_num):
        return None
    Y = y
    if not (cnp.PyArray_IS_C_CONTIGUOUS(X) and cnp.PyArray_IS_C_CONTIGUOUS(Y) and cnp.PyArray_SAMESHAPE(X, Y)):
        return None
    if out is None:
        return cnp.PyArray_EMPTY(cnp.PyArray_NDIM(X), cnp.PyArray_DIMS(X), type_num, 0)
    if not _plain(out, type_num):
        return None
    C = out
    if (cnp.PyArray_IS_C_CONTIGUOUS(C) and cnp.PyArray_ISWRITEABLE(C) and cnp.PyArray_SAMESHAPE(X, C)
            and (C is X or _apart(C, X)) and (C is Y or _apart(C, Y))):
        return C
    return None


cdef int _lay_flat(Walk *walk, cnp.ndarray x, cnp.ndarray y, cnp.ndarray out) noexcept:
    """Two contiguous arrays to a third."""
    walk.operands, walk.size, walk.dims, walk.outer = 3, cnp.PyArray_ITEMSIZE(out), 1, 1
    walk.data[0], walk.data[1] = <char *> cnp.PyArray_DATA(x), <char *> cnp.PyArray_DATA(y)
    walk.data[2] = <char *> cnp.PyArray_DATA(out)
    walk.strides[0][0] = walk.strides[1][0] = walk.strides[2][0] = walk.size
    walk.shape[0] = cnp.PyArray_SIZE(out)
    walk.chunks = (walk.shape[0] + PIECE - 1) // PIECE
    return 0


cdef int _past_cache(cnp.ndarray out, cnp.ndarray x, cnp.ndarray y) noexcept:
    """Whether a result is too large to stay in the cache, and not written over an input, which is there."""
    return (cnp.PyArray_NBYTES(out) >= STREAM_BYTES and cnp.PyArray_DATA(x) != cnp.PyArray_DATA(out)
            and cnp.PyArray_DATA(y) != cnp.PyArray_DATA(out))


def optimizer_update(optimizer, w, g, state, t, out):
    cdef Walk walk
    cdef cnp.ndarray c
    if not getattr(optimizer, "fused", True):   # one that needs whole matrices is written in NumPy
        return _numpy.optimizer_update(optimizer, w, g, state, t, out)
    kind, coefficients, w, g, state, out = _check.optimizer_update(optimizer, w, g, state, t, out)
    if out is not w:
        out[...] = w
    c = coefficients.astype(out.dtype)
    walk.kernel, walk.kind, walk.stream = UPDATE, UPDATES[kind], 0
    walk.coefficients = cnp.PyArray_DATA(c)
    _lay(&walk, [g, out, *(state[i, ...] for i in range(len(state)))], 1 + len(state))  # arrays, of no dimensions too
    _go(&walk, FUNCTION_FLOPS)
    return out


def clip_by_global_norm(grads, max_norm, out):
    cdef Walk walk
    grads, max_norm, outs, many = _check.clip_by_global_norm(grads, max_norm, out)
    norm = float(np.sqrt(sum([_squares(g) for g in grads])))
    for g, o in zip(grads, outs):
        for factor in _check.factors(norm, max_norm, g.dtype):
            walk.kernel, walk.value, walk.stream = SCALE, factor, 0
            if factor != 1.0 or not np.shares_memory(g, o):
                _lay(&walk, [g, o], 1)
                _go(&walk, VALUE_FLOPS)
            g = o
    return (outs if many else outs[0]), norm


cdef double _squares(cnp.ndarray x) except -1:
    """The sum of squares, of chunks in their order (those of a copy, if x isn't contiguous: its order counts)."""
    cdef cnp.ndarray flat = np.ascontiguousarray(x)
    cdef int64_t n = cnp.PyArray_SIZE(flat), chunks = (n + CHUNK - 1) // CHUNK, i, size = cnp.PyArray_ITEMSIZE(flat)
    cdef double[::1] parts = np.zeros(max(chunks, 1))
    cdef const char *data = <const char *> cnp.PyArray_DATA(flat)
    cdef const fmb_kernels *k = kernels[_dtype(flat)]
    cdef int threads = _threads_for(VALUE_FLOPS * n)
    cdef double total = 0
    if threads == 1:
        for i in range(chunks):
            parts[i] = k.squares(data + i * CHUNK * size, min(<int64_t> CHUNK, n - i * CHUNK))
    else:
        for i in prange(chunks, nogil=True, num_threads=threads, schedule="static"):
            parts[i] = k.squares(data + i * CHUNK * size, min(<int64_t> CHUNK, n - i * CHUNK))
    for i in range(chunks):
        total += parts[i]
    return total


# ---- the walk ----------------------------------------------------------------------------------------------------

cdef int _lay(Walk *walk, list arrays, int writes) except -1:
    """The dimensions of arrays of one shape; the last `writes` of them are written."""
    cdef int i, d, top = 0, n_arrays = len(arrays), nd = arrays[0].ndim
    cdef cnp.ndarray x, last = arrays[n_arrays - 1]
    cdef bint together, contiguous = True
    walk.operands = n_arrays
    walk.size = cnp.PyArray_ITEMSIZE(last)
    for i in range(n_arrays):
        x = arrays[i]
        walk.data[i] = <char *> cnp.PyArray_DATA(x)
        walk.writes[i] = i >= n_arrays - writes
        walk.reads[i] = not walk.writes[i] or walk.kernel == UPDATE
        contiguous = contiguous and cnp.PyArray_IS_C_CONTIGUOUS(x)
        walk.strides[i][0] = walk.size
    walk.shape[0] = cnp.PyArray_SIZE(last)
    walk.dims = 1
    if not contiguous:
        order = sorted(range(nd), key=lambda d: (abs(arrays[n_arrays - 1].strides[d]), -d))
        for d in order:
            if cnp.PyArray_DIMS(last)[d] == 1:
                continue
            together = top > 0
            for i in range(n_arrays):
                x = arrays[i]
                if top > 0 and cnp.PyArray_STRIDES(x)[d] != walk.strides[i][top - 1] * walk.shape[top - 1]:
                    together = False
            if together:
                walk.shape[top - 1] *= cnp.PyArray_DIMS(last)[d]
                continue
            walk.shape[top] = cnp.PyArray_DIMS(last)[d]
            for i in range(n_arrays):
                x = arrays[i]
                walk.strides[i][top] = cnp.PyArray_STRIDES(x)[d]
            top += 1
        if top > 0:
            walk.dims = top
    walk.outer = 1
    for d in range(1, walk.dims):
        walk.outer *= walk.shape[d]
    walk.chunks = (walk.shape[0] + PIECE - 1) // PIECE
    return 0


cdef int _go(Walk *walk, double flops) except -1:
    """The whole walk, on as many threads as it is worth at so many operations a value."""
    cdef int64_t job, jobs = walk.outer * walk.chunks
    cdef int threads = <int> min(<int64_t> _threads_for(flops * walk.outer * walk.shape[0]), jobs)
    with nogil:
        if threads <= 1:
            _walk_jobs(walk, 0, jobs)
        else:
            for job in prange(threads, num_threads=threads, schedule="static"):
                _walk_jobs(walk, job * jobs // threads, (job + 1) * jobs // threads)
    return 0


cdef void _walk_jobs(const Walk *walk, int64_t first, int64_t last) noexcept nogil:
    cdef unsigned long long state = fmb_fp_enter()
    cdef char *at[MAX_OPERANDS]
    cdef int64_t job, rest, begin, n
    cdef int i, d
    for job in range(first, last):
        rest = job // walk.chunks
        begin = job % walk.chunks * PIECE
        n = min(<int64_t> PIECE, walk.shape[0] - begin)
        for i in range(walk.operands):
            at[i] = walk.data[i] + begin * walk.strides[i][0]
        for d in range(1, walk.dims):
            for i in range(walk.operands):
                at[i] += rest % walk.shape[d] * walk.strides[i][d]
            rest //= walk.shape[d]
        _spans(walk, at, n)
    fmb_fp_leave(state)


cdef void _spans(const Walk *walk, char **at, int64_t n) noexcept nogil:
    """n elements of the innermost dimension; those of operands with gaps a span at a time, by way of a buffer."""
    cdef char[MAX_OPERANDS][SPAN * 8] buffer
    cdef char *to[MAX_OPERANDS]
    cdef const fmb_ops *k = ops[walk.size == 8]
    cdef int64_t begin = 0, count, step = n
    cdef int i
    for i in range(walk.operands):
        if walk.strides[i][0] != walk.size:
            step = SPAN
    while begin < n:
        count = min(step, n - begin)
        for i in range(walk.operands):
            to[i] = at[i] + begin * walk.strides[i][0]
            if walk.strides[i][0] != walk.size:
                if walk.reads[i]:
                    k.collect(to[i], walk.strides[i][0], buffer[i], count)
                to[i] = buffer[i]
        _compute(walk, k, to, count)
        for i in range(walk.operands):
            if walk.writes[i] and walk.strides[i][0] != walk.size:
                k.spread(buffer[i], at[i] + begin * walk.strides[i][0], walk.strides[i][0], count)
        begin += count


cdef inline void _compute(const Walk *walk, const fmb_ops *k, char **x, int64_t n) noexcept nogil:
    if walk.kernel == FORWARD:
        k.forward(walk.kind, walk.value, x[0], x[1], n)
    elif walk.kernel == BACKWARD:
        k.backward(walk.kind, walk.value, walk.from_output, x[0], x[1], x[2], n, walk.stream)
    elif walk.kernel == SCALE:
        k.scale(x[0], walk.value, x[1], n)
    else:
        kernels[walk.size == 8].update(
            walk.kind, walk.coefficients, x[1], x[2] if walk.operands > 2 else NULL,
            x[3] if walk.operands > 3 else NULL, x[4] if walk.operands > 4 else NULL, x[0], 1, n, n, n)


# ---- reductions over a stack ---------------------------------------------------------------------------------------

def reduce_gradients(stack, weights, mean, out, name="stack"):
    cdef cnp.ndarray x, o, w
    cdef const void *weight = NULL
    # plain: a contiguous stack without weights
    if cnp.PyArray_CheckExact(stack) and weights is None and (mean is True or mean is False):
        x = stack
        if (cnp.PyArray_NDIM(x) == 2 and cnp.PyArray_IS_C_CONTIGUOUS(x) and cnp.PyArray_SIZE(x) > 0
                and (_plain(x, cnp.NPY_FLOAT32) or _plain(x, cnp.NPY_FLOAT64))):
            o = None
            if out is None:
                o = cnp.PyArray_EMPTY(1, cnp.PyArray_DIMS(x) + 1, cnp.PyArray_TYPE(x), 0)
            elif _plain(out, cnp.PyArray_TYPE(x)):
                o = out
                if not (cnp.PyArray_NDIM(o) == 1 and cnp.PyArray_DIMS(o)[0] == cnp.PyArray_DIMS(x)[1]
                        and cnp.PyArray_IS_C_CONTIGUOUS(o) and cnp.PyArray_ISWRITEABLE(o) and _apart(o, x)):
                    o = None
            if o is not None:
                _reduce(x, NULL, cnp.PyArray_DIMS(x)[0] if mean else 1, o, cnp.PyArray_SIZE(o))
                return o
    stack, weights, divisor, out = _check.reduce_gradients(stack, weights, mean, out, name)
    if weights is not None:
        w = weights
        weight = cnp.PyArray_DATA(w)
    x, o = stack, out
    if cnp.PyArray_SIZE(o) == 0:
        return out
    # rows that are contiguous are read where they lie, others a block of columns at a time
    if cnp.PyArray_IS_C_CONTIGUOUS(o) and x[0].flags.c_contiguous:
        _reduce(x, weight, divisor, o, cnp.PyArray_SIZE(o))
        return out
    flat_out = out if cnp.PyArray_IS_C_CONTIGUOUS(o) else np.empty(out.shape, out.dtype)
    _reduce_strided(stack, weights, divisor, flat_out)
    if flat_out is not out:
        out[...] = flat_out
    return out


cdef int _reduce(cnp.ndarray x, const void *weight, double divisor, cnp.ndarray o, int64_t n) except -1:
    cdef const fmb_ops *k = ops[_dtype(o)]
    cdef int64_t S = cnp.PyArray_DIMS(x)[0], stride = cnp.PyArray_STRIDES(x)[0], size = cnp.PyArray_ITEMSIZE(x)
    cdef int64_t i, chunk
    cdef const char *data = <const char *> cnp.PyArray_DATA(x)
    cdef char *to = <char *> cnp.PyArray_DATA(o)
    cdef int stream = n * size >= STREAM_BYTES
    cdef int threads = _threads_for(VALUE_FLOPS / 2 * n * S)
    cdef unsigned long long state
    chunk = _share(n, LEAST, 1, threads)    # one a thread, of whole cache lines
    threads = <int> _quotient(n, chunk)
    with nogil:
        if threads == 1:
            state = fmb_fp_enter()
            k.reduce(data, stride, S, weight, divisor, to, n, stream)
            fmb_fp_leave(state)
        else:
            for i in prange(threads, num_threads=threads, schedule="static"):
                state = fmb_fp_enter()
                k.reduce(data + i * chunk * size, stride, S, weight, divisor, to + i * chunk * size,
                         min(chunk, n - i * chunk), stream)
                fmb_fp_leave(state)
    return 0


def _reduce_strided(stack, weights, double divisor, out):
    """A block of the stack at a time is copied; its columns are whole indices of the first dimensions."""
    cdef cnp.ndarray w, block
    cdef const void *weight = NULL
    if weights is not None:
        w = weights
        weight = cnp.PyArray_DATA(w)
    shape = stack.shape[1:]
    inner = 1
    depth = len(shape)
    while depth > 0 and inner * shape[depth - 1] * stack.itemsize * len(stack) <= 1 << 20:
        depth -= 1
        inner *= shape[depth]
    if depth == 0:
        block = np.ascontiguousarray(stack)
        _reduce(block, weight, divisor, out, out.size)
        return
    step = max(1, (1 << 20) // (inner * stack.itemsize * len(stack)))
    for index in np.ndindex(shape[:depth - 1]):
        for begin in range(0, shape[depth - 1], step):
            place = (*index, slice(begin, begin + step))
            block = np.ascontiguousarray(stack[(slice(None), *place)])
            _reduce(block, weight, divisor, out[place], out[place].size)


# ---- softmax and its loss ------------------------------------------------------------------------------------------

cdef struct Softmax:
    fmb_loss_spec spec
    fmb_source z, y
    int64_t n, C
    int y_rows
    const double *s             # sample weights
    double scale                # one over their sum
    double *losses              # per row, weighted
    char *out
    int64_t out_stride          # elements


def softmax_cross_entropy(z, y, sample_weight, class_weight, label_smoothing, out):
    cdef Softmax work
    cdef cnp.ndarray Z, Y, O, s, losses, weights, block
    cdef int dtype, threads
    cdef const fmb_kernels *k
    cdef int64_t blocks, i, bytes, size
    cdef double[8] lanes
    cdef double *loss
    cdef Scratch scratch
    z, y, sample_weight, class_weight, label_smoothing, total, out = _check.softmax_cross_entropy(
        z, y, sample_weight, class_weight, label_smoothing, out)
    if total == 0:
        out[...] = 0
        return 0.0, out
    # The kernel's writer takes rows whose elements follow each other.
    result = out if out.strides[1] == out.itemsize and out.strides[0] % out.itemsize == 0 else np.empty(
        out.shape, out.dtype)
    Z, Y, O, s = z, y, result, sample_weight
    losses = np.empty(len(z))
    dtype, size = _dtype(Z), cnp.PyArray_ITEMSIZE(Z)
    k = kernels[dtype]
    memset(&work, 0, sizeof(Softmax))
    work.n, work.C = cnp.PyArray_DIMS(Z)[0], cnp.PyArray_DIMS(Z)[1]
    work.spec.kind, work.spec.n, work.spec.smoothing, work.spec.delta = FMB_CROSS_ENTROPY, work.C, label_smoothing, 1.0
    work.spec.indices = cnp.PyArray_NDIM(Y) == 1
    if class_weight is not None:
        weights = class_weight.astype(z.dtype)
        work.spec.weight = cnp.PyArray_DATA(weights)
    _source(&work.z, Z)
    _source(&work.y, Y)
    work.s, work.scale = <const double *> cnp.PyArray_DATA(s), 1.0 / total
    work.losses = loss = <double *> cnp.PyArray_DATA(losses)
    work.out, work.out_stride = <char *> cnp.PyArray_DATA(O), cnp.PyArray_STRIDES(O)[0] // size
    blocks = (work.n + k.rb - 1) // k.rb
    bytes = ((2 * work.C + 2) * k.rb * size + k.rb * 4 + 4095) & ~<int64_t> 4095
    threads = <int> min(<int64_t> _threads_for(FUNCTION_FLOPS * work.n * work.C), blocks)
    scratch = _borrow(max(threads, 1) * bytes)
    with nogil:
        if threads <= 1:
            for i in range(blocks):
                _softmax_block(&work, k, size, i, scratch.memory)
        else:
            for i in prange(blocks, num_threads=threads, schedule="static"):
                _softmax_block(&work, k, size, i, scratch.memory + omp_get_thread_num() * bytes)
    pool.append(scratch)
    memset(lanes, 0, sizeof(lanes))
    for i in range(work.n):
        lanes[i & 7] += loss[i]
    if result is not out:
        out[...] = result
    loss_sum = ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]))
    return loss_sum / total, out


cdef int _source(fmb_source *source, cnp.ndarray x) except -1:
    source.data = <const char *> cnp.PyArray_DATA(x)
    source.row_stride = cnp.PyArray_STRIDES(x)[0]
    source.col_stride = cnp.PyArray_STRIDES(x)[1] if cnp.PyArray_NDIM(x) == 2 else 0
    source.columns = cnp.PyArray_DIMS(x)[1] if cnp.PyArray_NDIM(x) == 2 else 1
    source.type = _TYPES[x.dtype.str[1:]]
    return 0


cdef dict _TYPES = {"i1": 0, "i2": 1, "i4": 2, "i8": 3, "u1": 4, "u2": 5, "u4": 6, "u8": 7, "f4": 9, "f8": 10}


cdef void _softmax_block(const Softmax *work, const fmb_kernels *k, int64_t size, int64_t block,
                         char *scratch) noexcept nogil:
    """One block of rows: gathered, its loss and gradient, scattered."""
    cdef int64_t first = block * k.rb, row = k.rb * size
    cdef int r, rows = <int> min(<int64_t> k.rb, work.n - first)
    cdef char *target = scratch + work.C * row
    cdef char *s = target + work.C * row
    cdef char *loss = s + row
    cdef int32_t *labels = <int32_t *> (loss + row)
    cdef unsigned long long state = fmb_fp_enter()
    memset(s, 0, row)
    memset(labels, 0, k.rb * sizeof(int32_t))
    k.gather(&work.z, NULL, first, rows, 1.0, scratch)
    if work.spec.indices:
        for r in range(rows):
            labels[r] = <int32_t> fmb_label(&work.y, first + r)
    else:
        k.gather(&work.y, NULL, first, rows, 1.0, target)
    for r in range(rows):
        if size == 8:
            (<double *> s)[r] = work.s[first + r] * work.scale
        else:
            (<float *> s)[r] = <float> (work.s[first + r] * work.scale)
    k.loss(&work.spec, rows, scratch, labels, target, s, scratch, loss)
    for r in range(rows):
        work.losses[first + r] = work.s[first + r] * (
            (<double *> loss)[r] if size == 8 else (<float *> loss)[r])
    k.scatter(scratch, work.C, rows, work.out + first * work.out_stride * size, work.out_stride)
    fmb_fp_leave(state)
