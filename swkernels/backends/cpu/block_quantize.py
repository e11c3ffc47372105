"""Block quantization in C++, see ``csrc/cpu/block_quantize.cpp``."""

from __future__ import annotations

import ctypes

import torch

from swkernels.backends.plan import CLIPS, CODES, ZERO_POINTS

from . import NUMBERS, address, call, refuse


def supports(w: torch.Tensor, plan) -> str | None:
    return refuse(w)


def block_scales(
    w: torch.Tensor, plan, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the scales float32 [blocks] and the zero points int32 [blocks] or None."""
    half = plan.scale_dtype == "float16"
    scales, zero_points = _empty_scales(plan, torch.float16 if half else torch.float32)
    _call(w, plan, positions, scales, zero_points, None, given=False)
    return scales.float(), zero_points


def block_encode(
    w: torch.Tensor,
    plan,
    positions: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
) -> torch.Tensor:
    """Return the packed codes, uint8 [plan.code_bytes], for scales as they are stored."""
    codes = torch.empty(plan.code_bytes, dtype=torch.uint8)
    _call(w, plan, positions, scales, zero_points, codes, given=True)
    return codes


def block_quantize(
    w: torch.Tensor, plan, positions: torch.Tensor, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return codes, scales in ``scale_dtype`` and zero points int32, in one call."""
    scales, zero_points = _empty_scales(plan, scale_dtype)
    codes = torch.empty(plan.code_bytes, dtype=torch.uint8)
    _call(w, plan, positions, scales, zero_points, codes, given=False)
    return codes, scales, zero_points


def _empty_scales(plan, dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    zero_points = None if plan.code.symmetric else torch.empty(plan.blocks, dtype=torch.int32)
    return torch.empty(plan.blocks, dtype=dtype), zero_points


def _call(w, plan, positions, scales, zero_points, codes, *, given) -> None:
    clip = plan.clip
    factors = clip.factors if clip is not None and clip.by == "search" else ()
    listed = (ctypes.c_float * len(factors))(*factors)
    call(
        "block_quantize",
        w.data_ptr(),
        NUMBERS[w.dtype],
        plan.rows,
        plan.columns,
        *plan.block,
        CODES.index(plan.code.name),
        plan.code.symmetric,
        ZERO_POINTS[plan.scale_dtype][1],
        0 if clip is None else CLIPS.index(clip.by) + 1,
        0.0 if clip is None else float(clip.value),
        ctypes.addressof(listed),
        len(factors),
        positions.data_ptr(),
        len(positions),
        scales.data_ptr(),
        NUMBERS[scales.dtype],
        address(zero_points),
        address(codes),
        given,
    )
