"""The functions of the native module beside its executor: shuffling, looking for NaN, fork, the machine's peak, and
single kernels for the tests."""


# ---- data --------------------------------------------------------------------------------------------------------

cdef const fmb_kernels *shuffling = NULL     # chosen once: to ask the environment takes as long as to shuffle 2000 rows


def permutation(int64_t n, uint64_t key, isa=None):
    """The order of an epoch, (n,) int64: Fisher and Yates' shuffle with the random numbers of `fastmb.rng`."""
    cdef cnp.npy_intp size = n
    cdef cnp.ndarray order = cnp.PyArray_EMPTY(1, &size, cnp.NPY_INT64, 0)
    cdef int64_t *places = <int64_t *> cnp.PyArray_DATA(order)
    cdef const fmb_kernels *k
    global shuffling
    if shuffling == NULL:
        shuffling = _kernels(np.float64)
    k = shuffling if isa is None else _kernels(np.float64, isa)
    with nogil:
        k.shuffle(key, n, places)
    return order


def first_nonfinite(cnp.ndarray a):
    """The first row of a one- or two-dimensional array that holds a NaN or an infinity, or -1. One parallel pass."""
    cdef fmb_source source
    cdef int64_t n = a.shape[0], chunk, rows = 256, found = n, at
    cdef int64_t *first = &found    # what a loop of threads assigns to itself is each thread's own
    cdef const fmb_kernels *k
    cdef int threads
    if a.descr.kind != 102 or a.size == 0:      # "f"
        return -1
    _source(a, &source)
    k = _kernels(np.float64)
    threads = _threads.resolve(None, 1.0 * a.size)
    for chunk in prange((n + rows - 1) // rows, nogil=True, num_threads=threads, schedule="dynamic"):
        at = k.nonfinite(&source, chunk * rows, min(n, (chunk + 1) * rows))
        if at >= 0:
            fmb_least(first, at)
    return found if found < n else -1


def first_outside(cnp.ndarray labels, int64_t n_classes):
    """The first of some integers, (n,), that isn't 0 .. `n_classes` - 1, or -1."""
    cdef fmb_source source
    cdef int64_t row, label
    _source(labels, &source)
    for row in range(labels.shape[0]):
        label = fmb_label(&source, row)
        if label < 0 or label >= n_classes:
            return row
    return -1


def empty_arrays(cnp.npy_intp n, dict shapes, cnp.dtype dtype):
    """Uninitialised arrays (n, *shape) by name, each with memory of its own that begins at a cache line."""
    cdef dict arrays = {}
    cdef cnp.npy_intp bytes
    cdef cnp.npy_intp whole[8]
    cdef int i
    cdef char *place
    cdef cnp.ndarray array, memory
    for name, shape in shapes.items():
        whole[0] = n
        bytes = n * dtype.itemsize
        for i in range(len(shape)):
            whole[1 + i] = shape[i]
            bytes *= whole[1 + i]
        bytes += 63
        memory = cnp.PyArray_SimpleNew(1, &bytes, cnp.NPY_UINT8)
        place = <char *> cnp.PyArray_DATA(memory)
        array = cnp.PyArray_SimpleNewFromData(1 + len(shape), whole, dtype.num, place + (-<int64_t> place & 63))
        cnp.set_array_base(array, memory)
        arrays[name] = array
    return arrays


# ---- for fastmb.ops ----------------------------------------------------------------------------------------------

cdef const fmb_kernels *kernels_for(int isa, int dtype) noexcept:
    """The kernels of an instruction set, which the CPU must have, and dtype."""
    return fmb_kernels_for(isa, dtype)


# ---- fork --------------------------------------------------------------------------------------------------------

def _before_fork():
    """Ends the idle threads that OpenMP keeps for this one: a child that inherits their bookkeeping without them would
    wait for ever. Those of other Python threads are theirs, at work or not, and no matter to the child."""
    omp_pause_resource_all(omp_pause_hard)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork)


# ---- the machine -------------------------------------------------------------------------------------------------

def fma_peak(dtype="float32", int n_threads=1, double seconds=0.1):
    """GFLOP/s of fused multiply-adds on registers alone: the sum of what `n_threads` threads reach at once, each in the
    median of its fractions of a millisecond."""
    cdef const fmb_kernels *k = _kernels(dtype)
    cdef double[:, ::1] rates = np.full((n_threads, 1024), np.nan)
    cdef int tid
    for tid in prange(n_threads, nogil=True, num_threads=n_threads, schedule="static"):
        _peak(k, seconds, &rates[tid, 0], 1024)
    return 1e-9 * float(np.nanmedian(rates, axis=1).sum())


cdef void _peak(const fmb_kernels *k, double seconds, double *rates, int n) noexcept nogil:
    """The FLOP/s of one thread, in up to n rounds."""
    cdef char[64] sink
    cdef int64_t steps = 20_000
    cdef double start = fmb_now(), end = start + seconds, now
    cdef int i
    for i in range(n):
        k.peak(steps, sink)
        now = fmb_now()
        rates[i] = 4.0 * k.mr * k.lanes * steps / (now - start)
        start = now
        if start > end:
            break


# ---- single kernels, for the tests -------------------------------------------------------------------------------

def kernel_activation(int kind, double value, z, isa=None):
    """f(z) and f'(z) of an activation, elementwise."""
    cdef const fmb_kernels *k = _kernels(z.dtype, isa)
    cdef cnp.ndarray a = np.array(z, order="C"), d = np.full_like(a, np.nan)
    k.activation(kind, value, cnp.PyArray_DATA(a), cnp.PyArray_DATA(d), a.size, 1)
    return a, d


def kernel_dropout(uint64_t seed, uint64_t t, int index, int64_t row, double p, int64_t n, int rows, dtype, isa=None):
    """The mask (n, rows) of a dropout of n units, for the rows from `row` on."""
    cdef const fmb_kernels *k = _kernels(dtype, isa)
    cdef cnp.ndarray a = np.ones((n, k.rb), dtype), d = np.full_like(a, np.nan)
    k.dropout(seed, t, index, row, 0, <uint32_t> int(p * 4294967296.0), 1 / (1 - p),
              cnp.PyArray_DATA(a), cnp.PyArray_DATA(d), n, 1)
    return d[:, :rows]


def kernel_update(int kind, coef, cnp.ndarray w, list state, cnp.ndarray g, isa=None):
    """An optimiser's update, in place."""
    cdef const fmb_kernels *k = _kernels(w.dtype, isa)
    cdef cnp.ndarray c = np.ascontiguousarray(coef, w.dtype), s
    cdef void *pointers[3]
    cdef int i
    for i in range(3):
        pointers[i] = NULL
        if i < len(state):
            s = state[i]
            pointers[i] = cnp.PyArray_DATA(s)
    k.update(kind, cnp.PyArray_DATA(c), cnp.PyArray_DATA(w), pointers[0], pointers[1], pointers[2],
             cnp.PyArray_DATA(g), 1, w.size, w.size, w.size)


def kernel_loss(int kind, z, y, s, isa=None, double smoothing=0.0, double delta=1.0, weight=None):
    """The losses (rows,) and the output gradient (rows, n) of a block of rows."""
    cdef const fmb_kernels *k = _kernels(z.dtype, isa)
    cdef int rows = z.shape[0]
    cdef int64_t n = z.shape[1]
    cdef fmb_loss_spec spec
    cdef cnp.ndarray block = np.zeros((n, k.rb), z.dtype), target = np.zeros((n, k.rb), z.dtype)
    cdef cnp.ndarray labels = np.zeros(k.rb, np.int32), scale = np.zeros(k.rb, z.dtype)
    cdef cnp.ndarray dz = np.full_like(block, np.nan), loss = np.full(k.rb, np.nan, z.dtype), w
    block[:, :rows] = z.T
    scale[:rows] = s
    spec.kind, spec.n, spec.indices, spec.smoothing, spec.delta = kind, n, y.ndim == 1, smoothing, delta
    spec.weight = NULL
    if weight is not None:
        w = np.ascontiguousarray(weight, z.dtype)
        spec.weight = cnp.PyArray_DATA(w)
    if spec.indices:
        labels[:rows] = y
    else:
        target[:, :rows] = y.T
    k.loss(&spec, rows, cnp.PyArray_DATA(block), <int32_t *> cnp.PyArray_DATA(labels), cnp.PyArray_DATA(target),
           cnp.PyArray_DATA(scale), cnp.PyArray_DATA(dz), cnp.PyArray_DATA(loss))
    return loss[:rows].copy(), dz[:, :rows].T.copy()
