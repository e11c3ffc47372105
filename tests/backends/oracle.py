"""Peaks by their definition, in numpy integers: shares nothing with the backends under test."""

from __future__ import annotations

import numpy as np
import torch


def expected_keys(
    x: torch.Tensor,
    keys: torch.Tensor | None = None,
    token_index: torch.Tensor | None = None,
    token_offset: int = 0,
) -> torch.Tensor:
    """Return max(keys, peaks of x [T, C]) as int64 [C]; x is float32, bfloat16 or float16."""
    tokens, channels = x.shape
    bits = x.float().contiguous().numpy().view(np.uint32).astype(np.int64) & 0x7FFFFFFF
    bits[bits > 0x7F800000] = 0x7FC00000
    index = np.arange(tokens) if token_index is None else token_index.numpy()
    rows = (bits << 32) | (0xFFFFFFFF - (token_offset + index))[:, None]
    start = np.zeros(channels, np.int64) if keys is None else keys.numpy().copy()
    return torch.from_numpy(np.vstack([start[None], rows[index >= 0]]).max(0))


def special_values(dtype: torch.dtype) -> torch.Tensor:
    """Return the values at which floats are awkward: zeros, denormals, limits, NaN payloads."""
    info = torch.finfo(dtype)
    plain = torch.tensor(
        [0.0, -0.0, info.tiny, info.smallest_normal / 2, -info.smallest_normal, info.max,
         info.min, float("inf"), -float("inf"), 1.0, -1.0, 1 + info.eps],
        dtype=torch.float64,
    ).to(dtype)  # fmt: skip
    # The smallest and the largest denormal, and NaNs: quiet, signalling, negative, full payload.
    if dtype == torch.float32:
        raw = torch.tensor(
            [1, 0x7FFFFF, 0x7FC00000, 0x7F800001, -0x7FFFFF, 0x7FFFFFFF, -1], dtype=torch.int32
        )
    else:
        infinity = 0x7F80 if dtype == torch.bfloat16 else 0x7C00
        denormal = 0x7F if dtype == torch.bfloat16 else 0x3FF
        raw = torch.tensor(
            [1, denormal, infinity + 1, infinity | 0x40, 0x7FFF, -1, infinity - 0x7FFF],
            dtype=torch.int16,
        )
    return torch.cat([plain, raw.view(dtype)])
