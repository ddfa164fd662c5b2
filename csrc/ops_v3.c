/* The kernels of fastmb.ops for the instruction set of isa_v3.c. */
#if defined(__x86_64__)
#define KERNELS "ops.inc"
#include "isa_v3.c"
#endif
