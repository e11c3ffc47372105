"""Trainable deltas of a few weights of a frozen linear layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import torch
from torch import nn

from swkernels import ops
from swkernels.errors import InvalidInput

_FIELDS = [field.name for field in fields(ops.SparsePattern) if field.name != "shape"]


class SparseDelta(nn.Module):
    """float32 values beside a frozen weight [D, H], at k coordinates each, by adapter.

    The base layer is called as the module that it is, so it may be quantized, sharded or compiled;
    ``add`` then adds the contribution of the active adapters to its output, in one pass. The
    values are the only parameters: an optimizer keeps k numbers, not D x H. They stay float32
    when a model is cast to another dtype, for a step of an optimizer is often too small for
    bfloat16 (float64 is kept too).

    Args:
        shape: (D, H) of the weight.
        device: where the base layer works.
    """

    trains_beside_parent = True  # see swkernels.models.structure.features

    def __init__(self, shape: tuple[int, int], device: torch.device | str = "cpu"):
        super().__init__()
        self.shape = tuple(shape)
        self.device = torch.device(device)
        self.values = nn.ParameterDict()
        self.active: list[str] = []

    def add_adapter(self, name: str, coordinates: torch.Tensor) -> nn.Parameter:
        """Add an adapter, zero at first and active.

        Args:
            name: no other adapter's; without dots, as PyTorch asks of parameters.
            coordinates: integers [k, 2], row and column, different ones in any order.

        Returns:
            Its values, float32 [k], in the order of rows, then columns.

        Raises:
            InvalidInput: the name is taken, or what ``ops.SparsePattern.sort`` finds.
        """
        if name in self.values:
            raise InvalidInput(f"there is an adapter {name!r} already: choose another name")
        rows, cols = coordinates.to(self.device).unbind(1)
        pattern, _ = ops.SparsePattern.sort(rows, cols, self.shape)
        for field in _FIELDS:
            buffer = getattr(pattern, field)
            self.register_buffer(f"{name}_{field}", buffer, persistent=False)
        self.values[name] = nn.Parameter(torch.zeros(len(pattern), device=self.device))
        self.active.append(name)
        return self.values[name]

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter and its values."""
        del self.values[name]
        for field in _FIELDS:
            delattr(self, f"{name}_{field}")
        self.active = [other for other in self.active if other != name]

    def pattern(self, name: str) -> ops.SparsePattern:
        """The sorted coordinates of an adapter."""
        return ops.SparsePattern(self.shape, *(getattr(self, f"{name}_{f}") for f in _FIELDS))

    def coordinates(self, name: str) -> torch.Tensor:
        """The coordinates of an adapter, int32 [k, 2], in the order of its values."""
        return torch.stack([getattr(self, f"{name}_rows"), getattr(self, f"{name}_cols")], 1)

    def add(self, x: torch.Tensor, base_out: torch.Tensor, *, inplace: bool) -> torch.Tensor:
        """Return base_out [..., D] plus the contribution of the active adapters for x [..., H]."""
        for name in self.active:
            base_out = ops.pattern_linear(
                x, base_out, self.values[name], self.pattern(name), inplace=inplace
            )
        return base_out

    def deltas(self) -> Iterator[tuple[ops.SparsePattern, torch.Tensor]]:
        """The pattern and the values of each active adapter."""
        for name in self.active:
            yield self.pattern(name), self.values[name].detach()

    def _apply(self, fn, recurse=True):
        before = {name: value.dtype for name, value in self.values.items()}
        kept = {name: value.detach() for name, value in self.values.items()}
        super()._apply(fn, recurse)
        for name, dtype in before.items():
            cast = self.values[name]
            if cast.is_floating_point() and cast.dtype.itemsize < dtype.itemsize:
                cast.data = kept[name].to(cast.device)  # not what the cast has rounded
            self.device = cast.device
        return self

    def extra_repr(self) -> str:
        counts = ", ".join(f"{name}: {len(value)}" for name, value in self.values.items())
        return f"{self.shape[0]} x {self.shape[1]}, values {counts or 'none'}"
