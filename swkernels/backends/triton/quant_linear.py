"""x W^T + b of a packed weight: codes are read once and unpacked in registers.

``vector`` is for a token or a few: sums in registers, the columns split over programs where rows
alone do not fill the device. ``dot`` multiplies on the matrix units. Beyond what the tuning record
gives them, and for blocks that do not fit their tiles, the weight is unpacked for the library's
product. The codes at outliers count in the loop over H like any other; their share is taken away
again and the exact value's is added, so that the loop stays bare.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch.nn.functional import linear

from . import interpreted
from .block_dequantize import block_dequantize
from .launch import choose, multiprocessors, refusal
from .packed import (
    bias_of,
    block_of,
    constants,
    count_below,
    row_geometry,
    shared_run,
    table,
    value_of,
)


@triton.jit
def _listed(
    codes, scales, zero_points, table, positions, values, at, stop, H, r, c, across, TILES, BITS,
    ZERO, TABLE, TAKEN: tl.constexpr,
):  # fmt: skip
    """Of TAKEN outliers: row, column, -(what the code there gives), the exact value; [TAKEN]."""
    i = at + tl.arange(0, TAKEN)
    position = tl.load(positions + i, mask=i < stop, other=0)
    row = position // H
    block = block_of(position, H, r, c, across, TILES)
    if BITS == 4:
        byte = tl.load(codes + (position >> 1)).to(tl.int32)
        code = (byte >> (4 - 4 * (position & 1))) & 15
    else:
        code = tl.load(codes + position).to(tl.int32)
    bias = bias_of(zero_points, block, i < stop, BITS, ZERO)
    signed: tl.constexpr = BITS == 8 and zero_points is None
    decoded = value_of(code, bias, table, signed, TABLE) * tl.load(scales + block).to(tl.float32)
    value = tl.load(values + i, mask=i < stop, other=0.0).to(tl.float32)
    return tl.where(i < stop, row, -1), position - row * H, -decoded, value


@triton.jit
def _unpacked(words, bias, table, PLACE: tl.constexpr, BITS, SIGNED, TABLE):
    """The PLACE-th code of each word, less its bias. Only those of a high half are shifted."""
    # The first of two 4-bit codes has the high half of its byte.
    shift: tl.constexpr = (4 * PLACE) ^ 4 if BITS == 4 else 8 * PLACE
    low: tl.constexpr = shift % 16
    code = (words >> (shift - low)) & ((2**BITS - 1) << low)
    return value_of(code, bias, table, SIGNED, TABLE, low)


@triton.jit(do_not_specialize=["T", "k", "share"])
def quant_linear_vector_kernel(
    x,  # [T, H]
    codes,  # uint8 [D, H / elements a byte]
    words,  # the same memory, int32 [D, H / PER]
    scales,  # [blocks]
    zero_points,  # [blocks] or None
    table,  # [16] float32
    positions,  # [k] int32, ascending
    values,  # [k]
    bias,  # [D] or None
    y,  # [shares, T, D]
    T,
    D,
    H,
    r,
    c,
    across,
    k,
    share,  # words of a row that a program has
    stride_xt,
    TILES: tl.constexpr,
    RUN: tl.constexpr,  # c where blocks are no tiles: a division by a constant
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    TABLE: tl.constexpr,
    LISTED: tl.constexpr,
    TAKEN: tl.constexpr,
    PER: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    tokens, start_d = tl.arange(0, BLOCK_T), tl.program_id(0) * BLOCK_D
    rows = start_d + tl.arange(0, BLOCK_D)
    # A row past the end reads the last row again: its result is not stored.
    row = tl.minimum(rows, D - 1)
    blocks_above = row // r * across  # no compiler moves a division out of a loop
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, H // PER)
    signed: tl.constexpr = BITS == 8 and zero_points is None
    sums = tl.zeros([BLOCK_T, BLOCK_D, BLOCK_W], tl.float32)
    for first in range(begin, end, BLOCK_W):
        word = first + tl.arange(0, BLOCK_W)
        there = (word < end)[None, :]
        flat = row[:, None] * (H // PER) + word[None, :]
        packed = tl.load(words + flat, mask=there, other=0)  # [BLOCK_D, BLOCK_W]
        if TILES:
            block = blocks_above[:, None] + (word * PER // c)[None, :]
        else:
            block = flat * PER // RUN
        scale = tl.load(scales + block, mask=there, other=0.0).to(tl.float32)
        offset = bias_of(zero_points, block, there, BITS, ZERO)
        at = x + tokens.to(tl.int64)[:, None] * stride_xt + (word * PER)[None, :]
        part = tl.zeros([BLOCK_T, BLOCK_D, BLOCK_W], tl.float32)
        for place in tl.static_range(PER):
            weight = _unpacked(packed, offset, table, place, BITS, signed, TABLE)
            column = tl.load(at + place, mask=(tokens < T)[:, None] & there, other=0.0)
            part += weight[None, :, :] * column.to(tl.float32)[:, None, :]
        sums += part * scale[None, :, :]
    out = tl.sum(sums, 2)  # [BLOCK_T, BLOCK_D]
    if LISTED:
        start = count_below(positions, k, start_d.to(tl.int64) * H)
        stop = count_below(positions, k, (start_d.to(tl.int64) + BLOCK_D) * H)
        for i in range(start, stop, TAKEN):
            listed, column, less, value = _listed(
                codes, scales, zero_points, table, positions, values, i, stop, H, r, c, across,
                TILES, BITS, ZERO, TABLE, TAKEN,
            )  # fmt: skip
            mine = (column >= begin * PER) & (column < end * PER) & (listed >= 0)
            at = x + tokens.to(tl.int64)[:, None] * stride_xt + column[None, :]
            taken = tl.load(at, mask=(tokens < T)[:, None] & mine[None, :], other=0.0)
            hit = (rows[:, None] == listed[None, :])[None, :, :]
            taken = taken.to(tl.float32)[:, None, :]  # [BLOCK_T, 1, TAKEN]
            out += tl.sum(tl.where(hit, taken * less[None, None, :], 0.0), 2)
            out += tl.sum(tl.where(hit, taken * value[None, None, :], 0.0), 2)
    if bias is not None:
        added = tl.load(bias + row).to(tl.float32)
        out += tl.where(tl.program_id(1) == 0, added, 0.0)[None, :]
    to = y + (tl.program_id(1).to(tl.int64) * T + tokens.to(tl.int64)[:, None]) * D + rows[None, :]
    inside = (tokens < T)[:, None] & (rows < D)[None, :]
    tl.store(to, out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "k"])
def quant_linear_dot_kernel(
    x,  # [T, H]
    codes,  # uint8 [D, H / elements a byte]
    scales,  # [blocks]
    zero_points,  # [blocks] or None
    table,  # [16] float32
    positions,  # [k] int32, ascending
    values,  # [k]
    bias,  # [D] or None
    y,  # [T, D]
    T,
    D,
    H,
    r,
    c,
    across,
    k,
    stride_xt,
    TILES: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    TABLE: tl.constexpr,
    LISTED: tl.constexpr,
    TAKEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    start_d = tl.program_id(0) * BLOCK_D
    tokens = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    rows = start_d + tl.arange(0, BLOCK_D)
    # Rows past the end read the last row again: their results are not stored.
    row, token = tl.minimum(rows, D - 1), tl.minimum(tokens, T - 1).to(tl.int64)
    blocks_above = row // r * across
    signed: tl.constexpr = BITS == 8 and zero_points is None
    dtype: tl.constexpr = x.dtype.element_ty
    near = tl.arange(0, BLOCK_H)
    sums = tl.zeros([BLOCK_D, BLOCK_T], tl.float32)
    at_x = x + token[:, None] * stride_xt + near[None, :]
    for h in range(0, H, BLOCK_H):
        flat = row * H + h  # BLOCK_H elements from here on share a block
        if TILES:
            block = blocks_above + h // c
        else:
            block = flat // c
        scale = tl.load(scales + block).to(tl.float32)[:, None]
        offset = bias_of(zero_points, block, row >= 0, BITS, ZERO)[:, None]
        if BITS == 4:
            pair = tl.arange(0, BLOCK_H // 2)
            byte = tl.load(codes + (flat // 2)[:, None] + pair[None, :]).to(tl.int32)
            code = tl.reshape(tl.join(byte >> 4, byte & 15), [BLOCK_D, BLOCK_H])
        else:
            code = tl.load(codes + flat[:, None] + near[None, :]).to(tl.int32)
        weight = (value_of(code, offset, table, signed, TABLE) * scale).to(dtype)
        tile = tl.load(at_x + h)  # [BLOCK_T, BLOCK_H]
        sums = tl.dot(weight, tile.T, sums, input_precision="ieee")
    if LISTED:
        start = count_below(positions, k, start_d.to(tl.int64) * H)
        stop = count_below(positions, k, (start_d.to(tl.int64) + BLOCK_D) * H)
        for i in range(start, stop, TAKEN):
            listed, column, less, value = _listed(
                codes, scales, zero_points, table, positions, values, i, stop, H, r, c, across,
                TILES, BITS, ZERO, TABLE, TAKEN,
            )  # fmt: skip
            taken = tl.load(x + token[:, None] * stride_xt + column[None, :])  # [BLOCK_T, TAKEN]
            hit = rows[:, None] == listed[None, :]  # [BLOCK_D, TAKEN]
            less = tl.where(hit, less[None, :], 0.0).to(dtype)
            sums = tl.dot(less, taken.T, sums, input_precision="ieee")
            value = tl.where(hit, value[None, :], 0.0).to(dtype)
            sums = tl.dot(value, taken.T, sums, input_precision="ieee")
    if bias is not None:
        sums += tl.load(bias + row).to(tl.float32)[:, None]
    to = y + tokens.to(tl.int64)[:, None] * D + rows[None, :]
    tl.store(to, sums.to(dtype).T, mask=(tokens < T)[:, None] & (rows < D)[None, :])


def supports(x: torch.Tensor, plan) -> str | None:
    """Return why the backend cannot take the arguments, or None."""
    return refusal(x)


def quant_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    positions: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    plan,
    *,
    variant: str | None = None,
) -> torch.Tensor:
    """Return x [T, H] times the transpose of the weight [D, H] in x's type, plus bias.

    ``variant`` is "vector", "dot" or "dequantize"; None follows the tuning record of this device,
    shape and number of tokens. Where blocks do not fit a kernel's tiles it is "dequantize".
    """
    packed = codes, scales, zero_points, positions, values
    T = len(x)
    if variant is None:
        choice = choose("quant_linear", x, plan.rows, plan.columns, T)
        variant = choice.variant
        if T > choice.config.get("tokens", T):  # more than the kernel's registers hold
            variant = choice.config["beyond"]
    if 0 not in (T, plan.elements):
        x = x if x.stride(1) == 1 else x.contiguous()
        bias = bias if bias is None else bias.contiguous()
        if variant == "vector" and _words_fit(codes, plan):
            return _vector(x, packed, bias, plan)
        if variant == "dot" and _runs_fit(x, plan):
            return _dot(x, packed, bias, plan)
    return linear(x, block_dequantize(*packed, plan, x.dtype), bias)


def _words_fit(codes, plan) -> bool:
    """Whether rows are whole int32 words, each of one block."""
    per_word = 32 // plan.code.bits
    aligned = codes.data_ptr() % 4 == 0 and plan.columns % per_word == 0
    return aligned and shared_run(plan, per_word) == per_word


def _runs_fit(x, plan) -> bool:
    """Whether rows are whole runs of one block each that a tl.dot can take."""
    if interpreted() and x.dtype == torch.bfloat16:  # which it cannot multiply
        return False
    return _run(plan, 32) == 32


def _run(plan, most: int) -> int:
    return math.gcd(shared_run(plan, most), plan.columns)


def _vector(x, packed, bias, plan) -> torch.Tensor:
    """Each share of the columns writes sums of its own, which are added in one order."""
    (T, H), D = x.shape, plan.rows
    config = dict(choose("quant_linear", x, D, H, T, variant="vector").config)
    waves = config.pop("waves")
    for name in ("tokens", "beyond"):
        config.pop(name, None)
    per_word = 32 // plan.code.bits
    across, steps = triton.cdiv(D, config["BLOCK_D"]), triton.cdiv(H // per_word, config["BLOCK_W"])
    shares = max(1, min(steps, waves * multiprocessors(x.device) // across))
    share = triton.cdiv(steps, shares) * config["BLOCK_W"]
    shares = triton.cdiv(H // per_word, share)
    dtype = x.dtype if shares == 1 else torch.float32
    y = torch.empty(shares, T, D, dtype=dtype, device=x.device)
    codes, positions, cut = packed[0], packed[3], row_geometry(plan)
    with torch.cuda.device_of(x):
        quant_linear_vector_kernel[(across, shares)](
            x, codes, codes.view(-1)[: plan.code_bytes].view(torch.int32), *packed[1:3],
            table(plan.code, x.device), *packed[3:], bias, y, T, D, k=len(positions), share=share,
            stride_xt=x.stride(0), LISTED=len(positions) > 0, PER=per_word,
            BLOCK_T=triton.next_power_of_2(T), RUN=0 if cut["TILES"] else cut["c"], **cut,
            **constants(plan.code), **config,
        )  # fmt: skip
    return y[0] if shares == 1 else y.sum(0).to(x.dtype)


def _dot(x, packed, bias, plan) -> torch.Tensor:
    (T, H), D = x.shape, plan.rows
    config = dict(choose("quant_linear", x, D, H, T, variant="dot").config)
    config["BLOCK_H"] = _run(plan, config["BLOCK_H"])
    y = torch.empty(T, D, dtype=x.dtype, device=x.device)
    grid = triton.cdiv(D, config["BLOCK_D"]), triton.cdiv(T, config["BLOCK_T"])
    with torch.cuda.device_of(x):
        quant_linear_dot_kernel[grid](
            x, *packed[:3], table(plan.code, x.device), *packed[3:], bias, y, T, D,
            k=len(packed[3]), stride_xt=x.stride(0), LISTED=len(packed[3]) > 0,
            **row_geometry(plan), **constants(plan.code), **config,
        )  # fmt: skip
    return y
