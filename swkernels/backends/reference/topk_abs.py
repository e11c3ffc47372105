"""The largest entries of several matrices, by definition, a piece at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from swkernels.errors import InvalidInput

from .topk_low_rank import empty, join, largest

_CHUNK = 1 << 22  # entries that are looked at together


def supports(*matrices: torch.Tensor) -> str | None:
    return None


def topk_abs(
    matrices: Sequence[torch.Tensor], k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (values [k], place int64 [k], matrix int64 [k]); place is row * H + column.

    Values are float32, or float64 where a matrix is.

    Raises:
        InvalidInput: see ``nan_error``.
    """
    best = empty(matrices[0].device)  # values in float64, which holds all of them exactly
    for number, matrix in enumerate(matrices):
        for start, piece in _pieces(matrix):
            values = piece.double()
            nan = values.isnan()
            if nan.any():
                place = start + int(nan.nonzero()[0])
                raise nan_error(number, *divmod(place, matrix.shape[1]))
            place = torch.arange(len(values), device=values.device) + start
            best = largest(join(best, (values, place, torch.full_like(place, number))), k)
    wide = any(matrix.dtype == torch.float64 for matrix in matrices)
    values, place, number = best
    return values if wide else values.float(), place, number


def nan_error(number: int, row: int, column: int) -> InvalidInput:
    """The error for the first NaN among the matrices."""
    return InvalidInput(
        f"tensor {number} holds NaN at [{row}, {column}]: NaN cannot be ranked; repair the tensor"
    )


def _pieces(matrix: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Places and the entries from there on, in order, at most _CHUNK of them."""
    D, H = matrix.shape
    rows = max(1, _CHUNK // max(1, H))
    for row in range(0, D, rows):
        for column in range(0, H, _CHUNK):
            part = matrix[row : row + rows, column : column + _CHUNK]
            yield row * H + column, part.flatten()
