// y = x W^T. One position waits for memory: each row of W is read once, decoded in registers and
// multiplied. Many positions wait for arithmetic: sixteen rows of W are decoded into a panel that
// fits in the cache, and tiles of 4 x 24 sums stay in registers.

#define CHUNK 256         // inputs decoded at a time: a panel of them is 24 KiB of a 32 KiB cache
#define TILE 4            // positions in a tile: 12 sums, 3 values of W and one of x in 16 registers
#define WIDE (PANEL / 8)  // vectors in a row of a panel
#define PANELS 4          // at most, taken together
#define BLOCK 128         // positions

// One position's activations. Where `q` is there, it is x in 16 bits: x = q * scale for each 32 of
// them, of which the 16 even ones come first. That is the order in which words of two bytes of a
// weight give their low and their high bytes.
typedef struct {
    const float *x;
    i16 *q;
    float *scale;
    float *sum32, *sum16;  // of q * scale over each 32 and each 16 values, for weights with offsets
} Activations;

#define ACTIVATION_BYTES(inputs) ((inputs) * 2 + ((inputs) / 32 + 1) * 16 + 1024)

// Round x to 16 bits by blocks of 32, into `room` of ACTIVATION_BYTES. Not a number stays that.
static Activations quantised(const float *x, i64 inputs, u8 *room) {
    i64 blocks = inputs / 32;
    Activations a = {x, (i16 *)room};
    a.scale = (float *)(room + (inputs * 2 + 63) / 64 * 64);
    a.sum32 = a.scale + blocks;
    a.sum16 = a.sum32 + blocks;
    for (i64 b = 0; b < blocks; b++) {
        f8 v[4], most = (f8)0.0f, zero = (f8)0.0f;
        for (int i = 0; i < 4; i++) {
            v[i] = load(x + 32 * b + 8 * i);
            most = __builtin_elementwise_max(most, __builtin_elementwise_abs(v[i]));
            zero += v[i] * 0.0f;
        }
        float peak = 0;
        for (int i = 0; i < 8; i++) peak = most[i] > peak ? most[i] : peak;
        float scale = peak > 1e-30f ? peak / 32767.0f : 0.0f, inverse = scale ? 1 / scale : 0.0f;
        i32 sums[2];
        i16x16 side[2];
        for (int h = 0; h < 2; h++) {
            i32x8 q[2];
            for (int i = 0; i < 2; i++)
                q[i] = __builtin_convertvector(
                    __builtin_elementwise_roundeven(v[2 * h + i] * inverse), i32x8);
            i32x8 s = q[0] + q[1];
            sums[h] = s[0] + s[1] + s[2] + s[3] + s[4] + s[5] + s[6] + s[7];
            side[h] = __builtin_shufflevector(__builtin_convertvector(q[0], i16x8),
                                              __builtin_convertvector(q[1], i16x8), 0, 1, 2, 3, 4, 5,
                                              6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        }
        WRITE(a.q + 32 * b, __builtin_shufflevector(side[0], side[1], 0, 2, 4, 6, 8, 10, 12, 14, 16,
                                                    18, 20, 22, 24, 26, 28, 30));
        WRITE(a.q + 32 * b + 16, __builtin_shufflevector(side[0], side[1], 1, 3, 5, 7, 9, 11, 13, 15,
                                                         17, 19, 21, 23, 25, 27, 29, 31));
        a.scale[b] = scale + sum(zero);  // 0 is added, or not a number
        a.sum16[2 * b] = (float)sums[0] * a.scale[b];
        a.sum16[2 * b + 1] = (float)sums[1] * a.scale[b];
        a.sum32[b] = a.sum16[2 * b] + a.sum16[2 * b + 1];
    }
    return a;
}

// One stream of bytes does not use all of a core's bandwidth, and neither do rows next to each other,
// which share pages. So four parts of a piece are read side by side, a row of each at a time. Blocks
// of 256 values wait for arithmetic more than for memory: they go row by row, and fetch ahead.
#define PARTS 4
#define AHEAD 2048
ALWAYS void fetch(const u8 *p, const int bytes) {
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(p + AHEAD + i);
}

// Rows r of `parts` parts of n rows: the last part begins early where n does not divide evenly.
ALWAYS void rows_of_parts(const int parts, i64 n, i64 r, i64 *rows) {
    i64 each = (n + parts - 1) / parts;
    for (int s = 0; s < parts; s++) rows[s] = (s * each < n - each ? s * each : n - each) + r;
}

// Products for several positions read a weight once, and do for each position exactly what is done for
// one alone, in the same order: so they are the same to the last bit. Side by side are then positions,
// not parts: the registers do not hold both, and there is more to do for each byte.
#define FEW 4  // positions taken together

// Rows of blocks against activations of 16 bits, of so many positions; y's are `ldy` apart.
ALWAYS void dot_units(UnitOf *unit, const int values, const int bytes, const int group,
                      const int is_signed, const int parts, const int positions, const Matrix *m,
                      const u8 *first, const i64 *rows, const Activations *a, float *y, i64 ldy) {
    f8 sums[PARTS][FEW] = {0};
    float extra[PARTS][FEW] = {0};
    const u8 *w[PARTS];
    const i16 *x[FEW];
    const float *scale[FEW], *over[FEW];
    for (int s = 0; s < parts; s++) w[s] = first + rows[s] * m->row_bytes;
    for (int p = 0; p < positions; p++)
        x[p] = a[p].q, scale[p] = a[p].scale, over[p] = group == 16 ? a[p].sum16 : a[p].sum32;
    for (i64 n = 0; n < m->inputs / values; n++) {
#pragma clang loop unroll(full)
        for (int s = 0; s < parts; s++) {
            Unit u;
            f8 part[FEW][2];  // two, as one would wait for itself
            float scales[FEW][8];
            if (parts == 1) fetch(w[s], bytes);
            unit(w[s], &u);
#pragma clang loop unroll(full)
            for (int p = 0; p < positions; p++) {
                part[p][0] = sums[s][p], part[p][1] = (f8)0.0f;
                if (group == 32) {
                    if (values == 32) scales[p][0] = u.scale[0] * scale[p][0];
                    else store(scales[p], load(u.scale) * load(scale[p]));
                }
            }
#pragma clang loop unroll(full)
            for (int i = 0; i < values / 32; i++) {
                i16x16 q = READ(i16x16, u.q + i);
                i16x16 even = is_signed ? (q << 8) >> 8 : q & 255;
                i16x16 odd = is_signed ? q >> 8 : (i16x16)((u16x16)q >> 8);
#pragma clang loop unroll(full)
                for (int p = 0; p < positions; p++) {
                    i32x8 sum = pair_products(even, READ(i16x16, x[p] + 32 * i)) +
                                pair_products(odd, READ(i16x16, x[p] + 32 * i + 16));
                    f8 floats = __builtin_convertvector(sum, f8);
                    if (group == 32) {
                        part[p][i & 1] += floats * scales[p][i];
                    } else {
                        float t = u.scale[2 * i] * scale[p][i], v = u.scale[2 * i + 1] * scale[p][i];
                        part[p][i & 1] += floats * (f8){t, t, t, t, v, v, v, v};
                    }
                }
            }
#pragma clang loop unroll(full)
            for (int p = 0; p < positions; p++) {
                if (!is_signed && values == 32) extra[s][p] += u.offset[0] * over[p][0];
                if (!is_signed && values == 256)
#pragma clang loop unroll(full)
                    for (int g = 0; g < values / group; g += 8)
                        part[p][1] += load(u.offset + g) * load(over[p] + g);
                sums[s][p] = values == 32 ? part[p][0] : part[p][0] + part[p][1];
            }
            w[s] += bytes;
        }
        for (int p = 0; p < positions; p++)
            x[p] += values, scale[p] += values / 32, over[p] += values / group;
    }
    for (int s = 0; s < parts; s++)
        for (int p = 0; p < positions; p++) y[p * ldy + rows[s]] = sum(sums[s][p]) + extra[s][p];
}

ALWAYS f8 eight(const int type, const u8 *p) {
    if (type == I8) return __builtin_convertvector(READ(i8x8, p), f8);
    return type == F32 ? READ(f8, p) : type == F16 ? halves(p) : bfloats(p);
}
ALWAYS float one(const int type, const u8 *p) {
    if (type == I8) return (float)(i8)*p;
    return type == F32 ? READ(float, p) : type == F16 ? half(p) : bfloat(p);
}

// Rows of floats.
ALWAYS void dot_floats(const int type, const int parts, const int positions, const Matrix *m,
                       const u8 *first, const i64 *rows, const Activations *a, float *y, i64 ldy) {
    const int size = type == F32 ? 4 : 2;
    const u8 *w[PARTS];
    f8 sums[PARTS][FEW][2] = {0};
    i64 k = 0;
    for (int s = 0; s < parts; s++) w[s] = first + rows[s] * m->row_bytes;
    for (; k + 16 <= m->inputs; k += 16) {
#pragma clang loop unroll(full)
        for (int s = 0; s < parts; s++) {
            f8 low = eight(type, w[s] + size * k), high = eight(type, w[s] + size * (k + 8));
#pragma clang loop unroll(full)
            for (int p = 0; p < positions; p++) {
                sums[s][p][0] += low * load(a[p].x + k);
                sums[s][p][1] += high * load(a[p].x + k + 8);
            }
        }
    }
    for (int s = 0; s < parts; s++)
        for (int p = 0; p < positions; p++) {
            float total = sum(sums[s][p][0] + sums[s][p][1]);
            for (i64 j = k; j < m->inputs; j++) total += one(type, w[s] + size * j) * a[p].x[j];
            y[p * ldy + rows[s]] = total;
        }
}

// A row of any type, decoded to floats first.
ALWAYS void dot_decoded(const int positions, const Matrix *m, i64 row, const Activations *a, float *y,
                        i64 ldy) {
    float values[CHUNK], total[FEW] = {0};
    for (i64 k = 0; k < m->inputs; k += CHUNK) {
        i64 n = m->inputs - k < CHUNK ? m->inputs - k : CHUNK;
        floats(m, row, k, n, values);
        for (int p = 0; p < positions; p++) {
            const float *x = a[p].x + k;
            f8 sums[2] = {0};
            i64 i = 0;
            for (; i + 16 <= n; i += 16) {
                sums[0] += load(values + i) * load(x + i);
                sums[1] += load(values + i + 8) * load(x + i + 8);
            }
            total[p] += sum(sums[0] + sums[1]);
            for (; i < n; i++) total[p] += values[i] * x[i];
        }
    }
    for (int p = 0; p < positions; p++) y[p * ldy] = total[p];
}

static void columns(const Matrix *m, i64 o0, i64 k0, i64 n, float *out) {
    if (m->type == AWQ) columns_AWQ(m, o0, k0, n, out);
    else columns_GPTQ(m, o0, k0, n, out);
}

// y = outputs o0 ... o0+n-1 for 1, 2 or FEW positions; o0 is a multiple of PANEL.
ALWAYS void each_position(const int positions, const Matrix *m, i64 o0, i64 n, const Activations *a,
                          float *y, i64 ldy) {
    const u8 *w = m->data[0] + o0 * m->row_bytes;
    const int parts = positions == 1 ? PARTS : 1;
    i64 r = 0;
    if (by_columns(m)) {
        float values[CHUNK * PANEL];
        for (; r < n; r += PANEL) {
            f8 sums[FEW][WIDE] = {0};
            for (i64 k = 0; k < m->inputs; k += CHUNK) {
                i64 chunk = m->inputs - k < CHUNK ? m->inputs - k : CHUNK;
                columns(m, o0 + r, k, chunk, values);
                for (i64 i = 0; i < chunk; i++) {
                    for (int p = 0; p < positions; p++)
                        for (int j = 0; j < WIDE; j++)
                            sums[p][j] += load(values + PANEL * i + 8 * j) * a[p].x[k + i];
                }
            }
            for (int p = 0; p < positions; p++)
                for (i64 i = 0; i < PANEL && r + i < n; i++) y[p * ldy + r + i] = sums[p][i / 8][i % 8];
        }
        return;
    }
    switch (a->q || m->type <= BF16 ? m->type : -1) {
#define ROWS(P, PRODUCT)                                                                         \
    for (i64 rows[PARTS], each = (n + (P) - 1) / (P); r < each; r++) {                            \
        rows_of_parts(P, n, r, rows);                                                            \
        PRODUCT;                                                                                 \
    }                                                                                            \
    return;
#define FLOATS(T) case T: ROWS(parts, dot_floats(T, parts, positions, m, w, rows, a, y, ldy))
        FLOATS(F32) FLOATS(F16) FLOATS(BF16)
#undef FLOATS
#define CASE(T, V, B, G, S)                                                                      \
    case T: ROWS(V == 32 ? parts : 1, dot_units(unit_##T, V, B, G, S, V == 32 ? parts : 1,       \
                                                positions, m, w, rows, a, y, ldy))
        UNITS(CASE)
#undef CASE
#undef ROWS
    }
    for (; r < n; r++) dot_decoded(positions, m, o0 + r, a, y + r, ldy);
}

static void one_position(const Matrix *m, i64 o0, i64 n, const Activations *a, float *y) {
    each_position(1, m, o0, n, a, y, 0);
}

// The same for up to FEW positions, to the last bit: y (FEW, ldy). `a` has FEW, any after the last.
static void few_positions(const Matrix *m, i64 o0, i64 n, i64 positions, const Activations *a, float *y,
                          i64 ldy) {
    if (positions == 1) one_position(m, o0, n, a, y);
    else if (positions == 2) each_position(2, m, o0, n, a, y, ldy);
    else each_position(FEW, m, o0, n, a, y, ldy);
}

// c (n, 8 wide) = or += x (n, K) times w (K, 8 wide); ld* are distances between rows, in floats.
ALWAYS void tile(const int n, const int wide, const float *x, i64 ldx, const float *w, i64 ldw, i64 K,
                 float *c, i64 ldc, int add) {
    f8 sums[TILE][WIDE];
    for (int r = 0; r < n; r++)
        for (int j = 0; j < wide; j++) sums[r][j] = add ? load(c + r * ldc + 8 * j) : (f8)0.0f;
    for (i64 k = 0; k < K; k++) {
        f8 values[WIDE];
        for (int j = 0; j < wide; j++) values[j] = load(w + k * ldw + 8 * j);
        for (int r = 0; r < n; r++) {
            f8 v = (f8)(x[r * ldx + k]);
            for (int j = 0; j < wide; j++) sums[r][j] += values[j] * v;
        }
    }
    for (int r = 0; r < n; r++)
        for (int j = 0; j < wide; j++) store(c + r * ldc + 8 * j, sums[r][j]);
}

ALWAYS void tiles_of(const int wide, i64 n, const float *x, i64 ldx, const float *w, i64 ldw, i64 K,
                     float *c, i64 ldc, int add) {
    for (; n >= TILE; n -= TILE, x += TILE * ldx, c += TILE * ldc)
        tile(TILE, wide, x, ldx, w, ldw, K, c, ldc, add);
    switch (n) {
    case 3: tile(3, wide, x, ldx, w, ldw, K, c, ldc, add); break;
    case 2: tile(2, wide, x, ldx, w, ldw, K, c, ldc, add); break;
    case 1: tile(1, wide, x, ldx, w, ldw, K, c, ldc, add); break;
    }
}

// The same for any n; `wide` is at most WIDE.
static void tiles(int wide, i64 n, const float *x, i64 ldx, const float *w, i64 ldw, i64 K, float *c,
                  i64 ldc, int add) {
    switch (wide) {
    case 3: tiles_of(3, n, x, ldx, w, ldw, K, c, ldc, add); break;
    case 2: tiles_of(2, n, x, ldx, w, ldw, K, c, ldc, add); break;
    case 1: tiles_of(1, n, x, ldx, w, ldw, K, c, ldc, add); break;
    }
}

// Eight rows of n values become columns of an (n, PANEL) panel.
static void turn_rows(const float *rows, i64 ld, i64 n, float *out) {
    i64 k = 0;
    for (; k + 8 <= n; k += 8) {
        f8 t[8];
        for (int i = 0; i < 8; i++) t[i] = load(rows + ld * i + k);
        transpose8(t);
        for (int i = 0; i < 8; i++) store(out + PANEL * (k + i), t[i]);
    }
    for (; k < n; k++)
        for (int i = 0; i < 8; i++) out[PANEL * k + i] = rows[ld * i + k];
}

// Inputs k0 ... k0+n-1 of PANEL outputs from o0 on, as (n, PANEL); outputs beyond the last are zero.
// `rows` has room for 8 x CHUNK floats.
static void panel(const Matrix *m, i64 o0, i64 k0, i64 n, float *rows, float *out) {
    if (by_columns(m)) {
        columns(m, o0, k0, n, out);
        return;
    }
    for (int side = 0; side < PANEL; side += 8) {
        for (int i = 0; i < 8; i++) {
            if (o0 + side + i < m->outputs) floats(m, o0 + side + i, k0, n, rows + CHUNK * i);
            else __builtin_memset(rows + CHUNK * i, 0, 4 * n);
        }
        turn_rows(rows, CHUNK, n, out + side);
    }
}

#define PANEL_FLOATS (PANELS * CHUNK * PANEL + 8 * CHUNK)

// c (panels, positions, PANEL) = x W^T for the outputs of so many panels from o0 on. Positions come in
// blocks, whose inputs stay in the second cache while all panels use them. `room` has PANEL_FLOATS.
static void many_positions(const Matrix *m, i64 o0, i64 panels, i64 positions, const float *x,
                           float *c, float *room) {
    for (i64 k = 0; k < m->inputs; k += CHUNK) {
        i64 n = m->inputs - k < CHUNK ? m->inputs - k : CHUNK;
        for (i64 p = 0; p < panels; p++)
            panel(m, o0 + PANEL * p, k, n, room + PANELS * CHUNK * PANEL, room + p * CHUNK * PANEL);
        for (i64 s = 0; s < positions; s += BLOCK) {
            i64 block = positions - s < BLOCK ? positions - s : BLOCK;
            for (i64 p = 0; p < panels; p++)
                tiles(WIDE, block, x + s * m->inputs + k, m->inputs, room + p * CHUNK * PANEL, PANEL, n,
                      c + (p * positions + s) * PANEL, PANEL, k > 0);
        }
    }
}
