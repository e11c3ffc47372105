// Includes the file named by SWK_SELF once per instruction set; see isa.h. No include guard: every
// kernel file includes it once. SWK_IN_ISA tells that file which of its halves is wanted.
// Files on packed matrices define SWK_PACKING and get packing.h too.

#define SWK_IN_ISA

#define SWK_FN SWK_FN_SCALAR
namespace swk::scalar {
#include "elements.h"
#include "lanes.h"
#ifdef SWK_PACKING
#include "packing.h"
#endif
#include SWK_SELF
}  // namespace swk::scalar
#undef SWK_FN

#if SWK_X86
#define SWK_F16C  // both of the following have the conversions of float16

#define SWK_FN SWK_FN_AVX2
namespace swk::avx2 {
#include "elements.h"
#include "lanes.h"
#ifdef SWK_PACKING
#include "packing.h"
#endif
#include SWK_SELF
}  // namespace swk::avx2
#undef SWK_FN

#define SWK_FN SWK_FN_AVX512
#define SWK_ZMM  // the intrinsics of AVX-512 may be used
namespace swk::avx512 {
#include "elements.h"
#include "lanes.h"
#ifdef SWK_PACKING
#include "packing.h"
#endif
#include SWK_SELF
}  // namespace swk::avx512
#undef SWK_FN
#undef SWK_ZMM

#undef SWK_F16C
#endif

#undef SWK_IN_ISA
