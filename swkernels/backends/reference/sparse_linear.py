"""The contribution of a weight's deltas to a linear layer, by definition."""

from __future__ import annotations

import torch


def supports(x: torch.Tensor, y: torch.Tensor) -> str | None:
    return None


def sparse_linear(
    x: torch.Tensor,
    y: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
    cols: torch.Tensor,
    row_starts: torch.Tensor,
) -> None:
    """Add values[i] x[t, cols[i]] to y[t, rows[i]] in place, summed in values' dtype."""
    touched, place = rows.unique_consecutive(return_inverse=True)
    sums = y[:, touched].to(values.dtype)  # [T, R]
    sums.index_add_(1, place, x[:, cols].to(values.dtype) * values)
    y[:, touched] = sums.to(y.dtype)
