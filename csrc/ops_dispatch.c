/* The tables of fastmb.ops. Which of them this CPU can run, fmb_kernels_for has told before. */
#include "ops.h"

#if defined(__x86_64__)

extern const fmb_ops fmb_ops_f32_v2, fmb_ops_f64_v2;
extern const fmb_ops fmb_ops_f32_v3, fmb_ops_f64_v3;
extern const fmb_ops fmb_ops_f32_v4, fmb_ops_f64_v4;

const fmb_ops *fmb_ops_for(enum fmb_isa isa, enum fmb_dtype dtype)
{
    static const fmb_ops *const tables[FMB_ISAS][2] = {
        [FMB_V2] = {&fmb_ops_f32_v2, &fmb_ops_f64_v2},
        [FMB_V3] = {&fmb_ops_f32_v3, &fmb_ops_f64_v3},
        [FMB_V4] = {&fmb_ops_f32_v4, &fmb_ops_f64_v4},
    };
    return tables[isa][dtype];
}

#elif defined(__aarch64__)

extern const fmb_ops fmb_ops_f32_neon, fmb_ops_f64_neon;

const fmb_ops *fmb_ops_for(enum fmb_isa isa, enum fmb_dtype dtype)
{
    (void)isa;
    return dtype == FMB_F64 ? &fmb_ops_f64_neon : &fmb_ops_f32_neon;
}

#endif
