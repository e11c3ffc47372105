"""The contribution of a weight's deltas in C++, see ``csrc/cpu/sparse_linear.cpp``."""

from __future__ import annotations

import torch

from swkernels.backends.native import DTYPES

from . import call, refuse


def supports(x: torch.Tensor, y: torch.Tensor) -> str | None:
    return refuse(x, y)


def sparse_linear(
    x: torch.Tensor,
    y: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
    cols: torch.Tensor,
    row_starts: torch.Tensor,
) -> None:
    """Add values[i] x[t, cols[i]] to y[t, rows[i]] in place."""
    call(
        "sparse_linear",
        x.data_ptr(),
        DTYPES[str(x.dtype)],
        x.stride(0),
        y.data_ptr(),
        DTYPES[str(y.dtype)],
        y.stride(0),
        len(x),
        y.shape[1],
        x.shape[1],
        values.data_ptr(),
        rows.data_ptr(),
        cols.data_ptr(),
        len(rows),
    )
