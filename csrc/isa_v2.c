/* The kernels for x86-64-v2: SSE4.2, the base. 128-bit vectors, no fused multiply-add: its bits differ from the rest. */
#pragma GCC target("sse4.2,popcnt")
#define ISA v2
#define VECTOR_BYTES 16
#define HAVE_FMA 0
#define MR 6
#include "isa.inc"
