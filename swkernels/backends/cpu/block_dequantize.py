"""The values of a packed matrix in C++, see ``csrc/cpu/block_dequantize.cpp``."""

from __future__ import annotations

import torch

from swkernels.backends.plan import CODES

from . import NUMBERS, address, call


def supports(codes: torch.Tensor, plan, dtype: torch.dtype) -> str | None:
    if codes.device.type != "cpu":
        return f"it takes CPU tensors, got {codes.device}"
    if dtype not in NUMBERS:
        return f"it gives float32, bfloat16 and float16, not {dtype}"
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
    out = torch.empty(plan.rows, plan.columns, dtype=dtype)
    dequantize_rows(arguments(codes, scales, zero_points, positions, values, plan), 0, out)
    return out


def dequantize_rows(packed: tuple, first: int, out: torch.Tensor) -> None:
    """Write the rows of a packed matrix (see ``arguments``) from ``first`` on into ``out``."""
    begin = first * out.shape[1]
    call(
        "block_dequantize", *packed, begin, begin + out.numel(), out.data_ptr(),
        NUMBERS[out.dtype],
    )  # fmt: skip


def arguments(codes, scales, zero_points, positions, values, plan) -> tuple:
    """A packed matrix as functions of the library take it."""
    return (
        codes.data_ptr(), plan.rows, plan.columns, *plan.block, CODES.index(plan.code.name),
        plan.code.symmetric, scales.data_ptr(), NUMBERS[scales.dtype], address(zero_points),
        0 if zero_points is None else zero_points.itemsize, positions.data_ptr(),
        values.data_ptr(), NUMBERS[values.dtype], positions.shape[0],
    )  # fmt: skip
