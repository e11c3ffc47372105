"""The masks of a low-rank update: rows of B, columns of A, or exact positions of their product."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from swkernels.errors import InvalidInput

from .pattern import SparsePattern


@dataclass(frozen=True)
class LoraMask:
    """What a mask scales in dW = scaling B A, for B [D, r] and A [r, H].

    Attributes:
        row_scale: float [D]: row i of B is multiplied by row_scale[i]. None: no row is masked.
        column_scale: float [H], for the columns of A.
        pattern: exact positions of dW [D, H]; there dW is multiplied by ``scale``.
        scale: s of ``pattern``.
        kept: float [k], in the pattern's order: what is added to dW at those positions, after
            ``scale``. With scale 0 they are held at these values. None: nothing.
    """

    row_scale: torch.Tensor | None = None
    column_scale: torch.Tensor | None = None
    pattern: SparsePattern | None = None
    scale: float = 0.0
    kept: torch.Tensor | None = None

    @staticmethod
    def of(
        coordinates: torch.Tensor,
        shape: tuple[int, int],
        scale: float,
        *,
        rows: bool = False,
        columns: bool = False,
        positions: bool = False,
    ) -> LoraMask:
        """Make the mask of coordinates: their rows, their columns, or the positions themselves.

        Args:
            coordinates: integers [k, 2], row and column, inside ``shape``.
            shape: (D, H) of the weight.
            scale: s in [0, 1].

        Raises:
            InvalidInput: s is outside [0, 1], nothing is masked, or a coordinate lies outside.
        """
        check_scale(scale)
        if not (rows or columns or positions):
            raise InvalidInput("a mask needs rows, columns or positions: set one of them")
        pattern, _ = SparsePattern.sort(*coordinates.unique(dim=0).unbind(1), shape)
        D, H = shape
        return LoraMask(
            _scales(pattern.rows, D, scale) if rows else None,
            _scales(pattern.cols, H, scale) if columns else None,
            pattern if positions else None,
            float(scale),
        )

    def to(self, device: torch.device) -> LoraMask:
        """The same mask on another device."""
        names = ("row_scale", "column_scale", "pattern", "kept")
        moved = {n: v.to(device) for n in names if (v := getattr(self, n)) is not None}
        return replace(self, **moved)


def check_scale(scale: float) -> None:
    """Raise InvalidInput unless a mask's s is a number in [0, 1]."""
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise InvalidInput(f"the mask's scale s must be a number in [0, 1], got {scale!r}")
    if not 0.0 <= scale <= 1.0:
        raise InvalidInput(f"the mask's scale s must lie in [0, 1], got {scale}")


def check_mask(mask: LoraMask | None, D: int, H: int, device: torch.device) -> None:
    """Raise InvalidInput unless a mask fits a weight [D, H] on ``device``."""
    if mask is None:
        return
    if not isinstance(mask, LoraMask):
        raise InvalidInput(f"mask must be a LoraMask, got {type(mask).__name__}")
    for name, length in (("row_scale", D), ("column_scale", H)):
        vector = getattr(mask, name)
        if vector is None:
            continue
        if vector.shape != (length,) or not vector.is_floating_point():
            raise InvalidInput(
                f"the mask's {name} must be floating-point [{length}], got {vector.dtype} "
                f"{list(vector.shape)}"
            )
        if vector.device != device:
            raise InvalidInput(f"the mask's {name} is on {vector.device}, x on {device}: move it")
    if mask.pattern is None:
        return
    if tuple(mask.pattern.shape) != (D, H):
        raise InvalidInput(
            f"the mask's positions are of a weight {list(mask.pattern.shape)}, this one is "
            f"[{D}, {H}]: take those of this weight"
        )
    if mask.pattern.rows.device != device:
        raise InvalidInput(
            f"the mask's positions are on {mask.pattern.rows.device}, x on {device}: move them"
        )
    if mask.kept is not None and mask.kept.shape != mask.pattern.rows.shape:
        raise InvalidInput(
            f"the mask keeps {len(mask.pattern)} positions, but has values {list(mask.kept.shape)}"
        )


def _scales(places: torch.Tensor, length: int, scale: float) -> torch.Tensor:
    scales = torch.ones(length, device=places.device)
    scales[places.long()] = scale
    return scales
