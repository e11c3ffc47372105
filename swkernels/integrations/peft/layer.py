"""The layer that PEFT puts in the place of a linear layer that coordinates name."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from swkernels.errors import InvalidInput
from swkernels.models.structure import base_of
from swkernels.nn import SparseDelta
from swkernels.train.merging import check_merge
from swkernels.train.sites import _FRESH_OUTPUT, Target
from swkernels.train.sparse import SparseHandle

from .config import PREFIX
from .origin import check_origin, pack_origin

VALUES = f"{PREFIX}values"
ORIGIN = f"{PREFIX}origin"


class SparseCoordinateLayer(SparseDelta, BaseTunerLayer):
    """A base layer, called as the module that it is, with deltas beside its weight [D, H].

    Args:
        base_layer: a linear layer of any kind: plain, Conv1D, quantized, wrapped.
        shape: (D, H) of its weight.
    """

    adapter_layer_names = (VALUES,)
    other_param_names = (ORIGIN,)

    def __init__(self, base_layer: nn.Module, shape: tuple[int, int]):
        super().__init__(shape, _device(base_layer))
        # PEFT tells an adapter's parameters by the method's prefix in their names.
        setattr(self, VALUES, self._modules.pop("values"))
        setattr(self, ORIGIN, BufferDict(persistent=True))
        self.base_layer = base_layer
        self.merged_adapters = []
        self._fresh = type(base_of(base_layer)[0]).__name__ in _FRESH_OUTPUT
        self._parts: dict[str, list[Part]] = {}
        self._merges: list[SparseHandle] = []

    @property
    def values(self) -> nn.ParameterDict:
        """The deltas of each adapter, float32 [k]."""
        return getattr(self, VALUES)

    @property
    def active(self) -> list[str]:
        """The adapters that contribute now, as PEFT's own flags say."""
        if self.disable_adapters:
            return []
        merged = self.merged_adapters
        return [name for name in self.active_adapters if name in self.values and name not in merged]

    @active.setter
    def active(self, names: list[str]) -> None:
        pass  # SparseDelta would switch on what it adds; PEFT decides that

    def update_layer(
        self,
        adapter_name: str,
        targets: list[Target],
        coordinates: list[torch.Tensor],
        bases: list[str | None],
    ) -> None:
        """Add an adapter, zero at first.

        Args:
            targets: the weight of the base layer; of fused experts those in use, ascending.
            coordinates: of each target, int32 [k, 2], sorted.
            bases: of each target, as ``base_of_target`` gives it.
        """
        moved = torch.cat([self._place(t, pairs) for t, pairs in zip(targets, coordinates)])
        self.add_adapter(adapter_name, moved)
        getattr(self, ORIGIN)[adapter_name] = pack_origin(moved, bases).to(self.device)
        parts, start = [], 0
        for target, pairs in zip(targets, coordinates):
            share = _Share(self, pairs, slice(start, start + len(pairs)))
            parts.append(Part(target.site, target.shape, target.module, target.projection, share))
            start += len(pairs)
        self._parts[adapter_name] = parts

    def check_file(self, name: str, state_dict: dict, prefix: str) -> None:
        """Raise InvalidInput if values that are about to be loaded belong to something else.

        Args:
            name: of the module, for the message.
            state_dict: what is about to be loaded.
            prefix: of this layer's keys in it.
        """
        if any(key.startswith(f"{prefix}base_layer.") for key in state_dict):
            return  # the base is replaced as well
        for adapter, own in getattr(self, ORIGIN).items():
            stored = state_dict.get(f"{prefix}{ORIGIN}.{adapter}")
            if stored is not None:
                check_origin(name, stored, own)

    def forward(self, *args, **kwargs) -> torch.Tensor:
        """The base layer's output [..., D], with the deltas' contribution."""
        self._unmerge_disabled()
        y = self.base_layer(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        return self.add(x, y, inplace=self._fresh and not _has_hooks(self.base_layer))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write weight + delta into the weight itself.

        Args:
            safe_merge: put the weight back and raise if a merged value is NaN or infinite.
            adapter_names: None is the active ones.

        Raises:
            InvalidInput: the weight is packed, sharded or on the meta device; or ``safe_merge``.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.values:
                continue
            parts = self._parts[name]
            handle = SparseHandle(self, None, name, {part.site: part for part in parts}, [])
            handle.merge()
            if safe_merge and not all(part.is_finite() for part in parts):
                handle.unmerge()
                raise InvalidInput(
                    f"merging adapter {name!r} gives NaN or infinite weights in "
                    f"{parts[0].site.name}: its values are broken; this layer is as it was"
                )
            self._merges.append(handle)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the weight back exactly as it was."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self._merges:  # the last one first: the coordinates of several may overlap
            self._merges.pop().unmerge()
            self.merged_adapters.pop()

    def check_merge(self) -> None:
        """Raise InvalidInput if the weight cannot be written."""
        for parts in self._parts.values():
            for part in parts:
                check_merge(part, part.share.coordinates(""))

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; PEFT chooses which one is active then."""
        if adapter_name in self.values:
            self.remove_adapter(adapter_name)
            del self._parts[adapter_name]
        super().delete_adapter(adapter_name)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            # A model may read what its layer has (DBRX reads the weights of its experts).
            if name.startswith("_") or name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def _place(self, target: Target, pairs: torch.Tensor) -> torch.Tensor:
        """The coordinates of a target in this layer's matrix."""
        return pairs

    def _unmerge_disabled(self) -> None:
        if self.disable_adapters and self.merged:
            self.unmerge()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device=None) -> None:
        # PEFT's own would cast the values to the dtype of the base.
        if adapter_name in self.values:
            self.values.to(_device(self.base_layer) if device is None else device)


class _Share:
    """What of a layer's values belongs to one weight; ``SparseHandle`` merges it."""

    def __init__(self, layer: SparseCoordinateLayer, pairs: torch.Tensor, place: slice):
        self._layer = layer
        self._pairs = pairs
        self.place = place
        self.active: list[str] = []

    @property
    def values(self) -> dict[str, torch.Tensor]:
        return {name: value[self.place] for name, value in self._layer.values.items()}

    def coordinates(self, name: str) -> torch.Tensor:
        return self._pairs


@dataclass(frozen=True)
class Part(Target):
    """One weight below a layer, and its share of an adapter's values."""

    share: _Share

    @property
    def delta(self) -> _Share:
        return self.share

    def is_finite(self) -> bool:
        """Whether the weight is, at the coordinates."""
        matrix = self.read()
        rows, cols = self.share.coordinates("").to(matrix.device).long().unbind(1)
        return bool(matrix[rows, cols].isfinite().all())


def _device(module: nn.Module) -> torch.device:
    """Where a module computes; one on the meta device gets its deltas on the CPU."""
    tensors = [*module.parameters(), *module.buffers()]
    found = tensors[0].device if tensors else torch.device("cpu")
    return torch.device("cpu") if found.type == "meta" else found


def _has_hooks(module: nn.Module) -> bool:
    """Whether somebody may keep the module's output, which then must not be changed in place."""
    return bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)
