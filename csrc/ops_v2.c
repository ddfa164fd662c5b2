/* The kernels of fastmb.ops for the instruction set of isa_v2.c. */
#if defined(__x86_64__)
#define KERNELS "ops.inc"
#include "isa_v2.c"
#endif
