// What tinygrad's OpenCL C uses of the language's own header, which not every clang comes with.
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef __SIZE_TYPE__ size_t;
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define CLK_LOCAL_MEM_FENCE 1
#define OVERLOADED __attribute__((overloadable, const))
#define VECTORS(T)                                      \
    typedef T T##2 __attribute__((ext_vector_type(2))); \
    typedef T T##3 __attribute__((ext_vector_type(3))); \
    typedef T T##4 __attribute__((ext_vector_type(4))); \
    typedef T T##8 __attribute__((ext_vector_type(8)));
VECTORS(float) VECTORS(int) VECTORS(uint) VECTORS(short) VECTORS(ushort) VECTORS(char)
VECTORS(uchar) VECTORS(long) VECTORS(ulong)
#define ONE(name) float OVERLOADED name(float x);
ONE(exp2) ONE(log2) ONE(sqrt) ONE(rsqrt) ONE(trunc) ONE(sin) ONE(fabs)
float OVERLOADED fmax(float a, float b);
#undef ONE
#ifdef cl_khr_fp16
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
VECTORS(half)
#define ONE(name) half OVERLOADED name(half x);
ONE(exp2) ONE(log2) ONE(sqrt) ONE(rsqrt) ONE(trunc) ONE(sin) ONE(fabs)
half OVERLOADED fmax(half a, half b);
#undef ONE
#define as_half(x) __builtin_astype((x), half)
#endif
#undef VECTORS
#define as_float(x) __builtin_astype((x), float)
#define as_int(x) __builtin_astype((x), int)
#define as_uint(x) __builtin_astype((x), uint)
#define as_short(x) __builtin_astype((x), short)
#define as_ushort(x) __builtin_astype((x), ushort)
#define as_char(x) __builtin_astype((x), char)
#define as_uchar(x) __builtin_astype((x), uchar)
size_t get_group_id(uint dimension);
size_t get_local_id(uint dimension);
size_t get_global_id(uint dimension);
void barrier(uint flags);
