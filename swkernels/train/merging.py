"""Write trained deltas into the weights themselves, and take them out again, exactly.

A packed weight (``swkernels.nn``) keeps weight + delta as an outlier in float32: nothing is
quantized again, so nothing is rounded but that sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from swkernels.errors import InvalidInput
from swkernels.nn.packed import PackedModule
from swkernels.ops.outliers import Kept, check_keep, keep, restore

from .weights import Weight


@dataclass(frozen=True, eq=False)
class Merged:
    """What ``merge`` has changed.

    Attributes:
        weight: in which weight.
        before: its values at the coordinates, [k]; None where it is packed.
        kept: what it held there, where it is packed.
    """

    weight: Weight
    pairs: torch.Tensor
    before: torch.Tensor | None
    kept: Kept | None

    @torch.no_grad()
    def undo(self) -> None:
        """Put the values back as they were."""
        layer = self.weight.packed_layer
        if layer is not None:
            layer.set_packed(restore(layer.packed, self.kept))
            return
        matrix = self.weight.matrix()
        rows, cols = self.pairs.to(matrix.device).long().unbind(1)
        matrix[rows, cols] = self.before.to(matrix.device)


def check_merge(weight: Weight, pairs: torch.Tensor) -> None:
    """Raise InvalidInput if values at the coordinates ``pairs`` [k, 2] cannot be written."""
    layer = weight.packed_layer
    if layer is None:
        weight.matrix()
        return
    try:
        check_keep(layer.packed, _positions(layer, pairs))
    except InvalidInput as error:
        raise InvalidInput(f"{weight.site} is packed, and with those merged {error}") from error


@torch.no_grad()
def merge(weight: Weight, pairs: torch.Tensor, delta: torch.Tensor) -> Merged:
    """Add ``delta`` [k] to a weight [D, H] at the coordinates ``pairs`` [k, 2], sorted.

    Raises:
        InvalidInput: see ``check_merge``.
    """
    check_merge(weight, pairs)
    layer = weight.packed_layer
    if layer is not None:
        positions = _positions(layer, pairs)
        now = layer.packed.dequantize(torch.float32).view(-1)[positions]
        packed, kept = keep(layer.packed, positions, now + delta.to(now))
        layer.set_packed(packed)
        return Merged(weight, pairs, None, kept)
    matrix = weight.matrix()
    rows, cols = pairs.to(matrix.device).long().unbind(1)
    before = matrix[rows, cols]
    matrix[rows, cols] = (before.float() + delta.to(matrix.device)).to(matrix.dtype)
    return Merged(weight, pairs, before, None)


def _positions(layer: PackedModule, pairs: torch.Tensor) -> torch.Tensor:
    rows, cols = pairs.to(layer.packed.device).long().unbind(1)
    return rows * layer.packed.shape[1] + cols
