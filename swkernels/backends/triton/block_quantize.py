"""Block quantization: one pass where a block fits a program, else one for ranges and one to pack.

What decides about a code is exact or one rounded operation after the other, so codes equal the
reference's. Ranges are found as integers, in whose order NaN lies outside infinity: they reach
the scales, where the caller looks for them. Sums behind a z-score are of integers too, and any
split of a block over programs gives the same.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from swkernels.backends import blocks
from swkernels.backends.plan import ZERO_POINTS, Code
from swkernels.backends.reference import block_quantize as by_definition

from .launch import choose, multiprocessors, refusal
from .packed import (
    EXACT,
    TINY,
    block_of,
    count_below,
    divide,
    find_listed,
    flat_block,
    geometry,
    nearest,
    power_of_two,
    shared_run,
)

_SMALLEST_HALF = tl.constexpr(blocks.SMALLEST_HALF)


# --- ranges ---


@triton.jit
def _tile(w, b, first, rest, blocks, N, D, H, r, c, across, TILES, COLUMNS, WIDTH: tl.constexpr):
    """WIDTH elements, from ``first`` on, of blocks b [R]: offsets, which there are, values."""
    near = tl.arange(0, WIDTH)
    j = (first + near).to(tl.int32)
    if COLUMNS:  # blocks are whole columns: neighbours in memory are of different blocks
        offsets = j[None, :] * H + b[:, None]
        inside = (j < D)[None, :] & (b < H)[:, None]
    elif TILES:
        down, right = j // c, j % c
        row = (b // across * r)[:, None] + down[None, :]
        column = (b % across * c)[:, None] + right[None, :]
        offsets = row * H + column
        inside = (row < D) & (column < H)
    else:
        offsets = b[:, None] * c + j[None, :]
        inside = (offsets.to(tl.uint32) < N) & (b < blocks)[:, None]
    inside &= (near < rest)[None, :]
    return offsets, inside, tl.load(w + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _listed_range(positions, k, b, blocks, first, stop, H, r, c, across, TILES, COLUMNS):
    """Where elements first to stop of blocks from b on may stand in the positions."""
    last = b + blocks - 1
    if COLUMNS:
        low, high = first * H, stop * H
    elif TILES:
        low = (b // across * r + first // c) * H
        high = (last // across * r + (stop - 1) // c + 1) * H
    else:
        low, high = b * c + first, last * c + stop
    return count_below(positions, k, low), count_below(positions, k, high)


@triton.jit
def _ordered(values):
    """Bits of float32, or such bits: as integers in the order of the values; its own inverse."""
    bits = values.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit(do_not_specialize=["k", "tiles"])
def block_ranges_kernel(
    w,  # [N]
    positions,  # [k] int32, ascending
    low,  # [parts, blocks] float32, out
    high,  # likewise
    N,
    D,
    H,
    r,
    c,
    across,
    size,
    blocks,
    k,
    tiles,
    TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
    LISTED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    first = tl.program_id(0) * BLOCKS
    b = first + tl.arange(0, BLOCKS)
    begin = tl.program_id(1).to(tl.int64) * tiles * WIDTH
    end = tl.minimum(begin + tiles * WIDTH, size)
    least = tl.full([BLOCKS, WIDTH], 0x7F800000, tl.int32)  # infinity, in order
    most = tl.full([BLOCKS, WIDTH], -0x7F800001, tl.int32)  # -infinity
    if LISTED:
        start, stop = _listed_range(
            positions, k, first.to(tl.int64), BLOCKS, begin, end, H, r, c, across, TILES, COLUMNS
        )
    for tile in range(tiles):
        at = begin + tile * WIDTH
        offsets, kept, values = _tile(
            w, b, at, end - at, blocks, N, D, H, r, c, across, TILES, COLUMNS, WIDTH
        )
        if LISTED:
            if stop > start:
                place, hit = find_listed(offsets, positions, start, stop)
                kept &= ~hit
        order = _ordered(values)
        least = tl.where(kept, tl.minimum(least, order), least)
        most = tl.where(kept, tl.maximum(most, order), most)
    out = tl.program_id(1).to(tl.int64) * blocks + b
    least, most = _ordered(tl.min(least, 1)), _ordered(tl.max(most, 1))
    tl.store(low + out, least.to(tl.float32, bitcast=True), mask=b < blocks)
    tl.store(high + out, most.to(tl.float32, bitcast=True), mask=b < blocks)


@triton.jit(do_not_specialize=["k", "tiles"])
def block_sums_kernel(
    w,  # [N]
    positions,  # [k] int32, ascending
    exponents,  # [blocks] int32
    sums,  # [3, parts, blocks] int64, out: of units, of their squares, of those that count
    N,
    D,
    H,
    r,
    c,
    across,
    size,
    blocks,
    k,
    tiles,
    TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
    LISTED: tl.constexpr,
    SIGNED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    first = tl.program_id(0) * BLOCKS
    b = first + tl.arange(0, BLOCKS)
    begin = tl.program_id(1).to(tl.int64) * tiles * WIDTH
    end = tl.minimum(begin + tiles * WIDTH, size)
    exponent = tl.load(exponents + b, mask=b < blocks, other=0)
    # In two steps, as neither 2^164 nor what lies below 2^-126 is a float32.
    half = exponent >> 1
    factor, rest = power_of_two(half)[:, None], power_of_two(exponent - half)[:, None]
    total = tl.zeros([BLOCKS, WIDTH], tl.int64)
    squares, count = total, tl.zeros([BLOCKS, WIDTH], tl.int32)
    if LISTED:
        start, stop = _listed_range(
            positions, k, first.to(tl.int64), BLOCKS, begin, end, H, r, c, across, TILES, COLUMNS
        )
    for tile in range(tiles):
        at = begin + tile * WIDTH
        offsets, kept, values = _tile(
            w, b, at, end - at, blocks, N, D, H, r, c, across, TILES, COLUMNS, WIDTH
        )
        if LISTED:
            if stop > start:
                place, hit = find_listed(offsets, positions, start, stop)
                kept &= ~hit
        values = values if SIGNED else tl.abs(values)
        units = tl.where(kept, nearest(values * factor * rest), 0).to(tl.int64)
        total += units
        squares += units * units
        count += kept.to(tl.int32)
    plane = tl.num_programs(1).to(tl.int64) * blocks
    out = sums + tl.program_id(1).to(tl.int64) * blocks + b
    tl.store(out, tl.sum(total, 1), mask=b < blocks)
    tl.store(out + plane, tl.sum(squares, 1), mask=b < blocks)
    tl.store(out + 2 * plane, tl.sum(count.to(tl.int64), 1), mask=b < blocks)


# --- codes ---


@triton.jit
def _codes(values, scale, zero, middles, STEPS, ZERO, TABLE, ORDER):
    """The codes int32 of values [R, C] for scales and zero points [R]."""
    ratio = divide(values, scale)
    if TABLE:
        # How many middles lie below, in four steps.
        place = tl.where(ratio > tl.load(middles + 7), 8, 0)
        for step in tl.static_range(3):
            middle = tl.load(middles + place + (4 >> step) - 1)
            place += tl.where(ratio > middle, 4 >> step, 0)
        if ORDER:
            place = ((ORDER >> (4 * place.to(tl.int64))) & 15).to(tl.int32)
        return place
    else:
        # Rounding keeps integers where they are and the rest in order, so bounds may come first.
        if zero is None:
            bounded = tl.minimum(tl.maximum(ratio, -STEPS), STEPS)
            return (nearest(bounded) + ZERO) & 255
        else:
            at = zero.to(tl.float32)[:, None]
            bounded = tl.minimum(tl.maximum(ratio, -at), STEPS - at)
            return nearest(bounded) + zero[:, None]


@triton.jit(do_not_specialize=["k"])
def block_encode_kernel(
    w,  # [N]
    positions,  # [k] int32, ascending
    scales,  # [blocks]
    zero_points,  # [blocks] or None
    middles,  # [15] float32
    codes,  # uint8, out
    N,
    H,
    r,
    c,
    across,
    k,
    TILES: tl.constexpr,
    BITS: tl.constexpr,
    STEPS: tl.constexpr,
    ZERO: tl.constexpr,
    TABLE: tl.constexpr,
    ORDER: tl.constexpr,
    LISTED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    base = tl.program_id(0).to(tl.int64) * BLOCK
    left = tl.minimum(N - base, BLOCK).to(tl.int32)
    first = tl.arange(0, BLOCK // GROUP) * GROUP
    local = first[:, None] + tl.arange(0, GROUP)[None, :]
    inside = local < left
    values = tl.load(w + base + local, mask=inside, other=0.0).to(tl.float32)
    block = block_of((base + first).to(tl.int32), H, r, c, across, TILES)
    scale = tl.load(scales + block, mask=first < left, other=0.0).to(tl.float32)
    zero = None
    if zero_points is not None:
        zero = tl.load(zero_points + block, mask=first < left, other=0).to(tl.int32)
    code = _codes(values, scale, zero, middles, STEPS, ZERO, TABLE, ORDER)
    if LISTED:
        start = count_below(positions, k, base)
        stop = count_below(positions, k, base + BLOCK)
        if stop > start:
            place, hit = find_listed((base + local).to(tl.int32), positions, start, stop)
            code = tl.where(hit, ZERO, code)
    if BITS == 4:
        code = tl.where(inside, code, 0)  # the half byte behind the end
        one, other = tl.split(tl.reshape(code, [BLOCK // 2, 2]))
        pair = tl.arange(0, BLOCK // 2)
        tl.store(codes + base // 2 + pair, (one << 4 | other).to(tl.uint8), mask=2 * pair < left)
    else:
        tl.store(codes + base + local, code.to(tl.uint8), mask=inside)


@triton.jit
def _at_least(values, bound):
    return tl.where(values < bound, bound, values)  # keeps NaN, unlike a maximum


@triton.jit
def _quotient(values, scale):
    """One float32 over another, elementwise, as ``backends.blocks.divide``."""
    usual, one = scale >= TINY, tl.full(scale.shape, 1.0, tl.float32)
    product = values * tl.div_rn(one, tl.where(usual, scale, one))
    quotient = tl.div_rn(values, tl.where(scale > 0, scale, one))
    return tl.where(usual, product, tl.where(scale > 0, quotient, 0.0))


@triton.jit(do_not_specialize=["k"])
def block_fused_kernel(
    w,  # [N]
    positions,  # [k] int32, ascending
    scales,  # [blocks], out
    zero_points,  # [blocks] int32 or None, out
    middles,  # [15] float32
    codes,  # uint8, out
    N,
    c,
    blocks,
    k,
    BITS: tl.constexpr,
    STEPS: tl.constexpr,
    ZERO: tl.constexpr,
    TABLE: tl.constexpr,
    ORDER: tl.constexpr,
    LEAST: tl.constexpr,
    LISTED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    base = tl.program_id(0).to(tl.int64) * BLOCKS * c
    left = tl.minimum(N - base, BLOCKS * c).to(tl.int32)
    rows, j = tl.arange(0, BLOCKS), tl.arange(0, WIDTH)
    local = rows[:, None] * c + j[None, :]
    inside = (local < left) & (j < c)[None, :]
    values = tl.load(w + base + local, mask=inside, other=0.0).to(tl.float32)
    kept = inside
    if LISTED:
        start = count_below(positions, k, base)
        stop = count_below(positions, k, base + BLOCKS * c)
        if stop > start:
            place, hit = find_listed((base + local).to(tl.int32), positions, start, stop)
            kept = inside & ~hit
    b = tl.program_id(0) * BLOCKS + rows

    half: tl.constexpr = scales.dtype.element_ty == tl.float16
    smallest = tl.full([BLOCKS], 1, tl.int32).to(tl.float32, bitcast=True)  # 2^-149
    zero = None
    bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    magnitude = tl.max(tl.where(kept, bits, 0), 1).to(tl.float32, bitcast=True)
    if zero_points is None:
        scale = tl.div_rn(magnitude, tl.full([BLOCKS], STEPS, tl.float32))
    else:
        order = _ordered(values)
        least = tl.min(tl.where(kept, order, 0x7F800000), 1)
        most = tl.max(tl.where(kept, order, -0x7F800001), 1)
        some = least <= most  # something counts
        low = tl.where(some, _ordered(least), 0).to(tl.float32, bitcast=True)
        high = tl.where(some, _ordered(most), 0).to(tl.float32, bitcast=True)
        span = high - low
        scale = _at_least(tl.div_rn(span, tl.full([BLOCKS], STEPS, tl.float32)), magnitude * LEAST)
        scale = tl.where(span > 0, scale, magnitude)
    if half:
        scale = _at_least(scale, _SMALLEST_HALF).to(tl.float16).to(tl.float32)
    scale = tl.where(magnitude == 0, 0.0, _at_least(scale, smallest))
    if zero_points is not None:
        zero = -nearest(_quotient(low, scale))
        tl.store(zero_points + b, zero, mask=b < blocks)
    tl.store(scales + b, scale.to(scales.dtype.element_ty), mask=b < blocks)

    code = _codes(values, scale, zero, middles, STEPS, ZERO, TABLE, ORDER)
    code = tl.where(kept, code, ZERO)
    if BITS == 4:
        code = tl.where(inside, code, 0)  # the half byte behind the end
        one, other = tl.split(tl.reshape(code, [BLOCKS, WIDTH // 2, 2]))
        pair = tl.arange(0, WIDTH // 2)
        there = (2 * pair < c)[None, :] & (rows[:, None] * c + 2 * pair[None, :] < left)
        # Blocks of an even length start on a byte.
        at = base // 2 + rows[:, None] * (c // 2) + pair[None, :]
        tl.store(codes + at, (one << 4 | other).to(tl.uint8), mask=there)
    else:
        tl.store(codes + base + local, code.to(tl.uint8), mask=inside)


# --- launches ---


def supports(w: torch.Tensor, plan) -> str | None:
    """Return why the kernels cannot take the arguments, or None."""
    return refusal(w)


def block_scales(
    w: torch.Tensor, plan, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the scales float32 [blocks] and the zero points int32 [blocks] or None.

    The elements at ``positions`` do not count. Clips by rank or by search are those of the
    reference, on this device.
    """
    clip = plan.clip
    if plan.elements == 0 or (clip is not None and not clip.by.startswith("zscore")):
        return by_definition.block_scales(w, plan, positions)
    low, high = _ranges(w, plan, positions)
    if clip is not None:
        low, high = _cut(w, plan, positions, low, high)
    return blocks.scales(low, high, plan.code, plan.scale_dtype)


def _ranges(w, plan, positions) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest value of each block, 0 where none counts."""
    grid, arguments, launch = _statistics(w, plan, positions, "ranges")
    low, high = torch.empty(2, grid[1], plan.blocks, device=w.device)
    with torch.cuda.device_of(w):
        block_ranges_kernel[grid](w, positions, low, high, **arguments, **launch)
    low, high = low.amin(0), high.amax(0)
    empty = low > high  # infinities, which nothing has replaced
    return low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0)


def _cut(w, plan, positions, low, high) -> tuple[torch.Tensor, torch.Tensor]:
    exponent = blocks.unit_exponent(low.abs().maximum(high.abs())).to(torch.int32)
    grid, arguments, launch = _statistics(w, plan, positions, "sums")
    sums = torch.empty(3, grid[1], plan.blocks, dtype=torch.int64, device=w.device)
    with torch.cuda.device_of(w):
        block_sums_kernel[grid](
            w, positions, exponent, sums, **arguments, SIGNED=plan.clip.by == "zscore_signed",
            **launch, **EXACT,
        )  # fmt: skip
    total, squares, count = sums.sum(1)
    cut = blocks.zscore_range(low, high, total, squares, count, exponent, plan.clip)
    finite = torch.isfinite(low) & torch.isfinite(high)  # or they tell the caller
    return torch.where(finite, cut[0], low), torch.where(finite, cut[1], high)


def _statistics(w, plan, positions, variant) -> tuple[tuple[int, int], dict, dict]:
    """Grid, arguments and configuration of a kernel that reads all of each block.

    Small blocks share a program; large ones are split, so that the device is full.
    """
    config = dict(choose("block_quantize", w, *w.shape, len(w), variant=variant).config)
    block, waves, count = config.pop("BLOCK"), config.pop("waves"), plan.blocks
    shape = geometry(plan)
    columns = plan.block == (plan.rows, 1)
    size = plan.block_elements
    if columns:
        together = min(128, block, triton.next_power_of_2(count))
    else:
        together = max(1, block // triton.next_power_of_2(size))
        together = min(together, triton.next_power_of_2(count))
    width = min(block // together, triton.next_power_of_2(size))
    across, steps = triton.cdiv(count, together), triton.cdiv(size, width)
    parts = max(1, min(steps, waves * multiprocessors(w.device) // across))
    tiles = triton.cdiv(steps, parts)
    arguments = {"N": plan.elements, "D": plan.rows, "size": size, "blocks": count}
    arguments |= {"k": len(positions), "tiles": tiles, **shape}
    config |= {"COLUMNS": columns, "LISTED": len(positions) > 0}
    return (across, triton.cdiv(steps, tiles)), arguments, config | {
        "WIDTH": width,
        "BLOCKS": together,
    }


def block_encode(
    w: torch.Tensor,
    plan,
    positions: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
) -> torch.Tensor:
    """Return the packed codes, uint8 [plan.code_bytes], for scales as they are stored."""
    codes = torch.empty(plan.code_bytes, dtype=torch.uint8, device=w.device)
    if plan.elements:
        config = choose("block_quantize", w, *w.shape, len(w), variant="encode").config
        with torch.cuda.device_of(w):
            block_encode_kernel[(triton.cdiv(plan.elements, config["BLOCK"]),)](
                w, positions, scales, zero_points, _middles(plan.code, w.device), codes,
                plan.elements, k=len(positions), LISTED=len(positions) > 0,
                GROUP=shared_run(plan, 64), **geometry(plan), **_constants(plan.code), **config,
                **EXACT,
            )  # fmt: skip
    return codes


def block_quantize(
    w: torch.Tensor, plan, positions: torch.Tensor, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return codes, scales in ``scale_dtype`` and zero points int32: in one pass if blocks fit."""
    config = _fused(w, plan)
    if config is None:
        scales, zero_points = block_scales(w, plan, positions)
        scales = scales.to(scale_dtype)
        return block_encode(w, plan, positions, scales, zero_points), scales, zero_points
    n, device = flat_block(plan), w.device
    codes = torch.empty(plan.code_bytes, dtype=torch.uint8, device=device)
    scales = torch.empty(plan.blocks, dtype=scale_dtype, device=device)
    zero_points = None
    if not plan.code.symmetric:
        zero_points = torch.empty(plan.blocks, dtype=torch.int32, device=device)
    with torch.cuda.device_of(w):
        block_fused_kernel[(triton.cdiv(plan.blocks, config["BLOCKS"]),)](
            w, positions, scales, zero_points, _middles(plan.code, device), codes,
            plan.elements, n, plan.blocks, len(positions), LISTED=len(positions) > 0,
            LEAST=2.0 ** -ZERO_POINTS[plan.scale_dtype][1], **_constants(plan.code), **config,
            **EXACT,
        )  # fmt: skip
    return codes, scales, zero_points


def _fused(w, plan) -> dict | None:
    """The configuration of the kernel for all in one pass, or None where it does not apply."""
    n = flat_block(plan)
    if plan.clip is not None or n is None or plan.elements == 0:
        return None
    if plan.code.bits == 4 and n % 2 and plan.blocks > 1:  # blocks share bytes
        return None
    config = dict(choose("block_quantize", w, *w.shape, n, variant="fused").config)
    width = max(2, triton.next_power_of_2(n))
    block = config.pop("BLOCK")
    if width > block:
        return None
    together = min(block // width, triton.next_power_of_2(plan.blocks))
    return config | {"WIDTH": width, "BLOCKS": together}


def _constants(code: Code) -> dict:
    order = 0
    if code.name == "fp4":
        order = sum(place << 4 * i for i, place in enumerate(code.order))
    shared = {"BITS": code.bits, "STEPS": code.steps, "ZERO": code.zero}
    return shared | {"TABLE": code.table is not None, "ORDER": order}


@cache
def _middles(code: Code, device: torch.device) -> torch.Tensor:
    """Between the values of a table, ascending; anything where the code has none."""
    if code.table is None:
        return torch.zeros(1, device=device)
    ordered = torch.tensor(code.table)[list(code.order)]
    return ((ordered[1:] + ordered[:-1]) / 2).to(device)
