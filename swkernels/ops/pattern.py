"""The coordinates of a weight, sorted once, so that kernels reuse rows and columns."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from swkernels.errors import InvalidInput


@dataclass(frozen=True)
class SparsePattern:
    """k different coordinates of a weight [D, H], in the order of rows, then columns.

    Attributes:
        shape: (D, H).
        rows, cols: int32 [k], sorted.
        row_starts: int32 [R + 1]: where the run of each of the R different rows begins.
        columns: int32 [C], the different columns, ascending.
        column_of: int32 [k], the place of each coordinate's column in ``columns``.
        by_column: int64 [k], the permutation that sorts the coordinates by column.
        column_starts: int32 [C + 1], as ``row_starts``, in that order.
    """

    shape: tuple[int, int]
    rows: torch.Tensor
    cols: torch.Tensor
    row_starts: torch.Tensor
    columns: torch.Tensor
    column_of: torch.Tensor
    by_column: torch.Tensor
    column_starts: torch.Tensor

    @staticmethod
    def sort(
        rows: torch.Tensor, cols: torch.Tensor, shape: tuple[int, int]
    ) -> tuple[SparsePattern, torch.Tensor]:
        """Check and sort coordinates.

        Args:
            rows, cols: integers [k], in any order, on one device.
            shape: (D, H) of the weight.

        Returns:
            The pattern, and the int64 permutation [k] that brings what belongs to the given order
            into the pattern's.

        Raises:
            InvalidInput: a coordinate outside the weight, one that is listed twice, or indices
                that are no integers.
        """
        check_indices(rows, cols)
        D, H = shape
        check_inside(rows, cols, D, H)
        flat, order = (rows.to(torch.int64) * H + cols).sort()
        twice = flat[1:][flat[1:] == flat[:-1]]
        if len(twice):
            row, col = divmod(int(twice[0]), H)
            raise InvalidInput(f"coordinate [{row}, {col}] is listed more than once")
        sorted_rows, sorted_cols = flat // H, flat % H
        _, row_counts = sorted_rows.unique_consecutive(return_counts=True)
        columns, column_of, column_counts = sorted_cols.unique(
            return_inverse=True, return_counts=True
        )
        pattern = SparsePattern(
            (D, H),
            sorted_rows.int(),
            sorted_cols.int(),
            _starts(row_counts),
            columns.int(),
            column_of.int(),
            column_of.argsort(stable=True),
            _starts(column_counts),
        )
        return pattern, order

    def to(self, device: torch.device) -> SparsePattern:
        """The same pattern on another device."""
        moved = [
            value.to(device)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
            else value
            for field in fields(self)
        ]
        return SparsePattern(*moved)

    def __len__(self) -> int:
        return len(self.rows)


def check_indices(rows: torch.Tensor, cols: torch.Tensor) -> None:
    """Raise InvalidInput unless both are integers [k] on one device."""
    for name, index in (("rows", rows), ("cols", cols)):
        if not isinstance(index, torch.Tensor):
            raise InvalidInput(f"{name} must be a tensor of integers, got {type(index).__name__}")
        if index.dtype not in (torch.int32, torch.int64) or index.dim() != 1:
            raise InvalidInput(
                f"{name} must be int32 or int64 [k], got {index.dtype} {list(index.shape)}"
            )
    if rows.shape != cols.shape or rows.device != cols.device:
        raise InvalidInput(
            f"rows and cols must belong together, got {list(rows.shape)} on {rows.device} and "
            f"{list(cols.shape)} on {cols.device}"
        )


def check_inside(rows: torch.Tensor, cols: torch.Tensor, D: int, H: int) -> None:
    """Raise InvalidInput unless all coordinates lie in the weight [D, H]; waits for a GPU."""
    outside = (rows < 0) | (rows >= D) | (cols < 0) | (cols >= H)
    if outside.any():
        row, col = (int(index[outside][0]) for index in (rows, cols))
        raise InvalidInput(f"coordinate [{row}, {col}] lies outside the weight [{D}, {H}]")


def _starts(counts: torch.Tensor) -> torch.Tensor:
    starts = torch.zeros(len(counts) + 1, dtype=torch.int32, device=counts.device)
    torch.cumsum(counts, 0, out=starts[1:])
    return starts
