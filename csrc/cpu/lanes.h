// The inner loops that kernels share, compiled once per instruction set (see each_isa.h; hence no
// include guard and no includes).

// Rows and channels per step. Loops over kBlock channels become straight vector code.
constexpr int kRows = kRowsPerStep;
constexpr int kBlock = 64;

// take_rows for at most kBlock channels.
template <class Type>
SWK_FN SWK_INLINE void take_block(const typename Type::Bits* const rows[kRows],
                                  typename Type::Bits* SWK_RESTRICT best,
                                  uint32_t* SWK_RESTRICT where, uint32_t first_row, int count) {
  using Bits = typename Type::Bits;
  constexpr Bits kMagnitude = Type::kMagnitude;

  Bits greater = 0, nan = 0;
  for (int i = 0; i < count; ++i) {
    Bits most = rows[0][i] & kMagnitude;
    for (int k = 1; k < kRows; ++k) {
      const Bits magnitude = rows[k][i] & kMagnitude;
      most = magnitude > most ? magnitude : most;
    }
    greater |= static_cast<Bits>(most > best[i] ? -1 : 0);
    nan |= static_cast<Bits>(most > Type::kInfinity ? -1 : 0);
  }
  if (!greater) return;

  if (nan) {  // payloads differ, and must not decide which of several NaNs counts
    for (int k = 0; k < kRows; ++k) {
      for (int i = 0; i < count; ++i) {
        const Bits magnitude = rows[k][i] & kMagnitude;
        if (magnitude <= best[i]) continue;
        best[i] = magnitude > Type::kInfinity ? kMagnitude : magnitude;
        where[i] = first_row + static_cast<uint32_t>(k);
      }
    }
    return;
  }

  for (int i = 0; i < count; ++i) {
    Bits most = rows[0][i] & kMagnitude;
    uint32_t row = 0;
    for (int k = 1; k < kRows; ++k) {
      const Bits magnitude = rows[k][i] & kMagnitude;
      row = magnitude > most ? static_cast<uint32_t>(k) : row;
      most = magnitude > most ? magnitude : most;
    }
    const bool replace = most > best[i];
    best[i] = replace ? most : best[i];
    where[i] = replace ? first_row + row : where[i];
  }
}

// Takes kRows rows of `width` channels into the state: the magnitude (`best`) and the row (`where`)
// of each channel's peak so far. Rows come in the order of their tokens and only a greater
// magnitude replaces one, so the first of equals stays. A NaN becomes the greatest value there is:
// nothing, no other NaN either, replaces it.
template <class Type>
SWK_FN void take_rows(const typename Type::Bits* const rows[kRows], typename Type::Bits* best,
                      uint32_t* where, uint32_t first_row, int64_t width) {
  const typename Type::Bits* at[kRows];
  for (int k = 0; k < kRows; ++k) at[k] = rows[k];
  int64_t c = 0;
  for (; c + kBlock <= width; c += kBlock) {
    take_block<Type>(at, best + c, where + c, first_row, kBlock);
    for (int k = 0; k < kRows; ++k) at[k] += kBlock;
  }
  take_block<Type>(at, best + c, where + c, first_row, static_cast<int>(width - c));
}
