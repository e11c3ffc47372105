"""A gated linear unit and the peaks of its result, by definition."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from .column_absmax import column_absmax

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def supports(gate: torch.Tensor, up: torch.Tensor, activation: str) -> str | None:
    return None


def glu_absmax(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    keys: torch.Tensor | None,
    token_index: torch.Tensor | None,
    token_offset: int,
) -> torch.Tensor:
    """Return h = act(gate) * up [T, C]; merge the peaks of h in place."""
    h = ACTIVATIONS[activation](gate) * up
    if keys is not None:
        column_absmax(h, keys, token_index, token_offset)
    return h
