"""Per-channel peaks in CUDA C++, see ``csrc/cuda/column_absmax.cu``."""

from __future__ import annotations

import torch

from swkernels.backends.native import DTYPES

from . import check, library


def supports(x: torch.Tensor) -> str | None:
    if x.device.type != "cuda":
        return f"it takes CUDA tensors, got {x.device}"
    if str(x.dtype) not in DTYPES:
        return f"it takes float32, bfloat16 and float16, got {x.dtype}"
    if x.layout != torch.strided:
        return f"it takes dense tensors, got {x.layout}"
    if x.shape[1] > 1 and x.stride(1) != 1 and x.numel():
        return f"channels must be adjacent, got strides {tuple(x.stride())}"
    return None


def column_absmax(
    x: torch.Tensor, keys: torch.Tensor, token_index: torch.Tensor | None, token_offset: int
) -> None:
    """Merge the peaks of ``x`` [T, C] into ``keys`` [C] in place. See ``swkernels.ops``."""
    with torch.cuda.device(x.device):
        status = library().swk_cuda_column_absmax(
            x.data_ptr(),
            DTYPES[str(x.dtype)],
            *x.shape,
            x.stride(0),
            keys.data_ptr(),
            None if token_index is None else token_index.data_ptr(),
            token_offset,
            torch.cuda.current_stream().cuda_stream,
        )
    check(status, f"column_absmax of {list(x.shape)} {x.dtype}")
