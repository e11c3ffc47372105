"""Keep more elements of a packed matrix exactly, and take that back."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .block_quantize import check_count
from .quantized import QuantizedTensor


@dataclass(frozen=True, eq=False)
class Kept:
    """What was at some positions of a packed matrix before ``keep``.

    Attributes:
        positions: int64 [k], ascending.
        codes: uint8 [k], their codes.
        listed: bool [k], whether they were outliers already.
        values: [k], their outlier values; 0 where they were none.
    """

    positions: torch.Tensor
    codes: torch.Tensor
    listed: torch.Tensor
    values: torch.Tensor


def check_keep(q: QuantizedTensor, positions: torch.Tensor) -> None:
    """Raise InvalidInput if ``keep`` would list more outliers than a matrix may have."""
    listed = torch.isin(positions, q.positions.long())
    check_count(len(q.positions) + int((~listed).sum()), q.plan)


def keep(
    q: QuantizedTensor, positions: torch.Tensor, values: torch.Tensor
) -> tuple[QuantizedTensor, Kept]:
    """Give elements exact values; no other element changes.

    Args:
        q: a packed matrix; it stays as it is.
        positions: int64 [k], row * columns + column, ascending and all different.
        values: float32 [k]; the outliers' type becomes float32 if it is narrower.

    Returns:
        The new matrix, and what ``restore`` needs.

    Raises:
        InvalidInput: more outliers than a matrix may have.
    """
    check_keep(q, positions)
    listed = torch.isin(positions, q.positions.long())
    before = q.values.new_zeros(len(positions))
    before[listed] = q.values[torch.isin(q.positions.long(), positions)]
    kept = Kept(positions, _read(q, positions), listed, before)
    codes = _write(q, positions, torch.full_like(kept.codes, q.plan.code.zero))
    others = ~torch.isin(q.positions.long(), positions)
    return _listing(q, codes, others, positions, values.float()), kept


def restore(q: QuantizedTensor, kept: Kept) -> QuantizedTensor:
    """Undo ``keep``: what it changed is as it was, also if more has been kept since.

    The outliers' type is as it was as well, where it holds all values that are left.
    """
    others = ~torch.isin(q.positions.long(), kept.positions)
    codes = _write(q, kept.positions, kept.codes)
    listed = kept.listed
    old = _listing(q, codes, others, kept.positions[listed], kept.values[listed].float())
    narrow = old.values.to(kept.values.dtype)
    exact = torch.equal(narrow.to(old.values.dtype), old.values)
    return replace(old, values=narrow) if exact else old


def _listing(q, codes, others, positions, values) -> QuantizedTensor:
    """The matrix with those of its outliers that ``others`` marks, and new ones."""
    joined = torch.cat([q.positions[others].long(), positions])
    order = joined.argsort()
    values = torch.cat([q.values[others].float(), values])
    return replace(q, codes=codes, positions=joined[order].int(), values=values[order])


def _read(q: QuantizedTensor, positions: torch.Tensor) -> torch.Tensor:
    """The codes at positions [k], uint8."""
    if q.plan.code.bits == 8:
        return q.codes[positions]
    pairs = q.codes[positions >> 1]
    return torch.where(positions % 2 == 1, pairs & 15, pairs >> 4)


def _write(q: QuantizedTensor, positions: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """The packed codes with others at positions [k]."""
    codes = q.codes.clone()
    if q.plan.code.bits == 8:
        codes[positions] = new
        return codes
    for half, shift in ((0, 4), (1, 0)):  # two positions may share a byte
        here = positions % 2 == half
        byte = positions[here] >> 1
        codes[byte] = (codes[byte] & (15 << (4 - shift))) | (new[here] << shift)
    return codes
