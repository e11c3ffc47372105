"""A linear layer over a packed weight, by definition."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from .block_dequantize import block_dequantize


def supports(x: torch.Tensor, plan) -> str | None:
    return None


def quant_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    positions: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    plan,
) -> torch.Tensor:
    """Return x [T, H] times the transpose of the weight [D, H] in x's type, plus bias."""
    weight = block_dequantize(codes, scales, zero_points, positions, values, plan, x.dtype)
    return linear(x, weight, bias)
