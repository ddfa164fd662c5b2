"""What a thread does: training's two sweeps, and inference. Included by native.pyx."""


# ---- training: a thread's work -------------------------------------------------------------------------------------

cdef void _work(Engine *e, Run *run, int tid, int threads) noexcept nogil:
    """All steps of a run, as thread `tid` of `threads`."""
    cdef uint64_t fp = fmb_fp_enter()
    cdef Worker *me = &e.workers[tid]
    cdef Mini mini, past
    cdef int64_t done = run.start
    memset(&mini, 0, sizeof(Mini))
    _mini_batch(e, run, run.start, threads, &mini)
    if run.piece > 0:
        me.source = run.batch.X     # all features
        me.first_row = 0
        _balance(e, tid, threads)
    if e.tiled:
        _tile_all(e, tid, threads)
    if e.tiled or threads < run.threads:    # else what others need to know is there, see `_prepare`
        _share(&me.next_block, &me.last_block, mini.blocks, tid, threads)
        fmb_barrier_wait(&e.barrier, tid, threads)
    while True:
        if run.piece > 0:
            _chain(e, run, &mini, tid, threads)
        else:
            _share_tiles(e, run, &mini, tid, threads)
            _row_sweep(e, run, &mini, tid, threads)
            fmb_barrier_wait(&e.barrier, tid, threads)
            if tid == threads - 1:  # whose tiles are often smaller; meanwhile others take them
                _sum(e, run, &mini)
        if fmb_look(&run.bad):
            break
        if run.sweep and run.piece == 0:
            _weight_sweep(e, run, &mini, tid, threads)
        if run.stored and mini.last and not run.applied and not _at_once(run):
            fmb_barrier_wait(&e.barrier, tid, threads)
            _apply_gradient(e, run, mini.step, mini.weight, tid, threads)
        done = mini.step + mini.last
        if tid == 0 and mini.last and (done == run.steps or (done % run.check == 0 or done == run.start + 1)
                                       and fmb_now() > run.deadline):
            fmb_tell(&run.stop, done)
        if mini.last and mini.step + 1 == run.steps and run.stats == NULL:
            break   # the region's end is a barrier
        past = mini
        _next(e, run, threads, &mini)
        if run.piece == 0:
            _share(&me.next_block, &me.last_block, mini.blocks, tid, threads)
        fmb_barrier_wait(&e.barrier, tid, threads)
        if tid == threads - 1 and run.stats != NULL:
            _mean_squares(e, run, &past)
        if fmb_look(&run.stop) == done:
            break
    if tid == 0:    # once: others read what stands beside it
        run.done = done
    fmb_fp_leave(fp)


cdef void _prepare(Engine *e, Run *run) noexcept:
    """What threads have to know of one another when a region begins."""
    cdef int tid
    cdef int64_t tile
    cdef Mini mini
    cdef Worker *worker
    memset(&mini, 0, sizeof(Mini))
    _mini_batch(e, run, run.start, run.threads, &mini)
    for tid in range(run.threads):
        worker = &e.workers[tid]
        worker.handed = 0
        worker.expected.first = worker.expected.last = 0    # of another run: may be past the end of this one's rows
        _share(&worker.next_block, &worker.last_block, mini.blocks, tid, run.threads)
    e.next_piece = 0
    for tile in range(e.total_tiles if run.piece > 0 else 0):
        _added(e, tile)[0] = 0


cdef void _tile_all(Engine *e, int tid, int threads) noexcept nogil:
    """A thread's share of the weights that are kept as tiles."""
    cdef int i
    cdef int64_t first, last
    cdef Stage *s
    for i in range(e.n_stages):
        s = &e.stages[i]
        if s.tiled != NULL:
            _share(&first, &last, _tiles_across(e, s), tid, threads)
            _tile(e, s, 0, s.rows, first * e.k.mr, min(last * e.k.mr, s.n_out))


cdef inline void _tile(Engine *e, Stage *s, int64_t top, int64_t rows, int64_t first, int64_t last) noexcept nogil:
    """Rows of weights, columns `first` .. `last` - 1, to where tiles of the forward product read them."""
    cdef int64_t panel = s.rows * e.k.mr
    e.k.pack(s.w + (top * s.n_out + first) * e.size, s.n_out, rows, last - first, <int> (first % e.k.mr),
             s.tiled + (first // e.k.mr * panel + top * e.k.mr) * e.size, panel)


cdef void _mini_batch(Engine *e, Run *run, int64_t step, int threads, Mini *mini) noexcept nogil:
    """Which rows are mini-batch `step` of the run, and how they are cut into parts and blocks."""
    cdef int64_t i
    cdef double lanes[8]
    cdef Batch *batch = &run.batch
    mini.step = step
    mini.row = 0
    if batch.offsets != NULL:
        mini.begin = batch.offsets[run.first + step]
        mini.batch_rows = batch.offsets[run.first + step + 1] - mini.begin
    else:
        mini.begin = (run.first + step) * run.batch_size
        mini.batch_rows = min(run.batch_size, batch.n - mini.begin)
    mini.weight = mini.batch_rows
    if batch.sample_weight != NULL or (e.loss.indices and e.loss.weight != NULL):
        memset(lanes, 0, sizeof(lanes))
        for i in range(mini.batch_rows):
            lanes[i & 7] += _sample_weight(e, batch, mini.begin + i) * _class_weight(e, batch, mini.begin + i)
        mini.weight = _tree(lanes)
    _part(e, run, threads, mini)


cdef void _part(Engine *e, Run *run, int threads, Mini *mini) noexcept nogil:
    """What goes through of the mini-batch from row `mini.row` on: all, or some parts."""
    mini.rows = mini.batch_rows - mini.row
    if run.together > 0:
        mini.rows = min(mini.rows, run.together)
    mini.part = min(mini.rows, run.rules.part_rows or mini.rows)
    mini.last = mini.row + mini.rows == mini.batch_rows
    mini.block_rows = _block_rows(e, mini.rows, threads, e.room)
    mini.blocks = (mini.rows + mini.block_rows - 1) // mini.block_rows
    mini.relay = run.piece == 0 and _relays(e, run, mini, threads)
    mini.claim = threads > 1 and run.piece == 0 and mini.rows >= e.k.lanes


cdef int _relays(Engine *e, Run *run, Mini *mini, int threads) noexcept nogil:
    """Whether the first stage's product goes from thread to thread, so that its weights stay where they are: where more
    of them would move than of its inputs and outputs, and there are enough pieces for all threads to be at work."""
    cdef Stage *s = &e.stages[0]
    cdef int64_t pieces
    if (threads == 1 or s.kind != LINEAR or e.n_stages == 1 or run.want & INPUTS or s.n_in <= 2 * mini.rows
            or s.n_in < 8 * RELAYED_ROWS * threads):
        return 0
    pieces = (mini.blocks + e.group - 1) // e.group * ((s.n_out - 1) // _relayed_columns(e, mini) + 1)
    return pieces >= 4 * (threads - 1)


cdef inline int64_t _relayed_columns(Engine *e, Mini *mini) noexcept nogil:
    """Columns of weights that a thread hands on at a time."""
    if mini.blocks == 1 and mini.rows <= e.k.mr // 2:
        return e.rb
    return PANELS * e.k.mr if e.stages[0].packed and e.group > 1 else e.k.mr


cdef void _next(Engine *e, Run *run, int threads, Mini *mini) noexcept nogil:
    """On through the mini-batch, or to the next one, if there is one."""
    if not mini.last:
        mini.row += mini.rows
        mini.begin += mini.rows
        _part(e, run, threads, mini)
    elif mini.step + 1 < run.steps:
        _mini_batch(e, run, mini.step + 1, threads, mini)


cdef int64_t _longest(Run *run) noexcept nogil:
    """Rows of the largest mini-batch of a run whose mini-batches differ."""
    cdef int64_t k, most = 1
    for k in range(run.first, run.first + run.steps):
        most = max(most, run.batch.offsets[k + 1] - run.batch.offsets[k])
    return most


cdef int64_t _block_rows(Engine *e, int64_t rows, int threads, int64_t room) noexcept nogil:
    """Rows of a block, one vector of them or two, whichever keeps the threads busy for the shorter time, if so many
    blocks have room."""
    cdef double one = _rounds(e, e.k.lanes, 1.1, rows, threads), two = _rounds(e, e.rb, 2.0, rows, threads)
    if rows <= SMALL_BLOCKS * threads * e.rb and one < two and rows <= room * e.k.lanes:
        return e.k.lanes
    return e.rb


cdef double _rounds(Engine *e, int64_t size, double cost, int64_t rows, int threads) noexcept nogil:
    """Time of a row sweep in blocks of `size` rows that cost so much each, a vector of rows being about 1."""
    cdef int64_t whole = rows // size, rest = rows % size
    cdef double last = 0
    if rest > 0 and whole % threads == 0:   # else it falls to a thread that has nothing else to do
        last = 0.4 if rest <= e.k.mr // 2 else 1.1 if rest <= e.k.lanes else 2.0
    return (whole + threads - 1) // threads * cost + last


cdef double _sample_weight(Engine *e, Batch *batch, int64_t position) noexcept nogil:
    if batch.sample_weight == NULL:
        return 1.0
    return batch.sample_weight[batch.order[position] if batch.order != NULL else position]


cdef double _class_weight(Engine *e, Batch *batch, int64_t position) noexcept nogil:
    cdef int64_t label
    if not e.loss.indices or e.loss.weight == NULL:
        return 1.0
    label = fmb_label(&batch.y, batch.order[position] if batch.order != NULL else position)
    return _get(e.loss.weight, label, e.size)


cdef void _sum(Engine *e, Run *run, Mini *mini) noexcept nogil:
    """The sum of the losses of what went through, part by part, and the mini-batch's weight."""
    cdef int64_t parts = _parts(mini), part
    for part in range(parts):
        _sum_part(e, run, mini, part * mini.part, mini.part if part + 1 < parts else mini.rows - part * mini.part)


cdef inline int64_t _parts(Mini *mini) noexcept nogil:
    """How many parts go through together."""
    return (mini.rows - 1) // mini.part + 1 if mini.rows > mini.part else 1


cdef void _sum_part(Engine *e, Run *run, Mini *mini, int64_t first, int64_t rows) noexcept nogil:
    """The loss sum of rows from `first` on: eight lanes, then a tree."""
    cdef double squares[8]
    cdef double norms[8]
    cdef double largest = 0, scale, square
    cdef int64_t block = mini.place + (first // mini.block_rows if rows > 0 else 0), r, i = 0, row = mini.row + first
    cdef double *stats
    if run.piece == 0 or row == 0:     # else they go on from the piece before
        memset(e.lanes, 0, sizeof(e.lanes))
    memset(squares, 0, sizeof(squares))
    memset(norms, 0, sizeof(norms))
    while i < rows:
        for r in range(min(mini.block_rows, rows - i)):
            e.lanes[i & 7] += e.row_loss[block * e.rb + r]
            if run.stats != NULL:
                square = e.row_squares[block * e.rb + r]
                squares[i & 7] += square
                norms[i & 7] += e.row_norms[block * e.rb + r]
                largest = max(largest, square)
            i += 1
        block += 1
    if row == 0 or run.piece > 0:
        run.sums[2 * mini.step] = 0
    run.sums[2 * mini.step] += _tree(e.lanes)
    run.sums[2 * mini.step + 1] = mini.weight
    if run.stats != NULL:   # of rows' gradients so scaled that their plain mean is the step's
        stats = run.stats + 5 * mini.step
        scale = mini.batch_rows / mini.weight if mini.weight > 0 else 0.0
        if row == 0:
            stats[0] = stats[1] = stats[4] = 0
        stats[0] += scale * scale * _tree(squares)
        stats[1] = max(stats[1], scale * scale * largest)
        stats[3] = mini.batch_rows
        stats[4] += scale * _tree(norms)


cdef void _mean_squares(Engine *e, Run *run, Mini *mini) noexcept nogil:
    """The squared norm of the mean gradient, in the tiles' or the chunks' order."""
    cdef double lanes[8]
    cdef int64_t c
    if not run.stored:
        run.stats[5 * mini.step + 2] = e.k.total(e.tile_squares, 4 * e.total_tiles)
        return
    memset(lanes, 0, sizeof(lanes))
    for c in range(e.total_chunks):
        lanes[c & 7] += e.chunk_squares[c]
    run.stats[5 * mini.step + 2] = _tree(lanes)


# ---- the row sweep -------------------------------------------------------------------------------------------------

cdef void _row_sweep(Engine *e, Run *run, Mini *mini, int tid, int threads) noexcept nogil:
    """All blocks forward and back. Each batch normalisation cuts the way forward, and the way back, into phases."""
    cdef int phase
    if mini.relay:
        _relay(e, run, mini, tid, threads)
    for phase in range(2 * e.n_cuts + 1):
        if phase > 0:
            _meet(e, mini, phase, tid, threads)
        _phase(e, run, mini, phase, tid, threads)


cdef void _relay(Engine *e, Run *run, Mini *mini, int tid, int threads) noexcept nogil:
    """The first stage's product, by a thread that has rows of its weights for itself: it gathers these features, of all
    rows; and the sum over them, of a few outputs at a time, goes on from what the thread before has handed over. Before
    that their squares, where they are wanted: the thread after adds its own while it waits for the first outputs."""
    cdef Worker *me = &e.workers[tid]
    cdef Stage *s = &e.stages[0]
    cdef int64_t first, blocks, m, columns = _relayed_columns(e, mini), block = e.stages[1].x_block
    for first in range(mini.blocks):
        _rows_in(e, run, mini, me, first, 0, tid == 0)
    if run.want & NORMS:
        if tid > 0:
            fmb_wait(&e.barrier, tid, threads, &e.workers[tid - 1].handed, me.handed)
            for first in range(mini.blocks):
                _add_squares(e, first, me.first_row, me.last_row)
        fmb_advance(&me.handed)
    first = 0
    while first < mini.blocks:
        blocks = min(<int64_t> e.group, mini.blocks - first)
        m = 0
        while m < s.n_out:
            if tid > 0:
                fmb_wait(&e.barrier, tid, threads, &e.workers[tid - 1].handed, me.handed)
            _forward(e, s, mini, me, first, blocks, s.x + first * s.x_block * e.size, s.x_block,
                     e.stages[1].x + first * block * e.size, block, me.first_row, me.last_row, m,
                     min(m + columns, s.n_out))
            fmb_advance(&me.handed)
            m += columns
        first += blocks
    fmb_barrier_wait(&e.barrier, tid, threads)


cdef void _add_squares(Engine *e, int64_t block, int64_t first, int64_t last) noexcept nogil:
    """Those of a block's inputs, features `first` .. `last` - 1."""
    cdef Stage *s = &e.stages[0]
    e.k.row_squares(s.x + (block * s.x_block + first * e.rb) * e.size, last - first, _chains(e, block), NULL)


cdef void _phase(Engine *e, Run *run, Mini *mini, int phase, int tid, int threads) noexcept nogil:
    """Blocks of rows: this thread's own, then what is left of the others'. Where there are fewer blocks than
    threads, all threads work on every block, each on a part of the features of every stage."""
    cdef int i
    cdef int64_t block
    cdef Worker *owner
    if mini.blocks < threads:
        for block in range(mini.blocks):
            _rows(e, run, mini, &e.workers[0], block, 1, phase, tid, threads)
        return
    for i in range(threads):
        owner = &e.workers[(tid + i) % threads]
        while True:
            block = fmb_take(&owner.next_block, e.group)
            if block >= owner.last_block:
                break
            _rows(e, run, mini, &e.workers[tid], block, min(<int64_t> e.group, owner.last_block - block),
                  phase, 0, 1)


cdef void _rows(Engine *e, Run *run, Mini *mini, Worker *home, int64_t first, int64_t blocks, int phase, int part,
                int parts) noexcept nogil:
    """Blocks `first` .. of the mini-batch: gathered, forward, loss, backward, or of these what belongs to `phase`. Does
    part `part` of `parts`, each a range of features in whole panels, which meet where one needs what another has made.
    """
    cdef int64_t b
    cdef int back = 2 * e.n_cuts - phase    # phases left
    if phase <= e.n_cuts:
        _rows_forward(e, run, mini, home, first, blocks, e.cuts[phase - 1] if phase > 0 else 0,
                      e.cuts[phase] if phase < e.n_cuts else e.n_stages, part, parts)
    if phase == e.n_cuts:
        if part == 0:
            for b in range(blocks):
                _loss(e, run, mini, home, first + b, _gradient(e, home, 0, first, b))
        fmb_barrier_wait(&e.barrier, part, parts)
    if phase >= e.n_cuts:
        _rows_backward(e, run, mini, home, first, blocks, e.cuts[back] if phase > e.n_cuts else -1,
                       e.cuts[back - 1] if back > 0 else -1, part, parts)
    if run.want and part == 0 and back == 0:
        _each_row(e, run, mini, home, first, blocks)


cdef inline int64_t _first_row(Mini *mini, int64_t block) noexcept nogil:
    """The first row of a block, by its place in the arena."""
    return (block - mini.place) * mini.block_rows


cdef inline int64_t _slot(Engine *e, int64_t first, int64_t b) noexcept nogil:
    """Where block `first` + b is in what is kept on the way: of a group of blocks, or of all, for all threads."""
    return b + (first if e.n_cuts > 0 else 0)


cdef inline char *_gradient(Engine *e, Worker *home, int side, int64_t first, int64_t b) noexcept nogil:
    """Where the gradient of block `first` + b is, and before that the network's output."""
    return home.grad[side] + _slot(e, first, b) * (e.widest + 1) * e.rb * e.size


cdef inline char *_own(Engine *e, char **of_stages, int i, int64_t first, int64_t b, int64_t low) noexcept nogil:
    """Where stage i keeps feature `low` of block `first` + b, in `d` or `held`."""
    return of_stages[i] + (_slot(e, first, b) * e.stages[i].n_out + low) * e.rb * e.size


cdef inline char *_d_input(Engine *e, Worker *home, int64_t first, int64_t b) noexcept nogil:
    return home.d_input + _slot(e, first, b) * e.stages[0].n_in * e.rb * e.size


cdef inline char *_squares(Engine *e, Worker *home, int64_t first, int64_t b) noexcept nogil:
    return home.squares + _slot(e, first, b) * _line(e.rb * e.size)


cdef inline char *_chains(Engine *e, int64_t block) noexcept nogil:
    return e.chains + 4 * block * e.rb * e.size


cdef inline int _input_side(Stage *s) noexcept nogil:
    """In which of the gradients that go back that of a stage's input is."""
    return 1 - s.side if s.kind == LINEAR else s.side


cdef void _rows_in(Engine *e, Run *run, Mini *mini, Worker *home, int64_t first, int64_t b, int squares) noexcept nogil:
    """Block `first` + b, or those of its features that are the thread's own: gathered, and the operations on input;
    and `squares`, where norms are wanted, while the features are near."""
    cdef int64_t row = _first_row(mini, first + b), low = home.first_row, high = low + home.source.columns, end
    cdef int rows = <int> min(mini.block_rows, mini.rows - row)
    cdef char *x = e.stages[0].x + (first + b) * e.stages[0].x_block * e.size
    cdef char *d = NULL
    cdef fmb_source source = home.source
    squares = squares and run.want & NORMS and e.stages[0].kind == LINEAR
    if squares:
        memset(_chains(e, first + b), 0, 4 * e.rb * e.size)
    while low < high:
        end = min(low + SQUARED, high) if squares and e.n_input_ops == 0 else high
        source.columns = end - low
        _gather(e, &source, &run.batch, mini.begin + row, rows, run.batch.scale, x + low * e.rb * e.size)
        source.data += source.columns * source.col_stride
        if e.n_input_ops > 0:
            if run.want & INPUTS:
                d = _d_input(e, home, first, b)
            _apply(e, e.input_ops, e.n_input_ops, x + low * e.rb * e.size, d, low, end - low, run.t + mini.step,
                   run.row + mini.row + row, e.dropout)
        if squares:
            _add_squares(e, first + b, low, end if end < e.stages[0].n_in else e.stages[0].rows)
        low = end


cdef void _rows_forward(Engine *e, Run *run, Mini *mini, Worker *home, int64_t first, int64_t blocks, int start,
                        int end, int part, int parts) noexcept nogil:
    """Stages `start` .. `end` - 1."""
    cdef int64_t b, block, low, high
    cdef int i, begun = start == 0 and mini.relay
    cdef Stage *s
    cdef Stage *source
    cdef char *out
    cdef char *d

    if part == 0 and start == 0 and not begun:
        for b in range(blocks):
            _rows_in(e, run, mini, home, first, b, 1)
    fmb_barrier_wait(&e.barrier, part, parts)

    for i in range(start, end):
        s = &e.stages[i]
        if i + 1 < e.n_stages:
            block = e.stages[i + 1].x_block
            out = e.stages[i + 1].x + first * block * e.size
        else:
            block = (e.widest + 1) * e.rb
            out = _gradient(e, home, 0, first, 0)
        _panels(&low, &high, s.n_out, e.rb, part, parts)
        if i > 0 or not begun:
            _layer(e, s, mini, first, blocks, s.x + first * s.x_block * e.size, s.x_block, out, block, low, high, home,
                   0, part, parts)
        for b in range(blocks):
            if s.skip >= 0:
                source = &e.stages[s.skip]
                e.k.add((high - low) * e.rb, source.x + ((first + b) * source.x_block + low * e.rb) * e.size,
                        out + (b * block + low * e.rb) * e.size)
            d = NULL if s.derivative != FACTOR else _own(e, home.d, i, first, b, low)
            _apply(e, s.ops, s.n_ops, out + (b * block + low * e.rb) * e.size, d, low, high - low,
                   run.t + mini.step, run.row + mini.row + _first_row(mini, first + b), e.dropout)
        fmb_barrier_wait(&e.barrier, part, parts)


cdef void _rows_backward(Engine *e, Run *run, Mini *mini, Worker *home, int64_t first, int64_t blocks, int top,
                         int bottom, int part, int parts) noexcept nogil:
    """From the last stage to the first. Or, where phases meet in a stage, from the input gradient of stage `top` to
    the output gradient of stage `bottom`; -1 where they don't."""
    cdef int64_t b, low, high
    cdef int i, j, rows
    cdef Stage *s
    cdef char *da
    cdef char *d
    for i in range(top if top >= 0 else e.n_stages - 1, max(bottom, 0) - 1, -1):
        s = &e.stages[i]
        _panels(&low, &high, s.n_out, e.rb, part, parts)
        for b in range(blocks if i != top else 0):
            rows = <int> min(mini.block_rows, mini.rows - _first_row(mini, first + b))
            da = _gradient(e, home, s.side, first, b) + low * e.rb * e.size
            d = NULL
            if s.derivative == FACTOR:
                d = _own(e, home.d, i, first, b, low)
            elif s.derivative == SIGN:
                d = e.stages[i + 1].x + ((first + b) * e.stages[i + 1].x_block + low * e.rb) * e.size
            if s.kind == LINEAR:
                e.k.backward(da, d, s.derivative == SIGN, i > 0 or run.want != 0, high - low, rows,
                             s.dz + (low // e.rb * s.panel_stride + (first + b) * e.rb * e.rb) * e.size,
                             s.panel_stride)
            else:
                _layer_dz(e, s, first + b, da, d, low, high)
            if s.skip > 0 or (s.skip == 0 and run.want & INPUTS):
                if s.kind != LINEAR and s.kind != IDENTITY:
                    da = s.dz + ((first + b) * s.n_out + low) * e.rb * e.size
                memcpy(_own(e, home.held, i, first, b, low), da, (high - low) * e.rb * e.size)
        if i > 0 or run.want:
            fmb_barrier_wait(&e.barrier, part, parts)
        if run.want & NORMS and part == 0 and i != top:
            _row_squares(e, s, mini, home, first, blocks, i + 1 == e.n_stages)
        if i == bottom or (i == 0 and not run.want & INPUTS):
            continue
        _panels(&low, &high, s.n_in, e.rb, part, parts)
        if s.kind == LINEAR:
            _backward(e, s, mini, first, blocks, _gradient(e, home, s.side, first, 0),
                      _gradient(e, home, 1 - s.side, first, 0), (e.widest + 1) * e.rb, low, high)
        for b in range(blocks):
            da = _gradient(e, home, _input_side(s), first, b)
            if s.kind != LINEAR:
                _layer_dx(e, s, home, first + b, da, low, high, part, parts)
            for j in range(i, e.n_stages if s.skipped else 0):
                if e.stages[j].skip == i:
                    e.k.add((high - low) * e.rb, _own(e, home.held, j, first, b, low), da + low * e.rb * e.size)
        fmb_barrier_wait(&e.barrier, part, parts)


cdef void _gather(Engine *e, fmb_source *source, Batch *batch, int64_t position, int rows, double scale,
                  void *out) noexcept nogil:
    e.k.gather(source, batch.order + position if batch.order != NULL else NULL, position, rows, scale, out)


cdef void _apply(Engine *e, Op *ops, int n_ops, char *a, char *d, int64_t unit, int64_t n, uint64_t t, int64_t row,
                 int training) noexcept nogil:
    """A stage's operations on features `unit` .. of one block [n][rb], in place; `d` receives the product of their
    derivatives."""
    cdef int i, first = 1
    cdef uint32_t threshold
    cdef double scale
    cdef int64_t j
    for i in range(n_ops):
        if ops[i].kind == CUSTOM:
            ops[i].function(a, d, n * e.rb, FMB_VALUE if d == NULL else FMB_SLOPE if first else FMB_TIMES_SLOPE)
        elif ops[i].kind != DROPOUT:
            e.k.activation(ops[i].kind, ops[i].value, a, d, n * e.rb, first)
        elif training:
            threshold, scale = ops[i].threshold, ops[i].scale
            if ops[i].rates != NULL:
                scale = ops[i].rates[t - ops[i].since]
                threshold, scale = <uint32_t> (scale * 4294967296.0), 1.0 / (1.0 - scale)
            e.k.dropout(e.seed, t, ops[i].index, row, unit, threshold, scale, a, d, n, first)
        else:
            continue
        first = 0
    if first and d != NULL:     # nothing was done
        for j in range(n * e.rb):
            _put(d, j, 1.0, e.size)


cdef void _forward(Engine *e, Stage *s, Mini *mini, Worker *me, int64_t first, int64_t blocks, char *x,
                   int64_t x_block, char *out, int64_t out_block, int64_t k, int64_t last, int64_t low,
                   int64_t high) noexcept nogil:
    """out[o][row] = sum over i of w[i][o] x[i][row], low <= o < high, for each block; weights are looked at once
    for all of them. Rows `k` .. `last` - 1 of the matrix: if k isn't 0, the sum goes on from what is there."""
    cdef fmb_gemm g
    cdef int64_t m, p, b, columns, depth, step, ask, mr = e.k.mr, rb = e.rb, size = e.size, stride = s.n_out
    cdef int64_t ahead = s.ahead if e.group > 1 or last - k == s.rows else 0  # relayed, near: the next are another's
    cdef int rows = <int> min(mini.block_rows, mini.rows - _first_row(mini, first)), tiled
    cdef char *w
    cdef char *c
    if blocks == 1 and rows <= mr // 2:
        low = _forward_few(e, s, rows, x, out, k, last, low, high)
    tiled = e.tiled and s.tiled != NULL and low % mr == 0
    depth = s.rows if blocks == 1 or tiled else KC
    g.a_m, g.a_k, g.a_block = 1, mr if tiled else stride, 0
    g.b_k, g.b_block, g.c_m, g.blocks, g.squares = rb, 0, rb, 1, NULL
    g.asks = NULL
    while k < last:
        g.k = g.k_last = min(depth, last - k)
        m = low
        if blocks > 1 and s.packed and not tiled:
            g.a_k, g.ask_step = mr, _to_ask(e, &g)
            while m < high:
                columns = min(PANELS * mr, high - m)
                e.k.pack(s.w + (k * stride + m) * size, stride, g.k, columns, 0, me.packed, g.k * mr)
                for b in range(blocks):
                    p = 0
                    while p < columns:
                        c = out + (b * out_block + (m + p) * rb) * size
                        g.ask = c + mr * rb * size
                        e.k.gemm(&g, <int> min(mr, columns - p), _vectors(e, mini, first + b), k > 0,
                                 me.packed + p * g.k * size, x + (b * x_block + k * rb) * size, c)
                        p += mr
                m += columns
        if tiled:   # what is next is asked for: the next tile
            w, step = s.tiled + (m // mr * s.rows + k) * mr * size, s.rows * mr * size
            ask, g.ask_step = step, mr * size
        else:       # some rows on
            w, step = s.w + (k * stride + m) * size, mr * size
            ask, g.ask_step = ahead * stride * size, stride * size if ahead > 0 else 0
        c = out + m * rb * size
        while m < high:
            g.ask = w + ask
            if mini.claim and k == 0:
                _claim(e, s, mini, first, blocks, m, min(m + mr, high), c, out_block)
            for b in range(blocks):
                e.k.gemm(&g, <int> min(mr, high - m), _vectors(e, mini, first + b), k > 0, w,
                         x + (b * x_block + k * rb) * size, c + b * out_block * size)
            m += mr
            w += step
            c += mr * rb * size
        k += depth


cdef int64_t _forward_few(Engine *e, Stage *s, int rows, char *x, char *out, int64_t k, int64_t last, int64_t o,
                          int64_t high) noexcept nogil:
    """The same for few rows: vectors run over outputs, as many as fill them. Returns the first that is left."""
    cdef fmb_gemm g
    cdef char buffer[64 * 24]
    cdef int64_t j
    cdef int r, vectors, width
    g.a_m, g.a_k, g.a_block = 1, e.rb, 0
    g.b_k, g.b_block, g.blocks, g.squares = s.n_out, 0, 1, NULL
    g.ask, g.ask_step, g.asks = x, 0, NULL
    g.k = g.k_last = last - k
    while high - o >= e.k.lanes:
        vectors = 8 if 4 * rows <= e.k.mr else 4
        while vectors * e.k.lanes > high - o:
            vectors //= 2
        width = vectors * e.k.lanes
        g.c_m = width
        for j in range(width if k > 0 else 0):
            for r in range(rows):
                _put(buffer, r * width + j, _get(out, (o + j) * e.rb + r, e.size), e.size)
        e.k.gemm(&g, rows, vectors, k > 0, x + k * e.rb * e.size, s.w + (k * s.n_out + o) * e.size, buffer)
        for j in range(width):
            for r in range(rows):
                if e.size == 8:
                    (<double *> out)[(o + j) * e.rb + r] = (<double *> buffer)[r * width + j]
                else:
                    (<float *> out)[(o + j) * e.rb + r] = (<float *> buffer)[r * width + j]
        o += width
    return o


cdef void _backward(Engine *e, Stage *s, Mini *mini, int64_t first, int64_t blocks, char *dz, char *dx,
                    int64_t block, int64_t low, int64_t high) noexcept nogil:
    """dx[i][row] = sum over o of w[i][o] dz[o][row], low <= i < high, for each block."""
    cdef fmb_gemm g
    cdef int64_t k, m, b, mr = e.k.mr, rb = e.rb, size = e.size, stride = s.n_out
    cdef int64_t depth = stride if blocks == 1 else KC
    cdef int rows = <int> min(mini.block_rows, mini.rows - _first_row(mini, first))
    cdef char *w
    cdef char *c
    if blocks == 1 and rows <= e.k.few_rows:
        m = (high - low) // e.k.lanes * e.k.lanes
        e.k.few(s.w + low * stride * size, stride, m, stride, rows, dz, dx + low * rb * size)
        low += m
    g.a_m, g.a_k, g.a_block = stride, 1, 0
    g.b_k, g.b_block, g.c_m, g.blocks, g.squares = rb, 0, rb, 1, NULL
    g.asks = NULL
    k = 0
    while k < stride:
        g.k = g.k_last = min(depth, stride - k)
        g.ask_step = _to_ask(e, &g)
        m, w, c = low, s.w + (low * stride + k) * size, dx + low * rb * size
        while m < high:
            if mini.claim and k == 0 and s > e.stages and (s - 1).kind == LINEAR:
                _claim_gradients(e, s - 1, first, blocks, m, min(m + mr, high))
            for b in range(blocks):
                g.ask = c + ((b + 1) * block if b + 1 < blocks else mr * rb) * size
                e.k.gemm(&g, <int> min(mr, high - m), _vectors(e, mini, first + b), k > 0, w,
                         dz + (b * block + k * rb) * size, c + b * block * size)
            m += mr
            w += mr * stride * size
            c += mr * rb * size
        k += depth


cdef void _claim(Engine *e, Stage *s, Mini *mini, int64_t first, int64_t blocks, int64_t low, int64_t high, char *out,
                 int64_t out_block) noexcept nogil:
    """Takes the lines that outputs low .. high are going to, and after the last stage their gradients."""
    cdef int64_t b
    for b in range(blocks):
        fmb_clear_tile(out + b * out_block * e.size, high - low, _vectors(e, mini, first + b) * e.k.lanes * e.size,
                       e.rb * e.size)
    if s == &e.stages[e.n_stages - 1]:
        _claim_gradients(e, s, first, blocks, low, high)


cdef void _claim_gradients(Engine *e, Stage *s, int64_t first, int64_t blocks, int64_t low,
                           int64_t high) noexcept nogil:
    """Of a stage's output gradients in panels, the lines that begin with features low .. high."""
    cdef int64_t width = min(<int64_t> e.rb, 64 // e.size), o = _ceil(low, width) * width
    while o < high:
        fmb_clear_tile(s.dz + (o // e.rb * s.panel_stride + first * e.rb * e.rb + o % e.rb) * e.size, blocks * e.rb, 1,
                       e.rb * e.size)
        o += width


cdef inline int64_t _to_ask(Engine *e, fmb_gemm *g) noexcept nogil:
    """The step that takes as long as a tile's product to ask for a tile of sums."""
    return e.k.mr * e.rb * e.size // g.k + 1


cdef int _vectors(Engine *e, Mini *mini, int64_t block) noexcept nogil:
    """Vectors that the rows of a block fill."""
    return 2 if min(mini.block_rows, mini.rows - _first_row(mini, block)) > e.k.lanes else 1


cdef void _loss(Engine *e, Run *run, Mini *mini, Worker *me, int64_t block, char *z) noexcept nogil:
    """The block's row losses, and its output gradient in place of the outputs."""
    cdef int64_t row = _first_row(mini, block)
    cdef int64_t position = mini.begin + row
    cdef int r, rows = <int> min(mini.block_rows, mini.rows - row)
    cdef double value, scale = _scale(run, mini)
    cdef double *row_loss = e.row_loss + block * e.rb
    for r in range(e.rb):
        row_loss[r] = 1.0 if r < rows else 0.0
    if run.batch.sample_weight != NULL:
        for r in range(rows):
            row_loss[r] = _sample_weight(e, &run.batch, position + r)
    for r in range(e.rb):
        _put(me.s, r, row_loss[r] * scale, e.size)
    _targets(e, &run.batch, me, position, rows)
    e.k.loss(&e.loss, rows, z, me.labels, me.target, me.s, z, me.loss)
    for r in range(rows):
        value = row_loss[r] * _get(me.loss, r, e.size)
        row_loss[r] = value
        if value - value != 0:
            fmb_tell(&run.bad, 1)


cdef double _scale(Run *run, Mini *mini) noexcept nogil:
    """What a row's weight is multiplied by on its way to the gradient: stored gradients are sums."""
    if run.stored:
        return 1.0
    return 1.0 / mini.weight if mini.weight > 0 else 0.0


cdef void _targets(Engine *e, Batch *batch, Worker *me, int64_t position, int rows) noexcept nogil:
    cdef int r
    if e.loss.indices:
        for r in range(rows):
            me.labels[r] = <int32_t> fmb_label(&batch.y,
                                               batch.order[position + r] if batch.order != NULL else position + r)
        for r in range(rows, e.rb):
            me.labels[r] = 0
    else:
        _gather(e, &batch.y, batch, position, rows, 1.0, me.target)


# ---- the weight sweep ----------------------------------------------------------------------------------------------

cdef void _share_tiles(Engine *e, Run *run, Mini *mini, int tid, int threads) noexcept nogil:
    """A thread's own tiles, and what it gathers. Where the first stage is relayed, its rows of that stage's matrix, and
    these features; and in any case its share of the other tiles."""
    cdef Worker *me = &e.workers[tid]
    cdef Stage *s = &e.stages[0]
    cdef int64_t relayed = 0
    me.source = run.batch.X
    me.first_row = 0
    if mini.relay:
        relayed = s.tiles
        _share(&me.first_row, &me.last_row, s.rows // RELAYED_ROWS, tid, threads)
        me.first_row *= RELAYED_ROWS
        me.last_row = me.last_row * RELAYED_ROWS if tid < threads - 1 else s.rows
        me.next_relayed = me.first_row // e.k.mr * s.panels
        me.last_relayed = (me.last_row + e.k.mr - 1) // e.k.mr * s.panels
        me.source.data += me.first_row * me.source.col_stride
        me.source.columns = min(me.last_row, s.n_in) - me.first_row
    _share(&me.next_tile, &me.last_tile, e.total_tiles - relayed, tid, threads)
    me.next_tile += relayed
    me.last_tile += relayed


cdef void _weight_sweep(Engine *e, Run *run, Mini *mini, int tid, int threads) noexcept nogil:
    """Tiles of the weight gradients: this thread's own, then what is left of the others'."""
    cdef int i
    cdef int64_t least = 1 + 64 // max(<int64_t> 1, mini.rows) if threads > 1 else e.total_tiles
    if e.tiled:
        least = max(least, TOGETHER)
    cdef Worker *me = &e.workers[tid]
    cdef Worker *owner
    _round_coefficients(e, run, me, mini.step)
    _expect(e, run, mini, me, tid, threads)
    if run.running and tid == threads - 1:
        _running_statistics(e, mini)
    for i in range(threads):
        owner = &e.workers[(tid + i) % threads]
        if mini.relay:
            _take_tiles(e, run, mini, me, owner, &owner.next_relayed, owner.last_relayed, least)
        _take_tiles(e, run, mini, me, owner, &owner.next_tile, owner.last_tile, least)


cdef inline void _take_tiles(Engine *e, Run *run, Mini *mini, Worker *me, Worker *owner, int64_t *next, int64_t last,
                             int64_t least) noexcept nogil:
    """What is left of an owner's tiles; of a thread's own, half at a time as long as there are many."""
    cdef int64_t tile, left, count = least
    while True:
        if owner == me:     # to look at another's takes a while
            left = last - fmb_look(next)
            count = max(least, left // 2) if left >= MANY_TILES else least
        tile = fmb_take(next, count)
        if tile >= last:
            break
        _tiles(e, run, mini, me, owner, tile, min(tile + count, last), SUM | UPDATE)


cdef void _chain(Engine *e, Run *run, Mini *mini, int tid, int threads) noexcept nogil:
    """A mini-batch in pieces, each through both sweeps by one thread: of every tile the sum goes on from what the piece
    before has left, whoever had that. When all pieces are in, a thread updates the weights under its own tiles."""
    cdef Worker *me = &e.workers[tid]
    cdef int64_t pieces = max(<int64_t> 1, _ceil(mini.batch_rows, run.piece)), at = tid, block
    cdef int64_t end = mini.taken + max(<int64_t> 0, pieces - threads)
    cdef Mini piece = mini[0]
    cdef int updated = 0
    _round_coefficients(e, run, me, mini.step)
    piece.place = tid * _ceil(run.piece, e.rb)
    while at < pieces:
        piece.row = at * run.piece
        piece.begin = mini.begin + piece.row
        piece.rows = piece.part = min(run.piece, mini.batch_rows - piece.row)
        piece.block_rows = e.rb
        piece.blocks = _ceil(piece.rows, e.rb)
        piece.turn = mini.turn + <int32_t> at
        for block in range(piece.place, piece.place + piece.blocks):
            _rows(e, run, &piece, me, block, 1, 0, 0, 1)
        fmb_wait(&e.barrier, tid, threads, _added(e, 0), piece.turn - 1)
        _sum(e, run, &piece)
        _expect(e, run, &piece, me, tid, threads)
        if at < pieces - 1 or fmb_look(&run.bad):
            _tiles(e, run, &piece, me, me, 0, e.total_tiles, SUM)
        else:   # the last to have a tile; and all rows are known to be finite
            _tiles(e, run, &piece, me, me, 0, me.next_tile, SUM)
            _tiles(e, run, &piece, me, me, me.next_tile, me.last_tile, SUM | UPDATE)
            _tiles(e, run, &piece, me, me, me.last_tile, e.total_tiles, SUM)
            updated = 1
        at = threads + fmb_take_below(&e.next_piece, end) - mini.taken
    mini.taken = end
    mini.turn += <int32_t> pieces
    if not updated:
        fmb_wait(&e.barrier, tid, threads, _added(e, min(me.next_tile, e.total_tiles - 1)), mini.turn - 1)
        if not fmb_look(&run.bad):
            _tiles(e, run, mini, me, me, me.next_tile, me.last_tile, UPDATE)


cdef void _balance(Engine *e, int tid, int threads) noexcept nogil:
    """A thread's own tiles where it has to update no others: as many weights as others'."""
    cdef Worker *me = &e.workers[tid]
    cdef int64_t tile, before = 0, total = e.weight_bytes // e.size
    cdef int i
    cdef Stage *s
    me.next_tile = me.last_tile = e.total_tiles
    for i in range(e.n_stages):
        s = &e.stages[i]
        for tile in range(s.tiles):
            if before * threads >= tid * total:
                me.next_tile = min(me.next_tile, s.first_tile + tile)
            if before * threads >= (tid + 1) * total:
                me.last_tile = min(me.last_tile, s.first_tile + tile)
            before += (min(<int64_t> e.k.mr, s.rows - tile // s.panels * e.k.mr)
                       * min(<int64_t> e.rb, s.columns - tile % s.panels * e.rb))


cdef void _expect(Engine *e, Run *run, Mini *mini, Worker *me, int tid, int threads) noexcept nogil:
    """The rows that this thread is going to gather in the next mini-batch: asked for little by little, with each
    tile a few cache lines, since all at once they would be waited for."""
    cdef Batch *batch = &run.batch
    cdef int64_t complete = mini.begin - mini.row + mini.batch_rows, end = batch.n, blocks, lines
    cdef int64_t next = mini.begin + mini.rows, rows
    if mini.step + 1 == run.steps:
        end = complete
    if run.piece > 0:   # probably this thread's next piece: the first of them are theirs by number
        next = mini.begin + threads * run.piece
        if next >= complete:
            next = complete + tid * run.piece
    rows = min(run.piece or mini.rows, end - next)
    me.expected.first = me.expected.last = me.expected.at = 0
    if batch.offsets == NULL and rows > 0 and batch.X.col_stride > 0:
        me.expected.first, me.expected.last = next, next + rows
        if not mini.relay and run.piece == 0:
            blocks = (rows + mini.block_rows - 1) // mini.block_rows
            me.expected.first = next + min(rows, tid * blocks // threads * mini.block_rows)
            me.expected.last = next + min(rows, (tid + 1) * blocks // threads * mini.block_rows)
        lines = (me.expected.last - me.expected.first) * ((me.source.columns * me.source.col_stride + 63) // 64)
        me.expected_lines = 1 + lines * (threads if run.piece == 0 else 1) // e.total_tiles


cdef void _tiles(Engine *e, Run *run, Mini *mini, Worker *me, Worker *owner, int64_t tile, int64_t end,
                 int work) noexcept nogil:
    """An owner's tiles `tile` .. `end`: dw[i][o] = sum over rows of x[i][row] dz[row][o], or what another layer's
    gradient is, and the update of w. Or one of the two, where mini-batches go in pieces: into sums, or from them."""
    cdef int i = 0, rows, tall, vectors
    cdef int64_t m, panel, across, width, p, many, last, at, columns, top, bottom, height, waiting, place
    cdef int64_t part, parts = _parts(mini), part_blocks = mini.part // mini.block_rows
    cdef int64_t last_blocks = mini.blocks - (parts - 1) * part_blocks
    cdef int64_t last_rows = mini.rows - (mini.blocks - 1) * mini.block_rows
    cdef int64_t mr = e.k.mr, rb = e.rb, size = e.size, near = run.piece or mini.rows   # the same for all pieces
    cdef int tiled, relayed, claim, piece = run.piece > 0, load = piece and mini.row > 0
    cdef int squares = run.stats != NULL and not run.stored
    cdef int tid = <int> (me - e.workers), threads = run.threads
    cdef int ahead      # arrays, of the weights and their states, that are asked for a row of tiles ahead
    cdef int64_t asked  # the first row of weights of the row of tiles for which that has been done
    cdef int64_t own    # the tile up to which they are this thread's
    cdef char *sums = me.tile
    cdef char *x
    cdef char *dz
    cdef Into into, before
    cdef Stage *s
    cdef fmb_gemm g
    cdef fmb_ask asks[ASKS]
    _destination(e, run, mini, me, &into)
    if parts > 1:
        _to_gradient(run, me, &before)
    while tile < end:
        s = &e.stages[i]
        i += 1
        if tile >= s.first_tile + s.tiles:
            continue
        g.a_m, g.a_k, g.a_block = rb, 1, s.x_block
        g.ask, g.ask_step, g.asks = s.x, 0, NULL
        g.b_k, g.b_block = rb, rb * rb
        g.c_m = s.columns if s.panels == 1 else rb
        g.k = mini.block_rows
        m, panel, across, height = tile - s.first_tile, 0, s.panels, s.row_tiles
        top, bottom = 0, s.rows
        relayed = mini.relay and s == e.stages  # nobody else has read these weights, or made these inputs
        claim = run.claim and work & UPDATE and not relayed
        if relayed:
            top, bottom = owner.first_row, owner.last_row
            m -= top // mr * s.panels
            height = (bottom - top + mr - 1) // mr
        # Tiles go along rows of weights as far as the panels of output gradients under them stay near; then down.
        if across * near * rb * size > ACROSS_BYTES:
            across = max(<int64_t> 1, ACROSS_BYTES // (near * rb * size))
            panel = m // (height * across) * across
            m -= panel * height
        width = min(across, s.panels - panel)
        p = m % width
        m = top + m // width * mr
        place = s.first_tile + m // mr * s.panels + panel
        last = min(end, s.first_tile + s.tiles)
        tiled, waiting = e.tiled and s.tiled != NULL, 0
        ahead, asked = 0, -1
        own = end if owner != me else me.last_relayed if relayed else me.last_tile
        if run.far and work == SUM | UPDATE and width == s.panels and not tiled:
            ahead = _arrays_ahead(e, mini, &into)
        while tile < last:
            rows = <int> min(mr, bottom - m)
            if (mini.rows == 1 and not tiled and p == 0 and 1 < s.panels == width <= last - tile and s.kind == LINEAR
                    and run.stats == NULL and not into.completes and not piece):
                many = (last - tile) // width   # whole rows of tiles
                _update_outer(e, s, &into, m, min(many * mr, bottom - m))
                tile += many * width
                m += many * mr
                place += many * s.panels
                continue
            columns = min(rb, s.columns - (panel + p) * rb)
            at = m * s.columns + (panel + p) * rb
            if piece:
                sums = _sums(e, place + p)
            g.squares = e.tile_squares + 4 * (place + p) * size if squares else NULL
            tall, vectors = rows, 2 if columns > e.k.lanes else 1
            if s.panels == 1:   # whole rows of weights, and so of gradients: one span
                columns *= rows
                rows = 1
            if run.far and work & UPDATE:
                _ask_for(e, s, &into, at, rows, columns, ahead if asked == m else 0)
                if ahead > 0:
                    _ask_ahead(e, s, mini, &into, &g, asks, ahead, m + mr,
                               min(mr, bottom - m - mr) if tile + 2 * width - p <= own else 0, p)
            if me.expected.first < me.expected.last:
                fmb_prefetch_rows(&me.source, run.batch.order, &me.expected, me.expected_lines)
            if piece:
                fmb_wait(&e.barrier, tid, threads, _added(e, place + p), mini.turn - 1)
            if claim:
                fmb_claim_tile(into.params + (s.offset + at) * size, rows, columns * size, s.columns * size)
                if near >= ASKED_ROWS and asked != m and p + 1 < width:
                    _ask_weights(e, s, &into, m, panel + p + 1, bottom)
                elif near >= ASKED_ROWS and asked != m:
                    _ask_weights(e, s, &into, m + mr, panel, bottom)
            if not work & SUM:
                pass
            elif mini.rows == 0:
                memset(sums, 0, _tile_bytes(e))
                if squares:
                    memset(g.squares, 0, 4 * size)
            elif s.kind == LINEAR:
                x = s.x + (mini.place * s.x_block + m * rb) * size
                dz = s.dz + ((panel + p) * s.panel_stride + mini.place * rb * rb) * size
                if mini.claim and p == 0 and not relayed:
                    _ask_inputs(e, s, mini, x, tall, tid, threads)
                for part in range(parts - 1):
                    before.kind = FMB_GRADIENT if run.row + mini.row + part == 0 else FMB_ACCUMULATE
                    g.blocks, g.k_last = part_blocks, g.k
                    e.k.gemm(&g, tall, vectors, 0, x, dz, sums)
                    _update(e, s, &before, at, rows, columns, sums, rb)
                    x += part_blocks * s.x_block * size
                    dz += part_blocks * rb * rb * size
                g.blocks, g.k_last = last_blocks, last_rows
                e.k.gemm(&g, tall, vectors, load, x, dz, sums)
            else:
                _layer_gradient(e, s, mini, (panel + p) * rb, min(rb, s.columns - (panel + p) * rb),
                                g.c_m, sums)
                if squares:
                    _squares_of(e, sums, rows, columns, g.c_m, <char *> g.squares)
            if into.completes:
                _complete(e, run, &into, (s.offset + at) * size, rows, columns, s.columns, sums)
            if work & UPDATE:
                _update(e, s, &into, at, rows, columns, sums, rb)
            if piece and work & SUM:
                fmb_advance(_added(e, place + p))
            waiting += tiled
            if tiled and (waiting == TOGETHER or p + 1 == width or tile + 1 == last):
                _tile(e, s, m, rows, (panel + p + 1 - waiting) * rb, min(s.n_out, (panel + p + 1) * rb))
                waiting = 0
            tile += 1
            p += 1
            if p == width:
                p = 0
                m += mr
                asked = m if ahead > 0 and tile + width <= own else -1
                place += s.panels
                if m >= bottom:
                    m = top
                    panel += width
                    place = s.first_tile + m // mr * s.panels + panel
                    width = min(across, s.panels - panel)


cdef void _squares_of(Engine *e, const char *sums, int64_t rows, int64_t columns, int64_t stride,
                      char *four) noexcept nogil:
    """As the tile product leaves them: four numbers that add up to the sum of the squares."""
    cdef double total = 0
    cdef int64_t row
    for row in range(rows):
        total += e.k.squares(sums + row * stride * e.size, columns)
    memset(four, 0, 4 * e.size)
    _put(four, 0, total, e.size)


cdef inline int _arrays_ahead(Engine *e, Mini *mini, Into *into) noexcept nogil:
    """How many arrays' shares the product of a tile has the time to ask for, see `_ask_ahead`."""
    cdef int64_t blocks = min(mini.rows // mini.block_rows, <int64_t> ASKS - 1)
    return <int> min(1 + into.states, blocks // _ceil(e.k.mr * e.rb * e.size, 64 * mini.block_rows))


cdef void _ask_ahead(Engine *e, Stage *s, Mini *mini, Into *into, fmb_gemm *g, fmb_ask *ask, int arrays, int64_t m,
                     int64_t rows, int64_t p) noexcept nogil:
    """What the product of tile `p` of a row of tiles asks for on its way: its share of the weights under the next row,
    which are `rows` whole rows of the matrix from `m` on, and of their states. An array's share takes a block of the
    product, or two. Asked for at once, they would be waited for."""
    cdef int64_t start = (s.offset + m * s.columns) * e.size, share = e.k.mr * e.rb * e.size, at
    cdef int i = 0, j
    for j in range(arrays if rows > 0 else 0):
        at = 0
        while at < share:
            ask[i].at = (into.params if j == 0 else into.state[j - 1]) + start + p * share + at
            ask[i].step, ask[i].next = 64, &ask[i + 1]
            at += 64 * mini.block_rows
            i += 1
    ask[i].at, ask[i].step, ask[i].next = s.x, 0, NULL
    g.ask, g.ask_step, g.asks = ask[0].at, ask[0].step, ask[0].next


cdef void _ask_for(Engine *e, Stage *s, Into *into, int64_t first, int64_t rows, int64_t columns,
                   int asked) noexcept nogil:
    """What the update of a tile is going to read and write, but for the first arrays, if they have been asked for."""
    cdef int64_t at = (s.offset + first) * e.size, row
    cdef int j
    if asked == 0:
        fmb_prefetch_tile(into.params + at, rows, columns * e.size, s.columns * e.size)
    for j in range(max(0, asked - 1), into.states):
        fmb_prefetch_tile(into.state[j] + at, rows, columns * e.size, s.columns * e.size)
    if into.weight != 0:
        fmb_prefetch_tile(into.average + at, rows, columns * e.size, s.columns * e.size)
    if e.tiled and s.tiled != NULL:
        row, first = first // s.columns, first % s.columns // e.k.mr
        fmb_prefetch_tile(s.tiled + (first * s.rows + row) * e.k.mr * e.size, columns // e.k.mr + 1,
                          rows * e.k.mr * e.size, s.rows * e.k.mr * e.size)


cdef inline void _ask_weights(Engine *e, Stage *s, Into *into, int64_t m, int64_t panel, int64_t bottom) noexcept nogil:
    """The weights under the next tile, which others have read: so that to claim them takes no waiting."""
    cdef int64_t at = s.offset + m * s.columns + panel * e.rb
    fmb_prefetch_tile(into.params + at * e.size, min(<int64_t> e.k.mr, bottom - m),
                      min(e.rb, s.columns - panel * e.rb) * e.size, s.columns * e.size)


cdef inline void _ask_inputs(Engine *e, Stage *s, Mini *mini, char *x, int64_t features, int tid,
                             int threads) noexcept nogil:
    """A row of tiles' inputs, `features` from x on, as far as others have made them: nobody else reads them here."""
    cdef int64_t b, first, last
    _share(&first, &last, mini.blocks, tid, threads)
    for b in range(mini.blocks):
        if not first <= b < last:
            fmb_prefetch_tile(x + b * s.x_block * e.size, features, _vectors(e, mini, b) * e.k.lanes * e.size,
                              e.rb * e.size)


cdef void _round_coefficients(Engine *e, Run *run, Worker *me, int64_t step) noexcept nogil:
    """The step's coefficients in the plan's dtype. There are none where gradients are only stored."""
    cdef int64_t i
    if run.coefficients != NULL:
        for i in range(8 * e.groups):
            _put(me.coef, i, run.coefficients[run.columns * step + i], e.size)


cdef void _destination(Engine *e, Run *run, Mini *mini, Worker *me, Into *into) noexcept nogil:
    """Where the weight sweep's gradients go: into the update, or into the array that stores them."""
    _to_update(run, mini.step, me, into)
    into.completes = run.stored and mini.last and not run.applied and _at_once(run)
    if into.completes:
        into.before = run.gradient if mini.row > 0 or _parts(mini) > 1 else NULL
        into.factor = _factor(run, mini.weight)
    elif run.stored:
        _to_gradient(run, me, into)
        into.kind = FMB_GRADIENT if run.row + mini.row == 0 and _parts(mini) == 1 else FMB_ACCUMULATE


cdef void _to_gradient(Run *run, Worker *me, Into *into) noexcept nogil:
    """The sum of gradients so far; `kind` is the caller's."""
    cdef int j
    into.completes = 0
    into.coef = me.coef
    into.params, into.average = run.params, NULL
    for j in range(3):
        into.state[j] = run.gradient
    into.states = 1
    into.weight = 0


cdef void _complete(Engine *e, Run *run, Into *into, int64_t at, int64_t rows, int64_t columns, int64_t stride,
                    char *g) noexcept nogil:
    """A tile of the last part's gradient becomes that of the mini-batch: the parts before added, mean, limit."""
    if into.before != NULL:
        e.k.update(FMB_ACCUMULATE, into.coef, run.params + at, g, NULL, NULL, into.before + at, rows, columns, e.rb,
                   stride)
    if into.factor != 1.0 or run.rules.limit < INFINITY:
        e.k.limit(g, columns if rows == 1 else rows * e.rb, into.factor, run.rules.limit)


cdef void _to_update(Run *run, int64_t step, Worker *me, Into *into) noexcept nogil:
    cdef int j
    into.completes = 0
    into.kind = run.update
    into.coef = me.coef
    into.params, into.average = run.params, run.average
    into.states = 0
    for j in range(3):
        into.state[j] = run.state[j] if run.state[j] != NULL else run.params
        into.states += run.state[j] != NULL
    into.weight = 0 if run.average == NULL else run.coefficients[run.columns * (step + 1) - 1]


cdef inline void _update(Engine *e, Stage *s, Into *into, int64_t first, int64_t rows, int64_t columns, const char *g,
                         int64_t g_stride) noexcept nogil:
    """The update of rows x columns weights, from number `first` of the stage's matrix on, by their gradients."""
    if s.group == s.last_group:
        _update_group(e, s, into, s.group, first, rows, columns, g, g_stride)
    else:
        _update_groups(e, s, into, first, rows, columns, g, g_stride)


cdef void _update_groups(Engine *e, Stage *s, Into *into, int64_t first, int64_t rows, int64_t columns, const char *g,
                         int64_t g_stride) noexcept nogil:
    """The same where at `s.cut` another group of parameters begins."""
    cdef int64_t head
    if rows == 1:
        head = max(<int64_t> 0, min(columns, s.cut * s.columns - first))
        _update_group(e, s, into, s.group, first, 1, head, g, g_stride)
        _update_group(e, s, into, s.last_group, first + head, 1, columns - head, g + head * e.size, g_stride)
    else:
        head = max(<int64_t> 0, min(rows, s.cut - first // s.columns))
        _update_group(e, s, into, s.group, first, head, columns, g, g_stride)
        _update_group(e, s, into, s.last_group, first + head * s.columns, rows - head, columns,
                      g + head * g_stride * e.size, g_stride)


cdef inline void _update_group(Engine *e, Stage *s, Into *into, int group, int64_t first, int64_t rows, int64_t columns,
                               const char *g, int64_t g_stride) noexcept nogil:
    cdef int64_t at = (s.offset + first) * e.size
    if rows <= 0 or columns <= 0:
        return
    e.k.update(into.kind, into.coef + 8 * group * e.size, into.params + at, into.state[0] + at, into.state[1] + at,
               into.state[2] + at, g, rows, columns, s.columns, g_stride)
    if into.weight != 0:
        e.k.average(into.weight, into.params + at, into.average + at, rows, columns, s.columns)


cdef void _update_outer(Engine *e, Stage *s, Into *into, int64_t m, int64_t rows) noexcept nogil:
    """The update of whole rows m .. of a stage's matrix by the gradient of one row."""
    cdef int64_t head = max(<int64_t> 0, min(rows, s.cut - m))
    _update_outer_group(e, s, into, s.group, m, head)
    _update_outer_group(e, s, into, s.last_group, m + head, rows - head)


cdef inline void _update_outer_group(Engine *e, Stage *s, Into *into, int group, int64_t m,
                                     int64_t rows) noexcept nogil:
    cdef int64_t at = (s.offset + m * s.columns) * e.size
    if rows <= 0:
        return
    e.k.update_outer(into.kind, into.coef + 8 * group * e.size, into.params + at, into.state[0] + at,
                     into.state[1] + at, into.state[2] + at, s.x + m * e.rb * e.size, s.dz, s.panel_stride, rows,
                     s.columns)
    if into.weight != 0:
        e.k.average(into.weight, into.params + at, into.average + at, rows, s.columns, s.columns)


# ---- rows' own gradients -------------------------------------------------------------------------------------------

cdef void _row_squares(Engine *e, Stage *s, Mini *mini, Worker *home, int64_t first, int64_t blocks,
                       int start) noexcept nogil:
    """Adds to the squared norms of the blocks' rows what a stage has: a weight's gradient by one row is the product
    of the row's input and output gradient, so its norm is the product of theirs (Goodfellow 2015)."""
    cdef int64_t b, r, width = _line(e.rb * e.size)
    cdef char *x = home.factors
    cdef char *total
    for b in range(blocks):
        total = _squares(e, home, first, b)
        if start:
            memset(total, 0, width)
        if s.kind != LINEAR:
            _layer_squares(e, s, home, first + b, _gradient(e, home, 1 - s.side, first, b), total)
            continue
        if s == e.stages:   # they have been added up on the way in
            e.k.row_squares(NULL, 0, _chains(e, first + b), x)
        else:
            e.k.row_squares(s.x + (first + b) * s.x_block * e.size, s.rows, NULL, x)
        e.k.row_squares(_gradient(e, home, s.side, first, b), s.n_out, NULL, x + width)
        if e.size == 8:
            for r in range(e.rb):
                (<double *> total)[r] += (<double *> x)[r] * (<double *> (x + width))[r]
        else:
            for r in range(e.rb):
                (<float *> total)[r] += (<float *> x)[r] * (<float *> (x + width))[r]


cdef void _each_row(Engine *e, Run *run, Mini *mini, Worker *home, int64_t first, int64_t blocks) noexcept nogil:
    """What is wanted of the blocks' rows, now that their gradients are there: norms, shortening, themselves."""
    cdef int64_t b, r, row
    cdef int i, rows, shorter, side = _input_side(&e.stages[0])
    cdef char *dx
    cdef Stage *s
    for b in range(blocks):
        row = (first + b) * mini.block_rows
        rows = <int> min(mini.block_rows, mini.rows - row)
        shorter = _norms(e, run, mini, home, first, b, row, rows) if run.want & NORMS else 0
        for i in range(e.n_stages):
            s = &e.stages[i]
            if run.want & CLIP and shorter:
                if s.kind == LINEAR:
                    e.k.scale_rows(s.dz + (first + b) * e.rb * e.rb * e.size, s.panels, s.panel_stride, rows,
                                   home.factors)
                else:
                    _layer_shorten(e, s, first + b, home.factors)
            if run.want & WHOLE and s.kind != LINEAR:
                _layer_whole(e, run, s, i, first + b, rows, mini.begin + row, _gradient(e, home, 1 - side, first, b))
            elif run.want & WHOLE:
                for r in range(rows):
                    _whole(e, run, s, i, s.x + ((first + b) * s.x_block + r) * e.size,
                           s.dz + ((first + b) * e.rb + r) * e.rb * e.size, mini.begin + row + r)
        if run.want & INPUTS:
            dx = _gradient(e, home, side, first, b)
            if e.n_input_ops > 0:
                for i in range(e.stages[0].n_in * e.rb):
                    _put(dx, i, _get(dx, i, e.size) * _get(_d_input(e, home, first, b), i, e.size), e.size)
            e.k.scatter(dx, e.stages[0].n_in, rows,
                        run.inputs + (mini.begin + row) * e.stages[0].n_in * e.size, e.stages[0].n_in)
            e.k.limit(run.inputs + (mini.begin + row) * e.stages[0].n_in * e.size, rows * e.stages[0].n_in,
                      run.batch.scale, INFINITY)


cdef int _norms(Engine *e, Run *run, Mini *mini, Worker *home, int64_t first, int64_t b, int64_t row,
                int rows) noexcept nogil:
    """The norms of a block's rows, and the factors that shorten them; whether any is too long. A row's own gradient is
    without its sample weight; what statistics are made of has it."""
    cdef int64_t r, place
    cdef int shorter = 0
    cdef double scale = _scale(run, mini), norm, weight
    cdef double *squares = e.row_squares + (first + b) * e.rb
    cdef double *norms = e.row_norms + (first + b) * e.rb
    scale = 1.0 / scale if scale > 0 else 0.0
    for r in range(rows):
        squares[r] = _get(_squares(e, home, first, b), r, e.size) * scale * scale
    for r in range(rows):   # as vectors
        norms[r] = sqrt(squares[r])
    for r in range(rows if run.norms_out != NULL or run.norms != NULL or run.want & CLIP else 0):
        norm = norms[r]
        place = mini.begin + row + r
        if run.norms_out != NULL:
            _put(run.norms_out, place, norm, e.size)
        if run.batch.sample_weight != NULL:
            weight = _sample_weight(e, &run.batch, place)
            norm = norm / weight if weight > 0 else 0.0
        if run.norms != NULL:
            run.norms[run.batch.order[place] if run.batch.order != NULL else place] = <float> norm
        shorter |= norm > run.rules.clip
        _put(home.factors, r, run.rules.clip / norm if norm > run.rules.clip else 1.0, e.size)
    return shorter


cdef void _whole(Engine *e, Run *run, Stage *s, int i, char *x, char *dz, int64_t place) noexcept nogil:
    """A row's own gradient of a stage's weight and bias, where the caller wants it."""
    e.k.outer(x, s.n_in, dz, s.n_out, s.panel_stride, run.whole[2 * i] + place * s.n_in * s.n_out * e.size)
    if s.rows > s.n_in:
        e.k.outer(x + s.n_in * e.rb * e.size, 1, dz, s.n_out, s.panel_stride,
                  run.whole[2 * i + 1] + place * s.n_out * e.size)


# ---- a gradient that was stored ------------------------------------------------------------------------------------

cdef void _apply_work(Engine *e, Run *run, double weight, int tid, int threads) noexcept nogil:
    """A gradient that the caller has, applied."""
    cdef uint64_t fp = fmb_fp_enter()
    _apply_gradient(e, run, 0, weight, tid, threads)
    fmb_fp_leave(fp)


cdef void _apply_gradient(Engine *e, Run *run, int64_t step, double weight, int tid, int threads) noexcept nogil:
    """From the sum of gradients to the update: mean, noise, limits, in chunks of the matrices."""
    cdef Rules *rules = &run.rules
    cdef Stage *s
    cdef Into into
    cdef double lanes[8]
    cdef double norm, scale = 1.0
    cdef double factor = _factor(run, weight)
    cdef int64_t c, at, n, first, last
    cdef int norms = rules.max_norm < INFINITY or run.stats != NULL
    cdef char *g
    _round_coefficients(e, run, &e.workers[tid], step)
    _to_update(run, step, &e.workers[tid], &into)
    _share(&first, &last, e.total_chunks, tid, threads)
    if norms:
        for c in range(first, last):
            s = _chunk(e, c, &at, &n)
            g = run.gradient + (s.offset + at) * e.size
            _mean(e, run, &e.workers[tid], step, factor, s, at, n)
            e.chunk_squares[c] = e.k.squares(g, n)
        fmb_barrier_wait(&e.barrier, tid, threads)
        memset(lanes, 0, sizeof(lanes))
        for c in range(e.total_chunks):
            lanes[c & 7] += e.chunk_squares[c]
        norm = sqrt(_tree(lanes))
        if rules.max_norm < INFINITY and not norm + 1e-6 <= rules.max_norm:
            scale = rules.max_norm / (norm + 1e-6)
    for c in range(first, last):
        s = _chunk(e, c, &at, &n)
        g = run.gradient + (s.offset + at) * e.size
        if not norms:
            _mean(e, run, &e.workers[tid], step, factor, s, at, n)
        if scale != 1.0 or rules.limit < INFINITY:
            e.k.limit(g, n, scale, rules.limit)
        _update(e, s, &into, at, 1, n, g, n)


cdef Stage *_chunk(Engine *e, int64_t c, int64_t *at, int64_t *n) noexcept nogil:
    """Chunk `c` of the parameters: its stage, where it begins in the stage's matrix, and its numbers."""
    cdef int i = 0
    while c >= e.stages[i].first_chunk + e.stages[i].chunks:
        i += 1
    at[0] = (c - e.stages[i].first_chunk) * CHUNK
    n[0] = min(CHUNK, e.stages[i].rows * e.stages[i].columns - at[0])
    return &e.stages[i]


cdef inline int _at_once(Run *run) noexcept nogil:
    """Whether the last part's tiles complete a stored gradient and go into the update: nobody has to know it as a
    whole, or as chunks, before; and arrays that are far come faster in a row than tile by tile."""
    return not run.far and run.rules.noise == 0 and run.rules.max_norm == INFINITY and run.stats == NULL


cdef inline double _factor(Run *run, double weight) noexcept nogil:
    """What makes the mean of the sum of gradients."""
    cdef double divide = run.rules.divide if run.rules.divide > 0 else weight
    return 1.0 / divide if divide > 0 else 0.0


cdef void _mean(Engine *e, Run *run, Worker *me, int64_t step, double factor, Stage *s, int64_t at,
                int64_t n) noexcept nogil:
    """A chunk of the sum divided, and the noise added."""
    cdef char *g = run.gradient + (s.offset + at) * e.size
    cdef int64_t i, bytes
    cdef uint32_t *bits = NULL
    if factor != 1.0:
        e.k.limit(g, n, factor, INFINITY)
    if run.rules.noise > 0:
        if run.rules.secure:
            bits = me.bits
            bytes = (n + 127) // 128 * 128 * sizeof(uint32_t)
            for i in range(0, bytes, 256):
                if getentropy(<char *> bits + i, 256) != 0:
                    run.failed = 1
        e.k.noise(e.seed, run.t + step, s - e.stages, bits, run.rules.noise * factor, g, at, n)


# ---- inference: a thread's work ------------------------------------------------------------------------------------

cdef void _infer_work(Engine *e, Batch *batch, char *result, double *losses, double *weights, int64_t *counter,
                      int tid, int threads) noexcept nogil:
    """Blocks of rows forward, taken from `counter`; their losses too where `losses` is not NULL."""
    cdef uint64_t fp = fmb_fp_enter()
    cdef Worker *me = &e.workers[tid]
    cdef Mini mini
    cdef int64_t first
    mini.begin = mini.place = mini.claim = 0
    mini.rows = batch.n
    mini.block_rows = _block_rows(e, mini.rows, threads, mini.rows)
    mini.blocks = (mini.rows + mini.block_rows - 1) // mini.block_rows
    while True:
        first = fmb_take(counter, e.group)
        if first >= mini.blocks:
            break
        _infer_rows(e, batch, &mini, me, first, min(<int64_t> e.group, mini.blocks - first), result, losses,
                    weights)
    fmb_fp_leave(fp)


cdef void _infer_rows(Engine *e, Batch *batch, Mini *mini, Worker *me, int64_t first, int64_t blocks, char *result,
                      double *losses, double *weights) noexcept nogil:
    cdef int64_t b, row, r, block = (e.widest + 1) * e.rb, n_out = _plan_outputs(e)
    cdef int i, j, rows, current = 0
    cdef Stage *s
    cdef char *a
    for i in range(e.n_stages):
        s = &e.stages[i]
        for b in range(blocks):
            a = me.da[current] + b * block * e.size
            if i == 0:
                row = (first + b) * mini.block_rows
                _gather(e, &batch.X, batch, row, <int> min(mini.block_rows, mini.rows - row), batch.scale, a)
                _apply(e, e.input_ops, e.n_input_ops, a, NULL, 0, s.n_in, 0, 0, 0)
            for r in range(e.rb):
                _put(a, s.n_in * e.rb + r, 1.0, e.size)
            for j in range(i, e.n_stages if s.skipped else 0):
                if e.stages[j].skip == i:
                    memcpy(me.kept[j] + b * s.n_in * e.rb * e.size, a, s.n_in * e.rb * e.size)
        if s.kind != IDENTITY:
            _layer(e, s, mini, first, blocks, me.da[current], block, me.da[1 - current], block, 0, s.n_out, me, 1, 0,
                   1)
            current = 1 - current
        for b in range(blocks):
            if s.skip >= 0:
                e.k.add(s.n_out * e.rb, me.kept[i] + b * s.n_out * e.rb * e.size,
                        me.da[current] + b * block * e.size)
            _apply(e, s.ops, s.n_ops, me.da[current] + b * block * e.size, NULL, 0, s.n_out, 0, 0, 0)
    for b in range(blocks):
        a = me.da[current] + b * block * e.size
        row = (first + b) * mini.block_rows
        rows = <int> min(mini.block_rows, mini.rows - row)
        e.k.scatter(a, n_out, rows, result + row * n_out * e.size, n_out)
        if losses != NULL:
            _targets(e, batch, me, row, rows)
            for r in range(e.rb):
                _put(me.s, r, 1.0, e.size)
            e.k.loss(&e.loss, rows, a, me.labels, me.target, me.s, NULL, me.loss)
            for r in range(rows):
                losses[row + r] = _sample_weight(e, batch, row + r) * _get(me.loss, r, e.size)
                weights[row + r] = _sample_weight(e, batch, row + r) * _class_weight(e, batch, row + r)
