"""Per-channel peaks in C++, see ``csrc/cpu/column_absmax.cpp``."""

from __future__ import annotations

import torch

from swkernels.backends.native import DTYPES

from . import address, call, refuse


def supports(x: torch.Tensor) -> str | None:
    return refuse(x)


def column_absmax(
    x: torch.Tensor, keys: torch.Tensor, token_index: torch.Tensor | None, token_offset: int
) -> None:
    """Merge the peaks of ``x`` [T, C] into ``keys`` [C] in place. See ``swkernels.ops``."""
    call(
        "column_absmax",
        x.data_ptr(),
        DTYPES[str(x.dtype)],
        *x.shape,
        x.stride(0),
        keys.data_ptr(),
        address(token_index),
        token_offset,
    )
