"""Device code that every kernel with peaks shares: tokens of rows, keys of a tile, their merge.

A key is `(bits(|v| as float32) << 32) | (0xFFFFFFFF - token)`: the largest key is the largest
magnitude at its earliest token, and 0 means that nothing was seen. Magnitudes are compared as
integers. That orders NaN above infinity for free, keeps subnormal numbers whatever the target's
flush mode, and lets one integer `atomic_max` merge keys in any order with one result.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_tokens(rows, T, token_index, token_offset):
    """Low half of the keys of `rows` (uint32), and the mask that cuts their magnitudes out.

    Both are 0 for a row past the end and for a row left out (a negative `token_index`). 32 bits
    are enough for a token and take half the registers of the 64-bit index.
    """
    counts = rows < T
    if token_index is None:
        index = rows.to(tl.uint32)
    else:
        wide = tl.load(token_index + rows, mask=counts, other=-1)
        counts = wide >= 0
        index = wide.to(tl.uint32)
    low = (0xFFFFFFFF - token_offset.to(tl.int64)).to(tl.uint32) - index
    return tl.where(counts, low, 0), tl.where(counts, 0x7FFFFFFF, 0)


@triton.jit
def tile_keys(values, low, mask):
    """Keys of a tile; `low` and `mask` come from `row_tokens`, broadcastable to `values`.

    The AND that drops the sign also drops the rows that do not count: leaving rows out costs no
    instruction. One integer minimum folds all NaN into the smallest NaN pattern, so that the
    earliest NaN wins whatever its payload; `merge_keys` writes the canonical pattern.
    """
    bits = values.to(tl.float32).to(tl.int32, bitcast=True) & mask
    bits = tl.minimum(bits, 0x7F800001)
    return (bits.to(tl.int64) << 32) | low.to(tl.int64)


@triton.jit
def merge_keys(keys, channels, new, C):
    """keys[channels] = max(keys[channels], new), one 64-bit atomic per channel with news."""
    canonical = (new & 0xFFFFFFFF) | (0x7FC00000 << 32)
    new = tl.where(new >> 32 > 0x7F800000, canonical, new)
    tl.atomic_max(keys + channels, new, mask=(channels < C) & (new > 0), sem="relaxed")
