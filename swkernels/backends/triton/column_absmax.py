"""Per-channel peaks of a [T, C] tensor in one read: the pass beside a library's GEMM."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import choose, refusal, split_rows
from .peaks import merge_keys, row_tokens, tile_keys


@triton.jit(do_not_specialize=["T", "tiles", "token_offset"])
def column_absmax_kernel(
    x,  # [T, C]
    keys,  # [C] int64
    token_index,  # [T] int64 or None
    T,
    C,
    stride_t,
    stride_c,
    tiles,
    token_offset,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (channels < C)[None, :]
    offsets = channels[None, :].to(tl.int64) * stride_c
    first = tl.program_id(1).to(tl.int64) * tiles * BLOCK_T
    # Running keys per element of the tile: rows are reduced across threads once, after the loop.
    best = tl.zeros([BLOCK_T, BLOCK_C], tl.int64)
    for tile in range(tiles):
        rows = first + tile * BLOCK_T + tl.arange(0, BLOCK_T)
        low, mask = row_tokens(rows, T, token_index, token_offset)
        # A row past the end reads the last row again; its mask is 0.
        values = tl.load(
            x + tl.minimum(rows, T - 1)[:, None] * stride_t + offsets, mask=inside, other=0.0
        )  # [BLOCK_T, BLOCK_C]
        best = tl.maximum(best, tile_keys(values, low[:, None], mask[:, None]))
    merge_keys(keys, channels, tl.max(best, axis=0), C)


def supports(x: torch.Tensor) -> str | None:
    """Return why the kernel cannot take `x`, or None."""
    return refusal(x)


def column_absmax(
    x: torch.Tensor, keys: torch.Tensor, token_index: torch.Tensor | None, token_offset: int
) -> None:
    """Merge the peaks of `x` [T, C] into `keys` [C] in place. Any strides."""
    T, C = x.shape
    if x.numel() == 0:
        return
    config = dict(choose("column_absmax", x, C, C, T).config)
    launch = {name: config.pop(name) for name in ("BLOCK_T", "BLOCK_C")}
    grid, tiles = split_rows(T, C, x.device, waves=config.pop("waves"), **launch)
    with torch.cuda.device_of(x):
        column_absmax_kernel[grid](
            x, keys, token_index, T, C, *x.stride(), tiles, token_offset, **launch, **config
        )
