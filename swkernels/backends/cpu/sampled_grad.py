"""The gradient of a weight at listed coordinates in C++, see ``csrc/cpu/sampled_grad.cpp``."""

from __future__ import annotations

import torch

from swkernels.backends.native import DTYPES

from . import call, refuse


def supports(dy: torch.Tensor, x: torch.Tensor) -> str | None:
    return refuse(dy, x)


def sampled_grad(
    dy: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor
) -> torch.Tensor:
    """Return sum_t dy[t, rows[i]] x[t, cols[i]], float32 [k]."""
    values = torch.empty(len(rows), dtype=torch.float32)
    call(
        "sampled_grad",
        dy.data_ptr(),
        DTYPES[str(dy.dtype)],
        dy.stride(0),
        x.data_ptr(),
        DTYPES[str(x.dtype)],
        x.stride(0),
        len(x),
        dy.shape[1],
        x.shape[1],
        rows.data_ptr(),
        cols.data_ptr(),
        len(rows),
        values.data_ptr(),
    )
    return values
