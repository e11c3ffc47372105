"""A gradient zeroed or scaled at listed coordinates in C++, see ``csrc/cpu/masked_grad.cpp``."""

from __future__ import annotations

import torch

from swkernels.backends.native import DTYPES

from . import call, refuse


def supports(grad: torch.Tensor) -> str | None:
    return refuse(grad)


def masked_grad(grad: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor, scale: float) -> None:
    """Multiply grad[rows[i], cols[i]] by scale in place; exactly 0 for scale 0."""
    call(
        "masked_grad",
        grad.data_ptr(),
        DTYPES[str(grad.dtype)],
        grad.stride(0),
        *grad.shape,
        rows.data_ptr(),
        cols.data_ptr(),
        len(rows),
        scale,
    )
