"""The contribution of a weight's deltas to a linear layer, added in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import choose, refusal


@triton.jit(do_not_specialize=["T", "R"])
def sparse_linear_kernel(
    x,  # [T, H]
    y,  # [T, D], in and out
    values,  # [k] float32
    rows,  # [k] int32, sorted
    cols,  # [k] int32
    row_starts,  # [R + 1] int32, where the run of each different row begins
    T,
    R,
    stride_xt,
    stride_yt,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tokens = (tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    runs = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    start = tl.load(row_starts + runs, mask=runs < R, other=0)
    end = tl.load(row_starts + runs + 1, mask=runs < R, other=0)
    row = tl.load(rows + start, mask=runs < R, other=0)
    mask = (tokens < T) & (runs < R)[None, :]
    pointers = y + tokens * stride_yt + row[None, :]
    sums = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_R]
    for step in range(tl.max(end - start)):
        place = start + step
        there = place < end
        value = tl.load(values + place, mask=there, other=0.0)
        col = tl.load(cols + place, mask=there, other=0)
        taken = (tokens < T) & there[None, :]
        v = tl.load(x + tokens * stride_xt + col[None, :], mask=taken, other=0.0)
        # Where nothing is taken 0 is added, also beside an infinite sum.
        sums += v.to(tl.float32) * value[None, :]
    tl.store(pointers, sums.to(y.dtype.element_ty), mask=mask)


def supports(x: torch.Tensor, y: torch.Tensor) -> str | None:
    """Return why the kernel cannot take the arguments, or None."""
    return refusal(x) or refusal(y)


def sparse_linear(
    x: torch.Tensor,
    y: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
    cols: torch.Tensor,
    row_starts: torch.Tensor,
) -> None:
    """Add values[i] x[t, cols[i]] to y[t, rows[i]] in place; rows sorted."""
    T, R = len(x), len(row_starts) - 1
    if T == 0 or R == 0:
        return
    config = dict(choose("sparse_linear", x, y.shape[1], x.shape[1], T).config)
    launch = {name: config.pop(name) for name in ("BLOCK_T", "BLOCK_R")}
    grid = triton.cdiv(T, launch["BLOCK_T"]), triton.cdiv(R, launch["BLOCK_R"])
    with torch.cuda.device_of(x):
        sparse_linear_kernel[grid](
            x, y, values, rows, cols, row_starts, T, R, x.stride(0), y.stride(0),
            **launch, **config,
        )  # fmt: skip
