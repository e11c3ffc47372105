"""The values of a packed matrix, by definition."""

from __future__ import annotations

import torch

from swkernels.backends import blocks


def supports(codes: torch.Tensor, plan, dtype: torch.dtype) -> str | None:
    return None


def block_dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    positions: torch.Tensor,
    values: torch.Tensor,
    plan,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the matrix [D, H] in ``dtype``."""
    w = blocks.decode(blocks.unpack(codes, plan.code, plan.elements), plan.code)
    w = w.view(plan.rows, plan.columns)
    if zero_points is not None:
        w = w - blocks.spread(zero_points.float(), plan)
    w = (w * blocks.spread(scales.float(), plan)).to(dtype)
    w.view(-1)[positions.long()] = values.to(dtype)
    return w
