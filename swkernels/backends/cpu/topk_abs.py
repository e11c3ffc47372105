"""The largest entries of several matrices in C++, see ``csrc/cpu/topk_abs.cpp``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from swkernels.backends.reference.topk_abs import nan_error
from swkernels.errors import InvalidInput

from . import NUMBERS, call

_NUMBERS = NUMBERS | {torch.float8_e4m3fn: 3, torch.float8_e5m2: 4}  # enum swk_dtype


def supports(*matrices: torch.Tensor) -> str | None:
    for matrix in matrices:
        if matrix.device.type != "cpu":
            return f"it takes CPU tensors, got {matrix.device}"
        if matrix.dtype not in _NUMBERS:
            return (
                "it takes float32, bfloat16, float16, float8_e4m3fn and float8_e5m2, got "
                f"{matrix.dtype}"
            )
    return None


def topk_abs(
    matrices: Sequence[torch.Tensor], k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (values float32 [k], place int64 [k], matrix int64 [k]); place is row * H + column.

    Raises:
        InvalidInput: see ``reference.topk_abs.nan_error``.
    """
    given = [
        torch.tensor([matrix.data_ptr() for matrix in matrices]),
        torch.tensor([_NUMBERS[matrix.dtype] for matrix in matrices], dtype=torch.int32),
        *(torch.tensor([matrix.shape[side] for matrix in matrices]) for side in (0, 1)),
        torch.tensor([matrix.stride() for matrix in matrices]),
    ]
    values = torch.empty(k)
    place, number = (torch.empty(k, dtype=torch.int64) for _ in range(2))
    nan = torch.full((2,), -1)
    out = [values, place, number, nan]
    addresses = [[tensor.data_ptr() for tensor in tensors] for tensors in (given, out)]
    try:
        call("topk_abs", *addresses[0], len(matrices), k, *addresses[1])
    except InvalidInput as error:
        first, at = nan.tolist()
        if first < 0:
            raise
        raise nan_error(first, *divmod(at, matrices[first].shape[1])) from error
    return values, place, number
