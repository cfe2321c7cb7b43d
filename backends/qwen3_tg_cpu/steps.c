// A kernel is a list of steps, which all threads do together, one after the other. Arguments are
// buffers; the second one holds the list as int32, STEP_INTS for each step, the third one the
// position of the first new token and the number of new ones. What the integers mean: steps.py.

#define STEP_INTS 40
#define MATRIX_INTS 10
#define MOST_MATRICES 3

enum { EMBED, NORM, LINEAR, CACHE, ATTEND };
enum { GATED = 1, LAST_POSITION = 2, EXACT = 4 };

typedef struct {
    Pool *pool;
    int thread;
    const u64 *args;
    const i32 *ints;  // of this step
    i64 start, positions;
} Task;

// Memory of this thread alone, kept for the next step.
static u8 *room(const Task *t, i64 nbytes) {
    Helper *self = &t->pool->helpers[t->thread];
    if (self->room_bytes < nbytes) {
        free(self->room);
        self->room = malloc((u64)nbytes + CACHE_LINE);
        self->room_bytes = self->room ? nbytes : 0;
    }
    if (!self->room) abort();
    return (u8 *)(((u64)self->room + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE);
}

ALWAYS void *arg(const Task *t, int n) { return (void *)t->args[n]; }

static Matrix matrix(const Task *t, const i32 *m) {
    Matrix found = {.type = m[0], .outputs = m[2], .inputs = m[3], .row_bytes = m[4], .bits = m[5],
                    .group = m[6], .zero_offset = m[7], .scale_type = m[8], .has_order = m[9] > 3};
    for (int i = 0; i < m[9]; i++) found.data[i] = arg(t, m[1] + i);
    return found;
}

static float as_float(i32 bits) { return READ(float, &bits); }

// Rows of a matrix by their numbers. ints: ids, out, matrix
static void embed(const Task *t) {
    const i32 *ids = arg(t, t->ints[0]);
    Matrix m = matrix(t, t->ints + 2);
    float *out = arg(t, t->ints[1]);
    for (i64 s; (s = take(t->pool, 1)) < t->positions;) {
        if (!by_columns(&m)) {
            floats(&m, ids[s], 0, m.inputs, out + s * m.inputs);
            continue;
        }
        float values[PANEL];
        for (i64 k = 0; k < m.inputs; k++) {
            columns(&m, ids[s] / PANEL * PANEL, k, 1, values);
            out[s * m.inputs + k] = values[ids[s] % PANEL];
        }
    }
}

// RMSNorm of every position. ints: x, weight, out, width, eps
static void norm(const Task *t) {
    i64 width = t->ints[3];
    for (i64 s; (s = take(t->pool, 1)) < t->positions;)
        rms_norm((float *)arg(t, t->ints[0]) + s * width, arg(t, t->ints[1]), width,
                 as_float(t->ints[4]), (float *)arg(t, t->ints[2]) + s * width);
}

// What is done with sums of one output, or of two where one is the gate of the other.
static void finish(const Task *t, i64 position, i64 output, i64 n, const float *sums, const float *ups) {
    const i32 *ints = t->ints;
    i64 at = position * ints[5] + output;
    float *out = (float *)arg(t, ints[4]) + at;
    if (ups)
        for (i64 i = 0; i < n; i++) out[i] = silu8((f8)sums[i])[0] * ups[i];
    else if (ints[6] >= 0)
        for (i64 i = 0; i < n; i++) out[i] = ((const float *)arg(t, ints[6]))[at + i] + sums[i];
    else
        __builtin_memcpy(out, sums, 4 * n);
}

// Outputs of one matrix or of up to three, side by side. GATED: silu of the first's times the
// second's. ints: matrices, flags, x, norm's weight (in front of the products, for one position) or
// -1, out, its row, what is added or -1, eps, matrices
static void linear(const Task *t) {
    const i32 *ints = t->ints;
    int count = ints[0], gated = ints[1] & GATED, exact = ints[1] & EXACT;
    Matrix m[MOST_MATRICES];
    int quantise = 0;
    for (int i = 0; i < count; i++) {
        m[i] = matrix(t, ints + 8 + MATRIX_INTS * i);
        quantise |= group_of(m[i].type) != 0 && !exact;
    }
    i64 positions = t->positions, inputs = m[0].inputs;
    const float *x = arg(t, ints[2]);
    if (ints[1] & LAST_POSITION) x += (positions - 1) * inputs, positions = 1;
    int separate = gated ? 1 : count;
    if (positions == 1) {
        u8 *own = room(t, inputs * 4 + 64 + ACTIVATION_BYTES(inputs));
        Activations a = {x};
        if (ints[3] >= 0) {
            rms_norm(x, arg(t, ints[3]), inputs, as_float(ints[7]), (float *)own);
            a.x = (float *)own;
        }
        if (quantise) a = quantised(a.x, inputs, own + (inputs * 4 + 63) / 64 * 64);
        i64 all = 0;
        for (int i = 0; i < separate; i++) all += m[i].outputs;
        i64 rows = round_up(all / (t->pool->threads * 8), PANEL);
        rows = rows < PANEL ? PANEL : rows > 128 ? 128 : rows;
        i64 items = 0;
        for (int i = 0; i < separate; i++) items += (m[i].outputs + rows - 1) / rows;
        float sums[128], ups[128];
        for (i64 item; (item = take(t->pool, 1)) < items;) {
            i64 output = 0;
            int i = 0;
            for (; item >= (m[i].outputs + rows - 1) / rows; i++) {
                item -= (m[i].outputs + rows - 1) / rows;
                output += m[i].outputs;
            }
            i64 o0 = item * rows, n = m[i].outputs - o0 < rows ? m[i].outputs - o0 : rows;
            one_position(&m[i], o0, n, &a, sums);
            if (gated) one_position(&m[1], o0, n, &a, ups);
            finish(t, 0, output + o0, n, sums, gated ? ups : 0);
        }
        return;
    }
    float *own = (float *)room(t, 4 * (PANEL_FLOATS + 2 * PANEL * positions)), *c = own + PANEL_FLOATS;
    i64 items = 0;
    for (int i = 0; i < separate; i++) items += (m[i].outputs + PANEL - 1) / PANEL;
    for (i64 item; (item = take(t->pool, 1)) < items;) {
        i64 output = 0;
        int i = 0;
        for (; item >= (m[i].outputs + PANEL - 1) / PANEL; i++) {
            item -= (m[i].outputs + PANEL - 1) / PANEL;
            output += m[i].outputs;
        }
        i64 o0 = item * PANEL, n = m[i].outputs - o0 < PANEL ? m[i].outputs - o0 : PANEL;
        many_positions(&m[i], o0, positions, x, c, own);
        if (gated) many_positions(&m[1], o0, positions, x, c + PANEL * positions, own);
        for (i64 s = 0; s < positions; s++)
            finish(t, s, output + o0, n, c + PANEL * s, gated ? c + PANEL * (positions + s) : 0);
    }
}

static Attention attention(const Task *t) {
    const i32 *ints = t->ints;
    return (Attention){.heads = ints[0], .kv_heads = ints[1], .head_dim = ints[2],
                       .cache_type = ints[3], .start = t->start, .positions = t->positions,
                       .row = (ints[0] + 2 * ints[1]) * ints[2], .qkv = arg(t, ints[4]),
                       .k_cache = arg(t, ints[5]), .v_cache = arg(t, ints[6]),
                       .out = arg(t, ints[7]), .parts = arg(t, ints[8])};
}

// QK-norm and RoPE; new keys and values go to the cache. q is scaled for the scores.
// ints: heads, kv_heads, head_dim, cache type, qkv, k_cache, v_cache, out, parts, q_norm, k_norm,
// table, eps
static void cache(const Task *t) {
    Attention a = attention(t);
    i64 d = a.head_dim, all = a.heads + 2 * a.kv_heads;
    const float *table = arg(t, t->ints[11]);
    float eps = as_float(t->ints[12]), scale = 1.0f / __builtin_sqrtf((float)d);
    i64 items = a.positions * all, each = a.positions == 1 ? 4 : all;
    for (i64 first; (first = take(t->pool, (int)each)) < items;)
        for (i64 item = first; item < first + each && item < items; item++) {
            i64 s = item / all, head = item % all, position = a.start + s, kv = head - a.heads;
            float *x = a.qkv + s * a.row + head * d;
            if (head < a.heads) {
                norm_and_turn(x, arg(t, t->ints[9]), table + position * d, d, eps);
                for (i64 i = 0; i < d; i++) x[i] *= scale;
            } else if (kv < a.kv_heads) {
                norm_and_turn(x, arg(t, t->ints[10]), table + position * d, d, eps);
                write_cached(a.cache_type, (u8 *)cached(&a, a.k_cache, position, (int)kv), d, x);
            } else {
                kv -= a.kv_heads;
                write_cached(a.cache_type, (u8 *)cached(&a, a.v_cache, position, (int)kv), d, x);
            }
        }
}

// Scores, softmax, mixed values. ints as for cache()
static void attend(const Task *t) {
    Attention a = attention(t);
    i64 group = a.heads / a.kv_heads;
    if (a.positions == 1) {
        i64 keys = a.start + 1, each = part_keys(keys), parts = (keys + each - 1) / each;
        i64 d = a.head_dim, per = (group + 3) / 4;  // up to four query heads share what is read
        for (i64 item; (item = take(t->pool, 1)) < parts * a.kv_heads * per;) {
            i64 p = item / (a.kv_heads * per), rest = item % (a.kv_heads * per);
            i64 g = rest % per * 4, queries = group - g < 4 ? group - g : 4;
            i64 head = rest / per * group + g, end = (p + 1) * each < keys ? (p + 1) * each : keys;
            part(&a, (int)head, (int)queries, p * each, end, a.parts + (p * a.heads + head) * (d + 2));
        }
        barrier(t->pool);
        for (i64 head; (head = take(t->pool, 1)) < a.heads;) join_parts(&a, (int)head, parts);
        return;
    }
    i64 each = block_positions(&a), blocks = (a.positions + each - 1) / each;
    float *own = (float *)room(t, 4 * block_floats(&a));
    for (i64 item; (item = take(t->pool, 1)) < blocks * a.kv_heads;) {
        i64 b = blocks - 1 - item / a.kv_heads;  // the longest first
        i64 n = a.positions - b * each < each ? a.positions - b * each : each;
        block(&a, (int)(item % a.kv_heads), b * each, n, own);
    }
}

static void work(Pool *pool, int thread, const u64 *args) {
    const i32 *list = (const i32 *)args[1], *at = (const i32 *)args[2];
    Task t = {pool, thread, args, 0, at[0], at[1]};
    for (i32 n = 0; n < list[0]; n++) {
        const i32 *step = list + 1 + n * STEP_INTS;
        t.ints = step + 1;
        switch (step[0]) {
        case EMBED: embed(&t); break;
        case NORM: norm(&t); break;
        case LINEAR: linear(&t); break;
        case CACHE: cache(&t); break;
        case ATTEND: attend(&t); break;
        }
        barrier(pool);
    }
}
