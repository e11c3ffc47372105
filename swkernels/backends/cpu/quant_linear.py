"""A linear layer over a packed weight in C++, see ``csrc/cpu/quant_linear.cpp``."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from swkernels.backends.native import DTYPES

from . import address, call, refuse
from .block_dequantize import arguments, block_dequantize


def supports(x: torch.Tensor, plan) -> str | None:
    return refuse(x)


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
    if len(x) > 32:
        weight = block_dequantize(codes, scales, zero_points, positions, values, plan, x.dtype)
        return linear(x, weight, bias)
    y = torch.empty(len(x), plan.rows, dtype=x.dtype)
    packed = arguments(codes, scales, zero_points, positions, values, plan)
    if bias is not None:
        bias = bias.contiguous()
    call(
        "quant_linear", x.data_ptr(), DTYPES[str(x.dtype)], x.stride(0), len(x), *packed,
        address(bias), y.data_ptr(),
    )  # fmt: skip
    return y
