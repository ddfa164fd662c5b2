/* What the threads of one region need of each other and of the machine: a barrier, a counter, the clock, the state of
 * the floating-point unit. Header only: the executor's loops inline it. */
#ifndef FASTMB_SYNC_H
#define FASTMB_SYNC_H

#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* sched_getcpu, sched_setaffinity */
#endif
#include <sched.h>
#include <stdint.h>
#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* A barrier that can be used again at once. The last to arrive starts the next generation. */
enum { FMB_MAX_THREADS = 256 };
typedef struct { /* on cache lines of their own, wherever it lies */
    char before[64];
    int32_t arrived;
    char between[64];
    int32_t generation;
    char after[64];
    int32_t cpu[FMB_MAX_THREADS]; /* where each thread was when it last came here, or waited; -1: on its way elsewhere */
    char behind[64];
} fmb_barrier;

/* Some 20 to 70 us of spinning, by how long the processor pauses, but hardly any where another of the threads is on this
 * processor; then some milliseconds of giving way to others, then sleep. */
enum { FMB_SPINS = 4000, FMB_FEW_SPINS = 64, FMB_YIELDS = 2000 };

static inline int32_t fmb_cpu(void)
{
#if defined(__linux__)
    return sched_getcpu();
#else
    return -1;
#endif
}

/* The processor, for the others to know. */
static inline int32_t fmb_here(fmb_barrier *b, int tid)
{
    const int32_t cpu = fmb_cpu();
    if (tid < FMB_MAX_THREADS && b->cpu[tid] != cpu)
        __atomic_store_n(&b->cpu[tid], cpu, __ATOMIC_RELAXED);
    return cpu;
}

/* Whether another of these threads was on this processor when it last told. */
static inline int fmb_shared(const fmb_barrier *b, int tid, int threads, int32_t cpu)
{
    int shared = 0;
    for (int i = 0; i < threads && i < FMB_MAX_THREADS; i++)
        shared |= i != tid && __atomic_load_n(&b->cpu[i], __ATOMIC_RELAXED) == cpu;
    return shared;
}

/* The scheduler may wake a thread on the processor of the one that waits for it, and leave both there though another
 * processor is idle: each then waits out the other's turns. The one that finds this out goes to a processor where none
 * of the others is, if it may: its affinity is narrowed for a moment and put back as it was. It tells before it goes, or
 * the other, which has the processor from then on, would follow it. */
static inline void fmb_spread(fmb_barrier *b, int tid, int threads)
{
#if defined(__linux__)
    cpu_set_t allowed, free;
    if (tid >= FMB_MAX_THREADS || sched_getaffinity(0, sizeof(allowed), &allowed))
        return;
    free = allowed;
    for (int i = 0; i < threads && i < FMB_MAX_THREADS; i++) {
        const int32_t cpu = __atomic_load_n(&b->cpu[i], __ATOMIC_RELAXED);
        if (i != tid && cpu >= 0 && cpu < CPU_SETSIZE)
            CPU_CLR(cpu, &free);
    }
    if (fmb_shared(b, tid, threads, fmb_here(b, tid)) && CPU_COUNT(&free) > 0) {
        __atomic_store_n(&b->cpu[tid], -1, __ATOMIC_RELAXED);
        if (!sched_setaffinity(0, sizeof(free), &free))
            sched_setaffinity(0, sizeof(allowed), &allowed);
        fmb_here(b, tid);
    }
#else
    (void)b, (void)tid, (void)threads;
#endif
}

/* Whether the counter at `place` is past `past`. Counters may wrap round. */
static inline int fmb_past(const int32_t *place, int32_t past)
{
    return (int32_t)((uint32_t)__atomic_load_n(place, __ATOMIC_ACQUIRE) - (uint32_t)past) > 0;
}

/* Until the counter at `place`, which another thread moves on, is past `past`. */
static inline void fmb_wait(fmb_barrier *b, int tid, int threads, const int32_t *place, int32_t past)
{
    if (fmb_past(place, past))
        return;
    const int32_t cpu = fmb_here(b, tid);
    for (int spins = 0; spins < FMB_SPINS; spins++) {
        if (fmb_past(place, past))
            return;
        if (spins == FMB_FEW_SPINS && cpu >= 0 && fmb_shared(b, tid, threads, cpu))
            break;
#if defined(__x86_64__)
        if (spins > FMB_FEW_SPINS)
            _mm_pause();
#elif defined(__aarch64__)
        __asm__ __volatile__("isb"); /* about as long as x86's pause; `yield` takes no time on most cores */
#endif
    }
    fmb_spread(b, tid, threads);
    for (int yields = 0; !fmb_past(place, past); yields++) {
        const struct timespec nap = {0, 50000};
        if (yields < FMB_YIELDS)
            sched_yield();
        else
            nanosleep(&nap, NULL);
    }
}

static inline void fmb_barrier_wait(fmb_barrier *b, int tid, int threads)
{
    if (threads == 1)
        return;
    const int32_t generation = __atomic_load_n(&b->generation, __ATOMIC_RELAXED);
    fmb_here(b, tid);
    if (__atomic_add_fetch(&b->arrived, 1, __ATOMIC_ACQ_REL) == threads) {
        __atomic_store_n(&b->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&b->generation, (int32_t)((uint32_t)generation + 1), __ATOMIC_RELEASE);
        return;
    }
    fmb_wait(b, tid, threads, &b->generation, generation);
}

/* One step on, for who waits for that. */
static inline void fmb_advance(int32_t *counter)
{
    __atomic_store_n(counter, (int32_t)((uint32_t)*counter + 1), __ATOMIC_RELEASE);
}

/* What another thread may change, or look at, meanwhile; nothing else follows from it. */
static inline int64_t fmb_look(const int64_t *place)
{
    return __atomic_load_n(place, __ATOMIC_RELAXED);
}

static inline void fmb_tell(int64_t *place, int64_t value)
{
    __atomic_store_n(place, value, __ATOMIC_RELAXED);
}

/* The number at `place` becomes `value` if that is less. */
static inline void fmb_least(int64_t *place, int64_t value)
{
    int64_t now = fmb_look(place);
    while (value < now && !__atomic_compare_exchange_n(place, &now, value, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        ;
}

/* Take `count` pieces from a counter; the first of them. */
static inline int64_t fmb_take(int64_t *counter, int64_t count)
{
    return __atomic_fetch_add(counter, count, __ATOMIC_RELAXED);
}

/* Take the next piece, if it is before `end`; else `end`, and the counter stays. */
static inline int64_t fmb_take_below(int64_t *counter, int64_t end)
{
    int64_t next = __atomic_load_n(counter, __ATOMIC_RELAXED);
    while (next < end && !__atomic_compare_exchange_n(counter, &next, next + 1, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        ;
    return next < end ? next : end;
}

static inline double fmb_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Denormals are zero inside a sweep: returns what to restore afterwards. */
static inline uint64_t fmb_fp_enter(void)
{
#if defined(__x86_64__)
    const unsigned old = _mm_getcsr();
    _mm_setcsr(old | 0x8040); /* FTZ and DAZ */
    return old;
#elif defined(__aarch64__)
    uint64_t old;
    __asm__ __volatile__("mrs %0, fpcr" : "=r"(old));
    __asm__ __volatile__("msr fpcr, %0" : : "r"(old | (1ull << 24)) : "memory"); /* FZ */
    return old;
#else
    return 0;
#endif
}

static inline void fmb_fp_leave(uint64_t old)
{
#if defined(__x86_64__)
    _mm_setcsr((unsigned)old);
#elif defined(__aarch64__)
    __asm__ __volatile__("msr fpcr, %0" : : "r"(old) : "memory");
#else
    (void)old;
#endif
}

#endif
