"""A gated linear unit and the peaks of its result in C++, see ``csrc/cpu/glu_absmax.cpp``."""

from __future__ import annotations

import torch

from swkernels.backends.native import DTYPES

from . import address, call, refuse

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}  # enum swk_activation


def supports(gate: torch.Tensor, up: torch.Tensor, activation: str) -> str | None:
    if activation not in ACTIVATIONS:
        return f"it knows {', '.join(ACTIVATIONS)}, got {activation!r}"
    if gate.dtype != up.dtype:
        return f"gate and up must have one dtype, got {gate.dtype} and {up.dtype}"
    return refuse(gate, up)


def glu_absmax(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    keys: torch.Tensor | None,
    token_index: torch.Tensor | None,
    token_offset: int,
) -> torch.Tensor:
    """Return h = act(gate) * up [T, C]; merge the peaks of h in place."""
    h = torch.empty(gate.shape, dtype=gate.dtype)
    call(
        "glu_absmax",
        gate.data_ptr(),
        gate.stride(0),
        up.data_ptr(),
        up.stride(0),
        h.data_ptr(),
        h.stride(0),
        DTYPES[str(gate.dtype)],
        ACTIVATIONS[activation],
        *gate.shape,
        address(keys),
        address(token_index),
        token_offset,
    )
    return h
