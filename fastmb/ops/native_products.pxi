"""Batched products of matrices. Included by _native.pyx."""

cdef enum:
    MAX_DIMS = 64       # NumPy's own limit

cdef struct Products:
    fmb_product p
    int64_t count               # products in all
    int64_t inner               # of them, those that lie at equal distances
    int dims                    # leading dimensions around those
    int64_t shape[MAX_DIMS]
    int64_t a[MAX_DIMS]         # bytes from one to the next, by dimension
    int64_t b[MAX_DIMS]
    int64_t c[MAX_DIMS]
    int64_t bias[MAX_DIMS]

cdef struct Cut:                # how the work is cut into jobs
    int64_t run                 # products a job
    int64_t rows, columns       # of C a job
    int64_t row_jobs, column_jobs, jobs

cdef struct Share:              # the jobs of a thread: a cache line, so that others' counting is not felt
    int64_t next, last
    int64_t unused[6]


def matmul(a, b, transpose_a, transpose_b, bias, activation, alpha, beta, out, names=_check.MATMUL_NAMES):
    cdef cnp.ndarray A, B, C
    cdef int type_num, nd, kind = 0
    cdef bint ta, tb
    cdef Products work
    cdef double value = 0
    cdef cnp.npy_intp *sa
    cdef cnp.npy_intp *sb
    cdef int64_t m, n, k, ka
    # plain: two matrices, or two stacks of as many, and no more than a bias and an activation's name
    if cnp.PyArray_CheckExact(a) and cnp.PyArray_CheckExact(b):
        A, B = a, b
        nd, type_num = cnp.PyArray_NDIM(A), cnp.PyArray_TYPE(A)
        if ((type_num == cnp.NPY_FLOAT32 or type_num == cnp.NPY_FLOAT64) and cnp.PyArray_ISNOTSWAPPED(A)
                and _plain(b, type_num) and cnp.PyArray_NDIM(B) == nd and (nd == 2 or nd == 3)
                and beta is 0 and alpha is 1 and bias is None and activation is None
                and (transpose_a is False or transpose_a is True) and (transpose_b is False or transpose_b is True)):
            sa, sb = cnp.PyArray_DIMS(A), cnp.PyArray_DIMS(B)
            ta, tb = transpose_a is True, transpose_b is True
            m, ka = sa[nd - 2 + ta], sa[nd - 1 - ta]
            k, n = sb[nd - 2 + tb], sb[nd - 1 - tb]
            if ka == k and (nd == 2 or sa[0] == sb[0]):
                C = _fast_out(out, A, B, nd, sa[0], m, n)
                if C is not None:
                    memset(&work.p, 0, sizeof(fmb_product))
                    work.p.alpha = 1
                    work.p.a_m, work.p.a_k = cnp.PyArray_STRIDES(A)[nd - 2 + ta], cnp.PyArray_STRIDES(A)[nd - 1 - ta]
                    work.p.b_k, work.p.b_n = cnp.PyArray_STRIDES(B)[nd - 2 + tb], cnp.PyArray_STRIDES(B)[nd - 1 - tb]
                    work.p.c_m, work.p.c_n = cnp.PyArray_STRIDES(C)[nd - 2], cnp.PyArray_STRIDES(C)[nd - 1]
                    work.p.m, work.p.n, work.p.k = m, n, k
                    work.p.a = <const char *> cnp.PyArray_DATA(A)
                    work.p.b = <const char *> cnp.PyArray_DATA(B)
                    work.p.c = <char *> cnp.PyArray_DATA(C)
                    work.dims = 0
                    work.count = work.inner = 1
                    if nd == 3:
                        work.count = work.inner = sa[0]
                        work.p.a_next, work.p.b_next = cnp.PyArray_STRIDES(A)[0], cnp.PyArray_STRIDES(B)[0]
                        work.p.c_next = cnp.PyArray_STRIDES(C)[0]
                    _multiply(&work, _dtype(A))
                    return C
    A, B, bias, name, value, alpha, beta, C = _check.matmul(
        a, b, transpose_a, transpose_b, bias, activation, alpha, beta, out, names)
    memset(&work.p, 0, sizeof(fmb_product))
    work.p.alpha, work.p.beta = alpha, beta
    work.p.activation, work.p.value = ACTIVATIONS[name], value
    _describe(&work, A, B, bias, C)
    _multiply(&work, _dtype(A))
    return C


cdef cnp.ndarray _fast_out(object out, cnp.ndarray A, cnp.ndarray B, int nd, int64_t batch, int64_t m, int64_t n):
    """Where the result goes, or None if that takes a closer look."""
    cdef cnp.npy_intp shape[3]
    cdef cnp.ndarray C
    shape[0], shape[nd - 2], shape[nd - 1] = batch, m, n
    if nd == 2:
        shape[0] = m
    if out is None:
        return cnp.PyArray_EMPTY(nd, shape, cnp.PyArray_TYPE(A), 0)
    if not _plain(out, cnp.PyArray_TYPE(A)):
        return None
    C = out
    if (cnp.PyArray_NDIM(C) != nd or not cnp.PyArray_IS_C_CONTIGUOUS(C) or not cnp.PyArray_ISWRITEABLE(C)
            or cnp.PyArray_DIMS(C)[0] != shape[0] or cnp.PyArray_DIMS(C)[nd - 2] != m
            or cnp.PyArray_DIMS(C)[nd - 1] != n or not cnp.PyArray_IS_C_CONTIGUOUS(A)
            or not cnp.PyArray_IS_C_CONTIGUOUS(B) or not _apart(A, C) or not _apart(B, C)):
        return None
    return C


cdef int _describe(Products *work, cnp.ndarray A, cnp.ndarray B, object bias, cnp.ndarray C) except -1:
    """Arrays of equal leading dimensions (of stride 0 where they were broadcast), those that can be taken together
    being one dimension."""
    cdef fmb_product *p = &work.p
    cdef int nd = cnp.PyArray_NDIM(C), d, top
    cdef int64_t n
    cdef cnp.ndarray bias_array
    cdef cnp.npy_intp *s
    cdef cnp.npy_intp *t
    cdef cnp.npy_intp *u
    cdef cnp.npy_intp *v = NULL
    s, t, u = cnp.PyArray_STRIDES(A), cnp.PyArray_STRIDES(B), cnp.PyArray_STRIDES(C)
    p.m, p.n, p.k = cnp.PyArray_DIMS(C)[nd - 2], cnp.PyArray_DIMS(C)[nd - 1], cnp.PyArray_DIMS(A)[nd - 1]
    p.a, p.b = <const char *> cnp.PyArray_DATA(A), <const char *> cnp.PyArray_DATA(B)
    p.c = <char *> cnp.PyArray_DATA(C)
    p.a_m, p.a_k, p.b_k, p.b_n, p.c_m, p.c_n = s[nd - 2], s[nd - 1], t[nd - 2], t[nd - 1], u[nd - 2], u[nd - 1]
    if bias is not None:
        bias_array = bias
        v = cnp.PyArray_STRIDES(bias_array)
        p.bias = <const char *> cnp.PyArray_DATA(bias_array)
        p.bias_m, p.bias_n = v[nd - 2], v[nd - 1]
    work.count = 1
    top = 0
    for d in range(nd - 3, -1, -1):     # from the innermost: work.shape[0] is what `inner` becomes
        n = cnp.PyArray_DIMS(C)[d]
        work.count *= n
        if n == 1:
            continue
        if top > 0 and (s[d] == work.a[top - 1] * work.shape[top - 1] and t[d] == work.b[top - 1] * work.shape[top - 1]
                        and u[d] == work.c[top - 1] * work.shape[top - 1]
                        and (v == NULL or v[d] == work.bias[top - 1] * work.shape[top - 1])):
            work.shape[top - 1] *= n
            continue
        work.shape[top], work.a[top], work.b[top], work.c[top] = n, s[d], t[d], u[d]
        work.bias[top] = v[d] if v != NULL else 0
        top += 1
    work.inner = 1
    work.dims = 0
    if top > 0:
        work.inner = work.shape[0]
        p.a_next, p.b_next, p.c_next, p.bias_next = work.a[0], work.b[0], work.c[0], work.bias[0]
        work.dims = top - 1
        for d in range(top - 1):
            work.shape[d], work.a[d], work.b[d], work.c[d], work.bias[d] = (
                work.shape[d + 1], work.a[d + 1], work.b[d + 1], work.c[d + 1], work.bias[d + 1])
    # One B for all of a stack whose rows follow each other: one taller product.
    if (work.dims == 0 and work.inner > 1 and p.b_next == 0 and p.bias_next == 0 and p.bias_m == 0
            and p.a_next == p.m * p.a_m and p.c_next == p.m * p.c_m):
        p.m *= work.inner
        work.inner = work.count = 1
    return 0


cdef void _orient(Products *work, int64_t size) noexcept nogil:
    """Vectors run along the rows of C: C' = B' A' where its columns are the contiguous ones."""
    cdef fmb_product *p = &work.p
    cdef int d
    if p.n == 1 and p.m > 1 or (p.c_n != size and p.c_m == size and p.n > 1):
        p.m, p.n = p.n, p.m
        p.a, p.b = p.b, p.a
        p.a_m, p.a_k, p.b_k, p.b_n = p.b_n, p.b_k, p.a_k, p.a_m
        p.c_m, p.c_n = p.c_n, p.c_m
        p.bias_m, p.bias_n = p.bias_n, p.bias_m
        p.a_next, p.b_next = p.b_next, p.a_next
        for d in range(work.dims):
            work.a[d], work.b[d] = work.b[d], work.a[d]
    if p.n == 1:
        p.c_n = size
    p.scattered = p.c_n != size


cdef void _cut(Cut *cut, const Products *work, const fmb_ops *k, int threads) noexcept nogil:
    """The rule: many products go to the threads whole, few large ones in blocks of C, about four jobs a thread."""
    cdef const fmb_product *p = &work.p
    cdef int64_t wanted = 4 * threads, blocks
    cut.run, cut.rows, cut.columns = work.count, max(p.m, 1), max(p.n, 1)
    if threads > 1 and work.count >= wanted:
        cut.run = (work.count + wanted - 1) // wanted
    elif threads > 1:
        cut.run = 1
        blocks = (wanted + work.count - 1) // work.count
        # Whole panels of at least four tiles. Half of the cuts go through the columns, the others through the rows:
        # every cut of the columns has A read once more, every cut of the rows has B packed once more.
        cut.columns = _share(p.n, k.isa_columns, 4, (blocks + 1) // 2)
        cut.rows = _share(p.m, k.isa_rows, 4, _quotient(blocks, _quotient(p.n, cut.columns)))
    cut.row_jobs = _quotient(p.m, cut.rows)
    cut.column_jobs = _quotient(p.n, cut.columns)
    cut.jobs = _quotient(work.count, cut.run) * cut.row_jobs * cut.column_jobs


cdef inline int64_t _quotient(int64_t n, int64_t by) noexcept nogil:
    """n / by, rounded up."""
    return (n + by - 1) // by


cdef inline int64_t _share(int64_t n, int64_t tile, int64_t least, int64_t parts) noexcept nogil:
    """Elements a part, in whole tiles, at least so many."""
    cdef int64_t tiles = _quotient(n, tile)
    return max(_quotient(tiles, parts), min(least, tiles)) * tile


cdef int _multiply(Products *work, int dtype) except -1:
    cdef const fmb_ops *k = ops[dtype]
    cdef int64_t size = 8 if dtype == FMB_F64 else 4
    cdef double flops = 2.0 * work.p.m * work.p.n * work.p.k * work.count
    cdef int threads, t
    cdef Cut cut
    cdef Scratch scratch
    cdef Share *shares
    if work.p.m == 0 or work.p.n == 0 or work.count == 0:
        return 0
    _orient(work, size)
    threads = _threads_for(flops)
    _cut(&cut, work, k, threads)
    threads = <int> min(<int64_t> threads, cut.jobs)
    scratch = _borrow(threads * (k.scratch + <int64_t> sizeof(Share)))
    shares = <Share *> (scratch.memory + threads * k.scratch)
    for t in range(threads):
        shares[t].next, shares[t].last = t * cut.jobs // threads, (t + 1) * cut.jobs // threads
    with nogil:
        if threads == 1:
            _jobs(work, k, &cut, shares, 0, 1, scratch.memory)
        else:
            for t in prange(threads, num_threads=threads, schedule="static"):
                _jobs(work, k, &cut, shares, t, threads, scratch.memory + t * k.scratch)
    pool.append(scratch)
    return 0


cdef void _jobs(const Products *work, const fmb_ops *k, const Cut *cut, Share *shares, int thread, int threads,
                void *scratch) noexcept nogil:
    """A thread's own jobs, the same in each call of the same shapes, so that its cache may hold what it reads and
    writes; then those that others haven't got to."""
    cdef Share *share
    cdef int64_t job
    cdef int t
    for t in range(threads):
        share = &shares[(thread + t) % threads]
        while True:
            job = fmb_take(&share.next, 1)
            if job >= share.last:
                break
            _job(work, k, cut, job, scratch)


cdef void _job(const Products *work, const fmb_ops *k, const Cut *cut, int64_t job, void *scratch) noexcept nogil:
    cdef fmb_product p = work.p
    cdef int64_t r0, c0, first, last, at, outer, count
    cdef int d
    cdef unsigned long long state = fmb_fp_enter()
    r0 = job % cut.row_jobs * cut.rows
    job //= cut.row_jobs
    c0 = job % cut.column_jobs * cut.columns
    first = job // cut.column_jobs * cut.run
    last = min(work.count, first + cut.run)
    while first < last:
        at = first % work.inner
        outer = first // work.inner
        count = min(last - first, work.inner - at)
        p.a = work.p.a + at * p.a_next
        p.b = work.p.b + at * p.b_next
        p.c = work.p.c + at * p.c_next
        p.bias = work.p.bias + at * p.bias_next if work.p.bias != NULL else NULL
        for d in range(work.dims):
            p.a += outer % work.shape[d] * work.a[d]
            p.b += outer % work.shape[d] * work.b[d]
            p.c += outer % work.shape[d] * work.c[d]
            if p.bias != NULL:
                p.bias += outer % work.shape[d] * work.bias[d]
            outer //= work.shape[d]
        k.product(&p, count, r0, min(p.m, r0 + cut.rows), c0, min(p.n, c0 + cut.columns), scratch)
        first += count
    fmb_fp_leave(state)
