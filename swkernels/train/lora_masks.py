"""Which rows, columns and positions of a layer's adapted weights coordinates name.

The study's coordinates are super weights of down projections; its adapters lie on the attention
projections of the same layer. A coordinate (row, column) counts for an adapted weight [D, H] where
it lies inside it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from swkernels.errors import InvalidInput
from swkernels.files import read_json
from swkernels.models.structure import features

from .coordinates import Coordinates
from .weights import as_site, block_of, nearest

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Place:
    """What coordinates are of one adapted weight.

    Attributes:
        inside: int64 [k, 2], those that lie in the weight; sorted, all different.
        outside: how many of its layer's coordinates do not.
    """

    inside: torch.Tensor
    outside: int


class LayerCoordinates:
    """Coordinates by module or by layer, as masks take them.

    Args:
        given: a ``Coordinates``; the path of a file that it saved, or of a scan's report; or a
            dict {module name or number of the layer: [[row, column], ...]}.

    Raises:
        InvalidInput: none of these, or no coordinate at all.
    """

    def __init__(self, given: Coordinates | str | os.PathLike | Mapping):
        if isinstance(given, (str, os.PathLike)):
            given = _of_file(given)
        if isinstance(given, Coordinates):
            listed = [(site.name, pairs) for site, pairs in given.weights.items()]
        elif isinstance(given, Mapping) and given:
            listed = list(given.items())
        else:
            raise InvalidInput(
                "coordinates must be a Coordinates, the path of a file or report, or a dict "
                f"{{module or layer: [[row, column], ...]}} that is not empty, got {given!r:.80}"
            )
        self.listed: dict[str | int, torch.Tensor] = {}
        for key, pairs in listed:
            pairs = _pairs(key, pairs)
            before = self.listed.get(key, pairs[:0])  # the experts of one module come one by one
            self.listed[key] = torch.cat([before, pairs]).unique(dim=0)

    def place(self, name: str, shape: tuple[int, int], adapted: Iterable[str] = ()) -> Place:
        """Return the coordinates of one adapted weight.

        Those listed under its own name, if any; else those of its layer: by the layer's number,
        or under the name of a module of the same layer that is not adapted itself.

        Args:
            name: of the adapted module.
            shape: (D, H) of its weight.
            adapted: names of all adapted modules.
        """
        found = self.listed.get(name)
        if found is None:
            adapted, block = set(adapted), block_of(name)
            parts = [
                pairs
                for key, pairs in self.listed.items()
                if key not in adapted and block and _in_block(key, block)
            ]
            found = torch.cat([torch.empty(0, 2, dtype=torch.int64), *parts]).unique(dim=0)
        inside = (found < torch.tensor(shape)).all(1)
        return Place(found[inside], int((~inside).sum()))


@dataclass(frozen=True)
class MaskedModule:
    """What a mask touches in one module's LoRA.

    Attributes:
        name, shape: of the adapted weight [D, H].
        parameters: of its LoRA, r (D + H).
        positions: coordinates inside the weight.
        rows, columns: how many different rows and columns these have.
        outside: coordinates of its layer that lie outside the weight.
        rows_in_bounds, columns_in_bounds: different rows below D and columns below H among all
            coordinates of the layer, wherever the other index lies.
        touched: parameters in these rows of B and columns of A, r (rows + columns).
    """

    name: str
    shape: tuple[int, int]
    parameters: int
    positions: int
    rows: int
    columns: int
    outside: int
    rows_in_bounds: int
    columns_in_bounds: int
    touched: int


@dataclass(frozen=True)
class LoraMaskReport:
    """How much of a LoRA masks on rows of B and columns of A touch, per module and in total."""

    modules: tuple[MaskedModule, ...]

    @property
    def parameters(self) -> int:
        """Of all the modules' LoRA."""
        return sum(module.parameters for module in self.modules)

    @property
    def touched(self) -> int:
        """In masked rows of B and columns of A."""
        return sum(module.touched for module in self.modules)

    @property
    def outside(self) -> int:
        """Coordinates outside a weight, counted once for each weight."""
        return sum(module.outside for module in self.modules)

    def __str__(self) -> str:
        lines = [
            f"{m.name} {m.shape[0]} x {m.shape[1]}: {m.rows} rows, {m.columns} columns, "
            f"{m.positions} positions, {m.outside} outside; {m.touched:,} of {m.parameters:,}"
            for m in self.modules
        ]
        share = self.touched / self.parameters
        return "\n".join(
            [*lines, f"in total {self.touched:,} of {self.parameters:,} ({share:.2%})"]
        )


def lora_mask_report(
    where: nn.Module | Mapping[str, tuple[int, int]],
    coordinates: Coordinates | str | os.PathLike | Mapping,
    *,
    r: int = 8,
    target_modules: Iterable[str] = ATTENTION,
    strict: bool = False,
) -> LoraMaskReport:
    """Count what masks on rows of B and columns of A would touch.

    Args:
        where: the model, or (D, H) of each adapted module by name.
        coordinates: as of ``LayerCoordinates``.
        r: rank of the LoRA.
        target_modules: last parts of the names of the adapted modules in a model.
        strict: raise if a coordinate lies outside a weight.

    Raises:
        InvalidInput: no such module, r below 1, or ``strict``.
    """
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise InvalidInput(f"r must be an integer from 1, got {r!r}")
    shapes = where
    if isinstance(where, nn.Module):
        ends = tuple(target_modules)
        linear = {name: shape for name, m in where.named_modules() if (shape := features(m))}
        shapes = {name: s for name, s in linear.items() if name.rpartition(".")[2] in ends}
        if not shapes:
            near = nearest(ends[0], [name.rpartition(".")[2] for name in linear]) if ends else ""
            raise InvalidInput(f"the model has no linear layer called {', '.join(ends)}{near}")
    listed = LayerCoordinates(coordinates)
    modules = [_count(name, shape, listed, set(shapes), r) for name, shape in shapes.items()]
    if strict:
        check_inside({m.name: (m.outside, m.shape) for m in modules})
    return LoraMaskReport(tuple(modules))


def check_inside(outside: Mapping[str, tuple[int, tuple[int, int]]]) -> None:
    """Raise InvalidInput if coordinates of a layer lie outside an adapted weight of it.

    Args:
        outside: by module, how many do, and (D, H) of its weight.
    """
    for name, (count, (D, H)) in outside.items():
        if count:
            raise InvalidInput(
                f"{count} coordinates of its layer lie outside {name}, which is [{D}, {H}]: leave "
                "them out, or pass strict=False to pass over them"
            )


def _count(name, shape, listed: LayerCoordinates, adapted: set[str], r: int) -> MaskedModule:
    D, H = shape
    place = listed.place(name, shape, adapted)
    rows, columns = (len(index.unique()) for index in place.inside.unbind(1))
    every = listed.place(name, (2**31, 2**31), adapted).inside
    return MaskedModule(
        name,
        (D, H),
        r * (D + H),
        len(place.inside),
        rows,
        columns,
        place.outside,
        len(every[every[:, 0] < D, 0].unique()),
        len(every[every[:, 1] < H, 1].unique()),
        r * (rows + columns),
    )


def _of_file(path: str | os.PathLike) -> Coordinates:
    document = read_json(path) if Path(path).suffix == ".json" else None
    is_report = isinstance(document, dict) and "candidates" in document
    return Coordinates.from_report(path) if is_report else Coordinates.load(path)


def _pairs(key: object, pairs: object) -> torch.Tensor:
    if isinstance(key, tuple):
        key = as_site(key).name
    if isinstance(key, bool) or not isinstance(key, (str, int)):
        raise InvalidInput(f"expected the name of a module or the number of a layer, got {key!r}")
    try:
        given = torch.as_tensor(pairs)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"the coordinates of {key} must be integers [k, 2]: {error}") from error
    if given.dim() != 2 or given.shape[1] != 2 or given.is_floating_point() or len(given) == 0:
        raise InvalidInput(
            f"the coordinates of {key} must be integers [k, 2] (row, column), got {given.dtype} "
            f"{list(given.shape)}"
        )
    if (given < 0).any():
        raise InvalidInput(f"a coordinate of {key} is negative: rows and columns count from 0")
    return given.long().cpu()


def _in_block(key: str | int, block: str) -> bool:
    return block.endswith(f".{key}") if isinstance(key, int) else block_of(key) == block
