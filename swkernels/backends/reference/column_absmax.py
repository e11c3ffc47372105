"""Per-channel peaks, by definition."""

from __future__ import annotations

import torch

NAN_BITS = 0x7FC00000
TOKEN_MASK = 0xFFFFFFFF

# The keys of a chunk take 8 bytes an element; this bounds them to 32 MiB.
_CHUNK_ELEMENTS = 1 << 22


def supports(x: torch.Tensor) -> str | None:
    return None


def column_absmax(
    x: torch.Tensor, keys: torch.Tensor, token_index: torch.Tensor | None, token_offset: int
) -> None:
    """Merge the peaks of ``x`` [T, C] into ``keys`` [C] in place. See ``swkernels.ops``."""
    tokens, channels = x.shape
    if channels == 0:
        return
    step = max(1, _CHUNK_ELEMENTS // channels)
    for start in range(0, tokens, step):
        rows = x[start : start + step]
        if token_index is None:
            index = torch.arange(start, start + rows.shape[0], device=x.device)
        else:
            index = token_index[start : start + step]
        peaks = _row_keys(rows, index, token_offset).amax(0)  # [C]
        torch.maximum(keys, peaks, out=keys)


def _row_keys(rows: torch.Tensor, index: torch.Tensor, token_offset: int) -> torch.Tensor:
    magnitude = rows.abs().float()
    bits = magnitude.view(torch.int32).to(torch.int64)
    bits = bits.masked_fill(magnitude.isnan(), NAN_BITS)
    low = TOKEN_MASK - (index + token_offset)  # [T]
    keys = (bits << 32) | low[:, None]  # [T, C]
    return keys.masked_fill((index < 0)[:, None], 0)
