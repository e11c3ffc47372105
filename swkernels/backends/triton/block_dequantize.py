"""The values of a packed matrix: one pass, outliers in it.

A program has a run of the flattened matrix. Elements are grouped in runs that surely share a
block (``GROUP``, from the block size): one scale is looked up for each, not for each element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import DTYPES, choose, refusal
from .packed import (
    EXACT,
    bias_of,
    block_of,
    constants,
    count_below,
    find_listed,
    geometry,
    shared_run,
    table,
    value_of,
)


@triton.jit(do_not_specialize=["k"])
def block_dequantize_kernel(
    codes,  # uint8
    scales,  # [blocks]
    zero_points,  # [blocks] or None
    table,  # [16] float32
    positions,  # [k] int32, ascending
    values,  # [k]
    out,  # [N]
    N,
    H,
    r,
    c,
    across,
    k,
    TILES: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    TABLE: tl.constexpr,
    LISTED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    base = tl.program_id(0).to(tl.int64) * BLOCK
    left = tl.minimum(N - base, BLOCK).to(tl.int32)
    first = tl.arange(0, BLOCK // GROUP) * GROUP
    local = first[:, None] + tl.arange(0, GROUP)[None, :]
    inside = local < left
    block = block_of((base + first).to(tl.int32), H, r, c, across, TILES)
    scale = tl.load(scales + block, mask=first < left, other=0.0).to(tl.float32)
    bias = bias_of(zero_points, block, first < left, BITS, ZERO)
    if BITS == 4:
        pair = tl.arange(0, BLOCK // 2)
        byte = tl.load(codes + base // 2 + pair, mask=2 * pair < left, other=0).to(tl.int32)
        code = tl.reshape(tl.join(byte >> 4, byte & 15), [BLOCK // GROUP, GROUP])
    else:
        code = tl.load(codes + base + local, mask=inside, other=0).to(tl.int32)
    signed: tl.constexpr = BITS == 8 and zero_points is None
    w = value_of(code, bias[:, None], table, signed, TABLE) * scale[:, None]
    if LISTED:
        start = count_below(positions, k, base)
        stop = count_below(positions, k, base + BLOCK)
        if stop > start:
            place, hit = find_listed((base + local).to(tl.int32), positions, start, stop)
            w = tl.where(hit, tl.load(values + place).to(tl.float32), w)
    tl.store(out + base + local, w.to(out.dtype.element_ty), mask=inside)


def supports(codes: torch.Tensor, plan, dtype: torch.dtype) -> str | None:
    """Return why the kernel cannot take the arguments, or None."""
    if dtype not in DTYPES:
        return f"it writes float32, bfloat16 and float16, not {dtype}"
    return refusal(codes.new_empty(0, dtype=dtype))


def block_dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    positions: torch.Tensor,
    values: torch.Tensor,
    plan,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the matrix [D, H] in ``dtype``."""
    out = torch.empty(plan.rows, plan.columns, dtype=dtype, device=codes.device)
    if plan.elements == 0:
        return out
    config = choose("block_dequantize", out, *out.shape, len(out)).config
    with torch.cuda.device_of(out):
        block_dequantize_kernel[(triton.cdiv(plan.elements, config["BLOCK"]),)](
            codes, scales, zero_points, table(plan.code, codes.device), positions, values, out,
            plan.elements, k=len(positions), LISTED=len(positions) > 0,
            GROUP=shared_run(plan, 64), **geometry(plan), **constants(plan.code), **config, **EXACT,
        )  # fmt: skip
    return out
