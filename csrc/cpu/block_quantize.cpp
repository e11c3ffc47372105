// Blocks of a matrix to scales and codes; swkernels/backends/blocks.py is the definition.
//
// A block that fits the caches is looked at as often as needed by one thread: extremes, what the
// clip asks for, the scale, then the codes. A larger one is cut into pieces for all threads; what
// they find are extremes and sums of integers, which merge exactly in any order.

#ifndef SWK_IN_ISA

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <new>
#include <vector>

#include "../swkernels.h"
#include "coordinates.h"
#include "dtypes.h"
#include "isa.h"
#include "packed.h"
#include "pages.h"
#include "peaks.h"

namespace swk {

constexpr float kTiny = 1.17549435e-38f;   // 2^-126; the reciprocal of less may overflow
constexpr float kSmallest = 1.40129846e-45f;  // 2^-149
constexpr float kSmallestHalf = 5.96046448e-8f;  // 2^-24, of float16
constexpr int64_t kPiece = 32 << 10;       // elements of a task; even
constexpr int64_t kSpan = 1024;            // elements that are brought to float32 at once; even
constexpr float kFp4Order[16] = {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3};

struct Quantizing {
  const void* w;
  Layout layout;
  int zero_bits;
  int clip;
  double clip_value;
  const float* factors;
  int64_t factor_count;
  Outliers outliers;
  void* scales;
  int scale_dtype;
  int32_t* zero_points;
  uint8_t* codes;

  Scales stored() const { return {scales, scale_dtype, zero_points, 4}; }
};

// Part of a block: elements [first, last) of a run, or rows [first, last) of a tile.
struct Piece {
  int64_t block, first, last;
};

inline int64_t extent(const Layout& layout, int64_t block) {
  if (layout.r == 0) return std::min(layout.c, layout.elements() - block * layout.c);
  return std::min(layout.r, layout.D - block / layout.across * layout.r);
}

// What has been seen of a block: the least and the largest as integers that are ordered as floats
// are, the largest magnitude's bits, how many elements, and the sums that a clip asks for.
struct Seen {
  int32_t low = INT32_MAX, high = INT32_MIN, magnitude = 0;
  int64_t count = 0;
  int64_t total = 0, squares = 0;

  void merge(const Seen& other) {
    low = std::min(low, other.low);
    high = std::max(high, other.high);
    magnitude = std::max(magnitude, other.magnitude);
    count += other.count;
    total += other.total;
    squares += other.squares;
  }
};

inline int32_t ordered(int32_t bits) { return bits ^ (bits >> 31 & 0x7FFFFFFF); }

struct Range {
  float low, high;
};

inline Range range_of(const Seen& seen) {
  if (seen.count == 0) return {0.0f, 0.0f};
  return {float_of(static_cast<uint32_t>(ordered(seen.low))),
          float_of(static_cast<uint32_t>(ordered(seen.high)))};
}

// e such that magnitude * 2^e lies in [2^15, 2^16).
inline int unit_exponent(float magnitude) {
  if (!(magnitude > 0.0f) || std::isinf(magnitude)) return 0;
  int exponent;
  std::frexp(static_cast<double>(magnitude), &exponent);
  return 16 - exponent;
}

inline float magnitude_of(Range range) { return std::max(std::fabs(range.low), std::fabs(range.high)); }

inline float divided(float value, float scale) {
  if (!(scale > 0.0f)) return 0.0f;
  return scale >= kTiny ? value * (1.0f / scale) : value / scale;
}

struct Step {
  float scale;
  int32_t zero;
};

inline Range zscored(Range range, const Seen& seen, int exponent, double z, bool is_signed) {
  const double total = static_cast<double>(seen.total), squares = static_cast<double>(seen.squares);
  const double n = static_cast<double>(seen.count);
  const double mean = total / std::max(n, 1.0);
  volatile double square = total * total;  // products are rounded by themselves
  const double variance = (squares - square / std::max(n, 1.0)) / std::max(n - 1.0, 1.0);
  volatile double reach = std::sqrt(std::max(variance, 0.0)) * z;
  const auto top = static_cast<float>(std::ldexp(mean + reach, -exponent));
  if (!is_signed) return {std::max(range.low, -top), std::min(range.high, top)};
  const auto bottom = static_cast<float>(std::ldexp(mean - reach, -exponent));
  return {std::min(std::max(range.low, bottom), range.high),
          std::max(std::min(range.high, top), range.low)};
}

// How many magnitudes of `count` lie above the bound.
inline int64_t rank_of(const Quantizing& job, int64_t count) {
  double above = job.clip_value;
  if (job.clip == SWK_CLIP_PERCENTILE) {
    above = static_cast<double>(count) -
            std::ceil(static_cast<double>(count) * job.clip_value / 100.0);
  }
  return std::max<int64_t>(
      0, static_cast<int64_t>(std::min(above, static_cast<double>(count - 1))));
}

// The scale of a range as it is stored, and its zero point.
Step step_of(Range range, const Quantizing& job);

}  // namespace swk

#define SWK_PACKING
#define SWK_SELF "block_quantize.cpp"
#include "each_isa.h"

namespace swk {

// The scale as it is stored. No block but one of zeros has scale 0.
static float stored(float scale, float magnitude, int scale_dtype) {
  if (magnitude == 0.0f) return 0.0f;
  if (scale_dtype == SWK_FLOAT16) {  // in this order of arguments a NaN stays
    scale = scalar::to_float<Float16>(scalar::from_float<Float16>(std::max(scale, kSmallestHalf)));
  }
  return std::max(scale, kSmallest);
}

Step step_of(Range range, const Quantizing& job) {
  const Layout& layout = job.layout;
  const float magnitude = magnitude_of(range);
  const float steps = static_cast<float>(layout.steps());
  if (layout.symmetric) return {stored(magnitude / steps, magnitude, job.scale_dtype), 0};
  const float span = range.high - range.low;
  const float least = magnitude * std::ldexp(1.0f, -job.zero_bits);
  const float scale =
      stored(span > 0.0f ? std::max(span / steps, least) : magnitude, magnitude, job.scale_dtype);
  const float zero = std::nearbyint(divided(range.low, scale));
  return {scale, std::isfinite(zero) ? -static_cast<int32_t>(zero) : 0};
}

namespace {

struct Kernels {
  int64_t (*quantize_runs)(const Quantizing&, int64_t, int64_t);
  void (*extremes)(const Quantizing&, const Piece&, Seen&);
  void (*sums)(const Quantizing&, const Piece&, int, Seen&);
  void (*errors)(const Quantizing&, const Piece&, const Step*, int, int64_t*);
  void (*magnitudes)(const Quantizing&, const Piece&, std::vector<uint32_t>&);
  void (*encode)(const Quantizing&, int64_t, int64_t);
  void (*store_scale)(const Quantizing&, int64_t, float);
};

template <class Type>
Kernels kernels_of(int isa) {
#define SWK_KERNEL(name) name<Type>
#define SWK_PICK(name) SWK_FOR_ISA(isa, SWK_KERNEL(name))
  return {SWK_PICK(quantize_runs), SWK_PICK(find_extremes), SWK_PICK(find_sums), SWK_PICK(find_errors),
          SWK_PICK(find_magnitudes), SWK_PICK(encode_range), SWK_FOR_ISA(isa, store_scale)};
#undef SWK_PICK
#undef SWK_KERNEL
}

// The pieces of a block, and how what they find becomes its range. `each(pieces, work)` calls work
// for the number of every piece.
template <class Each>
Range find_range(const Quantizing& job, const Kernels& run, const std::vector<Piece>& pieces,
                 const Each& each) {
  std::vector<Seen> parts(pieces.size());
  const auto merged = [&] {
    Seen all;
    for (const Seen& part : parts) all.merge(part);
    return all;
  };
  each(pieces.size(), [&](size_t i) { run.extremes(job, pieces[i], parts[i]); });
  Seen seen = merged();
  Range range = range_of(seen);
  if (job.clip == SWK_CLIP_NONE || seen.count == 0) return range;
  if (static_cast<uint32_t>(seen.magnitude) >= kInfinityBits) return range;
  const int exponent = unit_exponent(magnitude_of(range));
  if (job.clip == SWK_CLIP_ZSCORE || job.clip == SWK_CLIP_ZSCORE_SIGNED) {
    for (Seen& part : parts) part = Seen{};
    each(pieces.size(), [&](size_t i) { run.sums(job, pieces[i], exponent, parts[i]); });
    const Seen sums = merged();
    seen.total = sums.total;
    seen.squares = sums.squares;
    return zscored(range, seen, exponent, job.clip_value, job.clip == SWK_CLIP_ZSCORE_SIGNED);
  }
  if (job.clip == SWK_CLIP_SEARCH) {
    const auto count = static_cast<size_t>(job.factor_count);
    std::vector<Step> steps(count);
    for (size_t f = 0; f < count; ++f) {
      steps[f] = step_of({range.low * job.factors[f], range.high * job.factors[f]}, job);
    }
    std::vector<int64_t> errors(count * pieces.size());
    each(pieces.size(), [&](size_t i) {
      run.errors(job, pieces[i], steps.data(), exponent, errors.data() + i * count);
    });
    size_t best = 0;
    std::vector<double> sums(count);
    for (size_t f = 0; f < count; ++f) {
      int64_t sum = 0;
      for (size_t i = 0; i < pieces.size(); ++i) sum += errors[i * count + f];
      sums[f] = std::isfinite(steps[f].scale) ? static_cast<double>(sum) : HUGE_VAL;
      if (sums[f] < sums[best]) best = f;
    }
    return {range.low * job.factors[best], range.high * job.factors[best]};
  }
  std::vector<uint32_t> magnitudes;
  magnitudes.reserve(static_cast<size_t>(seen.count));
  for (const Piece& piece : pieces) run.magnitudes(job, piece, magnitudes);
  const auto at = magnitudes.begin() + rank_of(job, seen.count);
  std::nth_element(magnitudes.begin(), at, magnitudes.end(), std::greater<uint32_t>());
  const float bound = float_of(*at);
  return {std::max(range.low, -bound), std::min(range.high, bound)};
}

void finish(const Quantizing& job, const Kernels& run, int64_t block, Range range) {
  const Step step = step_of(range, job);
  run.store_scale(job, block, step.scale);
  if (job.zero_points) job.zero_points[block] = step.zero;
}

template <class Type>
void quantize(const Quantizing& job, bool given, int threads, int isa) {
  const Kernels run = kernels_of<Type>(isa);
  const Layout& layout = job.layout;
  const int64_t elements = layout.elements(), blocks = layout.blocks();
  const int64_t unit = layout.r == 0 ? 1 : std::max<int64_t>(1, layout.c);
  const int64_t size = layout.r == 0 ? layout.c : layout.r * layout.c;
  bool encoded = false;
  if (!given && size <= kPiece) {
    // Runs that end on whole bytes are encoded while they are in the cache.
    const int64_t group = std::max<int64_t>(1, kPiece / size);
    encoded = job.codes && layout.r == 0 && size % 2 == 0;
    std::atomic<bool> failed{false};
    run_tasks((blocks + group - 1) / group, threads, [&](int64_t task) {
      const int64_t last = std::min(blocks, (task + 1) * group);
      try {
        std::vector<Piece> piece(1);
        for (int64_t block = task * group; block < last; ++block) {
          if (encoded) block = run.quantize_runs(job, block, last);
          if (block == last) break;
          piece[0] = {block, 0, extent(layout, block)};
          finish(job, run, block, find_range(job, run, piece, [](size_t, const auto& work) {
                   work(size_t{0});
                 }));
          if (encoded) run.encode(job, block * size, std::min(elements, (block + 1) * size));
        }
      } catch (const std::bad_alloc&) {
        failed = true;
      }
    });
    if (failed) throw std::bad_alloc();
  } else if (!given) {
    const int64_t step = std::max<int64_t>(1, kPiece / unit);
    for (int64_t block = 0; block < blocks; ++block) {
      std::vector<Piece> pieces;
      for (int64_t first = 0; first < extent(layout, block); first += step) {
        pieces.push_back({block, first, std::min(extent(layout, block), first + step)});
      }
      finish(job, run, block, find_range(job, run, pieces, [&](size_t count, const auto& work) {
               run_tasks(static_cast<int64_t>(count), threads,
                         [&](int64_t i) { work(static_cast<size_t>(i)); });
             }));
    }
  }
  if (!job.codes || encoded) return;
  run_tasks((elements + kPiece - 1) / kPiece, threads, [&](int64_t task) {
    run.encode(job, task * kPiece, std::min(elements, (task + 1) * kPiece));
  });
}

}  // namespace
}  // namespace swk

int swk_cpu_block_quantize(const void* w, int dtype, int64_t D, int64_t H, int64_t block_rows,
                           int64_t block_columns, int code, int symmetric, int zero_bits, int clip,
                           double clip_value, const float* factors, int64_t factor_count,
                           const int32_t* positions, int64_t k, void* scales, int scale_dtype,
                           int32_t* zero_points, uint8_t* codes, int given, int threads, int isa) {
  using namespace swk;
  const Layout layout(D, H, block_rows, block_columns, code, symmetric);
  if (!layout.valid() || zero_bits < 0 || zero_bits > 24 || factor_count < 0) return SWK_BAD_SIZE;
  if (clip < SWK_CLIP_NONE || clip > SWK_CLIP_SEARCH) return SWK_BAD_SIZE;
  if (clip == SWK_CLIP_SEARCH && (!factors || factor_count == 0)) return SWK_BAD_SIZE;
  const int resolved = resolve_isa(isa);
  if (!resolved) return SWK_BAD_ISA;
  if (dtype < SWK_FLOAT32 || dtype > SWK_FLOAT16) return SWK_BAD_DTYPE;
  if (scale_dtype != SWK_FLOAT32 && scale_dtype != SWK_FLOAT16) return SWK_BAD_DTYPE;
  const Outliers outliers{positions, nullptr, SWK_FLOAT32, k};
  if (!outliers.valid(layout.elements())) return SWK_BAD_INDEX;
  if (layout.elements() == 0) return SWK_OK;
  if (!w || !scales || (!layout.symmetric && !zero_points)) return SWK_BAD_SIZE;
  if (codes) expect_writes(codes, layout.bytes() ? layout.elements() : layout.elements() / 2);
  const Quantizing job{w,       layout,       zero_bits, clip,   clip_value,
                       factors, factor_count, outliers,  scales, scale_dtype,
                       layout.symmetric ? nullptr : zero_points, codes};
  const auto run = dtype == SWK_FLOAT32    ? &quantize<Float32>
                   : dtype == SWK_BFLOAT16 ? &quantize<BFloat16>
                                           : &quantize<Float16>;
  try {
    run(job, given != 0, threads, resolved);
  } catch (const std::bad_alloc&) {
    return SWK_OUT_OF_MEMORY;
  }
  return SWK_OK;
}

#else  // once per instruction set

// Calls take(values, n) for the elements [begin, end) of the flattened matrix in float32, in spans
// of at most kSpan; of outliers nothing is seen.
template <class Type, class Take>
SWK_FN SWK_INLINE void for_kept(const Quantizing& job, int64_t begin, int64_t end,
                                const Take& take) {
  const auto* const w = static_cast<const typename Type::Bits*>(job.w);
  const Outliers& outliers = job.outliers;
  int64_t next = outliers.count ? outliers.from(begin) : 0;
  alignas(64) float values[kSpan];
  for (int64_t p = begin; p < end;) {
    int64_t stop = std::min(end, p + kSpan);
    const bool kept = next < outliers.count && outliers.positions[next] < stop;
    if (kept) stop = outliers.positions[next++];
    const int64_t n = stop - p;
    if constexpr (sizeof(typename Type::Bits) == 4) {
      take(static_cast<const float*>(job.w) + p, n);
    } else {
      for (int64_t i = 0; i < n; ++i) values[i] = to_float<Type>(w[p + i]);
      take(static_cast<const float*>(values), n);
    }
    p = stop + (kept ? 1 : 0);
  }
}

template <class Type, class Take>
SWK_FN SWK_INLINE void for_piece(const Quantizing& job, const Piece& piece, const Take& take) {
  const Layout& layout = job.layout;
  if (layout.r == 0) {
    const int64_t start = piece.block * layout.c;
    for_kept<Type>(job, start + piece.first, start + piece.last, take);
    return;
  }
  const int64_t top = piece.block / layout.across * layout.r;
  const int64_t left = piece.block % layout.across * layout.c;
  const int64_t width = std::min(layout.c, layout.H - left);
  for (int64_t row = top + piece.first; row < top + piece.last; ++row) {
    for_kept<Type>(job, row * layout.H + left, row * layout.H + left + width, take);
  }
}

// Fixed numbers of elements become straight vector code.
constexpr int64_t kStep = 64;

struct Extremes {
  int32_t low, high, magnitude;
};

SWK_FN SWK_INLINE void extend(Extremes& found, const int32_t* SWK_RESTRICT bits, int64_t n,
                              bool both) {
  int32_t magnitude = found.magnitude;
  for (int64_t i = 0; i < n; ++i) magnitude = std::max(magnitude, bits[i] & 0x7FFFFFFF);
  found.magnitude = magnitude;
  if (!both) return;
  int32_t low = found.low, high = found.high;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t order = bits[i] ^ (bits[i] >> 31 & 0x7FFFFFFF);
    low = std::min(low, order);
    high = std::max(high, order);
  }
  found.low = low;
  found.high = high;
}

// Of a symmetric code without a signed clip only the largest magnitude is looked for; low and high
// then become minus it and it.
template <class Type>
SWK_FN void find_extremes(const Quantizing& job, const Piece& piece, Seen& seen) {
  Extremes found{seen.low, seen.high, seen.magnitude};
  const bool both = !job.layout.symmetric || job.clip == SWK_CLIP_ZSCORE_SIGNED;
  int64_t count = 0;
  for_piece<Type>(job, piece, [&](const float* values, int64_t n) SWK_FN {
    const auto* const bits = reinterpret_cast<const int32_t*>(values);
    int64_t i = 0;
    for (; i + kStep <= n; i += kStep) extend(found, bits + i, kStep, both);
    extend(found, bits + i, n - i, both);
    count += n;
  });
  // Infinity and NaN decide the range, whichever side they are on, so that the scale shows them.
  if (!both || static_cast<uint32_t>(found.magnitude) >= kInfinityBits) {
    found.high = found.magnitude;
    found.low = ordered(found.magnitude | INT32_MIN);
  }
  seen.low = std::min(seen.low, found.low);
  seen.high = std::max(seen.high, found.high);
  seen.magnitude = std::max(seen.magnitude, found.magnitude);
  seen.count += count;
}

// Rounds to the nearest integer, ties to the even one, where |value| is below 2^22 (2^51).
SWK_FN SWK_INLINE float whole(float value) { return (value + 12582912.0f) - 12582912.0f; }
SWK_FN SWK_INLINE double whole(double value) {
  return (value + 6755399441055744.0) - 6755399441055744.0;
}

template <class Type>
SWK_FN void find_sums(const Quantizing& job, const Piece& piece, int exponent, Seen& seen) {
  const double unit = std::ldexp(1.0, exponent);
  const bool is_signed = job.clip == SWK_CLIP_ZSCORE_SIGNED;
  for_piece<Type>(job, piece, [&](const float* values, int64_t n) SWK_FN {
    int64_t total = 0, squares = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double value = is_signed ? values[i] : std::fabs(values[i]);
      const auto units = static_cast<int64_t>(whole(value * unit));
      total += units;
      squares += units * units;
    }
    seen.total += total;
    seen.squares += squares;
  });
}

template <class Type>
SWK_FN void find_magnitudes(const Quantizing& job, const Piece& piece,
                            std::vector<uint32_t>& magnitudes) {
  for_piece<Type>(job, piece, [&](const float* values, int64_t n) SWK_FN {
    for (int64_t i = 0; i < n; ++i) magnitudes.push_back(bits_of(values[i]) & 0x7FFFFFFF);
  });
}

// Of float32 values to codes, one a byte. The same operations, in the same order, on each.
struct Encoder {
  float scale, reciprocal, shift;
  int32_t zero;
  bool by_reciprocal;

  SWK_FN SWK_INLINE Encoder(float scale_, int32_t zero_)
      : scale(scale_),
        reciprocal(scale_ > 0.0f ? 1.0f / std::max(scale_, kTiny) : 0.0f),
        shift(static_cast<float>(zero_)),
        zero(zero_),
        by_reciprocal(scale_ >= kTiny || !(scale_ > 0.0f)) {}
};

SWK_FN SWK_INLINE float within(float value, float low, float high) {
  value = value < low ? low : value;
  return value > high ? high : value;
}

template <int kCode, bool kSymmetric>
SWK_FN SWK_INLINE uint8_t code_for(float ratio, const float* middles, float shift) {
  if constexpr (kCode == SWK_NF4 || kCode == SWK_FP4) {
    int place = 0;
    for (int i = 0; i < 15; ++i) place += ratio > middles[i] ? 1 : 0;  // a middle: to the lower
    return static_cast<uint8_t>(place);
  } else if constexpr (kSymmetric) {
    constexpr float kMost = kCode == SWK_INT8 ? 127.0f : 7.0f;
    const int q = static_cast<int>(whole(within(ratio, -kMost, kMost)));
    return static_cast<uint8_t>(kCode == SWK_INT8 ? q : q + 8);
  } else {
    constexpr float kFar = 2097152.0f;  // 2^21, beyond any zero point
    constexpr float kMost = kCode == SWK_INT8 ? 255.0f : 15.0f;
    return static_cast<uint8_t>(
        static_cast<int>(within(whole(within(ratio, -kFar, kFar)) + shift, 0.0f, kMost)));
  }
}

#ifdef SWK_ZMM
// 64 codes of 4 bits, one a byte, to 32 bytes.
SWK_FN SWK_INLINE void pack_64(__m512i codes, uint8_t* out) {
  const __m512i pairs = _mm512_maddubs_epi16(codes, _mm512_set1_epi16(0x0110));  // 16 and 1
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi16_epi8(pairs));
}

// Codes of NF4 for 16 ratios: sixteenths of [-1, 1] hold one middle each at most, so the sixteenth
// tells the code but for one comparison.
SWK_FN SWK_INLINE __m512i nf4_codes(__m512 ratio, __m512 middle0, __m512 middle1, __m512i base0,
                                    __m512i base1) {
  ratio = _mm512_min_ps(_mm512_max_ps(ratio, _mm512_set1_ps(-1.0f)), _mm512_set1_ps(1.0f));
  const __m512 scaled =
      _mm512_add_ps(_mm512_mul_ps(ratio, _mm512_set1_ps(16.0f)), _mm512_set1_ps(16.0f));
  const __m512i cell = _mm512_min_epi32(_mm512_cvttps_epi32(scaled), _mm512_set1_epi32(31));
  const __m512 middle = _mm512_permutex2var_ps(middle0, cell, middle1);
  const __m512i base = _mm512_permutex2var_epi32(base0, cell, base1);
  const __mmask16 above = _mm512_cmp_ps_mask(ratio, middle, _CMP_GT_OQ);
  return _mm512_mask_add_epi32(base, above, base, _mm512_set1_epi32(1));
}
#endif

template <int kCode, bool kSymmetric>
SWK_FN SWK_INLINE void encode_as(const float* SWK_RESTRICT values, int64_t n, const Encoder& by,
                                 const float* middles, uint8_t* SWK_RESTRICT codes) {
  int64_t i = 0;
  if (!by.by_reciprocal) {
    for (; i < n; ++i) {
      codes[i] = code_for<kCode, kSymmetric>(values[i] / by.scale, middles, by.shift);
    }
    return;
  }
  for (; i + kStep <= n; i += kStep) {
    for (int64_t j = 0; j < kStep; ++j) {
      codes[i + j] =
          code_for<kCode, kSymmetric>(values[i + j] * by.reciprocal, middles, by.shift);
    }
  }
  for (; i < n; ++i) {
    codes[i] = code_for<kCode, kSymmetric>(values[i] * by.reciprocal, middles, by.shift);
  }
}

// The middles between neighbours of a table, ascending.
SWK_FN SWK_INLINE void middles_of(const Layout& layout, float* middles) {
  const float* const table = layout.table();
  if (!table) return;
  float ascending[16];
  for (int i = 0; i < 16; ++i) {
    ascending[i] = table[layout.code == SWK_FP4 ? static_cast<int>(kFp4Order[i]) : i];
  }
  for (int i = 0; i < 15; ++i) middles[i] = (ascending[i + 1] + ascending[i]) / 2;
}

#ifdef SWK_ZMM
struct Nf4Cells {
  __m512 middle0, middle1;
  __m512i base0, base1;

  SWK_FN explicit Nf4Cells(const float* middles) {
    float middle[32];
    int32_t base[32];
    int place = 0;
    for (int cell = 0; cell < 32; ++cell) {
      const float end = static_cast<float>(cell + 1) / 16.0f - 1.0f;
      base[cell] = place;
      const bool holds = place < 15 && middles[place] < end;
      middle[cell] = holds ? middles[place] : 2.0f;
      place += holds ? 1 : 0;
    }
    middle0 = _mm512_loadu_ps(middle);
    middle1 = _mm512_loadu_ps(middle + 16);
    base0 = _mm512_loadu_si512(base);
    base1 = _mm512_loadu_si512(base + 16);
  }
};
#endif

SWK_FN SWK_NOINLINE void encode_run(const Layout& layout, const float* values, int64_t n,
                                  const Encoder& by, const float* middles, uint8_t* codes) {
  switch (layout.code) {
    case SWK_INT4:
      if (layout.symmetric) return encode_as<SWK_INT4, true>(values, n, by, middles, codes);
      return encode_as<SWK_INT4, false>(values, n, by, middles, codes);
    case SWK_INT8:
      if (layout.symmetric) return encode_as<SWK_INT8, true>(values, n, by, middles, codes);
      return encode_as<SWK_INT8, false>(values, n, by, middles, codes);
    case SWK_NF4: {
      int64_t i = 0;
#ifdef SWK_ZMM
      if (by.by_reciprocal && n >= 16) {
        const Nf4Cells cells(middles);
        const __m512 reciprocal = _mm512_set1_ps(by.reciprocal);
        for (; i + 16 <= n; i += 16) {
          const __m512 ratio = _mm512_mul_ps(_mm512_loadu_ps(values + i), reciprocal);
          const __m512i found =
              nf4_codes(ratio, cells.middle0, cells.middle1, cells.base0, cells.base1);
          _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm512_cvtepi32_epi8(found));
        }
      }
#endif
      return encode_as<SWK_NF4, true>(values + i, n - i, by, middles, codes + i);
    }
    default:
      encode_as<SWK_FP4, true>(values, n, by, middles, codes);
      for (int64_t i = 0; i < n; ++i) codes[i] = static_cast<uint8_t>(kFp4Order[codes[i]]);
  }
}

// The sum of squared errors in units of 2^-exponent, for each of the steps.
template <class Type>
SWK_FN void find_errors(const Quantizing& job, const Piece& piece, const Step* steps, int exponent,
                        int64_t* errors) {
  const double unit = std::ldexp(1.0, exponent);
  const Layout& layout = job.layout;
  float middles[15] = {};
  middles_of(layout, middles);
  for_piece<Type>(job, piece, [&](const float* values, int64_t n) SWK_FN {
    uint8_t codes[kSpan];
    for (int64_t f = 0; f < job.factor_count; ++f) {
      const Encoder by(steps[f].scale, steps[f].zero);
      const double scale = steps[f].scale;
      encode_run(layout, values, n, by, middles, codes);
      int64_t squares = 0;
      for (int64_t i = 0; i < n; ++i) {
        float value = layout.bytes() ? static_cast<float>(layout.symmetric
                                                              ? static_cast<int8_t>(codes[i])
                                                              : codes[i])
                                     : layout.value4(codes[i]);
        value -= by.shift;
        // The product is exact in double, so it is one rounding however it is compiled.
        const double error = static_cast<double>(values[i]) - static_cast<double>(value) * scale;
        const auto units = static_cast<int64_t>(whole(error * unit));
        squares += units * units;
      }
      errors[f] += squares;
    }
  });
}

SWK_FN void store_scale(const Quantizing& job, int64_t block, float scale) {
  if (job.scale_dtype == SWK_FLOAT32) {
    static_cast<float*>(job.scales)[block] = scale;
  } else {
    static_cast<int16_t*>(job.scales)[block] = from_float<Float16>(scale);
  }
}

// Two codes a byte, the first in the high half; an odd last one alone.
SWK_FN SWK_INLINE void pack(const uint8_t* SWK_RESTRICT codes, int64_t n,
                            uint8_t* SWK_RESTRICT out) {
  int64_t i = 0;
#ifdef SWK_ZMM
  for (; i + 32 <= n / 2; i += 32) pack_64(_mm512_loadu_si512(codes + 2 * i), out + i);
#endif
  for (; i < n / 2; ++i) out[i] = static_cast<uint8_t>(codes[2 * i] << 4 | codes[2 * i + 1]);
  if (n % 2) out[n / 2] = static_cast<uint8_t>(codes[n - 1] << 4);
}

// The codes of the elements [begin, end); begin is even, and end too unless it is the last.
template <class Type>
SWK_FN void encode_range(const Quantizing& job, int64_t begin, int64_t end) {
  const Layout& layout = job.layout;
  const Scales stored = job.stored();
  const auto* const w = static_cast<const typename Type::Bits*>(job.w);
  float middles[15] = {};
  middles_of(layout, middles);
  int64_t outlier = job.outliers.count ? job.outliers.from(begin) : 0;
  alignas(64) float converted[kSpan];
  alignas(64) uint8_t codes[kSpan];
  int64_t block = layout.block_of(begin), run_end = layout.run_end(begin);
  for (int64_t p = begin; p < end; p += kSpan) {
    const int64_t stop = std::min(end, p + kSpan);
    const float* values = converted;
    if constexpr (sizeof(typename Type::Bits) == 4) {
      values = static_cast<const float*>(job.w) + p;
    } else {
      for (int64_t i = p; i < stop; ++i) converted[i - p] = to_float<Type>(w[i]);
    }
    for (int64_t at = p; at < stop;) {
      if (at == run_end) {
        block = layout.r == 0 ? block + 1 : layout.block_of(at);
        run_end = layout.r == 0 ? std::min(layout.elements(), at + layout.c) : layout.run_end(at);
      }
      const int64_t until = std::min(stop, run_end);
      const Encoder by(scale_of(stored, block), stored.zero_point(block));
      encode_run(layout, values + (at - p), until - at, by, middles, codes + (at - p));
      at = until;
    }
    for (; outlier < job.outliers.count && job.outliers.positions[outlier] < stop; ++outlier) {
      codes[job.outliers.positions[outlier] - p] = static_cast<uint8_t>(layout.zero());
    }
    if (layout.bytes()) {
      std::memcpy(job.codes + p, codes, static_cast<size_t>(stop - p));
    } else {
      pack(codes, stop - p, job.codes + p / 2);
    }
  }
}

#ifdef SWK_ZMM
template <class Type>
SWK_FN SWK_INLINE __m512 load_16(const void* w, int64_t p) {
  const auto* const at = static_cast<const typename Type::Bits*>(w) + p;
  if constexpr (sizeof(typename Type::Bits) == 4) {
    return _mm512_loadu_ps(at);
  } else {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    if constexpr (Type::kInfinity == Float16::kInfinity) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
}

// The codes of 16 values as code_for() has them, in the lowest byte of each lane.
template <int kCode, bool kSymmetric>
SWK_FN SWK_INLINE __m512i codes_16(__m512 ratio, const Nf4Cells& cells, __m512 shift) {
  if constexpr (kCode == SWK_NF4) {
    return nf4_codes(ratio, cells.middle0, cells.middle1, cells.base0, cells.base1);
  }
  constexpr float kMost = kCode == SWK_INT8 ? 127.0f : 7.0f;
  const float bound = kSymmetric ? kMost : 2097152.0f;
  ratio = _mm512_min_ps(_mm512_max_ps(ratio, _mm512_set1_ps(-bound)), _mm512_set1_ps(bound));
  const __m512 magic = _mm512_set1_ps(12582912.0f);
  const __m512 rounded = _mm512_add_ps(ratio, magic);
  if constexpr (kSymmetric) {  // the lowest bits of the sum are the integer
    const __m512i bits = _mm512_castps_si512(rounded);
    if constexpr (kCode == SWK_INT8) return bits;
    return _mm512_and_si512(_mm512_add_epi32(bits, _mm512_set1_epi32(8)), _mm512_set1_epi32(15));
  }
  const __m512 code = _mm512_add_ps(_mm512_sub_ps(rounded, magic), shift);
  const __m512 most = _mm512_set1_ps(kCode == SWK_INT8 ? 255.0f : 15.0f);
  return _mm512_cvttps_epi32(_mm512_min_ps(_mm512_max_ps(code, _mm512_setzero_ps()), most));
}

template <class Type, int kCode, bool kSymmetric>
SWK_FN int64_t quantize_runs_as(const Quantizing& job, int64_t block, int64_t last) {
  const Layout& layout = job.layout;
  const int64_t n = layout.c;
  float middles[15] = {};
  middles_of(layout, middles);
  const Nf4Cells cells(middles);
  const __m512i magnitude_bits = _mm512_set1_epi32(0x7FFFFFFF);
  const Outliers& outliers = job.outliers;
  int64_t outlier = outliers.count ? outliers.from(block * n) : 0;
  for (; block < last; ++block) {
    const int64_t begin = block * n;
    if (begin + n > layout.elements()) return block;
    if (outlier < outliers.count && outliers.positions[outlier] < begin + n) return block;
    __m512i magnitude[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    __m512 low = _mm512_set1_ps(HUGE_VALF), high = _mm512_set1_ps(-HUGE_VALF);
    for (int64_t i = 0; i < n; i += 64) {
      for (int j = 0; j < 4; ++j) {
        const __m512 values = load_16<Type>(job.w, begin + i + 16 * j);
        const __m512i bits = _mm512_and_si512(_mm512_castps_si512(values), magnitude_bits);
        magnitude[j % 2] = _mm512_max_epi32(magnitude[j % 2], bits);
        if constexpr (!kSymmetric) {
          low = _mm512_min_ps(low, values);
          high = _mm512_max_ps(high, values);
        }
      }
    }
    const auto most = static_cast<uint32_t>(
        _mm512_reduce_max_epi32(_mm512_max_epi32(magnitude[0], magnitude[1])));
    if (most >= kInfinityBits) return block;
    Range range{-float_of(most), float_of(most)};
    if constexpr (!kSymmetric) range = {_mm512_reduce_min_ps(low), _mm512_reduce_max_ps(high)};
    const Step step = step_of(range, job);
    if (step.scale < kTiny) return block;
    store_scale(job, block, step.scale);
    if (job.zero_points) job.zero_points[block] = step.zero;
    const __m512 reciprocal = _mm512_set1_ps(1.0f / step.scale);
    const __m512 shift = _mm512_set1_ps(static_cast<float>(step.zero));
    for (int64_t i = 0; i < n; i += 64) {
      alignas(64) uint8_t codes[64];
      for (int j = 0; j < 4; ++j) {
        const __m512 ratio =
            _mm512_mul_ps(load_16<Type>(job.w, begin + i + 16 * j), reciprocal);
        _mm_store_si128(reinterpret_cast<__m128i*>(codes + 16 * j),
                        _mm512_cvtepi32_epi8(codes_16<kCode, kSymmetric>(ratio, cells, shift)));
      }
      if constexpr (kCode == SWK_INT8) {
        std::memcpy(job.codes + begin + i, codes, 64);
      } else {
        pack_64(_mm512_load_si512(codes), job.codes + (begin + i) / 2);
      }
    }
  }
  return block;
}
#endif

// Quantizes blocks from `block` on, runs of a multiple of 64 elements without a clip, in one pass,
// and returns the first that it leaves: one with outliers, the short last one, one of values that
// are too small or not finite.
template <class Type>
SWK_FN int64_t quantize_runs(const Quantizing& job, int64_t block, int64_t last) {
#ifdef SWK_ZMM
  const Layout& layout = job.layout;
  if (job.clip != SWK_CLIP_NONE || layout.c % 64 || layout.code == SWK_FP4) return block;
  if (layout.code == SWK_NF4) return quantize_runs_as<Type, SWK_NF4, true>(job, block, last);
  if (layout.code == SWK_INT8) {
    return layout.symmetric ? quantize_runs_as<Type, SWK_INT8, true>(job, block, last)
                            : quantize_runs_as<Type, SWK_INT8, false>(job, block, last);
  }
  return layout.symmetric ? quantize_runs_as<Type, SWK_INT4, true>(job, block, last)
                          : quantize_runs_as<Type, SWK_INT4, false>(job, block, last);
#else
  (void)job;
  (void)last;
  return block;
#endif
}

#endif
