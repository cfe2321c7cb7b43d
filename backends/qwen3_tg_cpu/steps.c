// A kernel is a list of steps, which all threads do together, one after the other. The list is
// int64: its length, then STEP_NUMBERS for each step, of which the first says which one it is. The
// others are sizes, and addresses of buffers: x, weights, caches, scratch. What they mean is said at
// each step here, and in steps.py, which writes them.

#define STEP_NUMBERS 52
#define MATRIX_NUMBERS 12
#define MOST_MATRICES 3
#define MOST_ROWS 504  // of a matrix, taken at a time for one position: a multiple of PANEL
#define MOST_ALIKE 64  // positions of a kernel whose results are those of one position each
#define ALIKE_ROWS 96  // taken at a time for them: they stay in the second cache

enum { EMBED, NORM, LINEAR, CACHE, ATTEND, ROUTE, GROUP, EXPERTS, COMBINE };
enum { GATED = 1, LAST_POSITION = 2, EXACT = 4, ALIKE = 8 };

typedef struct {
    Pool *pool;
    int thread;
    const i64 *step;       // its numbers, without the first
    i64 start, positions;  // of the first new token; how many there are
    const i32 *rows;       // in a batch: of each its position and its slot in the caches
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
    return (u8 *)round_up((i64)self->room, CACHE_LINE);
}

ALWAYS void *at(const Task *t, int n) { return (void *)t->step[n]; }
ALWAYS float as_float(i64 bits) { return READ(float, &(i32){(i32)bits}); }

// type, outputs, inputs, bytes of a row, bits, group, zero offset, type of scales, four addresses
static Matrix matrix(const i64 *n) {
    Matrix m = {.type = (int)n[0], .outputs = n[1], .inputs = n[2], .row_bytes = n[3],
                .bits = (int)n[4], .group = (int)n[5], .zero_offset = (int)n[6],
                .scale_type = (int)n[7], .has_order = n[0] == GPTQ && n[11] != 0};
    for (int i = 0; i < 4; i++) m.data[i] = (const u8 *)n[8 + i];
    return m;
}

// Rows of a matrix by their numbers. ids, out, matrix
static void embed(const Task *t) {
    const i32 *ids = at(t, 0);
    Matrix m = matrix(t->step + 2);
    for (i64 s; (s = take(t->pool, 1)) < t->positions;) {
        float *out = (float *)at(t, 1) + s * m.inputs, values[PANEL];
        if (!by_columns(&m)) floats(&m, ids[s], 0, m.inputs, out);
        else
            for (i64 k = 0; k < m.inputs; k++) {
                columns(&m, ids[s] / PANEL * PANEL, k, 1, values);
                out[k] = values[ids[s] % PANEL];
            }
    }
}

// RMSNorm of every position. x, weight, out, width, eps
static void norm(const Task *t) {
    i64 width = t->step[3];
    for (i64 s; (s = take(t->pool, 1)) < t->positions;)
        rms_norm((float *)at(t, 0) + s * width, at(t, 1), width, as_float(t->step[4]),
                 (float *)at(t, 2) + s * width);
}

// Where sums of outputs go: added to something, or as they are, or gated by silu of their gate.
typedef struct {
    float *out;
    const float *added;
    i64 row;  // of both
} Target;

static void finish(Target to, i64 position, i64 output, i64 n, const float *sums, const float *ups) {
    i64 place = position * to.row + output;
    float *out = to.out + place;
    if (ups) {
        i64 i = 0;
        for (; i + 8 <= n; i += 8) store(out + i, silu8(load(sums + i)) * load(ups + i));
        for (; i < n; i++) out[i] = silu8((f8)sums[i])[0] * ups[i];
    } else if (to.added)
        for (i64 i = 0; i < n; i++) out[i] = to.added[place + i] + sums[i];
    else
        __builtin_memcpy(out, sums, 4 * n);
}

// Rows of a matrix to take at a time: enough for all threads, and not too few. A multiple of PANEL.
static i64 rows_at_a_time(const Task *t, i64 outputs, i64 most) {
    i64 rows = round_up(outputs / (t->pool->threads * 4), PANEL);
    return rows < PANEL ? PANEL : rows > most ? most : rows;
}

static i64 pieces(const Matrix *m, i64 rows) { return (m->outputs + rows - 1) / rows; }

// A piece of one matrix for one position; `up` is the other matrix where `m` is a gate.
static void piece(const Matrix *m, const Matrix *up, i64 first, i64 rows, const Activations *a,
                  Target to, i64 position, i64 output) {
    float sums[MOST_ROWS], ups[MOST_ROWS];
    i64 n = m->outputs - first < rows ? m->outputs - first : rows;
    one_position(m, first, n, a, sums);
    if (up) one_position(up, first, n, a, ups);
    finish(to, position, output + first, n, sums, up ? ups : 0);
}

// The same for up to MOST_ALIKE positions, FEW at a time: results are those of `piece` for each.
static void pieces_alike(const Matrix *m, const Matrix *up, i64 first, i64 rows, const Activations *a,
                         i64 positions, Target to, i64 position, i64 output) {
    float sums[FEW][ALIKE_ROWS], ups[FEW][ALIKE_ROWS];
    i64 n = m->outputs - first < rows ? m->outputs - first : rows;
    for (i64 s = 0; s < positions; s += FEW) {
        i64 left = positions - s < FEW ? positions - s : FEW;
        Activations some[FEW];
        for (i64 p = 0; p < FEW; p++) some[p] = a[s + (p < left ? p : 0)];
        few_positions(m, first, n, left, some, sums[0], ALIKE_ROWS);
        if (up) few_positions(up, first, n, left, some, ups[0], ALIKE_ROWS);
        for (i64 p = 0; p < left; p++)
            finish(to, position + s + p, output + first, n, sums[p], up ? ups[p] : 0);
    }
}

// Some panels of one matrix for many positions. `own` has WIDE_BYTES.
static void wide_piece(const Matrix *m, const Matrix *up, i64 first, i64 panels, i64 positions,
                       const float *x, float *own, Target to, i64 position, i64 output) {
    i64 left = pieces(m, PANEL) - first / PANEL, size = PANEL * positions;
    panels = left < panels ? left : panels;
    float *sums = own + PANEL_FLOATS, *ups = sums + panels * size;
    many_positions(m, first, panels, positions, x, sums, own);
    if (up) many_positions(up, first, panels, positions, x, ups, own);
    for (i64 s = 0; s < positions; s++)
        for (i64 p = 0, o = first; p < panels; p++, o += PANEL) {
            i64 n = m->outputs - o < PANEL ? m->outputs - o : PANEL;
            finish(to, position + s, output + o, n, sums + p * size + PANEL * s,
                   up ? ups + p * size + PANEL * s : 0);
        }
}

#define WIDE_BYTES(positions) (4 * (PANEL_FLOATS + 2 * PANELS * PANEL * (positions)))

// x as it is, normed, and rounded, as is wanted, in this thread's room.
static Activations prepared(const float *x, i64 inputs, const float *weight, float eps, int quantise,
                            u8 *own) {
    Activations a = {.x = x};
    if (weight) {
        rms_norm(x, weight, inputs, eps, (float *)own);
        a.x = (float *)own;
    }
    return quantise ? quantised(a.x, inputs, own + round_up(4 * inputs, 64)) : a;
}

#define PREPARED_BYTES(inputs) round_up(4 * (inputs) + 64 + ACTIVATION_BYTES(inputs), 64)

// Outputs of one matrix or of up to three, side by side. GATED: silu of the first's times the
// second's. ALIKE: of each position to the last bit what it has alone.
// flags, x, norm's weight (for one position, or where they are alike) or 0, eps, out, its row, what is
// added or 0,
// how many matrices, matrices
static void linear(const Task *t) {
    const i64 *n = t->step;
    int count = (int)n[7], gated = n[0] & GATED, quantise = 0;
    Matrix m[MOST_MATRICES];
    for (int i = 0; i < count; i++) {
        m[i] = matrix(n + 8 + MATRIX_NUMBERS * i);
        quantise |= group_of(m[i].type) != 0 && !(n[0] & EXACT);
    }
    i64 positions = t->positions, inputs = m[0].inputs, outputs = 0;
    const float *x = at(t, 1);
    if (n[0] & LAST_POSITION) x += (positions - 1) * inputs, positions = 1;
    Target to = {at(t, 4), at(t, 6), n[5]};
    if (gated) count = 1;
    for (int i = 0; i < count; i++) outputs += m[i].outputs;
    int alike = (n[0] & ALIKE) && positions > 1, alone = positions == 1;
    i64 most = alone ? MOST_ROWS : alike ? ALIKE_ROWS : PANELS * PANEL, items = 0;
    i64 rows = rows_at_a_time(t, outputs, most), each = PREPARED_BYTES(inputs);
    for (int i = 0; i < count; i++) items += pieces(&m[i], rows);
    u8 *own = room(t, alone || alike ? positions * each : WIDE_BYTES(positions));
    Activations a[MOST_ALIKE] = {{.x = x}};
    for (i64 s = 0; s < positions && (alone || alike); s++)
        a[s] = prepared(x + s * inputs, inputs, at(t, 2), as_float(n[3]), quantise, own + s * each);
    for (i64 item; (item = take(t->pool, 1)) < items;) {
        i64 output = 0;
        int i = 0;
        for (; item >= pieces(&m[i], rows); i++) item -= pieces(&m[i], rows), output += m[i].outputs;
        const Matrix *up = gated ? &m[1] : 0;
        if (alone) piece(&m[i], up, item * rows, rows, a, to, 0, output);
        else if (alike) pieces_alike(&m[i], up, item * rows, rows, a, positions, to, 0, output);
        else wide_piece(&m[i], up, item * rows, rows / PANEL, positions, x, (float *)own, to, 0, output);
    }
}

// heads, key/value heads, size of a head, type of the caches, q k v, keys, values, out, parts, scales
// of keys and of values or 0, whether it is of a batch: the caches are then int64 addresses, of those
// of each slot
static Attention attention(const Task *t) {
    const i64 *n = t->step;
    Attention a = {.heads = (int)n[0], .kv_heads = (int)n[1], .head_dim = (int)n[2],
                   .cache_type = (int)n[3], .start = t->start, .positions = t->positions,
                   .row = (n[0] + 2 * n[1]) * n[2], .qkv = at(t, 4), .k_cache = at(t, 5),
                   .v_cache = at(t, 6), .out = at(t, 7), .parts = at(t, 8), .k_scale = at(t, 9),
                   .v_scale = at(t, 10)};
    if (n[11]) a.rows = t->rows, a.slots = n;
    return a;
}

// QK-norm and RoPE; new keys and values go to the caches. q is scaled for the scores.
// attention's twelve, weights of q_norm and k_norm, table of RoPE, eps
static void cache(const Task *t) {
    Attention a = attention(t);
    i64 d = a.head_dim, all = a.heads + 2 * a.kv_heads;
    float eps = as_float(t->step[15]), scale = 1.0f / __builtin_sqrtf((float)d);
    i64 items = a.positions * all, each = a.positions == 1 ? 4 : all;
    for (i64 first; (first = take(t->pool, (int)each)) < items;)
        for (i64 item = first; item < first + each && item < items; item++) {
            i64 s = item / all, head = item % all, position = position_of(&a, s), kv = head - a.heads;
            const float *turn = (float *)at(t, 14) + position * d;
            float *x = a.qkv + s * a.row + head * d;
            choose_caches(&a, s);
            if (head < a.heads) {
                norm_and_turn(x, at(t, 12), turn, d, eps);
                for (i64 i = 0; i < d; i++) x[i] *= scale;
            } else if (kv < a.kv_heads) {
                norm_and_turn(x, at(t, 13), turn, d, eps);
                write_cached(&a, a.k_cache, a.k_scale, position, (int)kv, x);
            } else {
                kv -= a.kv_heads;
                write_cached(&a, a.v_cache, a.v_scale, position, (int)kv, x);
            }
        }
}

// One of several positions, as if it were alone. `parts` has room for each.
static Attention alone(const Attention *a, i64 s) {
    Attention one = *a;
    one.start = position_of(a, s), one.positions = 1, one.qkv += s * a->row;
    choose_caches(&one, s);
    one.rows = 0;
    one.out += s * a->heads * a->head_dim, one.parts += s * MOST_PARTS * a->heads * (a->head_dim + 2);
    return one;
}

static i64 parts_of(const Attention *one) {
    i64 keys = one->start + 1, each = part_keys(keys);
    return (keys + each - 1) / each;
}

// For each position what it has alone. The same part of the keys goes through all of them.
static void attend_alike(const Task *t, const Attention *a) {
    i64 most = 0, d = a->head_dim;
    for (i64 s = 0; s < a->positions; s++) {
        Attention one = alone(a, s);
        i64 parts = parts_of(&one);
        most = parts > most ? parts : most;
    }
    float *scores = (float *)room(t, 4 * SOME_KEYS * a->heads);
    for (i64 item; (item = take(t->pool, 1)) < most * a->positions;) {
        Attention one = alone(a, item % a->positions);
        i64 p = item / a->positions, keys = one.start + 1, each = part_keys(keys);
        i64 end = (p + 1) * each < keys ? (p + 1) * each : keys;
        if (p * each < keys) part(&one, p * each, end, scores, one.parts + p * a->heads * (d + 2));
    }
    barrier(t->pool);
    for (i64 item; (item = take(t->pool, 1)) < a->heads * a->positions;) {
        Attention one = alone(a, item / a->heads);
        join_parts(&one, (int)(item % a->heads), parts_of(&one));
    }
}

// Scores, softmax, mixed values. attention's twelve, flags
static void attend(const Task *t) {
    Attention a = attention(t);
    if (a.positions == 1 || a.rows || t->step[12] & ALIKE) {
        attend_alike(t, &a);
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

// The k likeliest of E experts for each position, the lower number first among equals, and their
// weights. logits (S, E), E, k, whether weights are to sum to one, chosen (S, k) int32, weights (S, k)
static void route(const Task *t) {
    i64 E = t->step[1], k = t->step[2];
    for (i64 s; (s = take(t->pool, 1)) < t->positions;) {
        float *logits = (float *)at(t, 0) + s * E, *weights = (float *)at(t, 5) + s * k;
        i32 *chosen = (i32 *)at(t, 4) + s * k;
        float greatest = greatest_of(logits, E, -__builtin_inff());
        float total = exponentials(logits, E, greatest), taken = 0;
        for (i64 j = 0; j < k; j++) {
            i64 best = -1;
            for (i64 e = 0; e < E; e++) {
                int used = 0;
                for (i64 i = 0; i < j; i++) used |= chosen[i] == e;
                if (!used && (best < 0 || logits[e] > logits[best])) best = e;
            }
            chosen[j] = (i32)best;
            taken += weights[j] = logits[best] / total;
        }
        for (i64 j = 0; j < k && t->step[3]; j++) weights[j] /= taken;
    }
}

// Sort pairs of position and expert by expert: first[e] ... first[e+1] are those of expert e, and
// place[s k + j] is where the pair of position s and its j-th expert went.
// chosen, E, k, first (E + 1) int32, place (S k) int32
static void group_pairs(const Task *t) {
    if (t->thread != 0) return;
    const i32 *chosen = at(t, 0);
    i64 E = t->step[1], pairs = t->positions * t->step[2];
    i32 *first = at(t, 3), *place = at(t, 4);
    __builtin_memset(first, 0, 4 * (E + 1));
    for (i64 p = 0; p < pairs; p++) first[chosen[p] + 1]++;
    for (i64 e = 0; e < E; e++) first[e + 1] += first[e];
    for (i64 p = pairs - 1; p >= 0; p--) place[p] = --first[chosen[p] + 1];
    // Each first[e + 1] now is where expert e begins: move them back by one.
    for (i64 e = 0; e < E; e++) first[e] = first[e + 1];
    first[E] = (i32)pairs;
}

// Each expert's matrix for its pairs. With `place`, x has a row a position, and pairs take theirs
// from it; without, x has a row a pair. flags, x, place or 0, k, out, its row, first, E, room for
// gathered rows, 1 or 2 matrices, for each: matrix of expert 0, then bytes of an expert's arrays
static void experts(const Task *t) {
    const i64 *n = t->step;
    i64 E = n[7], k = n[3], pairs = t->positions * k;
    int count = (int)n[9], quantise = 0;
    const i32 *place = at(t, 2), *first = at(t, 6);
    Matrix m[2];
    const i64 *strides[2];
    for (int i = 0; i < count; i++) {
        m[i] = matrix(n + 10 + (MATRIX_NUMBERS + 4) * i);
        strides[i] = n + 10 + (MATRIX_NUMBERS + 4) * i + MATRIX_NUMBERS;
        quantise |= group_of(m[i].type) != 0 && !(n[0] & EXACT);
    }
    i64 inputs = m[0].inputs;
    const float *x = at(t, 1);
    if (place) {
        float *gathered = at(t, 8);
        for (i64 p; (p = take(t->pool, 1)) < pairs;)
            __builtin_memcpy(gathered + place[p] * inputs, x + p / k * inputs, 4 * inputs);
        x = gathered;
        barrier(t->pool);
    }
    int alike = t->positions > 1 && (n[0] & ALIKE);
    i64 most = alike ? ALIKE_ROWS : MOST_ROWS, of_pair = PREPARED_BYTES(inputs), last = -1;
    i64 rows = rows_at_a_time(t, m[0].outputs * (t->positions == 1 ? k : 1), most);
    i64 each = pieces(&m[0], rows), bytes = WIDE_BYTES(t->positions);
    i64 prepared_bytes = (alike ? t->positions : 1) * of_pair;
    u8 *own = room(t, bytes > prepared_bytes ? bytes : prepared_bytes);
    Activations a[MOST_ALIKE];
    Target to = {at(t, 4), 0, n[5]};
    for (i64 item; (item = take(t->pool, 1)) < E * each;) {
        i64 e = item / each, pair = first[e], positions = first[e + 1] - pair;
        if (positions == 0) continue;
        Matrix of[2];
        for (int i = 0; i < count; i++) {
            of[i] = m[i];
            for (int j = 0; j < 4; j++)
                if (of[i].data[j]) of[i].data[j] += e * strides[i][j];
        }
        const Matrix *up = count > 1 ? &of[1] : 0;
        i64 begin = item % each * rows;
        if (positions == 1 || alike) {
            for (i64 p = 0; p < positions && last != pair; p++)
                a[p] = prepared(x + (pair + p) * inputs, inputs, 0, 0, quantise, own + p * of_pair);
            last = pair;
            if (positions == 1) piece(&of[0], up, begin, rows, a, to, pair, 0);
            else pieces_alike(&of[0], up, begin, rows, a, positions, to, pair, 0);
            continue;
        }
        last = -1;  // the room is used for another purpose
        for (i64 o = begin, end = begin + rows; o < end && o < m[0].outputs; o += PANELS * PANEL) {
            i64 panels = (end - o) / PANEL;
            wide_piece(&of[0], up, o, panels < PANELS ? panels : PANELS, positions, x + pair * inputs,
                       (float *)own, to, pair, 0);
        }
    }
}

// out = x + the experts' results by their weights. x, results (pairs, D), place, weights, k, D, out
static void combine(const Task *t) {
    i64 k = t->step[4], D = t->step[5];
    for (i64 s; (s = take(t->pool, 1)) < t->positions;) {
        float *out = (float *)at(t, 6) + s * D;
        __builtin_memcpy(out, (float *)at(t, 0) + s * D, 4 * D);
        for (i64 j = 0; j < k; j++) {
            const float *result = (float *)at(t, 1) + ((i32 *)at(t, 2))[s * k + j] * D;
            float weight = ((float *)at(t, 3))[s * k + j];
            for (i64 i = 0; i < D; i++) out[i] += weight * result[i];
        }
    }
}

// args: the pool, the list of steps, what is written (tinygrad's business alone), start and positions;
// in a batch, position and slot of each follow
static void work(Pool *pool, int thread, const u64 *args) {
    const i64 *list = (const i64 *)args[1];
    const i32 *where = (const i32 *)args[3];
    // Read once: after the last barrier the caller goes on, and may free the list at once.
    const i64 steps = list[0];
    for (i64 n = 0; n < steps; n++) {
        const i64 *step = list + 1 + n * STEP_NUMBERS;
        Task t = {pool, thread, step + 1, where[0], where[1], where + 2};
        switch (step[0]) {
        case EMBED: embed(&t); break;
        case NORM: norm(&t); break;
        case LINEAR: linear(&t); break;
        case CACHE: cache(&t); break;
        case ATTEND: attend(&t); break;
        case ROUTE: route(&t); break;
        case GROUP: group_pairs(&t); break;
        case EXPERTS: experts(&t); break;
        case COMBINE: combine(&t); break;
        }
        barrier(pool);
    }
}

#pragma clang attribute pop
