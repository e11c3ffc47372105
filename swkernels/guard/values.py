"""One stored number: its bytes, and what they mean."""

from __future__ import annotations

import torch

from swkernels.models.checkpoint import DTYPES


def item_size(dtype: str) -> int | None:
    """Bytes of an element of a dtype of safetensors; None where it is not known to hold one."""
    known = DTYPES.get(dtype)
    return None if known is None else known.itemsize


def value_of(bits: bytes, dtype: str) -> float | int | bool:
    """What the bytes of one element mean.

    Args:
        bits: little-endian, as in a file.
        dtype: one of ``DTYPES``.
    """
    return torch.frombuffer(bytearray(bits), dtype=DTYPES[dtype]).item()
