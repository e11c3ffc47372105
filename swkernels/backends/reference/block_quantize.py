"""Block quantization, by definition."""

from __future__ import annotations

import torch

from swkernels.backends import blocks


def supports(w: torch.Tensor, plan) -> str | None:
    return None


def block_scales(
    w: torch.Tensor, plan, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the scales float32 [blocks] and the zero points int32 [blocks] or None.

    The elements at ``positions`` do not count.
    """
    values = blocks.to_blocks(w.float(), plan.block, 0.0)
    kept = torch.ones(plan.elements, dtype=torch.bool, device=w.device)
    kept[positions.long()] = False
    kept = blocks.to_blocks(kept.view(w.shape), plan.block, False)
    low, high = blocks.clipped_range(values, kept, plan)
    return blocks.scales(low, high, plan.code, plan.scale_dtype)


def block_encode(
    w: torch.Tensor,
    plan,
    positions: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
) -> torch.Tensor:
    """Return the packed codes, uint8 [plan.code_bytes], for scales as they are stored."""
    scale = blocks.spread(scales.float(), plan)
    zero = None if zero_points is None else blocks.spread(zero_points.to(torch.int32), plan)
    codes = blocks.encode(w.float(), scale, zero, plan.code).reshape(-1)
    codes[positions.long()] = plan.code.zero
    return blocks.pack(codes, plan.code)


def block_quantize(
    w: torch.Tensor, plan, positions: torch.Tensor, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return codes, scales in ``scale_dtype`` and zero points int32, in one call."""
    scales, zero_points = block_scales(w, plan, positions)
    scales = scales.to(scale_dtype)
    return block_encode(w, plan, positions, scales, zero_points), scales, zero_points
