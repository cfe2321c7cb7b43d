// Threads: one pool a process. The calling thread is number 0; the others sleep until it has work,
// do their share of every step, and meet at a barrier after each.
//
// A thread that waits looks for work for some 50 us before it sleeps: kernels of one token follow
// each other within that time, and nothing is busy while the program is idle.

// tinygrad's loader does not know the jump that Arm's compilers make of a call at a function's end.
#pragma clang attribute push(__attribute__((disable_tail_calls)), apply_to = function)

#define CACHE_LINE 128
#define MAX_THREADS 256
#define SPINS_BEFORE_SLEEP 4000
#define SPINS_BEFORE_YIELD 2000

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef short i16;
typedef unsigned int u32;
typedef int i32;
typedef unsigned long long u64;
typedef long long i64;

// libc, found when the code is loaded. The real types are smaller than the room kept for them.
extern int pthread_create(void *thread, const void *attr, void *(*start)(void *), void *arg);
extern int pthread_join(void *thread, void **result);
extern int pthread_mutex_init(void *mutex, const void *attr);
extern int pthread_mutex_lock(void *mutex);
extern int pthread_mutex_unlock(void *mutex);
extern int pthread_cond_init(void *cond, const void *attr);
extern int pthread_cond_wait(void *cond, void *mutex);
extern int pthread_cond_broadcast(void *cond);
extern int sched_yield(void);
extern void *malloc(u64 nbytes);
extern void free(void *memory);
extern void abort(void);

typedef struct Pool Pool;
typedef struct {
    Pool *pool;
    i64 number;
    void *thread;
    void *room;  // memory of this thread alone
    i64 room_bytes;
} Helper;

// Zeroed by whoever makes it, but for the first two numbers.
struct Pool {
    u64 entry;   // address of qwen3_tg_cpu(), for the kernels
    i64 wanted;  // threads, with the calling one, from the next job on
    i64 threads, started, ready;
    __attribute__((aligned(CACHE_LINE))) u64 caller[32], mutex[32], cond[32];
    __attribute__((aligned(CACHE_LINE))) u32 generation;  // counts jobs
    u32 sleeping, stop;
    __attribute__((aligned(CACHE_LINE))) u32 arrived;   // at the barrier
    __attribute__((aligned(CACHE_LINE))) u32 phase;     // counts barriers passed
    __attribute__((aligned(CACHE_LINE))) u32 next[2];   // first item of a step not yet taken
    __attribute__((aligned(CACHE_LINE))) const u64 *args;
    Helper helpers[MAX_THREADS];
};
_Static_assert(sizeof(Pool) <= 1 << 16, "library.py gives it _POOL_BYTES");

static void run(Pool *pool, const u64 *args);
static void work(Pool *pool, int thread, const u64 *args);

// The first function of the text is where the program is entered.
void qwen3_tg_cpu(Pool *pool, const u64 *args) { run(pool, args); }

#define LOAD(p) __atomic_load_n(p, __ATOMIC_SEQ_CST)
#define STORE(p, v) __atomic_store_n(p, v, __ATOMIC_SEQ_CST)
#define ADD(p, v) __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST)

static void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Wait until `*counter` is no longer `seen`.
static void wait_change(u32 *counter, u32 seen) {
    for (int spins = 0; LOAD(counter) == seen; spins++) {
        if (spins < SPINS_BEFORE_YIELD) pause_briefly();
        else sched_yield();
    }
}

// All threads come here before any goes on.
static void barrier(Pool *pool) {
    u32 phase = LOAD(&pool->phase);
    if (ADD(&pool->arrived, 1) == (u32)pool->threads - 1) {
        STORE(&pool->arrived, 0);
        // The counter of the items of the step before last is free again.
        STORE(&pool->next[(phase + 1) & 1], 0);
        STORE(&pool->phase, phase + 1);
    } else {
        wait_change(&pool->phase, phase);
    }
}

// The next `count` items of this step that no thread has taken; the first one's number.
static i64 take(Pool *pool, int count) {
    return ADD(&pool->next[LOAD(&pool->phase) & 1], (u32)count);
}

static void *helper(void *argument) {
    Helper *self = argument;
    Pool *pool = self->pool;
    u32 seen = 0;
    for (;;) {
        for (int spins = 0; spins < SPINS_BEFORE_SLEEP && LOAD(&pool->generation) == seen; spins++)
            pause_briefly();
        if (LOAD(&pool->generation) == seen) {
            pthread_mutex_lock(pool->mutex);
            ADD(&pool->sleeping, 1);
            while (LOAD(&pool->generation) == seen) pthread_cond_wait(pool->cond, pool->mutex);
            ADD(&pool->sleeping, -1);
            pthread_mutex_unlock(pool->mutex);
        }
        seen++;
        if (LOAD(&pool->stop)) return 0;
        work(pool, (int)self->number, pool->args);
    }
}

static void wake(Pool *pool) {
    ADD(&pool->generation, 1);
    if (LOAD(&pool->sleeping) == 0) return;
    pthread_mutex_lock(pool->mutex);
    pthread_cond_broadcast(pool->cond);
    pthread_mutex_unlock(pool->mutex);
}

// Threads that the system refuses are done without.
static void start(Pool *pool) {
    pool->started = 1;
    for (i64 n = 1; n < pool->threads; n++) {
        pool->helpers[n].pool = pool, pool->helpers[n].number = n;
        if (pthread_create(&pool->helpers[n].thread, 0, helper, &pool->helpers[n]))
            pool->threads = pool->wanted = n;
    }
}

// End all helpers.
static void stop(Pool *pool) {
    if (!pool->started) return;
    STORE(&pool->stop, 1);
    wake(pool);
    for (i64 n = 1; n < pool->threads; n++) pthread_join(pool->helpers[n].thread, 0);
    STORE(&pool->stop, 0);
    STORE(&pool->generation, 0);
    pool->started = 0;
}

// What every kernel calls: do a job on all threads and return when it is done. Without args: end the
// helpers, which start again when there is work. Python calls it so once, before there can be two
// callers, and before the process ends.
static void run(Pool *pool, const u64 *args) {
    if (!pool->ready) {
        pthread_mutex_init(pool->caller, 0);
        pthread_mutex_init(pool->mutex, 0);
        pthread_cond_init(pool->cond, 0);
        pool->ready = 1;
    }
    pthread_mutex_lock(pool->caller);  // two models may compute at once
    if (args == 0 || pool->threads != pool->wanted) {
        stop(pool);
        pool->threads = pool->wanted;
    }
    if (args) {
        if (!pool->started) start(pool);
        pool->args = args;
        if (pool->threads > 1) wake(pool);
        work(pool, 0, args);  // ends with a barrier, so all are done
    }
    pthread_mutex_unlock(pool->caller);
}
