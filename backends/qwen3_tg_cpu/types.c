// What stored weights mean. Two ways to ask: floats() gives values of one row as float32; for the
// types of GGUF's blocks a Unit gives them as bytes with a scale and an offset for each group, which
// is what a product with activations of 16 bits takes.
//
// Sources: llama.cpp's ggml-quants.c, AutoAWQ's packing_utils.py, AutoGPTQ's qlinear_cuda.py,
// transformers' finegrained_fp8.py and mlx's quantized.h. The order is TYPES in steps.py.

enum {
    F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS,
    AWQ, GPTQ, FP8, MLX,
    I8  // of the cache of keys and values alone: integers, whose scales lie apart
};

// A matrix of `outputs` rows. `data` are its arrays in the order of the file's format.
typedef struct {
    int type;
    i64 outputs, inputs, row_bytes;
    const u8 *data[4];
    int bits, group, zero_offset, scale_type, has_order;
} Matrix;

// 256 values, or 32, as bytes in their order: value = q * scale + offset, with scales and offsets by
// groups of 32 or of 16.
typedef struct {
    u8x32 q[8];
    float scale[16], offset[16];
} Unit;

ALWAYS u8x32 bytes(const u8 *p) { return READ(u8x32, p); }

// Sixteen bytes are 32 values: the low halves first.
ALWAYS u8x32 nibbles(const u8 *p) {
    u8x16 once = READ(u8x16, p);
    u8x32 twice = __builtin_shufflevector(once, once, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14,
                                          15, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const u32x8 shift = {0, 0, 0, 0, 4, 4, 4, 4};
    u32x8 both = (READ(u32x8, &twice) >> shift) & 0x0f0f0f0f;
    return READ(u8x32, &both);
}

// 16 where the value's bit of 32 is set.
ALWAYS u8x32 fifth_bits(const u8 *p) {
    u32x8 same = (u32x8)READ(u32, p);
    u8x32 b = READ(u8x32, &same);
    b = __builtin_shufflevector(b, b, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 18, 18, 18, 18, 18,
                                18, 18, 18, 19, 19, 19, 19, 19, 19, 19, 19);
    const u8x32 each = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128,
                        1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    return (u8x32)((b & each) != 0) & 16;
}

ALWAYS u8x32 iq4_values(u8x32 q) {
    static const i8 table[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                 1,    13,   25,  38,  53,  69,  89,  113};
#if defined(__AVX2__)
    typedef char m __attribute__((vector_size(32)));
    u8x16 t = READ(u8x16, table);
    u8x32 twice = __builtin_shufflevector(t, t, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1,
                                          2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return (u8x32)__builtin_ia32_pshufb256((m)twice, (m)q);
#else
    u8x32 found;
    for (int i = 0; i < 32; i++) found[i] = (u8)table[q[i]];
    return found;
#endif
}

ALWAYS void unit_Q4_0(const u8 *b, Unit *u) {
    u->q[0] = nibbles(b + 2);
    u->scale[0] = half(b), u->offset[0] = -8 * half(b);
}
ALWAYS void unit_Q4_1(const u8 *b, Unit *u) {
    u->q[0] = nibbles(b + 4);
    u->scale[0] = half(b), u->offset[0] = half(b + 2);
}
ALWAYS void unit_Q5_0(const u8 *b, Unit *u) {
    u->q[0] = nibbles(b + 6) | fifth_bits(b + 2);
    u->scale[0] = half(b), u->offset[0] = -16 * half(b);
}
ALWAYS void unit_Q5_1(const u8 *b, Unit *u) {
    u->q[0] = nibbles(b + 8) | fifth_bits(b + 4);
    u->scale[0] = half(b), u->offset[0] = half(b + 2);
}
ALWAYS void unit_Q8_0(const u8 *b, Unit *u) {
    u->q[0] = bytes(b + 2);
    u->scale[0] = half(b);
}
ALWAYS void unit_IQ4_NL(const u8 *b, Unit *u) {
    u->q[0] = iq4_values(nibbles(b + 2));
    u->scale[0] = half(b);
}
ALWAYS void unit_IQ4_XS(const u8 *b, Unit *u) {
    float d = half(b);
    u32 high = READ(u16, b + 2);
    for (int g = 0; g < 8; g++) {
        int scale = ((b[4 + g / 2] >> (4 * (g & 1))) & 15) | (((high >> (2 * g)) & 3) << 4);
        u->scale[g] = d * (float)(scale - 32);
        u->q[g] = iq4_values(nibbles(b + 8 + 16 * g));
    }
}

// Q4_K and Q5_K: eight scales and eight offsets of six bits, in twelve bytes.
ALWAYS void scales_k(const u8 *b, Unit *u) {
    u32 low = READ(u32, b + 4), mid = READ(u32, b + 8), top = READ(u32, b + 12);
    u32 scale[2] = {low & 0x3f3f3f3f, (top & 0x0f0f0f0f) | ((low >> 2) & 0x30303030)};
    u32 offset[2] = {mid & 0x3f3f3f3f, ((top >> 4) & 0x0f0f0f0f) | ((mid >> 2) & 0x30303030)};
    store(u->scale, __builtin_convertvector(READ(u8x8, scale), f8) * half(b));
    store(u->offset, __builtin_convertvector(READ(u8x8, offset), f8) * -half(b + 2));
}
ALWAYS void unit_Q4_K(const u8 *b, Unit *u) {
    scales_k(b, u);
    for (int j = 0; j < 4; j++) {
        u8x32 both = bytes(b + 16 + 32 * j);
        u->q[2 * j] = both & 15, u->q[2 * j + 1] = both >> 4;
    }
}
ALWAYS void unit_Q5_K(const u8 *b, Unit *u) {
    scales_k(b, u);
    u8x32 high = bytes(b + 16);
    for (int j = 0; j < 4; j++) {
        u8x32 both = bytes(b + 48 + 32 * j);
        u->q[2 * j] = (both & 15) | ((high >> (2 * j)) & 1) << 4;
        u->q[2 * j + 1] = (both >> 4) | ((high >> (2 * j + 1)) & 1) << 4;
    }
}
ALWAYS void unit_Q6_K(const u8 *b, Unit *u) {
    f8 d = (f8)half(b + 208);
    for (int i = 0; i < 16; i += 8) {
        f8 scale = __builtin_convertvector(READ(i8x8, b + 192 + i), f8) * d;
        store(u->scale + i, scale), store(u->offset + i, -32 * scale);
    }
    for (int n = 0; n < 2; n++) {
        u8x32 high = bytes(b + 128 + 32 * n), first = bytes(b + 64 * n), second = bytes(b + 64 * n + 32);
        u->q[4 * n] = (first & 15) | (high & 3) << 4;
        u->q[4 * n + 1] = (second & 15) | (high & 12) << 2;
        u->q[4 * n + 2] = (first >> 4) | (high & 48);
        u->q[4 * n + 3] = (second >> 4) | ((high >> 2) & 48);
    }
}
ALWAYS void unit_Q2_K(const u8 *b, Unit *u) {
    for (int i = 0; i < 16; i += 8) {
        u8x8 both = READ(u8x8, b + i);
        store(u->scale + i, __builtin_convertvector(both & 15, f8) * half(b + 80));
        store(u->offset + i, __builtin_convertvector(both >> 4, f8) * -half(b + 82));
    }
    for (int n = 0; n < 2; n++)
        for (int j = 0; j < 4; j++) u->q[4 * n + j] = (bytes(b + 16 + 32 * n) >> (2 * j)) & 3;
}
ALWAYS void unit_Q3_K(const u8 *b, Unit *u) {
    float d = half(b + 108);
    for (int g = 0; g < 16; g++) {
        int low = (b[96 + (g & 7)] >> (4 * (g >> 3))) & 15;
        int high = (b[104 + (g & 3)] >> (2 * (g >> 2))) & 3;
        u->scale[g] = d * (float)((low | high << 4) - 32);
        u->offset[g] = -4 * u->scale[g];
    }
    u8x32 mask = bytes(b);
    for (int n = 0; n < 2; n++)
        for (int j = 0; j < 4; j++)
            u->q[4 * n + j] = ((bytes(b + 32 + 32 * n) >> (2 * j)) & 3) | ((mask >> (4 * n + j)) & 1) << 2;
}

// type, values in a unit, its bytes, values in a group, whether bytes are signed and have no offsets
#define UNITS(X)                                                                                 \
    X(Q4_0, 32, 18, 32, 0) X(Q4_1, 32, 20, 32, 0) X(Q5_0, 32, 22, 32, 0) X(Q5_1, 32, 24, 32, 0)  \
    X(Q8_0, 32, 34, 32, 1) X(Q2_K, 256, 84, 16, 0) X(Q3_K, 256, 110, 16, 0)                      \
    X(Q4_K, 256, 144, 32, 0) X(Q5_K, 256, 176, 32, 0) X(Q6_K, 256, 210, 16, 0)                   \
    X(IQ4_NL, 32, 18, 32, 1) X(IQ4_XS, 256, 136, 32, 1)

typedef void UnitOf(const u8 *, Unit *);

ALWAYS void unit_floats(UnitOf *unit, const int values, const int group, const int is_signed,
                        const u8 *b, float *out) {
    Unit u;
    unit(b, &u);
    for (int i = 0; i < values; i += 8) {
        const u8 *q = (const u8 *)u.q + i;
        f8 v = is_signed ? __builtin_convertvector(READ(i8x8, q), f8) * u.scale[i / group]
                         : __builtin_convertvector(READ(u8x8, q), f8) * u.scale[i / group] +
                               u.offset[i / group];
        store(out + i, v);
    }
}

// A scale of AWQ, GPTQ, FP8 or MLX, by its number in the array.
ALWAYS float scale_at(const u8 *scales, int type, i64 n) {
    if (type == F32) return READ(float, scales + 4 * n);
    return type == F16 ? half(scales + 2 * n) : bfloat(scales + 2 * n);
}

// e4m3fn: its bits, moved to a float32's place, are too small by 2^120. 127 is the only NaN.
ALWAYS f8 fp8_values(const u8 *p) {
    u32x8 byte = __builtin_convertvector(READ(u8x8, p), u32x8), rest = byte & 127;
    u32x8 bits = ((byte & 128) << 24) | (rest << 20);
    u32x8 nan = (u32x8)(rest == 127) & 0x7fc00000;
    bits |= nan;
    return READ(f8, &bits) * 0x1p120f;
}

static void floats_FP8(const Matrix *m, i64 row, i64 k0, i64 n, float *out) {
    const u8 *bytes = m->data[0] + row * m->inputs + k0;
    i64 columns = (m->inputs + m->group - 1) / m->group, first = row / m->group * columns;
    for (i64 k = 0; k < n; k++) {  // eight at a time where a block of scales allows it
        float scale = scale_at(m->data[1], m->scale_type, first + (k0 + k) / m->group);
        if (n - k >= 8 && m->group % 8 == 0 && (k0 + k) % 8 == 0) {
            store(out + k, fp8_values(bytes + k) * scale);
            k += 7;
        } else {
            u8 one[8] = {bytes[k]};
            out[k] = fp8_values(one)[0] * scale;
        }
    }
}

// Rows of words, the first value in the lowest bits; groups divide the rows evenly.
static void floats_MLX(const Matrix *m, i64 row, i64 k0, i64 n, float *out) {
    const int bits = m->bits;
    const u32x8 step = {0, 1, 2, 3, 4, 5, 6, 7};
    const u8 *words = m->data[0] + row * m->row_bytes;
    i64 groups = m->inputs / m->group;
    for (i64 k = 0; k < n; k += 8) {
        i64 at = k0 + k, g = row * groups + at / m->group;
        const u8 *p = words + at * bits / 8;
        u32x8 q = bits == 8 ? __builtin_convertvector(READ(u8x8, p), u32x8)
                            : (u32x8)(bits == 4 ? READ(u32, p) : READ(u16, p));
        if (bits != 8) q = (q >> (step * bits)) & ((1u << bits) - 1);
        store(out + k, __builtin_convertvector(q, f8) * scale_at(m->data[1], m->scale_type, g) +
                           scale_at(m->data[2], m->scale_type, g));
    }
}

// Values k0 ... k0+n-1 of a row. For blocks k0 and n are whole ones; of types by rows alone.
static void floats(const Matrix *m, i64 row, i64 k0, i64 n, float *out) {
    const u8 *b = m->data[0] + row * m->row_bytes;
    i64 k = 0;
    switch (m->type) {
    case F32:
        __builtin_memcpy(out, b + 4 * k0, 4 * n);
        break;
    case F16:
        for (; k + 8 <= n; k += 8) store(out + k, halves(b + 2 * (k0 + k)));
        for (; k < n; k++) out[k] = half(b + 2 * (k0 + k));
        break;
    case BF16:
        for (; k + 8 <= n; k += 8) store(out + k, bfloats(b + 2 * (k0 + k)));
        for (; k < n; k++) out[k] = bfloat(b + 2 * (k0 + k));
        break;
    case FP8:
        floats_FP8(m, row, k0, n, out);
        break;
    case MLX:
        floats_MLX(m, row, k0, n, out);
        break;
#define CASE(T, VALUES, BYTES, GROUP, SIGNED)                                                   \
    case T:                                                                                      \
        for (b += k0 / VALUES * BYTES; k < n; k += VALUES, b += BYTES)                           \
            unit_floats(unit_##T, VALUES, GROUP, SIGNED, b, out + k);                           \
        break;
        UNITS(CASE)
#undef CASE
    }
}

#define PANEL 24  // outputs that are computed together for many positions

// AWQ and GPTQ store columns: `out` is (n, PANEL), values k0 ... k0+n-1 of PANEL outputs from o0 on, a
// multiple of PANEL; those beyond the last are zero.
static void columns_AWQ(const Matrix *m, i64 o0, i64 k0, i64 n, float *out) {
    const u32x8 shift = {0, 16, 4, 20, 8, 24, 12, 28};
    i64 words = m->outputs / 8, o8 = o0 / 8;
    int have = words - o8 < PANEL / 8 ? (int)(words - o8) : PANEL / 8;
    for (i64 k = 0; k < n; k++) {
        i64 g = (k0 + k) / m->group;
        for (int j = 0; j < have; j++) {
            u32x8 q = ((u32x8)READ(u32, m->data[0] + 4 * ((k0 + k) * words + o8 + j)) >> shift) & 15;
            u32x8 z = ((u32x8)READ(u32, m->data[1] + 4 * (g * words + o8 + j)) >> shift) & 15;
            f8 difference = __builtin_convertvector((i32x8)(q - z), f8);
            f8 scale;
            for (int i = 0; i < 8; i++)
                scale[i] = scale_at(m->data[2], m->scale_type, g * m->outputs + o0 + 8 * j + i);
            store(out + PANEL * k + 8 * j, difference * scale);
        }
        for (int j = have; j < PANEL / 8; j++) store(out + PANEL * k + 8 * j, (f8)0.0f);
    }
}

static void columns_GPTQ(const Matrix *m, i64 o0, i64 k0, i64 n, float *out) {
    const int bits = m->bits, in_word = 32 / bits, mask = (1 << bits) - 1;
    i64 zero_words = m->outputs / in_word, last = -1;
    int have = m->outputs - o0 < PANEL ? (int)(m->outputs - o0) : PANEL;
    float scale[PANEL] = {0}, zero[PANEL] = {0};
    for (i64 k = 0; k < n; k++) {
        i64 at = k0 + k, g = m->has_order ? READ(i32, m->data[3] + 4 * at) : at / m->group;
        for (int i = 0; g != last && i < have; i++) {
            i64 o = o0 + i;
            u32 word = READ(u32, m->data[1] + 4 * (g * zero_words + o / in_word));
            zero[i] = (float)((int)(word >> (o % in_word * bits) & mask) + m->zero_offset);
            scale[i] = scale_at(m->data[2], m->scale_type, g * m->outputs + o);
        }
        last = g;
        const u8 *words = m->data[0] + 4 * (at / in_word * m->outputs + o0);
        int shift = (int)(at % in_word) * bits;
        if (have == PANEL)
            for (int j = 0; j < PANEL; j += 8) {
                u32x8 q = (READ(u32x8, words + 4 * j) >> shift) & mask;
                store(out + PANEL * k + j,
                      (__builtin_convertvector(q, f8) - load(zero + j)) * load(scale + j));
            }
        else
            for (int i = 0; i < PANEL; i++) {
                u32 q = i < have ? (READ(u32, words + 4 * i) >> shift) & mask : 0;
                out[PANEL * k + i] = ((float)q - zero[i]) * scale[i];
            }
    }
}

ALWAYS int by_columns(const Matrix *m) { return m->type == AWQ || m->type == GPTQ; }

static int group_of(int type) {
    switch (type) {
#define CASE(T, VALUES, BYTES, GROUP, SIGNED) case T: return GROUP;
        UNITS(CASE)
#undef CASE
    }
    return 0;
}
