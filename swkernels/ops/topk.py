"""The result of the operations that look for the largest entries of several matrices."""

from __future__ import annotations

from typing import NamedTuple

import torch


class TopK(NamedTuple):
    """The k entries of largest magnitude, in descending order.

    Of equal magnitudes the first comes first: by matrix, then row, then column. NaN comes before
    infinity, infinity before every number.

    Attributes:
        values: [k], with their signs.
        tensor: int64 [k], which of the matrices.
        row, column: int64 [k].
    """

    values: torch.Tensor
    tensor: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
