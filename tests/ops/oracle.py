"""The peaks, computed the slow and obvious way: Python numbers, one element at a time."""

from __future__ import annotations

import math
import struct

import torch

NAN_BITS = 0x7FC00000


def key(value: float, token: int) -> int:
    bits = NAN_BITS if math.isnan(value) else _float32_bits(abs(value))
    return (bits << 32) | (0xFFFFFFFF - token)


def _float32_bits(value: float) -> int:
    return struct.unpack("<i", struct.pack("<f", value))[0]


def column_absmax(x: torch.Tensor, index=None, offset: int = 0) -> torch.Tensor:
    """Keys [C] of x [T, C]; index: the token of each row, negative where it does not count."""
    rounded = x.detach().float()
    tokens = range(len(rounded)) if index is None else index.tolist()
    keys = [0] * x.shape[1]
    for row, token in zip(rounded.tolist(), tokens):
        if token < 0:
            continue
        for channel, value in enumerate(row):
            keys[channel] = max(keys[channel], key(value, token + offset))
    return torch.tensor(keys, dtype=torch.int64)
