// Enough of Metal's language for clang to check the syntax and types of what tinygrad renders for
// it, off macOS. It is not Metal: what passes may still be refused there, and nothing is compiled.
#define kernel
#define device
#define constant
#define threadgroup
typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
typedef unsigned long ulong;
typedef _Float16 half;
typedef __bf16 bfloat;
// Metal's constructors float2(a, b) are called make_float2(a, b) before clang sees them.
#define VECTORS(T)                                                        \
    typedef T T##2 __attribute__((ext_vector_type(2)));                   \
    typedef T T##3 __attribute__((ext_vector_type(3)));                   \
    typedef T T##4 __attribute__((ext_vector_type(4)));                   \
    static inline T##2 make_##T##2(T a, T b) { return (T##2){a, b}; }     \
    static inline T##4 make_##T##4(T a, T b, T c, T d) { return (T##4){a, b, c, d}; }
VECTORS(float) VECTORS(half) VECTORS(int) VECTORS(uint) VECTORS(short) VECTORS(ushort)
VECTORS(char) VECTORS(uchar) VECTORS(long) VECTORS(ulong) VECTORS(bfloat)
#undef VECTORS

// Attributes such as [[buffer(0)]] are unknown to clang, which ignores them with a warning.
template <typename To, typename From> To as_type(From value) {
    static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
    return __builtin_bit_cast(To, value);
}
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
template <typename T> struct same { using type = T; };
#define ONE(name) template <typename T> T name(T x);
ONE(exp2) ONE(log2) ONE(sqrt) ONE(rsqrt) ONE(trunc) ONE(floor) ONE(ceil) ONE(abs) ONE(isnan)
ONE(sin) ONE(cos)
namespace precise { ONE(sin) }
#undef ONE
template <typename T> T max(T a, typename same<T>::type b);
template <typename T> T min(T a, typename same<T>::type b);
template <typename T> T fma(T a, typename same<T>::type b, typename same<T>::type c);
template <typename T> T select(T a, typename same<T>::type b, bool c);

enum class mem_flags { mem_threadgroup };
void threadgroup_barrier(mem_flags flags);

template <typename T> struct simdgroup_8x8 {
    T elements[2];
    T (&thread_elements())[2] { return elements; }
};
using simdgroup_float8x8 = simdgroup_8x8<float>;
using simdgroup_half8x8 = simdgroup_8x8<half>;
using simdgroup_bfloat8x8 = simdgroup_8x8<bfloat>;
template <typename C, typename A>
void simdgroup_multiply_accumulate(
    simdgroup_8x8<C> &out, simdgroup_8x8<A> &a, simdgroup_8x8<A> &b, simdgroup_8x8<C> &c);
