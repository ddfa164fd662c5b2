/* The kernels for x86-64-v4: AVX-512 (F, BW, DQ, VL) with FMA. 512-bit vectors, 32 registers. */
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2,f16c,popcnt,prefer-vector-width=512")
#define ISA v4
#define VECTOR_BYTES 64
#define HAVE_FMA 1
#define MR 12
#include "isa.inc"
