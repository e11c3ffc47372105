"""Scan reports as ``compare`` reads them: checked, and only what a comparison needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from swkernels.detect.report import SCHEMA, ScanReport
from swkernels.detect.table import position
from swkernels.errors import InvalidInput

UNVERIFIED = "candidate"
VERDICTS = ("inert", "mild", UNVERIFIED, "part of a critical set", "super weight")


class Place(NamedTuple):
    """A coordinate of a down projection, as a report names it."""

    layer: int
    module: str
    expert: int | None
    row: int
    column: int

    @property
    def label(self) -> str:
        """``layer 11 [507, 1229]``."""
        return position(self._asdict())


@dataclass(frozen=True)
class Sighting:
    """What one report says of a coordinate.

    Attributes:
        verdict: None where the report does not list it as a candidate.
        value: the weight: of the report, else of the checkpoint beside it, else None.
        in_peak, out_peak: of its input and its output channel; None where it is not listed.
        ratio: perplexity with this weight zeroed over the intact one; None where not measured.
    """

    verdict: str | None = None
    value: float | None = None
    in_peak: float | None = None
    out_peak: float | None = None
    ratio: float | None = None


@dataclass(frozen=True)
class Peak:
    """The largest output of a layer's down projection, over the layer's experts.

    Attributes:
        channel: the output channel.
        value: its magnitude.
        text: the token, decoded, or None.
        prominence: ``value`` over the median channel peak.
        super: whether the prominence reaches what the scan asks of a candidate.
    """

    channel: int
    value: float
    text: str | None
    prominence: float
    super: bool


@dataclass(frozen=True)
class Report:
    """One report.

    Attributes:
        data: the document.
        label: what error messages call it: its path, or its number in the list.
        model: the name in it.
        shapes: (rows, columns) by layer and module, of every layer that has a peak.
        dense: by layer, whether it has no experts.
        found: the candidates.
        peaks: by layer, in the order of layers.
    """

    data: dict
    label: str
    model: str
    shapes: dict[int, dict[str, tuple[int, int]]]
    dense: dict[int, bool]
    found: dict[Place, Sighting]
    peaks: dict[int, Peak]

    @property
    def verified(self) -> bool:
        """Whether its candidates were measured (true where there are none)."""
        return all(sighting.verdict != UNVERIFIED for sighting in self.found.values())


def read_reports(given: object) -> list[Report]:
    """Read two or more reports of one architecture; see ``compare``.

    Raises:
        InvalidInput: fewer, one that is no report or damaged, or models of different shapes.
    """
    listed = isinstance(given, Sequence) and not isinstance(given, str)
    if not listed or len(given) < 2:
        count = len(given) if listed else 0
        raise InvalidInput(f"a comparison needs two reports at least, got {count}: name more")
    reports = [_read(one, number) for number, one in enumerate(given, 1)]
    for other in reports[1:]:
        _check_alike(reports[0], other)
    return reports


def _read(given: object, number: int) -> Report:
    label = f"report {number}"
    if isinstance(given, (str, Path)):
        label = str(given)
        path = Path(given).expanduser()
        given = ScanReport.load(path / "report.json" if path.is_dir() else path)
    data = given.data if isinstance(given, ScanReport) else given
    if not isinstance(data, Mapping):
        raise InvalidInput(
            f"{label}: expected a ScanReport, its document or the path of one, got "
            f"{type(given).__name__}"
        )
    if data.get("schema") != SCHEMA:
        raise InvalidInput(
            f"{label}: expected a report of schema {SCHEMA}, got {data.get('schema')!r:.100}"
        )
    try:
        return _parse(dict(data), label)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidInput(
            f"{label} is damaged ({type(error).__name__} {error}): scan the model again"
        ) from error


def _parse(data: dict, label: str) -> Report:
    shapes: dict[int, dict[str, tuple[int, int]]] = {}
    dense: dict[int, bool] = {}
    peaks: dict[int, Peak] = {}
    least = _number(data["settings"]["prominence"])
    for entry in data["layers"]:
        layer = _count(entry["layer"])
        shapes.setdefault(layer, {})[_text(entry["module"])] = (
            _count(entry["rows"]),
            _count(entry["columns"]),
        )
        dense[layer] = entry["expert"] is None
        peak = _peak(entry, least)
        if layer not in peaks or peak.value > peaks[layer].value:
            peaks[layer] = peak
    if not shapes:
        raise ValueError("no layers")
    found = {}
    for c in data["candidates"]:
        expert = None if c["expert"] is None else _count(c["expert"])
        place = Place(
            _count(c["layer"]), _text(c["module"]), expert, _count(c["row"]), _count(c["column"])
        )
        rows, columns = shapes[place.layer][place.module]
        if place.row >= rows or place.column >= columns:
            raise ValueError(f"{place.label} lies outside [{rows}, {columns}]")
        verdict = c["verdict"]
        if verdict not in VERDICTS:
            raise ValueError(f"unknown verdict {verdict!r:.100}")
        numbers = [_number(c[key]) for key in ("weight", "in_peak", "out_peak")]
        ratio = None if c["ratio"] is None else _number(c["ratio"])
        found[place] = Sighting(verdict, *numbers, ratio)
    model = _text(data["model"]["name"])
    return Report(data, label, model, shapes, dense, found, dict(sorted(peaks.items())))


def _peak(entry: Mapping, least: float) -> Peak:
    peak, median = entry["out_peak"], _number(entry["out_median"])
    value = _number(peak["value"])
    prominence = value / median if median else (math.inf if value else 0.0)
    text = None if peak["text"] is None else _text(peak["text"])
    return Peak(_count(peak["channel"]), value, text, prominence, prominence >= least)


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"expected a number from 0, got {value!r:.100}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a text, got {value!r:.100}")
    return value


def _number(value: object) -> float:
    """A number; a document that was read as plain JSON has infinities as strings."""
    if isinstance(value, bool):
        raise ValueError(f"expected a number, got {value}")
    return float(value)


def _check_alike(one: Report, other: Report) -> None:
    """Refuse models that differ in layers, in the shapes of their weights, or in modules."""
    ours, theirs = one.shapes, other.shapes
    both = f"{one.label} ({one.model}) and {other.label} ({other.model})"
    what = "only reports of one architecture can be compared"
    if ours.keys() != theirs.keys():
        counts = f"{len(ours)} and {len(theirs)} layers"
        if len(ours) == len(theirs):
            counts = f"other layers, {sorted(ours.keys() ^ theirs.keys())[0]} in one of them alone"
        raise InvalidInput(f"{both} have {counts}: {what}")
    for layer in ours:
        mine, others = ours[layer], theirs[layer]
        for module in mine.keys() & others.keys():
            if mine[module] != others[module]:
                raise InvalidInput(
                    f"{both} differ: {module} is {list(mine[module])} and {list(others[module])}; "
                    f"{what}"
                )
        if set(mine.values()) != set(others.values()):
            shapes = [sorted(map(list, set(s.values()))) for s in (mine, others)]
            raise InvalidInput(
                f"{both} differ: the weights of layer {layer} are {shapes[0]} and {shapes[1]}; "
                f"{what}"
            )
        if one.dense[layer] != other.dense[layer]:
            raise InvalidInput(
                f"{both} differ: layer {layer} has experts in one of them alone; {what}"
            )
        # Of experts that are modules one run may reach some, and another run others.
        if one.dense[layer] and mine.keys() != others.keys():
            names = [min(set(s) - set(o) or s) for s, o in ((mine, others), (others, mine))]
            raise InvalidInput(
                f"{both} differ: layer {layer} has {names[0]} in one and {names[1]} in the other; "
                f"{what}"
            )


__all__ = ["UNVERIFIED", "Peak", "Place", "Report", "Sighting", "read_reports"]
