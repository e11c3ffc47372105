"""Peaks: one int64 key per channel.

A key holds the bits of |v| as float32 in its high half and the complement of the token's index in
its low half: ``(bits(|v|) << 32) | (0xFFFFFFFF - token)``. So the largest key is the largest
magnitude, ties go to the earliest token, NaN (made canonical) beats infinity beats every number,
merging is ``max``, and 0 means that no token has been seen.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from swkernels.errors import InvalidInput

TOKEN_MASK = 0xFFFFFFFF
INFINITY_KEY = 0x7F800000 << 32


class Peaks(NamedTuple):
    """The peaks of C channels.

    Attributes:
        values: float32 [C], the largest |v| of each channel; 0 where no token was seen.
        tokens: int64 [C], the index of the token that holds it; -1 where no token was seen.
    """

    values: torch.Tensor
    tokens: torch.Tensor


def peaks(keys: torch.Tensor) -> Peaks:
    """Unpack int64 ``keys`` of any shape into magnitudes (float32) and token indices (int64)."""
    if keys.dtype != torch.int64:
        raise InvalidInput(f"keys must be int64, got {keys.dtype}")
    values = (keys >> 32).to(torch.int32).view(torch.float32)
    tokens = TOKEN_MASK - (keys & TOKEN_MASK)
    return Peaks(values, torch.where(keys == 0, -1, tokens))


def empty_keys(channels: int, device: torch.device | str | None = None) -> torch.Tensor:
    """Return the running state of ``channels`` channels before any token: int64 zeros [C]."""
    return torch.zeros(channels, dtype=torch.int64, device=device)


def token_index(mask: torch.Tensor) -> torch.Tensor:
    """Number the tokens that ``mask`` keeps, in row-major order; -1 where it is False.

    Padding does not take an index, so the keys of a batch do not depend on how it was padded.

    Args:
        mask: bool, any shape (True or non-zero: the token counts).

    Returns:
        int64, the shape of ``mask``.
    """
    kept = mask.bool()
    index = kept.flatten().cumsum(0) - 1
    return index.view(mask.shape).masked_fill(~kept, -1)
