/* Which instruction set's kernels this CPU can run. */
#include <stddef.h>

#include "fastmb.h"

#if defined(__x86_64__)

extern const fmb_kernels fmb_kernels_f32_v2, fmb_kernels_f64_v2;
extern const fmb_kernels fmb_kernels_f32_v3, fmb_kernels_f64_v3;
extern const fmb_kernels fmb_kernels_f32_v4, fmb_kernels_f64_v4;

const fmb_kernels *fmb_kernels_for(enum fmb_isa isa, enum fmb_dtype dtype)
{
    static const fmb_kernels *const tables[FMB_ISAS][2] = {
        [FMB_V2] = {&fmb_kernels_f32_v2, &fmb_kernels_f64_v2},
        [FMB_V3] = {&fmb_kernels_f32_v3, &fmb_kernels_f64_v3},
        [FMB_V4] = {&fmb_kernels_f32_v4, &fmb_kernels_f64_v4},
    };
    __builtin_cpu_init();
    const int v2 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
    const int v3 = v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                   __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
    const int v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const int have[FMB_ISAS] = {[FMB_V2] = v2, [FMB_V3] = v3, [FMB_V4] = v4};
    return have[isa] ? tables[isa][dtype] : NULL;
}

#elif defined(__aarch64__)

extern const fmb_kernels fmb_kernels_f32_neon, fmb_kernels_f64_neon;

const fmb_kernels *fmb_kernels_for(enum fmb_isa isa, enum fmb_dtype dtype)
{
    if (isa != FMB_NEON)
        return NULL;
    return dtype == FMB_F64 ? &fmb_kernels_f64_neon : &fmb_kernels_f32_neon;
}

#else
#error "fastmb has kernels for x86-64 and AArch64"
#endif
