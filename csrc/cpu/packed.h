// What the kernels on packed matrices share: where blocks lie, what codes stand for, scales.

#pragma once

#include <algorithm>
#include <cstdint>

#include "../swkernels.h"
#include "dtypes.h"

namespace swk {

constexpr float kNf4[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};
constexpr float kFp4[16] = {
    0.0f,  0.0052083334885537624f,  0.6666666865348816f,  1.0f,  0.3333333432674408f,
    0.5f,  0.1666666716337204f,     0.25f,                0.0f,  -0.0052083334885537624f,
    -0.6666666865348816f, -1.0f,    -0.3333333432674408f, -0.5f, -0.1666666716337204f,
    -0.25f,
};

// A matrix [D, H] in blocks: runs of c elements of the flattened matrix where r is 0, else tiles
// of r rows and c columns, `across` of them side by side. Blocks are numbered in the order of
// their first elements.
struct Layout {
  int64_t D, H, r, c, across;
  int code;
  bool symmetric;

  Layout(int64_t rows, int64_t columns, int64_t block_rows, int64_t block_columns, int code_,
         int symmetric_)
      : D(rows),
        H(columns),
        r(block_rows),
        c(block_columns),
        across(block_columns > 0 ? (columns + block_columns - 1) / block_columns : 0),
        code(code_),
        symmetric(symmetric_ != 0) {}

  bool valid() const {
    return D >= 0 && H >= 0 && r >= 0 && c > 0 && (H == 0 || D <= INT32_MAX / H) &&
           code >= SWK_INT4 && code <= SWK_FP4 && (symmetric || !table());
  }
  int64_t elements() const { return D * H; }
  int64_t blocks() const {
    if (elements() == 0) return 0;
    return r == 0 ? (elements() + c - 1) / c : (D + r - 1) / r * across;
  }
  int64_t block_of(int64_t p) const { return r == 0 ? p / c : p / H / r * across + p % H / c; }
  // Where the adjacent elements end that lie in the block of p.
  int64_t run_end(int64_t p) const {
    if (r == 0) return std::min(elements(), (p / c + 1) * c);
    return p / H * H + std::min(H, (p % H / c + 1) * c);
  }

  bool bytes() const { return code == SWK_INT8; }
  const float* table() const {
    return code == SWK_NF4 ? kNf4 : code == SWK_FP4 ? kFp4 : nullptr;
  }
  // What the largest magnitude, or the whole range of an asymmetric code, is divided by.
  int steps() const {
    if (table()) return 1;
    return symmetric ? (bytes() ? 127 : 7) : (bytes() ? 255 : 15);
  }
  // The code of zero.
  int zero() const {
    if (code == SWK_NF4) return 7;
    return symmetric && code == SWK_INT4 ? 8 : 0;
  }
  // What a code of 4 bits stands for before zero point and scale.
  float value4(int code4) const {
    return table() ? table()[code4] : static_cast<float>(code4 - zero());
  }
};

// Scales in float32 or float16, zero points in 4 or 2 bytes or none at all.
struct Scales {
  const void* values;
  int dtype;
  const void* zero_points;
  int zero_bytes;

  bool valid() const {
    return (dtype == SWK_FLOAT32 || dtype == SWK_FLOAT16) &&
           (!zero_points || zero_bytes == 4 || zero_bytes == 2);
  }
  int32_t zero_point(int64_t block) const {
    if (!zero_points) return 0;
    return zero_bytes == 4 ? static_cast<const int32_t*>(zero_points)[block]
                           : static_cast<const int16_t*>(zero_points)[block];
  }
};

// What is kept exactly: ascending positions in the flattened matrix, and values of some type.
struct Outliers {
  const int32_t* positions;
  const void* values;
  int dtype;
  int64_t count;

  bool valid(int64_t elements) const {
    if (count < 0 || (count > 0 && !positions)) return false;
    for (int64_t i = 0; i < count; ++i) {
      if (positions[i] < (i ? positions[i - 1] + 1 : 0) || positions[i] >= elements) return false;
    }
    return true;
  }
  // The first one at or after p.
  int64_t from(int64_t p) const {
    return std::lower_bound(positions, positions + count, p,
                            [](int32_t position, int64_t value) { return position < value; }) -
           positions;
  }
};

}  // namespace swk
