// Instruction sets, chosen at run time.
//
// A kernel is written once, as plain loops over channels that compilers turn into vector code. Its
// file includes each_isa.h, which includes the file back once per instruction set, every time in a
// namespace of its own and with SWK_FN set to the function attributes that allow that set. No
// compiler flag raises the baseline, so the library loads on any CPU.

#pragma once

#include "../swkernels.h"

#if (defined(__GNUC__) || defined(__clang__)) && !defined(_MSC_VER) && defined(__x86_64__)
#define SWK_X86 1
#include <immintrin.h>
#else
#define SWK_X86 0
#endif

#define SWK_FN_SCALAR
#define SWK_FN_AVX2 __attribute__((target("avx2,fma,f16c")))
// GCC prefers 256-bit vectors even where it may use 512; clang decides by itself.
#if defined(__clang__)
#define SWK_FN_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#else
#define SWK_FN_AVX512 \
  __attribute__((     \
      target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")))
#endif

#if defined(_MSC_VER) && !defined(__clang__)
#define SWK_INLINE __forceinline
#define SWK_NOINLINE __declspec(noinline)
#define SWK_RESTRICT __restrict
#else
#define SWK_INLINE inline __attribute__((always_inline))
#define SWK_NOINLINE __attribute__((noinline))
#define SWK_RESTRICT __restrict__
#endif

namespace swk {

inline bool has_isa(int isa) {
  if (isa == SWK_ISA_SCALAR) return true;
#if SWK_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (isa == SWK_ISA_AVX2) return avx2;
  if (isa == SWK_ISA_AVX512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return false;
}

// What `isa` stands for on this CPU; 0 where it cannot be had.
inline int resolve_isa(int isa) {
  if (isa != SWK_ISA_BEST) return has_isa(isa) ? isa : 0;
  if (has_isa(SWK_ISA_AVX512)) return SWK_ISA_AVX512;
  return has_isa(SWK_ISA_AVX2) ? SWK_ISA_AVX2 : SWK_ISA_SCALAR;
}

}  // namespace swk

// The version of `function` (a name in the namespaces scalar, avx2 and avx512) for a resolved isa.
#if SWK_X86
#define SWK_FOR_ISA(isa, function)                  \
  ((isa) == SWK_ISA_AVX512 ? &swk::avx512::function \
   : (isa) == SWK_ISA_AVX2 ? &swk::avx2::function   \
                           : &swk::scalar::function)
#else
#define SWK_FOR_ISA(isa, function) (&swk::scalar::function)
#endif
