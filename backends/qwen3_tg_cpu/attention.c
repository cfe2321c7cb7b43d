// Attention over the cache of keys and values, which is read where it lies, never copied.
//
// Softmax in parts (Milakov & Gimelshein 2018, arXiv:1805.02867): of each part of the keys the
// greatest score, the sum of exponentials and the mixed values are kept, and put together at the
// end. The parts depend on lengths alone, not on the number of threads: nor do results.

#define SOME_KEYS 32   // keys whose scores are computed at a time for one position
#define KEYS 72        // and for many: a multiple of PANEL
#define QUERIES 48     // query rows of a block at most: heads of one key/value head times positions
#define MOST_PARTS 64  // of the keys, for one position

typedef struct {
    int heads, kv_heads, head_dim, cache_type;
    i64 start, positions, row;  // row: floats of q, k and v of one position side by side
    const i32 *rows;            // in a batch, position and slot of each; else 0
    const i64 *slots;           // and the step's numbers, of which some say where those of slots are
    float *qkv, *out;           // q is read from qkv and already turned
    u8 *k_cache, *v_cache;      // (capacity, kv_heads, head_dim)
    float *parts;               // (parts, heads, head_dim + 2)
    float *k_scale, *v_scale;   // (capacity, kv_heads), of I8
} Attention;

// The position of the s-th new one.
ALWAYS i64 position_of(const Attention *a, i64 s) { return a->rows ? a->rows[2 * s] : a->start + s; }

// Let the caches be those of the s-th new position.
ALWAYS void choose_caches(Attention *a, i64 s) {
    if (!a->rows) return;
    i64 slot = a->rows[2 * s + 1];
    a->k_cache = (u8 *)((i64 *)a->slots[5])[slot], a->v_cache = (u8 *)((i64 *)a->slots[6])[slot];
    if (a->cache_type != I8) return;
    a->k_scale = (float *)((i64 *)a->slots[9])[slot], a->v_scale = (float *)((i64 *)a->slots[10])[slot];
}

ALWAYS i64 type_size(int type) { return type == F32 ? 4 : type == I8 ? 1 : 2; }

ALWAYS const u8 *cached(const Attention *a, const u8 *cache, i64 position, int kv_head) {
    return cache + (position * a->kv_heads + kv_head) * a->head_dim * type_size(a->cache_type);
}

// `scales` are those of this cache, of I8.
ALWAYS float *scale_of(const Attention *a, float *scales, i64 position, int kv_head) {
    return scales + position * a->kv_heads + kv_head;
}

static void read_cached(const Attention *a, const u8 *cache, float *scales, i64 position, int kv_head,
                        float *out) {
    i64 n = a->head_dim, i = 0;
    const u8 *p = cached(a, cache, position, kv_head);
    if (a->cache_type != I8) {
        Matrix row = {.type = a->cache_type, .inputs = n, .data = {p}};
        floats(&row, 0, 0, n, out);
        return;
    }
    float scale = *scale_of(a, scales, position, kv_head);
    for (; i + 8 <= n; i += 8) store(out + i, eight(I8, p + i) * scale);
    for (; i < n; i++) out[i] = one(I8, p + i) * scale;
}

// Integers from -127 to 127 and their scale; zeros where that is no normal number. What is not finite
// makes the scale infinite, and 0 times that is not a number.
static void write_integers(u8 *p, i64 n, const float *x, float *scale) {
    float most = 0;
    for (i64 i = 0; i < n; i++) {
        float size = x[i] == x[i] ? __builtin_fabsf(x[i]) : __builtin_inff();
        most = size > most ? size : most;
    }
    *scale = most * (1.0f / 127);
    int usable = *scale >= 0x1p-126f && *scale < __builtin_inff();
    for (i64 i = 0; i < n; i++) p[i] = usable ? (u8)(i8)__builtin_rintf(x[i] / *scale) : 0;
}

// Round to the cache's type; what float16 cannot hold becomes its greatest number.
static void write_cached(const Attention *a, u8 *cache, float *scales, i64 position, int kv_head,
                         const float *x) {
    int type = a->cache_type;
    i64 n = a->head_dim;
    u8 *p = (u8 *)cached(a, cache, position, kv_head);
    if (type == I8) {
        write_integers(p, n, x, scale_of(a, scales, position, kv_head));
        return;
    }
    for (i64 i = 0; i < n; i++) {
        float v = x[i];
        if (type == F32) {
            WRITE(p + 4 * i, v);
        } else if (type == F16) {
            v = v > 65504.0f ? 65504.0f : v < -65504.0f ? -65504.0f : v;
            WRITE(p + 2 * i, (_Float16)v);
        } else {
            u32 bits = READ(u32, &v);
            u32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
            WRITE(p + 2 * i, (u16)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded));
        }
    }
}

static float mean_square_scale(const float *x, i64 n, float eps) {
    f8 squares = (f8)0.0f;
    i64 i = 0;
    for (; i + 8 <= n; i += 8) squares += load(x + i) * load(x + i);
    float total = sum(squares);
    for (; i < n; i++) total += x[i] * x[i];
    return 1.0f / __builtin_sqrtf(total / (float)n + eps);
}

static void rms_norm(const float *x, const float *weight, i64 n, float eps, float *out) {
    float scale = mean_square_scale(x, n, eps);
    for (i64 i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
}

// QK-norm, then RoPE by split halves. `turn` is a position's row of the table: cosines, sines.
static void norm_and_turn(float *x, const float *weight, const float *turn, i64 n, float eps) {
    float scale = mean_square_scale(x, n, eps);
    i64 half_n = n / 2;
    for (i64 i = 0; i < half_n; i++) {
        float a = x[i] * scale * weight[i], b = x[i + half_n] * scale * weight[i + half_n];
        x[i] = a * turn[i] - b * turn[half_n + i];
        x[i + half_n] = b * turn[i] + a * turn[half_n + i];
    }
}

// Exponentials of scores, and their sum. Scores that are minus infinity become 0.
static float exponentials(float *scores, i64 n, float greatest) {
    f8 total = (f8)0.0f;
    i64 i = 0;
    for (; i + 8 <= n; i += 8) {
        f8 e = exp8(load(scores + i) - greatest);
        store(scores + i, e);
        total += e;
    }
    float all = sum(total);
    for (; i < n; i++) all += scores[i] = exp8((f8)(scores[i] - greatest))[0];
    return all;
}

static float greatest_of(const float *x, i64 n, float most) {
    for (i64 i = 0; i < n; i++) most = x[i] > most ? x[i] : most;
    return most;
}

// ---- one position -------------------------------------------------------------------------

// Keys in a part: a multiple of SOME_KEYS, so that there are at most MOST_PARTS.
static i64 part_keys(i64 keys) {
    i64 each = (keys + MOST_PARTS - 1) / MOST_PARTS;
    return round_up(each, SOME_KEYS);
}

// Sums of eight vectors.
ALWAYS f8 sums_of(f8 v[8]) {
    transpose8(v);
    return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

// Scores of four keys, `stride` bytes apart, with up to two queries.
ALWAYS void dots(const int type, const int queries, const float *q, const u8 *k[4], i64 head_dim,
                 float *scores, i64 ld) {
    const int size = (int)type_size(type);
    f8 sums[8] = {0};
    i64 i = 0;
    for (; i + 8 <= head_dim; i += 8) {
        f8 a = load(q + i), b = queries > 1 ? load(q + head_dim + i) : a;
        for (int j = 0; j < 4; j++) {
            f8 key = eight(type, k[j] + size * i);
            sums[j] += key * a;
            if (queries > 1) sums[4 + j] += key * b;
        }
    }
    f8 all = sums_of(sums);
    for (int g = 0; g < queries; g++)
        for (int j = 0; j < 4; j++) {
            float s = all[4 * g + j];
            for (i64 n = i; n < head_dim; n++) s += one(type, k[j] + size * n) * q[g * head_dim + n];
            scores[g * ld + j] = s;
        }
}

// out += four values by their weights, for up to two queries.
ALWAYS void mix(const int type, const int queries, const float *weights, i64 ld, const u8 *v[4],
                i64 head_dim, float *out, i64 ldo) {
    const int size = (int)type_size(type);
    i64 i = 0;
    for (; i + 8 <= head_dim; i += 8) {
        f8 a = load(out + i), b = queries > 1 ? load(out + ldo + i) : a;
        for (int j = 0; j < 4; j++) {
            f8 value = eight(type, v[j] + size * i);
            a += value * weights[j];
            if (queries > 1) b += value * weights[ld + j];
        }
        store(out + i, a);
        if (queries > 1) store(out + ldo + i, b);
    }
    for (; i < head_dim; i++)
        for (int g = 0; g < queries; g++)
            for (int j = 0; j < 4; j++)
                out[g * ldo + i] += one(type, v[j] + size * i) * weights[g * ld + j];
}

// Scores of four keys, or weights of four values, of I8, by their scales.
ALWAYS void by_scales(const int queries, const float scale[4], float *scores) {
    for (int g = 0; g < queries; g++)
        for (int j = 0; j < 4; j++) scores[g * SOME_KEYS + j] *= scale[j];
}

// All heads, over the keys of one part, in the order in which they lie in memory: four positions
// at a time. Of the last ones there may be fewer: the same is read again, and counts nothing.
ALWAYS void part_of(const Attention *a, const int type, i64 first, i64 end, float *scores, float *out) {
    const i64 d = a->head_dim, ld = d + 2, row = a->kv_heads * d * type_size(type);
    const int group = a->heads / a->kv_heads;
    for (int h = 0; h < a->heads; h++) {
        __builtin_memset(out + h * ld, 0, 4 * (d + 1));
        out[h * ld + d + 1] = -__builtin_inff();
    }
    for (i64 t = first; t < end; t += SOME_KEYS) {
        i64 n = end - t < SOME_KEYS ? end - t : SOME_KEYS;
        for (int values = 0; values < 2; values++) {
            for (i64 j = 0; j < n; j += 4)
                for (int kv = 0; kv < a->kv_heads; kv++) {
                    const u8 *p[4];
                    float scale[4];
                    for (int i = 0; i < 4; i++) {
                        i64 position = t + (j + i < n ? j + i : n - 1);
                        if (type == I8) scale[i] = *scale_of(a, values ? a->v_scale : a->k_scale, position, kv);
                        p[i] = cached(a, values ? a->v_cache : a->k_cache, position, kv);
                        for (i64 b = 0; b < d * type_size(type); b += 64)
                            __builtin_prefetch(p[i] + 4 * row + b);
                    }
                    for (int h = kv * group; h < (kv + 1) * group; h += 2) {
                        float *of = scores + h * SOME_KEYS + j;
                        int both = h + 1 < (kv + 1) * group;
                        if (values && type == I8) by_scales(1 + both, scale, of);
                        if (!values && both) dots(type, 2, a->qkv + h * d, p, d, of, SOME_KEYS);
                        else if (!values) dots(type, 1, a->qkv + h * d, p, d, of, SOME_KEYS);
                        else if (both) mix(type, 2, of, SOME_KEYS, p, d, out + h * ld, ld);
                        else mix(type, 1, of, SOME_KEYS, p, d, out + h * ld, ld);
                        if (!values && type == I8) by_scales(1 + both, scale, of);
                    }
                }
            for (int h = 0; h < a->heads && !values; h++) {
                float *of = scores + h * SOME_KEYS, *mixed = out + h * ld, before = mixed[d + 1];
                for (i64 i = n; i < SOME_KEYS; i++) of[i] = -__builtin_inff();
                float most = greatest_of(of, n, before), fade = exp8((f8)(before - most))[0];
                mixed[d] = mixed[d] * fade + exponentials(of, SOME_KEYS, most);
                mixed[d + 1] = most;
                if (fade != 1)
                    for (i64 i = 0; i < d; i++) mixed[i] *= fade;
            }
        }
    }
}

static void part(const Attention *a, i64 first, i64 end, float *scores, float *out) {
    if (a->cache_type == F32) part_of(a, F32, first, end, scores, out);
    else if (a->cache_type == F16) part_of(a, F16, first, end, scores, out);
    else if (a->cache_type == I8) part_of(a, I8, first, end, scores, out);
    else part_of(a, BF16, first, end, scores, out);
}

// Put the parts of one head together.
static void join_parts(const Attention *a, int head, i64 parts) {
    i64 d = a->head_dim, ld = d + 2;
    const float *of_head = a->parts + head * ld;
    float most = -__builtin_inff(), total = 0, *out = a->out + head * d;
    for (i64 p = 0; p < parts; p++) most = greatest_of(of_head + p * a->heads * ld + d + 1, 1, most);
    __builtin_memset(out, 0, 4 * d);
    for (i64 p = 0; p < parts; p++) {
        const float *x = of_head + p * a->heads * ld;
        float weight = exp8((f8)(x[d + 1] - most))[0];
        total += weight * x[d];
        for (i64 i = 0; i < d; i++) out[i] += weight * x[i];
    }
    for (i64 i = 0; i < d; i++) out[i] /= total;
}

// ---- many positions -----------------------------------------------------------------------

// Positions in a block of queries.
static i64 block_positions(const Attention *a) {
    i64 group = a->heads / a->kv_heads, n = QUERIES / group;
    return n < 1 ? 1 : n;
}

// Floats of room that block() takes.
static i64 block_floats(const Attention *a) {
    i64 d = round_up(a->head_dim, 8), rows = block_positions(a) * (a->heads / a->kv_heads);
    return rows * (2 * d + KEYS + 2) + 2 * KEYS * d;
}

// Positions s0 ... s0+n-1 of the query heads of one key/value head, over all keys they may see.
static void block(const Attention *a, int kv_head, i64 s0, i64 n, float *room) {
    i64 group = a->heads / a->kv_heads, d = a->head_dim, wide = round_up(d, 8), rows = n * group;
    float *q = room, *mixed = q + rows * d, *scores = mixed + rows * wide, *total = scores + rows * KEYS;
    float *most = total + rows, *keys = most + rows, *values = keys + KEYS * d;
    for (i64 r = 0; r < rows; r++) {  // row r: position r / group, head r % group of the group
        const float *from = a->qkv + (s0 + r / group) * a->row + (kv_head * group + r % group) * d;
        __builtin_memcpy(q + r * d, from, 4 * d);
        total[r] = 0, most[r] = -__builtin_inff();
    }
    __builtin_memset(mixed, 0, 4 * rows * wide);
    i64 end = a->start + s0 + n;
    for (i64 t = 0; t < end; t += KEYS) {
        i64 seen = end - t < KEYS ? end - t : KEYS;
        // 1. Scores: panels of keys.
        for (i64 p = 0; p < seen; p += PANEL) {
            for (i64 j = 0; j < PANEL; j++) {
                float *key = values + j * d;  // free until step 3
                if (p + j < seen) read_cached(a, a->k_cache, a->k_scale, t + p + j, kv_head, key);
                else __builtin_memset(key, 0, 4 * d);
            }
            for (int i = 0; i < PANEL; i += 8) turn_rows(values + i * d, d, d, keys + i);
            tiles(WIDE, rows, q, d, keys, PANEL, d, scores + p, KEYS, 0);
        }
        // 2. What a position may not see, and the softmax of this part.
        for (i64 r = 0; r < rows; r++) {
            float *of_row = scores + r * KEYS;
            i64 may_see = a->start + s0 + r / group + 1 - t;
            for (i64 i = may_see < 0 ? 0 : may_see; i < KEYS; i++) of_row[i] = -__builtin_inff();
            float greatest = greatest_of(of_row, seen, most[r]);
            if (greatest == -__builtin_inff()) {
                __builtin_memset(of_row, 0, 4 * KEYS);
                continue;
            }
            float fade = exp8((f8)(most[r] - greatest))[0];
            total[r] = total[r] * fade + exponentials(of_row, seen, greatest);
            most[r] = greatest;
            for (i64 i = 0; i < wide; i++) mixed[r * wide + i] *= fade;
        }
        // 3. Values, mixed by it.
        for (i64 j = 0; j < seen; j++) {
            read_cached(a, a->v_cache, a->v_scale, t + j, kv_head, values + j * wide);
            for (i64 i = d; i < wide; i++) values[j * wide + i] = 0;
        }
        for (i64 i = 0; i < wide; i += PANEL)
            tiles((int)(wide - i < PANEL ? wide - i : PANEL) / 8, rows, scores, KEYS, values + i, wide,
                  seen, mixed + i, wide, 1);
    }
    for (i64 r = 0; r < rows; r++) {
        float *to = a->out + ((s0 + r / group) * a->heads + kv_head * group + r % group) * d;
        for (i64 i = 0; i < d; i++) to[i] = mixed[r * wide + i] / total[r];
    }
}
