"""The mask of one adapter in one layer: what it does to the factors, and how files hold them."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch

from swkernels import ops
from swkernels.errors import InvalidInput
from swkernels.ops.lora_linear import correction

MODES = ("rows", "columns", "rows and columns", "positions")
_DIGEST = 16  # bytes


class FactorMask:
    """Rows of B, columns of A, or positions of dW that are scaled by s or held as they are.

    Args:
        mode: one of ``MODES``.
        coordinates: int64 [k, 2], inside the weight.
        shape: (D, H) of the weight.
        scale: s.
        hold: the masked entries keep the values that they have when ``take`` is called, whatever
            an optimizer does to the parameters.
    """

    def __init__(
        self,
        mode: str,
        coordinates: torch.Tensor,
        shape: tuple[int, int],
        scale: float,
        hold: bool,
    ):
        self.positions = mode == "positions"
        self.hold = hold
        self.scale = 0.0 if hold else scale
        self._rows = coordinates[:, 0].unique() if "rows" in mode else coordinates[:0, 0]
        self._cols = coordinates[:, 1].unique() if "columns" in mode else coordinates[:0, 0]
        self._mask = ops.LoraMask.of(
            coordinates, shape, self.scale,
            rows="rows" in mode, columns="columns" in mode, positions=self.positions,
        )  # fmt: skip
        if hold and not self.positions:
            self._mask = None  # what is held is put in the place of the factors' own entries
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None  # [n, r] of B, [r, m] of A
        self._restored = False
        text = f"{mode} {scale} {hold} {coordinates.tolist()} {list(shape)}"
        digest = hashlib.sha256(text.encode()).digest()[:_DIGEST]
        self.digest = torch.tensor(list(digest), dtype=torch.uint8)

    def take(self, A: torch.Tensor, B: torch.Tensor, scaling: float) -> None:
        """Hold the masked entries at the values that these factors give them.

        Right after ``unpack`` has found held values they stay.
        """
        restored, self._restored = self._restored, False
        if not self.hold or restored or A.is_meta or B.is_meta:
            return
        A, B = A.detach(), B.detach()
        self.to(A.device)
        if self.positions:
            bare = replace(self._mask, kept=None)
            self._mask = replace(bare, kept=-correction(A, B, scaling, bare))
        else:
            self._kept = B[self._rows], A[:, self._cols]

    def to(self, device: torch.device) -> None:
        """Move the mask to where the layer computes."""
        if self._rows.device == device:
            return
        self._rows, self._cols = self._rows.to(device), self._cols.to(device)
        if self._mask is not None:
            self._mask = self._mask.to(device)
        if self._kept is not None:
            self._kept = tuple(kept.to(device) for kept in self._kept)

    def factors(self, A: torch.Tensor, B: torch.Tensor):
        """Return (A, B, mask) as ``ops.lora_linear`` takes them; held entries get no gradient."""
        if self._kept is not None:
            kept_B, kept_A = self._kept
            B = B.index_copy(0, self._rows, kept_B.to(B.dtype))
            A = A.index_copy(1, self._cols, kept_A.to(A.dtype))
        return A, B, self._mask

    @property
    def extra_rank(self) -> int:
        """By how much the rank of an ordinary LoRA is larger that has the masked positions."""
        if not self.positions:
            return 0
        pattern = self._mask.pattern
        return min(len(pattern.row_starts) - 1, len(pattern.columns))

    @property
    def needs_originals(self) -> bool:
        """Whether the factors of a file do not tell what the trained ones are, and what is held."""
        if self.positions:
            return self.hold
        return not self.hold and 0.0 < self.scale < 1.0

    def originals(self, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """The masked entries as they are trained or held, after the digest: bytes, for a file."""
        if self.positions:
            values = self._mask.kept.float()
        else:
            parts = (B[self._rows], A[:, self._cols])
            values = torch.cat([part.detach().float().flatten() for part in parts])
        return torch.cat([self.digest, values.cpu().view(torch.uint8)])

    def pack(self, A: torch.Tensor, B: torch.Tensor, scaling: float):
        """Return (A, B) of an ordinary LoRA with the same dW, for the same scaling."""
        with torch.no_grad():
            A, B, mask = self.factors(A.detach(), B.detach())
            if mask is None:
                return A, B
            if not self.positions:
                columns, rows = mask.column_scale, mask.row_scale
                A = A if columns is None else A * columns.to(A.dtype)
                return A, B if rows is None else B * rows.to(B.dtype)[:, None]
            one_hot_A, one_hot_B = self._one_hot(A, B)
            values = correction(A.float(), B.float(), scaling, mask) / (scaling or 1.0)
            pattern = mask.pattern
            rank = torch.arange(self.extra_rank, device=A.device)
            if one_hot_B is not None:  # B picks the rows, A has their entries
                more_B = one_hot_B
                more_A = A.new_zeros(len(rank), A.shape[1])
                counts = pattern.row_starts.diff().long()
                more_A[rank.repeat_interleave(counts), pattern.cols.long()] = values.to(A.dtype)
            else:
                more_A = one_hot_A
                more_B = B.new_zeros(B.shape[0], len(rank))
                more_B[pattern.rows.long(), pattern.column_of.long()] = values.to(B.dtype)
            return torch.cat([A, more_A]), torch.cat([B, more_B], 1)

    def unpack(
        self, name: str, r: int, A: torch.Tensor, B: torch.Tensor, stored: torch.Tensor | None
    ):
        """Return the factors that ``pack`` was given.

        What is held is what the adapter has there, also if it was trained without a mask.

        Args:
            name: of the module, for the message.
            r: rank of the adapter here.
            A, B: from a file.
            stored: what ``originals`` gave, if the file has it.

        Raises:
            InvalidInput: they are of an adapter with another mask, or with none.
        """
        self.to(A.device)
        self._restored = False
        if self.hold and stored is None and len(A) == r:
            return A, B
        if self.needs_originals != (stored is not None):
            raise _other_mask(name)
        values = self._values(name, stored) if self.needs_originals else None
        if self.positions:
            if len(A) != r + self.extra_rank or not self._has_one_hot(A[r:], B[:, r:]):
                raise _other_mask(name)
            if self.hold:
                self._mask = replace(self._mask, kept=values.to(A.device))
                self._restored = True
            return A[:r], B[:, :r]
        if self.needs_originals:
            sizes = [len(self._rows) * B.shape[1], len(self._cols) * len(A)]
            if len(values) != sum(sizes):
                raise _other_mask(name)
            of_B, of_A = values.to(A.device).split(sizes)
            A, B = A.clone(), B.clone()
            B[self._rows] = of_B.view(-1, B.shape[1]).to(B.dtype)
            A[:, self._cols] = of_A.view(len(A), -1).to(A.dtype)
        elif self.scale == 0.0 and (B[self._rows].any() or A[:, self._cols].any()):
            raise _other_mask(name)
        return A, B

    def _values(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """The float32 values that ``originals`` has written for this mask."""
        stored = stored.cpu()
        if len(stored) % 4 or not torch.equal(stored[:_DIGEST], self.digest):
            raise _other_mask(name)
        return stored[_DIGEST:].clone().view(torch.float32)

    def _has_one_hot(self, more_A: torch.Tensor, more_B: torch.Tensor) -> bool:
        one_hot_A, one_hot_B = self._one_hot(more_A, more_B)
        if one_hot_B is not None:
            return torch.equal(more_B, one_hot_B)
        return torch.equal(more_A, one_hot_A)

    def _one_hot(self, A: torch.Tensor, B: torch.Tensor):
        """(rows of A, None) or (None, columns of B) that pick the masked columns or rows of dW."""
        pattern = self._mask.pattern
        R, C = len(pattern.row_starts) - 1, len(pattern.columns)
        rank = torch.arange(min(R, C), device=A.device)
        if R <= C:
            picked = B.new_zeros(B.shape[0], R)
            picked[pattern.rows[pattern.row_starts[:-1].long()].long(), rank] = 1.0
            return None, picked
        picked = A.new_zeros(C, A.shape[1])
        picked[rank, pattern.columns.long()] = 1.0
        return picked, None


def _other_mask(name: str) -> InvalidInput:
    return InvalidInput(
        f"the adapter was trained with another mask, or with none, than {name} has here: open it "
        "with MaskedLoraConfig.from_pretrained(its folder), or with a plain LoraConfig"
    )
