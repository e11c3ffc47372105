// Which rows count, and in which order their tokens come.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../swkernels.h"

namespace swk {

// The rows of a matrix in the order of their tokens, those that do not count last.
class RowOrder {
 public:
  static constexpr int64_t kLastToken = 0xFFFFFFFE;  // so that no key of a token is 0

  // Throws std::bad_alloc; status() tells whether every token is in range.
  RowOrder(const int64_t* token_index, int64_t token_offset, int64_t T)
      : index_(token_index), offset_(token_offset), counted_(T) {
    const int64_t last = kLastToken - offset_;
    if (offset_ < 0 || T - 1 > kLastToken || (!index_ && T - 1 > last)) status_ = SWK_BAD_TOKEN;
    if (!index_ || status_ != SWK_OK) return;

    rows_.resize(static_cast<size_t>(T));
    for (int64_t row = 0; row < T; ++row) rows_[static_cast<size_t>(row)] = row;
    const auto counts = [this](int64_t row) { return index_[row] >= 0; };
    const auto earlier = [this](int64_t a, int64_t b) { return index_[a] < index_[b]; };
    const auto end = std::stable_partition(rows_.begin(), rows_.end(), counts);
    if (!std::is_sorted(rows_.begin(), end, earlier)) std::sort(rows_.begin(), end, earlier);
    counted_ = end - rows_.begin();
    if (counted_ > 0 && index_[end[-1]] > last) status_ = SWK_BAD_TOKEN;
  }

  int status() const { return status_; }
  int64_t counted() const { return counted_; }
  // Position to row; null stands for the order of the matrix.
  const int64_t* rows() const { return index_ ? rows_.data() : nullptr; }
  int64_t token(int64_t position) const {
    return offset_ + (index_ ? index_[rows_[static_cast<size_t>(position)]] : position);
  }

 private:
  const int64_t* index_;
  int64_t offset_;
  int64_t counted_;
  int status_ = SWK_OK;
  std::vector<int64_t> rows_;
};

}  // namespace swk
