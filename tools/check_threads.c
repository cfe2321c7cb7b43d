// Runs the steps of the C program in backends/qwen3_tg_cpu on several threads, from two callers at
// once, for a sanitizer to watch. The program's text stands before this one: see check_threads.py.

extern int printf(const char *format, ...);
extern int atoi(const char *text);
extern void *memcpy(void *to, const void *from, unsigned long nbytes);
extern void *memset(void *to, int value, unsigned long nbytes);
extern void *aligned_alloc(unsigned long alignment, unsigned long nbytes);

#define D 64
#define F 96
#define H 4
#define K 2
#define HD 32
#define E 6
#define CHOSEN 2
#define S 40  // positions at most
#define CAPACITY 4096

typedef struct {
    i64 list[1 + 16 * STEP_NUMBERS];
    i32 at[2];
    float *buffers[24];
    int count;
} Model;

static float *floats_of(Model *m, i64 n) {
    float *p = malloc((u64)n * 4);
    for (i64 i = 0; i < n; i++) p[i] = (float)((i * 7919 + m->count) % 199) / 199.0f - 0.5f;
    return m->buffers[m->count++] = p;
}

static i64 *step(Model *m, i64 kind) {
    i64 *s = m->list + 1 + m->list[0]++ * STEP_NUMBERS;
    s[0] = kind;
    return s + 1;
}

static void put_matrix(i64 *n, int type, i64 outputs, i64 inputs, i64 row_bytes, const void *data) {
    i64 all[MATRIX_NUMBERS] = {type, outputs, inputs, row_bytes, 0, 0, 0, 0, (i64)data};
    memcpy(n, all, sizeof all);
}

static void put_linear(Model *m, i64 flags, float *x, float *out, i64 row, float *added, int type,
                       i64 outputs, i64 inputs, i64 row_bytes, const void *data, int count) {
    i64 *n = step(m, LINEAR);
    n[0] = flags, n[1] = (i64)x, n[4] = (i64)out, n[5] = row, n[6] = (i64)added, n[7] = count;
    for (int i = 0; i < count; i++) put_matrix(n + 8 + MATRIX_NUMBERS * i, type, outputs, inputs, row_bytes, data);
}

static void put_experts(Model *m, float *x, float *place, float *out, i64 row, float *first,
                        float *gathered, i64 outputs, i64 inputs, const float *data, int count) {
    i64 *n = step(m, EXPERTS);
    n[1] = (i64)x, n[2] = (i64)place, n[3] = CHOSEN, n[4] = (i64)out, n[5] = row, n[6] = (i64)first;
    n[7] = E, n[8] = (i64)gathered, n[9] = count;
    for (int i = 0; i < count; i++) {
        i64 *at = n + 10 + (MATRIX_NUMBERS + 4) * i;
        put_matrix(at, F32, outputs, inputs, 4 * inputs, data);
        at[MATRIX_NUMBERS] = 4 * outputs * inputs;
    }
}

// A layer with attention, an MLP on blocks of Q8_0, and experts.
static void make(Model *m) {
    memset(m, 0, sizeof *m);
    float *x = floats_of(m, S * D), *normed = floats_of(m, S * D), *weights = floats_of(m, 4 * F * D);
    float *qkv = floats_of(m, S * (H + 2 * K) * HD), *mixed = floats_of(m, S * H * HD);
    float *keys = floats_of(m, CAPACITY * K * HD), *values = floats_of(m, CAPACITY * K * HD);
    float *parts = floats_of(m, MOST_PARTS * H * (HD + 2)), *table = floats_of(m, CAPACITY * HD);
    float *out = floats_of(m, S * D), *inner = floats_of(m, S * CHOSEN * F), *first = floats_of(m, E + 1);
    float *router = floats_of(m, S * E), *chosen = floats_of(m, S * CHOSEN), *place = floats_of(m, S * CHOSEN);
    float *shares = floats_of(m, S * CHOSEN), *gathered = floats_of(m, S * CHOSEN * D);
    float *results = floats_of(m, S * CHOSEN * D), *experts = floats_of(m, E * F * D);
    i64 *n = step(m, NORM);
    n[0] = (i64)x, n[1] = (i64)weights, n[2] = (i64)normed, n[3] = D;
    put_linear(m, EXACT, normed, qkv, (H + 2 * K) * HD, 0, F32, (H + 2 * K) * HD, D, 4 * D, experts, 1);
    for (int kind = CACHE; kind <= ATTEND; kind++) {
        i64 all[15] = {H, K, HD, F32, (i64)qkv, (i64)keys, (i64)values, (i64)mixed, (i64)parts, 0, 0,
                       (i64)weights, (i64)weights, (i64)table, 0x3727c5ac};
        memcpy(step(m, kind), all, sizeof all);
    }
    put_linear(m, EXACT, mixed, out, D, x, F32, D, H * HD, 4 * H * HD, experts, 1);
    put_linear(m, GATED, normed, inner, F, 0, Q8_0, F, D, D / 32 * 34, weights, 2);
    put_linear(m, EXACT, normed, router, E, 0, F32, E, D, 4 * D, weights, 1);
    n = step(m, ROUTE);
    n[0] = (i64)router, n[1] = E, n[2] = CHOSEN, n[4] = (i64)chosen, n[5] = (i64)shares;
    n = step(m, GROUP);
    n[0] = (i64)chosen, n[1] = E, n[2] = CHOSEN, n[3] = (i64)first, n[4] = (i64)place;
    put_experts(m, normed, place, inner, F, first, gathered, F, D, experts, 2);
    put_experts(m, inner, 0, results, D, first, 0, D, F, experts, 1);
    n = step(m, COMBINE);
    n[0] = (i64)out, n[1] = (i64)results, n[2] = (i64)place, n[3] = (i64)shares, n[4] = CHOSEN;
    n[5] = D, n[6] = (i64)normed;
}

static Pool *pool;

static void *call(void *argument) {
    Model *m = argument;
    for (int round = 0; round < 60; round++) {
        m->at[0] = round * 37, m->at[1] = round % 3 == 0 ? S : round % 3;
        if (m->at[1] == 0) m->at[1] = 1;
        u64 args[] = {(u64)pool, (u64)m->list, 0, (u64)m->at};
        run(pool, args);
        if (round == 30) run(pool, 0);  // helpers end, and start again
    }
    return 0;
}

int main(int count, char **arguments) {
    pool = aligned_alloc(CACHE_LINE, (sizeof *pool + CACHE_LINE) / CACHE_LINE * CACHE_LINE);
    memset(pool, 0, sizeof *pool);
    pool->wanted = count > 1 ? atoi(arguments[1]) : 4;
    run(pool, 0);  // before there are two callers
    Model *models = malloc(2 * sizeof *models);
    void *other;
    make(&models[0]), make(&models[1]);
    pthread_create(&other, 0, call, &models[1]);
    call(&models[0]);
    pthread_join(other, 0);
    run(pool, 0);
    printf("%lld threads, two callers, %lld steps, done\n", pool->threads, models[0].list[0] * 120);
    return 0;
}
