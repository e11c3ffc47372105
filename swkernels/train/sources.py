"""Read single weights out of a model, a state dict or a checkpoint on disk, as matrices [D, H]."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from swkernels.errors import InvalidInput
from swkernels.models.checkpoint import Checkpoint, open_checkpoint, stores_transposed

from .coordinates import Coordinates
from .sites import Target, find_targets
from .weights import Site, block_of, nearest, readable

# The last part of a down projection's name, where experts are stored under other names than in the
# model (and beside gate and up projections, which may have the same shape transposed).
_DOWN = re.compile(r"(^|[._])(down|w2|fc2|wo|output|out|contract)(_\w+)?(\.weight)?$")
_ATTENTION = re.compile(r"attn|attention", re.I)

Reader = Callable[[Site], torch.Tensor]
Placed = tuple[str, torch.Tensor]


class Tensors(Protocol):
    """Named tensors that may be on disk, such as a ``Checkpoint``."""

    label: str

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""


def open_weights(
    source: nn.Module | Mapping[str, torch.Tensor] | str | Path,
    coordinates: Coordinates,
    stack: ExitStack,
) -> Reader:
    """Find every weight of ``coordinates`` and return a function that reads one as [D, H].

    Args:
        source: a model, whose active sparse deltas count; a state dict; or a safetensors file, or
            a folder of them, of which only the tensors that are read are touched.
        stack: closes the files.

    Raises:
        InvalidInput: not there, of another shape, packed, or of a layout that cannot be told.
    """
    if isinstance(source, nn.Module):
        targets = find_targets(source, coordinates)
        for target in targets.values():
            target.read()  # raises now rather than in the middle
        return lambda site: _effective(targets[site])
    tensors = _StateDict(source) if isinstance(source, Mapping) else _open(source, stack)
    catalog = _Catalog(tensors)
    stored = {site: catalog.find(site, shape) for site, shape in coordinates.shapes.items()}
    return lambda site: stored[site].read(tensors)


def locate(tensors: Tensors, shapes: Mapping[Site, tuple[int, int]]) -> dict[Site, Placed]:
    """Say where the weights of a checkpoint are, whatever they hold; nothing is read.

    Args:
        tensors: their names and shapes.
        shapes: (D, H) of each weight.

    Returns:
        By site, the name of a tensor, and the weight as a matrix [D, H] on the meta device: its
        offset and strides are those of the weight in that tensor.

    Raises:
        InvalidInput: not there, of another shape, or of a layout that cannot be told.
    """
    catalog = _Catalog(tensors)
    stored = {site: catalog.locate(site, shape) for site, shape in shapes.items()}
    return {site: (found.key, found.read(_Empty(tensors))) for site, found in stored.items()}


def _effective(target: Target) -> torch.Tensor:
    """The weight that the model computes with: its own, plus sparse deltas that are not merged."""
    matrix = target.read()
    deltas = list(target.delta.deltas()) if target.delta is not None else []
    if deltas:
        matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32), copy=True)
    for pattern, values in deltas:
        index = pattern.rows.long().to(matrix.device), pattern.cols.long().to(matrix.device)
        matrix[index] += values.to(matrix)
    return matrix


class _Empty:
    """Named tensors of a checkpoint, on the meta device."""

    def __init__(self, tensors: Tensors):
        self._shapes = tensors.shapes()

    def read(self, key: str, index=...) -> torch.Tensor:
        return torch.empty(self._shapes[key], device="meta")[index]


class _StateDict:
    """Named tensors in memory."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self._tensors = tensors
        self.label = "the state dict"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            key: tuple(value.shape)
            for key, value in self._tensors.items()
            if isinstance(value, torch.Tensor)
        }

    def dtype(self, key: str) -> torch.dtype | None:
        """None where the tensor is wrapped or on the meta device, so its values cannot be read."""
        tensor = self._tensors[key]
        unreadable = tensor.is_meta or hasattr(tensor, "__tensor_flatten__")
        return None if unreadable else tensor.dtype

    def read(self, key: str, index=...) -> torch.Tensor:
        return self._tensors[key].detach()[index]


def _open(source: object, stack: ExitStack) -> Checkpoint:
    if not isinstance(source, (str, Path)):
        raise InvalidInput(
            "expected a model, a state dict, or the path of a safetensors file or of a folder of "
            f"them; got {type(source).__name__}"
        )
    return stack.enter_context(open_checkpoint(source))


@dataclass(frozen=True)
class _Stored:
    """Where a matrix [D, H] is in a named tensor; layouts as in ``DownProjection``."""

    key: str
    layout: str
    shape: tuple[int, int]
    expert: int | None = None

    def read(self, tensors: _StateDict | Checkpoint | _Empty) -> torch.Tensor:
        H = self.shape[1]
        if self.layout == "ei_o":
            return tensors.read(self.key, slice(self.expert * H, (self.expert + 1) * H)).T
        matrix = tensors.read(self.key, ... if self.expert is None else self.expert)
        return matrix.T if self.layout.endswith("io") else matrix


class _Catalog:
    """The names and shapes of the tensors of a checkpoint."""

    def __init__(self, tensors: Tensors):
        self._tensors = tensors
        self._shapes = tensors.shapes()
        self._in_block: dict[str, list[str]] = {}
        for key in self._shapes:
            self._in_block.setdefault(block_of(key), []).append(key)

    def locate(self, site: Site, shape: tuple[int, int]) -> _Stored:
        """Return where the weight of ``site`` is stored, in whatever dtype."""
        return self._dense(site, shape) if site.expert is None else self._expert(site, shape)

    def find(self, site: Site, shape: tuple[int, int]) -> _Stored:
        """Return where the weight of ``site`` is stored; see ``open_weights``."""
        found = self.locate(site, shape)
        dtype = self._tensors.dtype(found.key)
        if dtype is None or not readable(dtype):
            raise InvalidInput(
                f"{found.key} of {self._tensors.label} is packed, sharded or on the meta device "
                f"({dtype}): expected a plain floating-point weight"
            )
        return found

    def _dense(self, site: Site, shape: tuple[int, int]) -> _Stored:
        key = self._named(site.name)
        D, H = shape
        stored = self._shapes[key]
        if stored not in ((D, H), (H, D)):
            raise InvalidInput(
                f"{key} of {self._tensors.label} is {list(stored)}, the coordinates are for "
                f"{list(shape)}: give the checkpoint of the same model"
            )
        transposed = stored != shape if D != H else stores_transposed(self._shapes)
        return _Stored(key, "io" if transposed else "oi", shape)

    def _named(self, name: str) -> str:
        for wanted in (f"{name}.weight", f"{name}.base_layer.weight"):
            if wanted in self._shapes:
                return wanted
            # A checkpoint may lack the model's prefix ("model."), or have one that it lacks.
            alike = [
                key
                for key in self._shapes
                if key.endswith(f".{wanted}") or (wanted.endswith(f".{key}") and block_of(key))
            ]
            if len(alike) == 1:
                return alike[0]
        known = [key.removesuffix(".weight") for key in self._shapes]
        raise InvalidInput(f"{self._tensors.label} has no {name}.weight{nearest(name, known)}")

    def _expert(self, site: Site, shape: tuple[int, int]) -> _Stored:
        """In a fused tensor as in the model; or split, or renamed, as transformers saves it."""
        name, expert = site
        D, H = shape
        block, inner = self._block_of(name)
        keys = [key for key in self._in_block.get(block, []) if _DOWN.search(key)]
        own = [key for key in keys if key.startswith(f"{block}{inner}.")]
        others = [key for key in keys if not _ATTENTION.search(key)]
        of_expert = re.compile(rf"experts?\.{expert}\.")
        split = [k for k in others if of_expert.search(k) and self._shapes[k] == shape]
        for candidates in (own, others):
            fused = [key for key in candidates if self._fits(key, site, shape)]
            if len(fused) == 1:
                return self._fused(fused[0], site, shape)
            if len(split) == 1:
                return _Stored(split[0], "oi", shape)
        raise InvalidInput(
            f"{self._tensors.label} has no down projection [{D}, {H}] for {site}, neither fused "
            f"nor split{nearest(name, keys)}; give the model instead"
        )

    def _block_of(self, name: str) -> tuple[str, str]:
        """The block of ``name`` as it is called here, and what follows it in the name."""
        block = block_of(name)
        inner = name.removeprefix(block)
        if block in self._in_block:
            return block, inner
        alike = [
            b for b in self._in_block if b and (b.endswith(f".{block}") or block.endswith(f".{b}"))
        ]
        return (alike[0] if len(alike) == 1 else block), inner

    def _fits(self, key: str, site: Site, shape: tuple[int, int]) -> bool:
        D, H = shape
        stored = self._shapes[key]
        if len(stored) == 3:
            return stored[1:] in ((D, H), (H, D)) and site.expert < stored[0]
        stacked = len(stored) == 2 and stored[1] == D and stored[0] % H == 0
        return stacked and stored[0] > H * max(site.expert, 1)

    def _fused(self, key: str, site: Site, shape: tuple[int, int]) -> _Stored:
        D, H = shape
        stored = self._shapes[key]
        if len(stored) == 2:
            return _Stored(key, "ei_o", shape, site.expert)
        if D == H:
            raise InvalidInput(
                f"{key} of {self._tensors.label} is {list(stored)}: whether its experts are "
                "transposed cannot be told from square ones; give the model instead"
            )
        return _Stored(key, "eoi" if stored[1:] == shape else "eio", shape, site.expert)
