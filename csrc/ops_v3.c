/* The kernels of fastmb.ops for the instruction set of isa_v3.c. */
#define KERNELS "ops.inc"
#include "isa_v3.c"
