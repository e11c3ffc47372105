"""A linear layer over a packed weight in C++, see ``csrc/cpu/quant_linear.cpp``."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from swkernels import tuning

from . import NUMBERS, address, call, isa, refuse
from .block_dequantize import arguments, dequantize_rows


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
    packed = arguments(codes, scales, zero_points, positions, values, plan)
    T = x.shape[0]
    if T > 1:  # one token is never worth a weight that is written out
        dtype = str(x.dtype).removeprefix("torch.")
        config = tuning.lookup(
            "quant_linear", "cpu", plan.rows, plan.columns, T, dtype, architecture=isa()
        ).config
        if T > config[plan.code.name]:
            return _in_slabs(x, packed, bias, plan, config["slab_bytes"])
    y = torch.empty(T, plan.rows, dtype=x.dtype)
    if bias is not None:
        bias = bias.contiguous()
    call(
        "quant_linear", x.data_ptr(), NUMBERS[x.dtype], x.stride(0), T, *packed, address(bias),
        y.data_ptr(),
    )  # fmt: skip
    return y


def _in_slabs(x, packed, bias, plan, slab_bytes) -> torch.Tensor:
    """Dequantize as many rows as stay in a cache, and let the library multiply."""
    D, H = plan.rows, plan.columns
    rows = max(1, min(D, slab_bytes // max(1, H * x.itemsize)))
    y = torch.empty(len(x), D, dtype=x.dtype)
    slab = torch.empty(rows, H, dtype=x.dtype)
    for first in range(0, D, rows):
        last = min(D, first + rows)
        weight = slab[: last - first]
        dequantize_rows(packed, first, weight)
        y[:, first:last] = linear(x, weight, None if bias is None else bias[first:last])
    return y
