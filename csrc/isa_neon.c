/* The kernels for AArch64: NEON, which every such processor has, with FMA. 128-bit vectors, 32 registers. */
#define ISA neon
#define VECTOR_BYTES 16
#define HAVE_FMA 1
#define MR 12
#include "isa.inc"
