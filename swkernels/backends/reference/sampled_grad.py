"""The gradient of a weight at listed coordinates, by definition."""

from __future__ import annotations

import torch

# The products of a chunk of coordinates over all tokens; this bounds them to 64 MiB in float32.
_CHUNK_ELEMENTS = 1 << 24


def supports(dy: torch.Tensor, x: torch.Tensor) -> str | None:
    return None


def sampled_grad(
    dy: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor
) -> torch.Tensor:
    """Return sum_t dy[t, rows[i]] x[t, cols[i]], [k]: float64 where an input is, else float32."""
    dtype = torch.float64 if torch.float64 in (dy.dtype, x.dtype) else torch.float32
    values = torch.empty(len(rows), dtype=dtype, device=x.device)
    step = max(1, _CHUNK_ELEMENTS // max(1, len(x)))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        products = dy[:, rows[part]].to(dtype) * x[:, cols[part]].to(dtype)  # [T, step]
        values[part] = products.sum(0)
    return values
