"""What the threads of one region need of each other: a barrier, and a seat each where work is put."""

from __future__ import annotations

from .machine import (
    CPU_SET,
    address,
    at,
    atomic_add,
    atomic_exchange,
    atomic_load,
    atomic_store,
    atomic_swap,
    call,
    get_affinity,
    give_way,
    item,
    jit,
    load_i8,
    make_semaphore,
    nap,
    now,
    pause,
    processor,
    set_affinity,
    sleep,
    store_i8,
    wake,
)
from .records import LINE, MAX_THREADS, SEAT, offset

SPINS = 4000  # some 20 us
FEW_SPINS = 64  # where another of the threads is on this processor
PATIENCE = 0.001  # seconds of giving way to others; then sleep
IDLE = 0.002  # seconds after which a thread without work sleeps

EMPTY, FREE, WORK, PARKED, LEAVE = range(5)  # states of a seat
_STATE, _BED = offset(SEAT, "state"), LINE  # the semaphore that its thread sleeps in
_GENERATION, _CPUS, _SETS = LINE, 2 * LINE, 2 * LINE + 8 * MAX_THREADS


@jit
def _here(barrier, tid):
    """The processor, for the others to know."""
    cpu = processor()
    if load_i8(barrier + _CPUS + 8 * tid) != cpu:
        store_i8(barrier + _CPUS + 8 * tid, cpu)
    return cpu


@jit
def _shared(barrier, tid, threads, cpu):
    """Whether another of these threads was on this processor when it last told."""
    shared = False
    for i in range(threads):
        shared = shared or (i != tid and load_i8(barrier + _CPUS + 8 * i) == cpu)
    return shared


@jit
def _spread(barrier, tid, threads):
    """Leaves a processor that another of these threads is on, if one is free: affinity narrowed for a moment. It tells
    before it goes, or the other would follow it.
    """
    allowed = barrier + _SETS + 2 * CPU_SET * tid
    free = allowed + CPU_SET
    if get_affinity(allowed) < 0:
        return
    for i in range(0, CPU_SET, 8):
        store_i8(free + i, load_i8(allowed + i))
    for i in range(threads):
        cpu = load_i8(barrier + _CPUS + 8 * i)
        if i != tid and cpu >= 0 and cpu < 8 * CPU_SET:
            word = free + cpu // 64 * 8
            store_i8(word, load_i8(word) & ~(1 << (cpu % 64)))
    some = 0
    for i in range(0, CPU_SET, 8):
        some |= load_i8(free + i)
    if _shared(barrier, tid, threads, _here(barrier, tid)) and some != 0:
        store_i8(barrier + _CPUS + 8 * tid, -1)
        if set_affinity(free) == 0:
            set_affinity(allowed)
        _here(barrier, tid)


@jit
def wait(barrier, tid, threads):
    """Until all threads have come here. The last to arrive starts the next generation."""
    if threads == 1:
        return
    generation = atomic_load(barrier + _GENERATION)
    _here(barrier, tid)
    if atomic_add(barrier, 1) + 1 == threads:
        atomic_store(barrier, 0)
        atomic_store(barrier + _GENERATION, generation + 1)
        return
    wait_past(barrier, tid, threads, barrier + _GENERATION, generation)


@jit
def wait_past(barrier, tid, threads, place, past):
    """Until the counter at `place`, which another thread moves on, is past `past`."""
    if atomic_load(place) > past:
        return
    cpu = _here(barrier, tid)
    for spin in range(SPINS):
        if atomic_load(place) > past:
            return
        if spin > FEW_SPINS:
            pause()
        elif spin == FEW_SPINS and cpu >= 0 and _shared(barrier, tid, threads, cpu):
            break
    _spread(barrier, tid, threads)
    since = now()
    while atomic_load(place) <= past:
        if now() - since < PATIENCE:
            give_way()
        else:
            nap()


@jit
def serve(where):
    """A thread's life: does what is put on its seat, and sleeps when nothing has been for a while. Whoever comes to a
    seat first keeps it.
    """
    seat = at(SEAT, where)
    if atomic_exchange(where + _STATE, EMPTY, FREE) != EMPTY:
        return
    make_semaphore(where + _BED)
    spins, since = 0, now()
    while True:
        state = atomic_load(where + _STATE)
        if state == WORK:
            call(seat.function, (seat.engine, seat.run, seat.tid, seat.threads))
            atomic_store(where + _STATE, FREE)
            spins, since = 0, now()
        elif state == LEAVE:
            return
        elif state == PARKED:
            sleep(where + _BED)
        elif spins < SPINS:
            spins += 1
            pause()
        elif now() - since < IDLE:
            give_way()
        else:
            atomic_exchange(where + _STATE, FREE, PARKED)


@jit
def _tell(where, state):
    """Sets the state of a seat, whose thread is woken if it sleeps."""
    if atomic_swap(where + _STATE, state) == PARKED:
        wake(where + _BED)


@jit
def lead(seats, threads, function, engine, run):
    """A region: puts work on the seats of threads 1 .. threads - 1, does the share of thread 0, waits for them."""
    for tid in range(1, threads):
        seat = item(SEAT, seats, tid)
        seat.function, seat.engine, seat.run, seat.tid, seat.threads = function, engine, run, tid, threads
        while atomic_load(address(seat) + _STATE) == EMPTY:  # its thread has just been started
            give_way()
        _tell(address(seat), WORK)
    call(function, (engine, run, 0, threads))
    for tid in range(1, threads):
        state = address(item(SEAT, seats, tid)) + _STATE
        waited = 0
        while atomic_load(state) == WORK:
            if waited < SPINS:
                pause()
            else:
                give_way()
            waited += 1


@jit
def dismiss(seats, threads):
    """Ends threads 1 .. threads - 1."""
    for tid in range(1, threads):
        _tell(address(item(SEAT, seats, tid)), LEAVE)
