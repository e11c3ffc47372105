// y = x W^T + bias of a packed W, for few tokens: codes are read once for a group of them.
//
// With AVX-512 the 128 codes of 64 bytes lie in a register as 16 lanes of 8 adjacent elements
// each. Shifted by 4 i bits, every lane has its element i ^ 1 in its lowest 4 bits, which are all
// that a permutation of a table of 16 looks at. So the tokens are brought into that order once,
// and 16 weights cost a shift, a permutation and a multiply-add. A lane's 8 elements share a
// block where blocks are multiples of 8 (and rows begin with a lane), so that scale and zero point
// enter once for 8 of them.
//
// Elsewhere a row is decoded to float32 and multiplied.

#ifndef SWK_IN_ISA

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "../swkernels.h"
#include "coordinates.h"
#include "dtypes.h"
#include "isa.h"
#include "packed.h"
#include "peaks.h"

namespace swk {

constexpr int64_t kChunk = 128;    // elements of a row at once
constexpr int kLaneElements = 8;   // of a lane
constexpr int kLanes = 16;
constexpr int kRowsAtOnce = 4;     // of W, so that tokens are read from the cache less often
constexpr int64_t kMostTokens = 16;  // that share one reading of the codes

struct Product {
  const void* x;
  int dtype;
  int64_t x_stride, T;
  const uint8_t* codes;
  Layout layout;
  Scales scales;
  Outliers outliers;
  const void* bias;
  void* y;

  int64_t chunks() const { return (layout.H + kChunk - 1) / kChunk; }
  // Whether the lanes of a row begin at whole dwords and lie in one block each.
  bool in_lanes() const {
    return !layout.bytes() && layout.H % kLaneElements == 0 && layout.c % kLaneElements == 0;
  }
};

// Tokens [first, first + count), padded with 0: either values or halves.
struct Tokens {
  int64_t first, count;
  const float* values;     // [count, chunks * kChunk] in float32
  const float* sums;       // [count, chunks * kLanes]: of each lane, for the zero points of halves
  const uint16_t* halves;  // [count, chunks * kChunk] in bfloat16, or null
};

}  // namespace swk

#define SWK_PACKING
#define SWK_SELF "quant_linear.cpp"
#include "each_isa.h"

namespace swk {
namespace {

bool has_bfloat16_dot() {
#if SWK_X86
  __builtin_cpu_init();
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has;
#else
  return false;
#endif
}

void multiply(const Product& job, int threads, int isa) {
  const int64_t width = job.chunks() * kChunk;
  const bool lanes = isa == SWK_ISA_AVX512 && job.in_lanes();
  // Integers of 4 bits are exact in bfloat16, and so are products of them with its numbers.
  const bool halves = lanes && job.dtype == SWK_BFLOAT16 && !job.layout.table() &&
                      has_bfloat16_dot();
  const int64_t group = std::min(job.T, kMostTokens);
  std::vector<float> values(static_cast<size_t>(halves ? 0 : group * width));
  std::vector<float> sums(
      static_cast<size_t>(halves && !job.layout.symmetric ? group * job.chunks() * kLanes : 0));
  std::vector<uint16_t> pairs(static_cast<size_t>(halves ? group * width : 0));
  const auto arrange = SWK_FOR_ISA(isa, arrange_tokens);
  const auto rows = SWK_FOR_ISA(isa, multiply_rows);
  // Some tasks for every thread, of rows that are worth one, in multiples of what is taken at once.
  constexpr int64_t kGrain = 32 << 10, kMostRows = 64;
  const int64_t H = std::max<int64_t>(1, job.layout.H), D = job.layout.D;
  const int64_t share = std::min(kMostRows, D / (8 * std::max(threads, 1)));
  const int64_t chunk = (std::max(share, kGrain / H) / kRowsAtOnce + 1) * kRowsAtOnce;
  std::atomic<bool> failed{false};
  for (int64_t first = 0; first < job.T; first += group) {
    const int64_t count = std::min(group, job.T - first);
    arrange(job, first, count, lanes, values.data(), sums.data(),
            halves ? pairs.data() : nullptr);
    const Tokens tokens{first, count, values.data(), sums.data(),
                        halves ? pairs.data() : nullptr};
    run_tasks((D + chunk - 1) / chunk, threads, [&](int64_t task) {
      try {
        rows(job, tokens, task * chunk, std::min(D, (task + 1) * chunk), lanes);
      } catch (const std::bad_alloc&) {
        failed = true;
      }
    });
    if (failed) throw std::bad_alloc();
  }
}

}  // namespace
}  // namespace swk

int swk_cpu_quant_linear(const void* x, int dtype, int64_t x_stride, int64_t T,
                         const uint8_t* codes, int64_t D, int64_t H, int64_t block_rows,
                         int64_t block_columns, int code, int symmetric, const void* scales,
                         int scale_dtype, const void* zero_points, int zero_bytes,
                         const int32_t* positions, const void* values, int value_dtype, int64_t k,
                         const void* bias, void* y, int threads, int isa) {
  using namespace swk;
  const Layout layout(D, H, block_rows, block_columns, code, symmetric);
  if (!layout.valid() || T < 0) return SWK_BAD_SIZE;
  const int resolved = resolve_isa(isa);
  if (!resolved) return SWK_BAD_ISA;
  const Scales given{scales, scale_dtype, zero_points, zero_bytes};
  if (dtype < SWK_FLOAT32 || dtype > SWK_FLOAT16 || !given.valid()) return SWK_BAD_DTYPE;
  if (value_dtype < SWK_FLOAT32 || value_dtype > SWK_FLOAT16) return SWK_BAD_DTYPE;
  const Outliers outliers{positions, values, value_dtype, k};
  if (!outliers.valid(layout.elements())) return SWK_BAD_INDEX;
  if (T == 0 || D == 0) return SWK_OK;
  if (!y || (H > 0 && (!x || !codes || !scales)) || (k > 0 && !values)) return SWK_BAD_SIZE;
  try {
    multiply({x, dtype, x_stride, T, codes, layout, given, outliers, bias, y}, threads, resolved);
  } catch (const std::bad_alloc&) {
    return SWK_OUT_OF_MEMORY;
  }
  return SWK_OK;
}

#else  // once per instruction set

SWK_FN SWK_INLINE float token_of(const Product& job, int64_t t, int64_t column) {
  return value_of(job.x, job.dtype, t * job.x_stride + column);
}

// Tokens [first, first + count) as the kernels want them. In lanes, element 8 l + (i ^ 1) of a chunk
// goes to place 16 i + l; of halves, element 4 w + (i ^ 1) to place 32 i + w.
SWK_FN void arrange_tokens(const Product& job, int64_t first, int64_t count, bool lanes,
                           float* values, float* sums, uint16_t* halves) {
  const int64_t H = job.layout.H, chunks = job.chunks(), width = chunks * kChunk;
  std::vector<float> row(static_cast<size_t>(width));
  for (int64_t t = 0; t < count; ++t) {
    const int64_t at = (first + t) * job.x_stride;
    float* const natural = lanes ? row.data() : values + t * width;
    if (job.dtype == SWK_FLOAT32) {
      std::memcpy(natural, static_cast<const float*>(job.x) + at,
                  static_cast<size_t>(H) * sizeof(float));
    } else if (job.dtype == SWK_BFLOAT16) {
      const auto* const x = static_cast<const int16_t*>(job.x) + at;
      for (int64_t i = 0; i < H; ++i) natural[i] = to_float<BFloat16>(x[i]);
    } else {
      const auto* const x = static_cast<const int16_t*>(job.x) + at;
      for (int64_t i = 0; i < H; ++i) natural[i] = to_float<Float16>(x[i]);
    }
    for (int64_t c = 0; lanes && c < chunks; ++c) {
      const float* const from = natural + c * kChunk;
      if (!halves) {
        float* const to = values + t * width + c * kChunk;
        for (int i = 0; i < kLaneElements; ++i) {
          for (int lane = 0; lane < kLanes; ++lane) {
            to[kLanes * i + lane] = from[kLaneElements * lane + (i ^ 1)];
          }
        }
        continue;
      }
      uint16_t* const words = halves + t * width + c * kChunk;
      for (int i = 0; i < 4; ++i) {
        for (int w = 0; w < 32; ++w) {
          words[32 * i + w] = static_cast<uint16_t>(bits_of(from[4 * w + (i ^ 1)]) >> 16);
        }
      }
      if (job.layout.symmetric) continue;
      for (int lane = 0; lane < kLanes; ++lane) {
        float total = 0.0f;
        for (int i = 0; i < kLaneElements; ++i) total += from[kLaneElements * lane + i];
        sums[(t * chunks + c) * kLanes + lane] = total;
      }
    }
  }
}

// The row's sum for one token, less what the codes of outliers contribute, and with their values
// and the bias; rounded once.
SWK_FN SWK_INLINE void finish_row(const Product& job, int64_t t, int64_t row, float sum,
                                  int64_t outlier) {
  const Layout& layout = job.layout;
  const int64_t end = (row + 1) * layout.H;
  for (; outlier < job.outliers.count && job.outliers.positions[outlier] < end; ++outlier) {
    const int64_t p = job.outliers.positions[outlier], block = layout.block_of(p);
    const float coded = decoded(layout, code_of(job.codes, layout, p),
                                job.scales.zero_point(block), scale_of(job.scales, block));
    const float x = token_of(job, t, p - row * layout.H);
    sum -= x * coded;  // exactly nothing is left of a token that is 1 here and 0 elsewhere
    sum += x * value_of(job.outliers.values, job.outliers.dtype, outlier);
  }
  if (job.bias) sum += value_of(job.bias, job.dtype, row);
  const int64_t at = t * layout.D + row;
  if (job.dtype == SWK_FLOAT32) {
    static_cast<float*>(job.y)[at] = sum;
  } else if (job.dtype == SWK_BFLOAT16) {
    static_cast<int16_t*>(job.y)[at] = from_float<BFloat16>(sum);
  } else {
    static_cast<int16_t*>(job.y)[at] = from_float<Float16>(sum);
  }
}

SWK_FN SWK_INLINE float dot(const float* SWK_RESTRICT a, const float* SWK_RESTRICT b, int64_t n) {
  float sums[64] = {};
  for (int64_t i = 0; i < n; i += 64) {  // n is a multiple of kChunk
    for (int j = 0; j < 64; ++j) sums[j] += a[i + j] * b[i + j];
  }
  float sum = 0.0f;
  for (int j = 0; j < 64; ++j) sum += sums[j];
  return sum;
}

#ifdef SWK_ZMM
// Up to 16 scales from `block` on, and zero points.
SWK_FN SWK_INLINE __m512 load_scales(const Scales& from, int64_t block, __mmask16 mask) {
  if (from.dtype == SWK_FLOAT32) {
    return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(from.values) + block);
  }
  return _mm512_cvtph_ps(
      _mm256_maskz_loadu_epi16(mask, static_cast<const int16_t*>(from.values) + block));
}
SWK_FN SWK_INLINE __m512 load_zeros(const Scales& from, int64_t block, __mmask16 mask) {
  if (from.zero_bytes == 4) {
    return _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(
        mask, static_cast<const int32_t*>(from.zero_points) + block));
  }
  return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(
      _mm256_maskz_loadu_epi16(mask, static_cast<const int16_t*>(from.zero_points) + block)));
}

// The scale and, where there are any, the zero point of every lane of a row [chunks * kLanes].
SWK_FN void lane_scales(const Product& job, int64_t row, float* scales, float* zeros) {
  const Layout& layout = job.layout;
  const int64_t lanes = layout.H / kLaneElements, begin = row * layout.H;
  const int64_t wide = layout.c / kLaneElements;  // lanes of a block
  int64_t block = layout.block_of(begin);
  if (layout.r == 0 && layout.H % layout.c == 0 && kLanes % wide == 0) {
    // Whole blocks in each chunk: every lane takes one of its scales.
    const int64_t count = kLanes / wide, blocks = layout.H / layout.c;
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i taken =
        _mm512_srli_epi32(lane, static_cast<unsigned>(__builtin_ctzll(static_cast<uint64_t>(wide))));
    for (int64_t at = 0; at < blocks; at += count, scales += kLanes) {
      const auto left = static_cast<unsigned>(std::min(count, blocks - at));
      const auto mask = static_cast<__mmask16>(0xFFFFu >> (kLanes - left));
      _mm512_storeu_ps(scales, _mm512_permutexvar_ps(
                                   taken, load_scales(job.scales, block + at, mask)));
      if (!zeros) continue;
      _mm512_storeu_ps(zeros,
                       _mm512_permutexvar_ps(taken, load_zeros(job.scales, block + at, mask)));
      zeros += kLanes;
    }
    return;
  }
  int64_t stop = (layout.run_end(begin) - begin) / kLaneElements;
  for (int64_t lane = 0; lane < lanes; ++block) {
    const int64_t end = std::min(lanes, stop);
    std::fill(scales + lane, scales + end, scale_of(job.scales, block));
    if (zeros) {
      std::fill(zeros + lane, zeros + end, static_cast<float>(job.scales.zero_point(block)));
    }
    lane = end;
    stop = end + wide;
  }
}

// Rows of a matrix product on lanes: the codes of `rows` rows from `row` on, scales and zero points
// of each row [chunks * kLanes] one after the other.
struct Lanes {
  const uint8_t* codes;
  int64_t row_bytes, chunks;
  const float* scales;
  const float* zeros;  // or null
  __mmask16 last;      // the lanes of the last chunk

  SWK_FN Lanes(const Product& job, int64_t row, const float* scales_, const float* zeros_)
      : codes(job.codes + row * job.layout.H / 2),
        row_bytes(job.layout.H / 2),
        chunks(job.chunks()),
        scales(scales_),
        zeros(zeros_),
        last(static_cast<__mmask16>(
            0xFFFFu >> (kLanes - (job.layout.H - (chunks - 1) * kChunk) / kLaneElements))) {}

  SWK_FN SWK_INLINE __m512i load(int r, int64_t c) const {
    const __mmask16 mask = c + 1 < chunks ? __mmask16{0xFFFF} : last;
    const uint8_t* const at = codes + r * row_bytes + c * kChunk / 2;
    // The same place in the rows that come next: rows are too short for hardware to foresee them.
    _mm_prefetch(reinterpret_cast<const char*>(at + kRowsAtOnce * row_bytes), _MM_HINT_T1);
    return _mm512_maskz_loadu_epi32(mask, at);
  }
  SWK_FN SWK_INLINE __m512 scale(int r, int64_t c) const {
    return _mm512_loadu_ps(scales + (r * chunks + c) * kLanes);
  }
  SWK_FN SWK_INLINE __m512 zero(int r, int64_t c) const {
    return _mm512_loadu_ps(zeros + (r * chunks + c) * kLanes);
  }
};

// kRows rows and one token: an element of all rows at once. sums[r * stride].
template <int kRows, bool kShift>
SWK_FN SWK_INLINE void multiply_token(const Lanes& lanes, const Tokens& tokens, int64_t t,
                                      __m512 table, float* sums, int64_t stride) {
  const float* const x = tokens.values + t * lanes.chunks * kChunk;
  __m512 total[kRows];
  for (int r = 0; r < kRows; ++r) total[r] = _mm512_setzero_ps();
  for (int64_t c = 0; c < lanes.chunks; ++c) {
    __m512i packed[kRows];
    __m512 part[kRows], zero[kRows];
    for (int r = 0; r < kRows; ++r) {
      packed[r] = lanes.load(r, c);
      if constexpr (kShift) zero[r] = lanes.zero(r, c);
      part[r] = _mm512_setzero_ps();
    }
#pragma GCC unroll 8
    for (int i = 0; i < kLaneElements; ++i) {
      const __m512 values = _mm512_loadu_ps(x + c * kChunk + i * kLanes);
      for (int r = 0; r < kRows; ++r) {
        const __m512i index = _mm512_srli_epi32(packed[r], static_cast<unsigned>(4 * i));
        __m512 weights = _mm512_permutexvar_ps(index, table);
        if constexpr (kShift) weights = _mm512_sub_ps(weights, zero[r]);
        part[r] = _mm512_fmadd_ps(weights, values, part[r]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      total[r] = _mm512_fmadd_ps(part[r], lanes.scale(r, c), total[r]);
    }
  }
  for (int r = 0; r < kRows; ++r) sums[r * stride] = _mm512_reduce_add_ps(total[r]);
}

// kRows rows and kTokens tokens, a chunk of one row after the other, so that the tokens' chunk is
// read from the nearest cache. sums[r * stride + t].
template <int kRows, int kTokens, bool kShift>
SWK_FN SWK_INLINE void multiply_tokens(const Lanes& lanes, const Tokens& tokens, int64_t t0,
                                       __m512 table, float* sums, int64_t stride) {
  const int64_t width = lanes.chunks * kChunk;
  const float* const x = tokens.values + t0 * width;
  __m512 total[kRows][kTokens];
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTokens; ++t) total[r][t] = _mm512_setzero_ps();
  }
  for (int64_t c = 0; c < lanes.chunks; ++c) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m512i packed = lanes.load(r, c);
      const __m512 zero = kShift ? lanes.zero(r, c) : _mm512_setzero_ps();
      __m512 part[kTokens];
      for (int t = 0; t < kTokens; ++t) part[t] = _mm512_setzero_ps();
#pragma GCC unroll 8
      for (int i = 0; i < kLaneElements; ++i) {
        const __m512i index = _mm512_srli_epi32(packed, static_cast<unsigned>(4 * i));
        __m512 weights = _mm512_permutexvar_ps(index, table);
        if constexpr (kShift) weights = _mm512_sub_ps(weights, zero);
        for (int t = 0; t < kTokens; ++t) {
          const __m512 values = _mm512_loadu_ps(x + t * width + c * kChunk + i * kLanes);
          part[t] = _mm512_fmadd_ps(weights, values, part[t]);
        }
      }
      for (int t = 0; t < kTokens; ++t) {
        total[r][t] = _mm512_fmadd_ps(part[t], lanes.scale(r, c), total[r][t]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTokens; ++t) sums[r * stride + t] = _mm512_reduce_add_ps(total[r][t]);
  }
}

#define SWK_FN_BF16                                                                     \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")))

// The same for tokens in bfloat16: pairs of products at once, their sums in float32.
template <int kRows, int kTokens>
SWK_FN_BF16 void multiply_halves(const Lanes& lanes, const Tokens& tokens, int64_t t0,
                                 __m512i table, float* sums, int64_t stride) {
  const int64_t width = lanes.chunks * kChunk;
  const uint16_t* const x = tokens.halves + t0 * width;
  const float* const lane_sums = tokens.sums + t0 * lanes.chunks * kLanes;
  __m512 total[kRows][kTokens];
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTokens; ++t) total[r][t] = _mm512_setzero_ps();
  }
  for (int64_t c = 0; c < lanes.chunks; ++c) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m512i packed = lanes.load(r, c);
      __m512 part[kTokens];
      for (int t = 0; t < kTokens; ++t) part[t] = _mm512_setzero_ps();
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        // The permutation reads 5 bits: the table stands there twice.
        const __m512i index = _mm512_srli_epi16(packed, static_cast<unsigned>(4 * i));
        const __m512i weights = _mm512_permutexvar_epi16(index, table);
        for (int t = 0; t < kTokens; ++t) {
          const __m512i values = _mm512_loadu_si512(x + t * width + c * kChunk + i * 32);
          part[t] = _mm512_dpbf16_ps(part[t], (__m512bh)weights, (__m512bh)values);
        }
      }
      for (int t = 0; t < kTokens; ++t) {
        if (lanes.zeros) {
          const float* const sums_of = lane_sums + (t * lanes.chunks + c) * kLanes;
          part[t] = _mm512_fnmadd_ps(lanes.zero(r, c), _mm512_loadu_ps(sums_of), part[t]);
        }
        total[r][t] = _mm512_fmadd_ps(part[t], lanes.scale(r, c), total[r][t]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTokens; ++t) sums[r * stride + t] = _mm512_reduce_add_ps(total[r][t]);
  }
}

// All tokens of a group with kRows rows. sums [kRows, kMostTokens].
template <int kRows, bool kShift>
SWK_FN SWK_INLINE void multiply_group(const Lanes& lanes, const Tokens& tokens, __m512 table,
                                      __m512i table16, float* sums) {
  int64_t t = 0;
  if (tokens.halves) {
    for (; t + 4 <= tokens.count; t += 4) {
      multiply_halves<kRows, 4>(lanes, tokens, t, table16, sums + t, kMostTokens);
    }
    for (; t + 2 <= tokens.count; t += 2) {
      multiply_halves<kRows, 2>(lanes, tokens, t, table16, sums + t, kMostTokens);
    }
    for (; t < tokens.count; ++t) {
      multiply_halves<kRows, 1>(lanes, tokens, t, table16, sums + t, kMostTokens);
    }
    return;
  }
  for (; t + 4 <= tokens.count; t += 4) {
    multiply_tokens<kRows, 4, kShift>(lanes, tokens, t, table, sums + t, kMostTokens);
  }
  for (; t + 2 <= tokens.count; t += 2) {
    multiply_tokens<kRows, 2, kShift>(lanes, tokens, t, table, sums + t, kMostTokens);
  }
  for (; t < tokens.count; ++t) {
    multiply_token<kRows, kShift>(lanes, tokens, t, table, sums + t, kMostTokens);
  }
}

template <bool kShift>
SWK_FN void rows_in_lanes(const Product& job, const Tokens& tokens, int64_t begin, int64_t end) {
  const Layout& layout = job.layout;
  const int64_t places = job.chunks() * kLanes;
  std::vector<float> scales(static_cast<size_t>(kRowsAtOnce * places));
  std::vector<float> zeros(kShift ? scales.size() : 0);
  float* const shift = kShift ? zeros.data() : nullptr;
  float values[16];
  uint16_t words[32];
  for (int i = 0; i < 16; ++i) {
    values[i] = layout.value4(i);
    words[i] = words[i + 16] = static_cast<uint16_t>(bits_of(values[i]) >> 16);
  }
  const __m512 table = _mm512_loadu_ps(values);
  const __m512i table16 = _mm512_loadu_si512(words);
  int64_t outlier = job.outliers.from(begin * layout.H);
  for (int64_t row = begin; row < end; row += kRowsAtOnce) {
    const auto rows = static_cast<int>(std::min<int64_t>(kRowsAtOnce, end - row));
    for (int r = 0; r < rows; ++r) {
      lane_scales(job, row + r, scales.data() + r * places, shift ? shift + r * places : nullptr);
    }
    float sums[kRowsAtOnce][kMostTokens];
    const Lanes lanes(job, row, scales.data(), shift);
    if (rows == kRowsAtOnce) {
      multiply_group<kRowsAtOnce, kShift>(lanes, tokens, table, table16, sums[0]);
    } else {
      for (int r = 0; r < rows; ++r) {
        const int64_t at = r * places;
        const Lanes one(job, row + r, scales.data() + at, kShift ? shift + at : shift);
        multiply_group<1, kShift>(one, tokens, table, table16, sums[r]);
      }
    }
    for (int r = 0; r < rows; ++r) {
      while (outlier < job.outliers.count &&
             job.outliers.positions[outlier] < (row + r) * layout.H) {
        ++outlier;
      }
      for (int64_t t = 0; t < tokens.count; ++t) {
        finish_row(job, tokens.first + t, row + r, sums[r][t], outlier);
      }
    }
  }
}
#endif

#ifdef SWK_ZMM
// One row of bytes and kTokens tokens, as they come; blocks and rows are multiples of 16.
template <int kTokens>
SWK_FN SWK_INLINE void multiply_bytes(const Product& job, const Tokens& tokens, int64_t t0,
                                      int64_t row, float* sums) {
  const Layout& layout = job.layout;
  const int64_t width = job.chunks() * kChunk, begin = row * layout.H, end = begin + layout.H;
  const float* const x = tokens.values + t0 * width - begin;
  __m512 total[kTokens];
  for (int t = 0; t < kTokens; ++t) total[t] = _mm512_setzero_ps();
  int64_t block = layout.block_of(begin), stop = layout.run_end(begin);
  for (int64_t p = begin; p < end; stop += layout.c, ++block) {
    const __m512 scale = _mm512_set1_ps(scale_of(job.scales, block));
    const __m512i zero = _mm512_set1_epi32(job.scales.zero_point(block));
    __m512 part[kTokens];
    for (int t = 0; t < kTokens; ++t) part[t] = _mm512_setzero_ps();
    for (const int64_t until = std::min(end, stop); p < until; p += 16) {
      const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(job.codes + p));
      const __m512i wide =
          layout.symmetric ? _mm512_cvtepi8_epi32(codes) : _mm512_cvtepu8_epi32(codes);
      const __m512 weights = _mm512_cvtepi32_ps(_mm512_sub_epi32(wide, zero));
      for (int t = 0; t < kTokens; ++t) {
        part[t] = _mm512_fmadd_ps(weights, _mm512_loadu_ps(x + t * width + p), part[t]);
      }
    }
    for (int t = 0; t < kTokens; ++t) total[t] = _mm512_fmadd_ps(part[t], scale, total[t]);
  }
  for (int t = 0; t < kTokens; ++t) sums[t] = _mm512_reduce_add_ps(total[t]);
}

SWK_FN void rows_of_bytes(const Product& job, const Tokens& tokens, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    float sums[kMostTokens];
    int64_t t = 0;
    for (; t + 4 <= tokens.count; t += 4) multiply_bytes<4>(job, tokens, t, row, sums + t);
    for (; t < tokens.count; ++t) multiply_bytes<1>(job, tokens, t, row, sums + t);
    const int64_t outlier = job.outliers.from(row * job.layout.H);
    for (t = 0; t < tokens.count; ++t) finish_row(job, tokens.first + t, row, sums[t], outlier);
  }
}
#endif

// The rows [begin, end) of W with a group of tokens.
SWK_FN void multiply_rows(const Product& job, const Tokens& tokens, int64_t begin, int64_t end,
                          bool lanes) {
#ifdef SWK_ZMM
  if (lanes) {
    return job.layout.symmetric ? rows_in_lanes<false>(job, tokens, begin, end)
                                : rows_in_lanes<true>(job, tokens, begin, end);
  }
  if (job.layout.bytes() && job.layout.H % 16 == 0 && job.layout.c % 16 == 0) {
    return rows_of_bytes(job, tokens, begin, end);
  }
#endif
  (void)lanes;
  const int64_t H = job.layout.H, width = job.chunks() * kChunk;
  std::vector<float> row_values(static_cast<size_t>(width));
  for (int64_t row = begin; row < end; ++row) {
    decode<Float32>(job.codes, job.layout, job.scales, row * H, (row + 1) * H,
                    reinterpret_cast<int32_t*>(row_values.data()), false);
    const int64_t outlier = job.outliers.from(row * H);
    for (int64_t t = 0; t < tokens.count; ++t) {
      const float sum = dot(row_values.data(), tokens.values + t * width, width);
      finish_row(job, tokens.first + t, row, sum, outlier);
    }
  }
}

#endif
