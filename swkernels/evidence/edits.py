"""Chosen weights of a model, changed for a while and put back bit for bit.

A weight is changed where it lies: there is never a copy of the model or of a matrix, and each
saved value is one element. Values are put back whatever ends the block, Ctrl-C included.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from swkernels.detect.evaluate import scaled
from swkernels.errors import InvalidInput
from swkernels.models import find_down_projections
from swkernels.quant.super_weights import read_super_weights
from swkernels.train import Coordinates
from swkernels.train.sites import find_targets
from swkernels.train.weights import Site, Weight, find_weights

_INLINE = re.compile(r"(?P<where>.+?)(@(?P<expert>\d+))?:(?P<row>\d+):(?P<column>\d+)")
CATALOGUE = "catalogue"
TOGETHER = "all together"  # what results call all the weights that a caller names


@dataclass(frozen=True)
class Entry:
    """One scalar of a model.

    Attributes:
        weight: the matrix [D, H] that it is in.
        row, column: its output and its input channel.
        value: what it was when it was looked up.
    """

    weight: Weight
    row: int
    column: int
    value: float

    @property
    def site(self) -> Site:
        return self.weight.site

    @property
    def layer(self) -> int | None:
        """Of a down projection its block's number, from 0; None for another linear layer."""
        projection = self.weight.projection
        return None if projection is None else projection.layer

    @property
    def expert(self) -> int | None:
        """Of an expert's down projection the expert, whether it is fused or a module."""
        projection = self.weight.projection
        own = None if projection is None else projection.expert
        return self.site.expert if own is None else own

    @property
    def label(self) -> str:
        """Short and unique in its model: ``layer 11 [507, 1229]``."""
        place = str(self.site)
        if self.layer is not None:
            place = f"layer {self.layer}"
            place += "" if self.expert is None else f" expert {self.expert}"
        return f"{place} [{self.row}, {self.column}]"

    def to_dict(self) -> dict:
        """Where it is and what it was."""
        return {
            "layer": self.layer,
            "module": self.site.name,
            "expert": self.expert,
            "row": self.row,
            "column": self.column,
            "value": self.value,
        }


class Edits:
    """The entries of a model at some coordinates, and what may be done to them.

    Args:
        model: its weights are in memory, neither packed nor sharded.
        coordinates: of this model.

    Attributes:
        entries: in the order of the coordinates.
        notes: what else changes with them: one line for each weight that modules share.

    Raises:
        InvalidInput: a module, layer or expert that is not there, a weight of another shape, packed
            or sharded, or an entry that is zero (or NaN) already. Nothing has been changed.
    """

    def __init__(self, model: nn.Module, coordinates: Coordinates):
        self.model = model
        self.coordinates = coordinates
        self.entries = _entries(model, coordinates)
        self.notes = _shared(model, self.entries)

    def zeroed(self, entries: Iterable[Entry] | None = None):
        """A context in which these entries (None: all) are zero."""
        return self.scaled(0.0, entries)

    def scaled(self, factor: float, entries: Iterable[Entry] | None = None):
        """A context in which these entries (None: all) are ``factor`` times what they are."""
        chosen = self.entries if entries is None else entries
        return scaled(((e.weight.matrix(), e.row, e.column) for e in chosen), factor)


def weights_of(model: nn.Module, given: object, name: str | None = None) -> Coordinates:
    """Return the coordinates that a caller means.

    Args:
        model: the model whose weights they are.
        given: Coordinates; a ``ScanReport`` or its document; the path of a scan's report.json or
            of a file of coordinates; {name or (name, expert): [[row, column], ...]}; "catalogue",
            for what was published of the model ``name``, or "catalogue:NAME"; or
            "WHERE:ROW:COLUMN", WHERE a layer's number or a module's path, with "@EXPERT" behind it
            in a mixture of experts. A list of these means all of them together.
        name: of the model, as it was loaded.

    Raises:
        InvalidInput: none of these, or not of this model.
    """
    if isinstance(given, Coordinates):
        return given
    if isinstance(given, (list, tuple)):
        if not given:
            raise InvalidInput("no weights are named: expected one at least")
        found = [weights_of(model, one, name) for one in given]
        for more in found[1:]:
            found[0] |= more
        return found[0]
    if isinstance(given, (str, Path)):
        return _named(model, given, name)
    found = read_super_weights(given, model)
    if found is None:
        raise InvalidInput("no weights are named: expected one at least")
    return found


def _named(model: nn.Module, given: str | Path, name: str | None) -> Coordinates:
    listed = str(given).partition(":")
    if listed[0] == CATALOGUE:
        known = listed[2] or name
        if known is None:
            raise InvalidInput(f"the catalogue needs the name of the model: {CATALOGUE}:NAME")
        try:
            return Coordinates.from_catalogue(known, model)
        except InvalidInput as error:
            raise InvalidInput(f"{error}; {CATALOGUE}:NAME says which entry to take") from error
    inline = _INLINE.fullmatch(str(given))
    if inline is not None and not Path(given).exists():
        return _inline(model, inline)
    path = Path(given).expanduser()
    if path.suffix.lower() not in (".json", ".safetensors"):
        raise InvalidInput(
            f"expected a report.json, a file of coordinates, {CATALOGUE!r} or LAYER:ROW:COLUMN, "
            f"got {str(given)!r:.200}"
        )
    return read_super_weights(path)


def _inline(model: nn.Module, found: re.Match) -> Coordinates:
    where, expert = found["where"], found["expert"] and int(found["expert"])
    site, shape = _site(model, where, expert)
    row, column = int(found["row"]), int(found["column"])
    return Coordinates({site: [(row, column)]}, {site: shape})


def _site(model: nn.Module, where: str, expert: int | None) -> tuple[Site, tuple[int, int]]:
    if not where.isdecimal():
        weights = find_weights(model, [(where, expert)])
        if len(weights) > 1:
            raise InvalidInput(f"{where} holds several experts: name one, {where}@0 for the first")
        return weights[0].site, weights[0].shape
    layer, projections = int(where), find_down_projections(model)
    layers = sorted({p.layer for p in projections})
    if layer not in layers:
        raise InvalidInput(
            f"the model has no down projection in layer {layer}: it has layers {layers[0]} to "
            f"{layers[-1]}"
        )
    of_layer = [p for p in projections if p.layer == layer]
    for p in of_layer:
        if p.experts is not None and expert is not None and expert < p.experts:
            return Site(p.name, expert), (p.rows, p.columns)
        if p.experts is None and p.expert == expert:
            return Site(p.name), (p.rows, p.columns)
    if expert is None:
        raise InvalidInput(f"layer {layer} holds experts: name one, {layer}@0 for the first")
    raise InvalidInput(f"layer {layer} has no expert {expert}")


def _entries(model: nn.Module, coordinates: Coordinates) -> list[Entry]:
    entries = []
    for site, target in find_targets(model, coordinates).items():
        listed, matrix = coordinates.weights[site], target.matrix()
        rows, columns = listed.to(matrix.device).long().unbind(1)
        values = matrix[rows, columns].double().tolist()
        entries += [Entry(target, *place, v) for place, v in zip(listed.tolist(), values)]
    for entry in entries:
        if entry.value == 0 or entry.value != entry.value:
            what = "zero already" if entry.value == 0 else "NaN"
            raise InvalidInput(f"{entry.label} is {what}: there is nothing to take away")
    return entries


def _shared(model: nn.Module, entries: Sequence[Entry]) -> list[str]:
    """What each weight is called elsewhere in the model: all of them change with it."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    notes = []
    for weight in {id(e.weight.parameter): e.weight for e in entries}.values():
        alike = names.get(id(weight.parameter), [])
        if len(alike) > 1:
            notes.append(f"{alike[0]} is tied to {', '.join(alike[1:])}: they change together")
    return notes


__all__ = ["CATALOGUE", "TOGETHER", "Edits", "Entry", "weights_of"]
