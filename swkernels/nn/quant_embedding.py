"""An embedding of packed rows."""

from __future__ import annotations

import torch
from torch import nn

from swkernels.backends import blocks
from swkernels.errors import InvalidInput
from swkernels.ops.block_dequantize import check_packed
from swkernels.ops.quantized import QuantizedTensor

from .packed import PackedModule, empty_packed


class QuantEmbedding(PackedModule, nn.Embedding):
    """The rows of a packed matrix [V, H] that indices ask for; only these are dequantized.

    Attributes:
        num_embeddings, embedding_dim: V and H.
        padding_idx: of the embedding that was quantized, or None.
    """

    def __init__(self, packed: QuantizedTensor, padding_idx: int | None = None):
        nn.Module.__init__(self)  # nn.Embedding's would make a weight
        check_packed(packed)
        if len(packed.shape) != 2:
            raise InvalidInput(f"a packed embedding must be [V, H], got {list(packed.shape)}")
        self.num_embeddings, self.embedding_dim = packed.shape
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type = None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self.set_packed(packed)
        # A cast of the model casts it, and so what the embedding returns.
        like = torch.empty(0, dtype=packed.dtype, device=packed.device)
        self.register_buffer("_like", like, persistent=False)

    @classmethod
    def from_packed(cls, q: QuantizedTensor, padding_idx: int | None = None) -> QuantEmbedding:
        """An embedding over a packed matrix [V, H], whose memory it shares.

        Raises:
            InvalidInput: ``q`` is no packed matrix [V, H].
        """
        return cls(q, padding_idx)

    @classmethod
    def empty(
        cls,
        num_embeddings: int,
        embedding_dim: int,
        *,
        dtype: torch.dtype,
        padding_idx: int | None = None,
        **form,
    ) -> QuantEmbedding:
        """An embedding without values, to load some into; ``form`` is of ``empty_packed``."""
        return cls(empty_packed((num_embeddings, embedding_dim), dtype=dtype, **form), padding_idx)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """Integers [...] -> [..., H], in the type that the model was cast to last."""
        rows = dequantize_rows(self.packed, indices.reshape(-1).long(), self._like.dtype)
        return rows.view(*indices.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f"padding_idx={self.padding_idx}, "
        return f"{self.num_embeddings}, {self.embedding_dim}, {padding}{self.form_repr()}"


def dequantize_rows(q: QuantizedTensor, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The rows [n] of a packed matrix [D, H], as ``block_dequantize`` gives them: [n, H]."""
    plan = q.plan
    columns = torch.arange(plan.columns, device=rows.device)
    place = rows[:, None] * plan.columns + columns  # [n, H], of the flattened matrix
    if plan.code.bits == 8:
        codes = q.codes[place]
    else:
        pairs = q.codes[place >> 1]
        codes = torch.where(place & 1 == 1, pairs & 15, pairs >> 4)
    r, c = plan.block
    if r == 0:
        block = place // c
    else:
        block = (rows // r)[:, None] * -(-plan.columns // c) + columns // c
    w = blocks.decode(codes, plan.code)
    if q.zero_points is not None:
        w = w - q.zero_points[block].float()
    w = (w * q.block_scales()[block].float()).to(dtype)
    kept = q.positions.long()
    if not len(kept):
        return w
    nearest = torch.searchsorted(kept, place).clamp(max=len(kept) - 1)
    return torch.where(kept[nearest] == place, q.values[nearest].to(dtype), w)
