"""A linear layer and the peaks of its input and output.

The product stays PyTorch's (oneDNN or MKL); a pass over x and one over y, at the speed of reading
them, find the peaks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import refuse
from .column_absmax import column_absmax


def supports(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    return refuse(x)


def linear_absmax(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    in_keys: torch.Tensor | None,
    out_keys: torch.Tensor | None,
    token_index: torch.Tensor | None,
    token_offset: int,
) -> torch.Tensor:
    """Return y = x W^T + b [T, D]; merge the peaks of x and of y in place."""
    y = F.linear(x, weight, bias)
    if in_keys is not None:
        column_absmax(x, in_keys, token_index, token_offset)
    if out_keys is not None:
        column_absmax(y, out_keys, token_index, token_offset)
    return y
