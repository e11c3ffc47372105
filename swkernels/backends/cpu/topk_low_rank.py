"""The largest entries of products of low rank in C++, see ``csrc/cpu/topk_low_rank.cpp``."""

from __future__ import annotations

import torch

from . import call, refuse


def supports(B: torch.Tensor, A: torch.Tensor) -> str | None:
    device = torch.device("cpu")
    if B.device != device or B.dtype == torch.float64 or A.dtype == torch.float64:
        return refuse(B[:, :0], A[:, :0])
    return None


def topk_low_rank(factors, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (sums float64 [k], place int64 [k], module int64 [k]); place is row * H + column."""
    # 16-bit factors become float32 exactly; they are small.
    Bs = [B.float().contiguous() for B, _ in factors]
    As = [A.float().contiguous() for _, A in factors]
    sizes = [
        torch.tensor([tensor.data_ptr() for tensor in Bs]),
        torch.tensor([tensor.data_ptr() for tensor in As]),
        torch.tensor([len(B) for B in Bs]),
        torch.tensor([A.shape[1] for A in As]),
        torch.tensor([len(A) for A in As]),
    ]
    sums = torch.empty(k, dtype=torch.float64)
    place, module = (torch.empty(k, dtype=torch.int64) for _ in range(2))
    call(
        "topk_low_rank",
        *(size.data_ptr() for size in sizes),
        len(factors),
        k,
        sums.data_ptr(),
        place.data_ptr(),
        module.data_ptr(),
    )
    return sums, place, module
