/* The kernels for x86-64-v3: AVX2 and FMA. 256-bit vectors, 16 registers. */
#pragma GCC target("avx2,fma,bmi2,f16c,popcnt,prefer-vector-width=256")
#define ISA v3
#define VECTOR_BYTES 32
#define HAVE_FMA 1
#define MR 6
#include "isa.inc"
