// What dropout multiplies an activation by: Philox4x32-10, a counter for every four channels.

#ifndef SWK_IN_ISA

#include <algorithm>
#include <cstdint>

#include "../swkernels.h"
#include "coordinates.h"
#include "dtypes.h"
#include "isa.h"
#include "peaks.h"

namespace swk {

// Counters at a time: one word each of so many fills vectors, and all of them stay in registers
// or the nearest cache.
constexpr int kLanes = 32;

struct Dropout {
  int64_t N;
  uint32_t key[2];
  uint32_t threshold;
  float scale;
};

}  // namespace swk

#define SWK_SELF "dropout.cpp"
#include "each_isa.h"

namespace swk {
namespace {

void rows(const Dropout& dropout, int64_t start, int64_t stop, float* out, int threads, int isa) {
  const auto fill = SWK_FOR_ISA(isa, fill_row);
  run_tasks(stop - start, threads,
            [&](int64_t t) { fill(dropout, start + t, out + t * dropout.N); });
}

}  // namespace
}  // namespace swk

int swk_cpu_dropout(float* out, int64_t start, int64_t stop, int64_t N, int64_t seed,
                    int64_t threshold, float scale, int threads, int isa) {
  using namespace swk;
  if (start < 0 || stop < start || N < 0) return SWK_BAD_SIZE;
  if (threshold < 0 || threshold > UINT32_MAX) return SWK_BAD_SIZE;
  const int resolved = resolve_isa(isa);
  if (!resolved) return SWK_BAD_ISA;
  if (start == stop || N == 0) return SWK_OK;
  if (!out) return SWK_BAD_SIZE;
  const auto bits = static_cast<uint64_t>(seed);
  const Dropout dropout{N,
                        {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)},
                        static_cast<uint32_t>(threshold),
                        scale};
  rows(dropout, start, stop, out, threads, resolved);
  return SWK_OK;
}

#else  // once per instruction set

// One round for kLanes counters. The products of even and odd lanes are what vector units have.
SWK_FN SWK_INLINE void philox_round(uint32_t* SWK_RESTRICT w0, uint32_t* SWK_RESTRICT w1,
                                    uint32_t* SWK_RESTRICT w2, uint32_t* SWK_RESTRICT w3,
                                    uint32_t key0, uint32_t key1) {
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t first = static_cast<uint64_t>(w0[i]) * 0xD2511F53u;
    const uint64_t second = static_cast<uint64_t>(w2[i]) * 0xCD9E8D57u;
    w0[i] = static_cast<uint32_t>(second >> 32) ^ w1[i] ^ key0;
    w2[i] = static_cast<uint32_t>(first >> 32) ^ w3[i] ^ key1;
    w1[i] = static_cast<uint32_t>(second);
    w3[i] = static_cast<uint32_t>(first);
  }
}

// out[j] = 0 or scale for the channels of token t.
SWK_FN void fill_row(const Dropout& dropout, int64_t t, float* out) {
  const auto groups = static_cast<uint64_t>((dropout.N + 3) / 4);
  const uint64_t first = static_cast<uint64_t>(t) * groups;
  for (uint64_t g = 0; g < groups; g += kLanes) {
    uint32_t w0[kLanes], w1[kLanes], w2[kLanes] = {}, w3[kLanes] = {};
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t counter = first + g + static_cast<uint64_t>(i);
      w0[i] = static_cast<uint32_t>(counter);
      w1[i] = static_cast<uint32_t>(counter >> 32);
    }
    uint32_t key0 = dropout.key[0], key1 = dropout.key[1];
    for (int round = 0; round < 10; ++round) {
      philox_round(w0, w1, w2, w3, key0, key1);
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    float lanes[4 * kLanes];
    for (int i = 0; i < kLanes; ++i) {
      lanes[4 * i] = w0[i] >= dropout.threshold ? dropout.scale : 0.0f;
      lanes[4 * i + 1] = w1[i] >= dropout.threshold ? dropout.scale : 0.0f;
      lanes[4 * i + 2] = w2[i] >= dropout.threshold ? dropout.scale : 0.0f;
      lanes[4 * i + 3] = w3[i] >= dropout.threshold ? dropout.scale : 0.0f;
    }
    const auto begin = static_cast<int64_t>(4 * g);
    std::copy_n(lanes, std::min<int64_t>(4 * kLanes, dropout.N - begin), out + begin);
  }
}

#endif
