"""What the kernels on packed matrices share: blocks, codes, outliers, exact divisions.

Flat positions are 32-bit, since a packed matrix has fewer than 2^31 elements; what lies beyond its
end wraps, and is masked. Kernels that divide or round are launched with ``EXACT``.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import triton
import triton.language as tl

from swkernels.backends.plan import Code

EXACT = {"enable_fp_fusion": False}  # a product and a sum are rounded one after the other
TINY = tl.constexpr(2.0**-126)  # as in backends.blocks
# 1.5 * 2^23: adding it rounds |v| < 2^22 to the nearest integer, ties to even, which then stands
# in the low bits.
_ROUNDER = tl.constexpr(12582912.0)
_ROUNDER_BITS = tl.constexpr(0x4B400000)


# --- blocks ---


@triton.jit
def block_of(index, H, r, c, across, TILES: tl.constexpr):
    """The block of a flat position; c is the length of a run where blocks are no tiles."""
    if TILES:
        row = index // H
        return row // r * across + (index - row * H) // c
    else:
        return index // c


def flat_block(plan) -> int | None:
    """The length of the runs that the blocks are, or None where they are tiles."""
    r, c = plan.block
    if r == 0:
        return c
    if c >= plan.columns:
        return r * plan.columns
    return c if r == 1 and plan.columns % c == 0 else None


def geometry(plan) -> dict:
    """The arguments of ``block_of``."""
    n = flat_block(plan)
    r, c = plan.block if n is None else (1, n)
    across = triton.cdiv(plan.columns, c)
    return {"H": plan.columns, "r": r, "c": c, "across": across, "TILES": n is None}


def row_geometry(plan) -> dict:
    """Likewise, with tiles wherever every row is cut alike: one division a row, one a column."""
    (r, c), H = plan.block, plan.columns
    if r == 0 and H % c == 0:
        r = 1
    elif r == 0 and c % H == 0:
        r, c = c // H, H
    return {"H": H, "r": max(r, 1), "c": c, "across": triton.cdiv(H, c), "TILES": r > 0}


def shared_run(plan, most: int) -> int:
    """The longest run, a power of two up to ``most``, that starts at a multiple of its length in
    the flattened matrix and lies in one block wherever it is."""
    if plan.blocks <= 1:
        return most
    n = flat_block(plan)
    return math.gcd(most, n) if n is not None else math.gcd(most, plan.block[1], plan.columns)


# --- outliers ---


@triton.jit
def count_below(positions, k, wanted):
    """How many of the k ascending positions are less than a scalar."""
    low = 0 * k
    n = k
    while n > 0:
        half = n // 2
        below = tl.load(positions + low + half) < wanted
        low = tl.where(below, low + half + 1, low)
        n = tl.where(below, n - half - 1, half)
    return low


@triton.jit
def find_listed(offsets, positions, start, stop):
    """For a tile of flat offsets: a place in positions[start:stop], which is not empty, and
    whether the offset stands there."""
    place = offsets * 0 + start
    n = stop - start
    while n > 1:
        half = n // 2
        place = tl.where(tl.load(positions + place + half) <= offsets, place + half, place)
        n -= half
    return place, tl.load(positions + place) == offsets


# --- codes ---


def constants(code: Code) -> dict:
    """What kernels that decode must know of a code when they are compiled."""
    return {"BITS": code.bits, "ZERO": code.zero, "TABLE": code.table is not None}


@cache
def table(code: Code, device: torch.device) -> torch.Tensor:
    """The table of a code [16] float32; anything where it has none."""
    return torch.tensor(code.table or [0.0], dtype=torch.float32, device=device)


@triton.jit
def bias_of(zero_points, block, mask, BITS: tl.constexpr, ZERO: tl.constexpr):
    """What ``value_of`` subtracts in each block, float32."""
    if zero_points is None:
        offset: tl.constexpr = ZERO if BITS == 4 else 128
        return tl.full(block.shape, offset, tl.float32)
    else:
        return tl.load(zero_points + block, mask=mask, other=0).to(tl.float32)


@triton.jit
def value_of(code, bias, values, SIGNED: tl.constexpr, TABLE: tl.constexpr, AT: tl.constexpr = 0):
    """What codes (int32), each AT bits further up, stand for before the scale; exact."""
    if TABLE:
        return tl.load(values + (code >> AT))
    else:
        # Under the exponent of 2^(23 - AT) bit AT is worth 1: neither a shift nor a conversion.
        bits = ((code ^ (128 << AT)) if SIGNED else code) | ((150 - AT) << 23)
        return bits.to(tl.float32, bitcast=True) - (bias + 2.0 ** (23 - AT))


# --- exact arithmetic, as in backends.blocks ---


@triton.jit
def nearest(values):
    """Integers next to |values| < 2^22, ties to even."""
    return (values + _ROUNDER).to(tl.int32, bitcast=True) - _ROUNDER_BITS


@triton.jit
def power_of_two(exponent):
    """2^exponent in float32 for integers from -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def divide(values, scale):
    """values [R, C] over scale [R], by the reciprocal where it is finite; 0 where scale is 0."""
    usual = scale >= TINY
    one = tl.full(scale.shape, 1.0, tl.float32)
    inverse = tl.where(usual, tl.div_rn(one, tl.where(usual, scale, one)), 0.0)
    ratio = values * inverse[:, None]
    small = (scale > 0) & (scale < TINY)
    if tl.max(small.to(tl.int32), 0) > 0:
        quotient = tl.div_rn(values, tl.where(small, scale, 1.0)[:, None])
        ratio = tl.where(small[:, None], quotient, ratio)
    return ratio
