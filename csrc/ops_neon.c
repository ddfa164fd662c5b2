/* The kernels of fastmb.ops for the instruction set of isa_neon.c. */
#if defined(__aarch64__)
#define KERNELS "ops.inc"
#include "isa_neon.c"
#endif
