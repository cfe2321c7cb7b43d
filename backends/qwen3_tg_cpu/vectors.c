// Vectors of eight, by clang's vector extensions: the same text for x86 and Arm.

#define ALWAYS static inline __attribute__((always_inline))

typedef float f8 __attribute__((ext_vector_type(8)));
typedef i32 i32x8 __attribute__((ext_vector_type(8)));
typedef u32 u32x8 __attribute__((ext_vector_type(8)));
typedef i16 i16x16 __attribute__((ext_vector_type(16)));
typedef u16 u16x16 __attribute__((ext_vector_type(16)));
typedef i16 i16x8 __attribute__((ext_vector_type(8)));
typedef u16 u16x8 __attribute__((ext_vector_type(8)));
typedef u8 u8x16 __attribute__((ext_vector_type(16)));
typedef u8 u8x32 __attribute__((ext_vector_type(32)));
typedef u8 u8x8 __attribute__((ext_vector_type(8)));
typedef i8 i8x8 __attribute__((ext_vector_type(8)));
typedef _Float16 h8 __attribute__((ext_vector_type(8)));

// Nothing in a file is aligned, and one memory is seen as many types.
#define READ(type, address) ({ type value_; __builtin_memcpy(&value_, address, sizeof(type)); value_; })
#define WRITE(address, value) ({ __typeof__(value) value_ = value; __builtin_memcpy(address, &value_, sizeof(value_)); })

ALWAYS i64 round_up(i64 n, i64 to) { return (n + to - 1) / to * to; }

ALWAYS f8 load(const float *p) { return READ(f8, p); }
ALWAYS void store(float *p, f8 v) { WRITE(p, v); }

ALWAYS float sum(f8 v) {
    f8 a = v + __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
    f8 b = a + __builtin_shufflevector(a, a, 2, 3, 0, 1, 4, 5, 6, 7);
    return b[0] + b[1];
}

ALWAYS float half(const void *p) { return (float)READ(_Float16, p); }
ALWAYS float bfloat(const void *p) { return READ(float, &(u32){(u32)READ(u16, p) << 16}); }
ALWAYS f8 halves(const void *p) { return __builtin_convertvector(READ(h8, p), f8); }
ALWAYS f8 bfloats(const void *p) {
    return READ(f8, &(u32x8){__builtin_convertvector(READ(u16x8, p), u32x8) << 16});
}

// e to the x, relative error below 2e-7; 0 below -87 and for minus infinity, not a number for that.
// x = n ln 2 + r, a polynomial for e^r (Cephes, expf), and n goes into the exponent.
ALWAYS f8 exp8(f8 given) {
    f8 x = __builtin_elementwise_min(__builtin_elementwise_max(given, (f8)-88.0f), (f8)88.0f);
    f8 n = __builtin_elementwise_floor(x * 1.44269504088896341f + 0.5f);
    f8 r = x - n * 0.693359375f + n * 2.12194440e-4f;
    f8 p = (f8)1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    i32x8 power = (__builtin_convertvector(n, i32x8) + 127) << 23;
    f8 e = power > 0 ? p * READ(f8, &power) : (f8)0.0f;
    return given == given ? e : given;
}

ALWAYS f8 silu8(f8 x) { return x / (1.0f + exp8(-x)); }

// Pairwise: lane i of the result is a[2i] b[2i] + a[2i+1] b[2i+1].
ALWAYS i32x8 pair_products(i16x16 a, i16x16 b) {
#if defined(__AVX2__)
    typedef i16 m __attribute__((vector_size(32)));
    return READ(i32x8, &(__typeof__(__builtin_ia32_pmaddwd256((m)a, (m)b))){__builtin_ia32_pmaddwd256((m)a, (m)b)});
#else
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
    return __builtin_convertvector(__builtin_shufflevector(a, a, EVEN), i32x8) *
               __builtin_convertvector(__builtin_shufflevector(b, b, EVEN), i32x8) +
           __builtin_convertvector(__builtin_shufflevector(a, a, ODD), i32x8) *
               __builtin_convertvector(__builtin_shufflevector(b, b, ODD), i32x8);
#endif
}

// Columns become rows.
ALWAYS void transpose8(f8 r[8]) {
    f8 a[8], b[8];
    for (int i = 0; i < 4; i++) {
        a[2 * i] = __builtin_shufflevector(r[2 * i], r[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        a[2 * i + 1] = __builtin_shufflevector(r[2 * i], r[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + j] = __builtin_shufflevector(a[i + j], a[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            b[i + j + 2] = __builtin_shufflevector(a[i + j], a[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int j = 0; j < 4; j++) {
        r[j] = __builtin_shufflevector(b[j], b[j + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        r[j + 4] = __builtin_shufflevector(b[j], b[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}
