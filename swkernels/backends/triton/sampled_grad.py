"""The gradient of a weight at listed coordinates: k dot products over tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import choose, multiprocessors, refusal


@triton.jit(do_not_specialize=["T", "k", "tiles"])
def sampled_grad_kernel(
    dy,  # [T, D]
    x,  # [T, H]
    rows,  # [k] int32
    cols,  # [k] int32
    partial,  # [shares, k] float32
    T,
    D,
    H,
    k,
    stride_dt,
    stride_xt,
    tiles,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    places = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    row = tl.load(rows + places, mask=places < k, other=-1)
    col = tl.load(cols + places, mask=places < k, other=-1)
    # A coordinate outside the weight reads nothing, whatever its index.
    inside = ((row >= 0) & (row < D) & (col >= 0) & (col < H))[None, :]
    first = tl.program_id(1).to(tl.int64) * tiles * BLOCK_T
    sums = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    for tile in range(tiles):
        tokens = first + tile * BLOCK_T + tl.arange(0, BLOCK_T)
        mask = (tokens < T)[:, None] & inside
        g = tl.load(dy + tokens[:, None] * stride_dt + row[None, :], mask=mask, other=0.0)
        v = tl.load(x + tokens[:, None] * stride_xt + col[None, :], mask=mask, other=0.0)
        sums += g.to(tl.float32) * v.to(tl.float32)  # [BLOCK_T, BLOCK_K]
    out = partial + tl.program_id(1).to(tl.int64) * k + places
    tl.store(out, tl.sum(sums, axis=0), mask=places < k)


def supports(dy: torch.Tensor, x: torch.Tensor) -> str | None:
    """Return why the kernel cannot take the arguments, or None."""
    return refusal(dy) or refusal(x)


def sampled_grad(
    dy: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor
) -> torch.Tensor:
    """Return sum_t dy[t, rows[i]] x[t, cols[i]], float32 [k].

    Each share of the tokens writes sums of its own, which are added in one order: the result is
    the same every time.
    """
    T, k = len(x), len(rows)
    if T == 0 or k == 0:
        return torch.zeros(k, dtype=torch.float32, device=x.device)
    D, H = dy.shape[1], x.shape[1]
    config = dict(choose("sampled_grad", x, D, H, T).config)
    launch = {name: config.pop(name) for name in ("BLOCK_T", "BLOCK_K")}
    blocks, tiles = triton.cdiv(k, launch["BLOCK_K"]), triton.cdiv(T, launch["BLOCK_T"])
    wanted = max(1, config.pop("waves") * multiprocessors(x.device) // blocks)
    per_share = triton.cdiv(tiles, min(tiles, wanted))
    shares = triton.cdiv(tiles, per_share)
    partial = torch.empty((shares, k), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        sampled_grad_kernel[(blocks, shares)](
            dy, x, rows, cols, partial, T, D, H, k, dy.stride(0), x.stride(0), per_share,
            **launch, **config,
        )  # fmt: skip
    return partial[0] if shares == 1 else partial.sum(0)
