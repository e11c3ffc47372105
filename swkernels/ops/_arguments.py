"""Checks that every operation shares."""

from __future__ import annotations

import torch

from swkernels.errors import InvalidInput

from .peaks import TOKEN_MASK, token_index

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_activation(name: str, x: torch.Tensor) -> None:
    """Raise InvalidInput unless ``x`` is a plain floating-point tensor [..., C]."""
    if not isinstance(x, torch.Tensor):
        raise InvalidInput(f"{name} must be a tensor, got {type(x).__name__}")
    if hasattr(x, "to_local"):
        raise InvalidInput(f"{name} is a DTensor: pass {name}.to_local() and merge keys with max")
    if x.is_meta and not torch.compiler.is_compiling():
        raise InvalidInput(f"{name} is on the meta device and holds no values: load it first")
    if x.dtype not in FLOATS:
        raise InvalidInput(
            f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}; "
            "dequantize it first"
        )
    if x.dim() < 1:
        raise InvalidInput(f"{name} must be [..., C], got a scalar")


def check_keys(name: str, keys: torch.Tensor | None, channels: int, x: torch.Tensor) -> None:
    """Raise InvalidInput unless ``keys`` is None or a running state for ``x``."""
    if keys is None:
        return
    if keys.dtype != torch.int64 or keys.shape != (channels,) or not keys.is_contiguous():
        raise InvalidInput(
            f"{name} must be contiguous int64 [{channels}], got {keys.dtype} {list(keys.shape)}"
        )
    if keys.device != x.device:
        raise InvalidInput(f"{name} is on {keys.device}, the activation on {x.device}: move it")


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """View ``x`` [..., C] as [T, C] with a contiguous last dimension (a copy only if it must)."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(_rows(x), x.shape[-1])
    if rows.numel() and rows.shape[1] > 1 and rows.stride(1) != 1:
        rows = rows.contiguous()
    return rows


def _rows(x: torch.Tensor) -> int:
    rows = 1
    for size in x.shape[:-1]:
        rows *= size
    return rows


def as_token_index(
    token_mask: torch.Tensor | None, x: torch.Tensor, token_offset: int
) -> torch.Tensor | None:
    """Turn the caller's mask into the int64 [T] index that backends take, or None.

    Args:
        token_mask: bool of x's leading shape (True: the token counts), or int64 of that shape:
            the token index of each row, negative where the row does not count.
    """
    if not 0 <= token_offset <= TOKEN_MASK - _rows(x):
        raise InvalidInput(
            f"token_offset must be at least 0 and leave token indices below 2^32 - 1, "
            f"got {token_offset} with {_rows(x)} tokens"
        )
    if token_mask is None:
        return None
    if token_mask.shape != x.shape[:-1] and token_mask.shape != (_rows(x),):
        raise InvalidInput(
            f"token_mask must be {list(x.shape[:-1])}, one entry a token, "
            f"got {list(token_mask.shape)}"
        )
    if token_mask.device != x.device:
        raise InvalidInput(
            f"token_mask is on {token_mask.device}, the activation on {x.device}: move it"
        )
    if token_mask.dtype == torch.int64:
        index = token_mask.reshape(-1).contiguous()
        # On a GPU the check would wait for the device; there the caller answers for the range.
        if index.device.type == "cpu" and index.numel() and not torch.compiler.is_compiling():
            if int(index.max()) + token_offset >= TOKEN_MASK:
                raise InvalidInput(
                    f"token indices must stay below 2^32 - 1, got {int(index.max())} "
                    f"with token_offset {token_offset}"
                )
        return index
    if token_mask.dtype != torch.bool:
        raise InvalidInput(
            f"token_mask must be bool, or int64 token indices, got {token_mask.dtype}"
        )
    return token_index(token_mask.reshape(-1))
