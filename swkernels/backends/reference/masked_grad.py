"""A gradient zeroed or scaled at listed coordinates, by definition."""

from __future__ import annotations

import torch


def supports(grad: torch.Tensor) -> str | None:
    return None


def masked_grad(grad: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor, scale: float) -> None:
    """Multiply grad[rows[i], cols[i]] by scale in place; exactly 0 for scale 0."""
    if scale == 0:
        grad[rows, cols] = 0
    else:
        grad[rows, cols] *= scale
