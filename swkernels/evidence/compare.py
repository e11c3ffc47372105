"""Scan reports side by side: which super weights and super activations stay, move, come and go.

Reports stand in order: base before instruct, original before quantized, checkpoint after
checkpoint of a training run. The fates are defined in docs/evidence/compare.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from swkernels.detect.report import versions
from swkernels.errors import InvalidInput
from swkernels.train import Coordinates, Site
from swkernels.train.sources import open_weights

from . import compare_fates as fates
from .compare_reports import VERDICTS, Peak, Place, Report, Sighting, read_reports
from .results import Result

_AGREE = 0.01  # of a value in a report and in a checkpoint: bfloat16 has 2^-9


@dataclass(frozen=True)
class Trace:
    """One coordinate over the reports.

    Attributes:
        place: where it is.
        sightings: one for each report.
        fate: one of ``compare_fates.FATES``.
        moved_to, moved_from: labels of the coordinate that takes over, or that it takes over from.
    """

    place: Place
    sightings: tuple[Sighting, ...]
    fate: str
    moved_to: str | None = None
    moved_from: str | None = None


@dataclass(frozen=True)
class ActivationTrace:
    """The largest output of one layer over the reports.

    Attributes:
        layer: its number.
        peaks: one for each report.
        fate: one of ``compare_fates.FATES``; "unchanged" where nothing stands out in any report.
        moved_to, moved_from: the neighbouring layer that it went to or came from, or None.
    """

    layer: int
    peaks: tuple[Peak, ...]
    fate: str
    moved_to: int | None = None
    moved_from: int | None = None


@dataclass(frozen=True)
class Comparison(Result):
    """The result of ``compare``.

    Attributes:
        names: of the reports, in order.
        reports: of each, ``name``, ``model``, ``fingerprint``, ``created``, ``source`` (its path)
            and ``verified``.
        traces: every coordinate that is a candidate anywhere, by fate, then by place.
        activations: every layer.
        notes: what to mind: reports that were not verified, checkpoints that do not fit.
    """

    names: tuple[str, ...]
    reports: tuple[dict, ...]
    traces: tuple[Trace, ...]
    activations: tuple[ActivationTrace, ...]
    notes: tuple[str, ...]

    schema = "swkernels.compare/1"
    height = 7.0

    @property
    def largest(self) -> list[tuple[int, Peak]]:
        """For each report the layer and the peak of its largest super activation."""
        return [
            max(((a.layer, a.peaks[i]) for a in self.activations), key=lambda found: found[1].value)
            for i in range(len(self.names))
        ]

    def to_dict(self) -> dict:
        """The whole result as plain values; see docs/evidence/compare.md."""
        return {
            "schema": self.schema,
            "versions": versions(),
            "reports": list(self.reports),
            "coordinates": [
                t.place._asdict()
                | {"fate": t.fate, "moved_to": t.moved_to, "moved_from": t.moved_from}
                | {"sightings": [vars(sighting) for sighting in t.sightings]}
                for t in self.traces
            ],
            "activations": [vars(a) | {"peaks": [vars(p) for p in a.peaks]}
                            for a in self.activations],
            "largest": [{"layer": layer} | vars(peak) for layer, peak in self.largest],
            "notes": list(self.notes),
            "summary": str(self),
        }  # fmt: skip

    def rows(self) -> list[dict]:
        """One row a coordinate: its place, its fate, and "FIGURE NAME" for each report."""
        rows = []
        for t in self.traces:
            row = t.place._asdict() | {"fate": t.fate, "moved_to": t.moved_to}
            for name, sighting in zip(self.names, t.sightings):
                row |= {f"{figure} {name}": value for figure, value in vars(sighting).items()}
            rows.append(row)
        return rows

    def activation_rows(self) -> list[dict]:
        """One row a layer: its fate, and "FIGURE NAME" for each report."""
        rows = []
        for a in self.activations:
            row = {"layer": a.layer, "fate": a.fate, "moved_to": a.moved_to}
            for name, peak in zip(self.names, a.peaks):
                row |= {f"{figure} {name}": value for figure, value in vars(peak).items()}
            rows.append(row)
        return rows

    def __str__(self) -> str:
        """What became of the coordinates and of the largest super activation."""
        from .compare_views import summary

        return summary(self)

    def table(self):
        """Return the coordinates and the super activations, to print with rich."""
        from .compare_views import table

        return table(self)

    def _draw(self, figure) -> None:
        from .compare_views import draw

        draw(self, figure)


def compare(
    reports: Sequence[object],
    *,
    names: Sequence[str] | None = None,
    values_from: Sequence[object] | None = None,
) -> Comparison:
    """Put scan reports side by side.

    Args:
        reports: two or more, in order: ``ScanReport``, its document, or the path of a report.json
            or of the folder it is in. All of one architecture.
        names: one for each report, all different; None: those of the models, numbered where they
            are the same.
        values_from: for each report what its weights can be read from where it does not list a
            coordinate, or None: a safetensors file or folder, a state dict or a model.

    Raises:
        InvalidInput: fewer than two reports, a damaged one, models of other shapes (the message
            names what differs), names or checkpoints that do not fit in number, or a checkpoint
            without one of the weights.
    """
    read = read_reports(reports)
    names = _names(read, names)
    notes = [f"{name} was not verified: fates go by whether a coordinate is a candidate"
             for name, report in zip(names, read) if not report.verified]  # fmt: skip
    places = sorted({place for report in read for place in report.found}, key=_order)
    sightings = {p: [report.found.get(p, Sighting()) for report in read] for p in places}
    if values_from is not None:
        _add_values(read, names, values_from, sightings, notes)
    verified = all(report.verified for report in read)
    levels = {p: fates.levels_of(seen, verified) for p, seen in sightings.items()}
    pairs = fates.moves(levels, sightings)
    back = {new: old for old, new in pairs.items()}
    traces = []
    for p in places:
        fate = fates.MOVES if p in pairs or p in back else fates.fate_of(levels[p])
        to, origin = (found[p].label if p in found else None for found in (pairs, back))
        traces.append(Trace(p, tuple(sightings[p]), fate, to, origin))
    traces.sort(key=lambda t: fates.FATES.index(t.fate))
    about = tuple(_about(name, report) for name, report in zip(names, read))
    return Comparison(names, about, tuple(traces), tuple(_activations(read)), tuple(notes))


def _names(reports: list[Report], names: Sequence[str] | None) -> tuple[str, ...]:
    if names is None:
        own = [report.model.rstrip("/").rpartition("/")[2] or report.model for report in reports]
        twice = {name for name in own if own.count(name) > 1}
        return tuple(f"{n} ({i})" if n in twice else n for i, n in enumerate(own, 1))
    names = tuple(names)
    if len(names) != len(reports) or len(set(names)) != len(names) or not all(names):
        raise InvalidInput(
            f"expected {len(reports)} different names, one for each report, got "
            f"{', '.join(map(str, names)) or 'none'}"
        )
    return names


def _about(name: str, report: Report) -> dict:
    return {
        "name": name,
        "model": report.model,
        "fingerprint": report.data["model"].get("fingerprint"),
        "created": report.data.get("created"),
        "source": report.label,
        "verified": report.verified,
    }


def _order(place: Place) -> tuple:
    return place.layer, place.module, -1 if place.expert is None else place.expert, *place[3:]


def _add_values(reports, names, sources, sightings: dict, notes: list[str]) -> None:
    """Fill in the values that reports do not have; note a checkpoint that has other ones."""
    if len(sources) != len(reports):
        raise InvalidInput(
            f"expected a checkpoint for each of the {len(reports)} reports, got {len(sources)}"
        )
    listed = [Coordinates.from_report(r.data, VERDICTS) for r in reports if r.found]
    if not listed:
        return
    coordinates = listed[0]
    for more in listed[1:]:
        coordinates |= more
    for number, (source, name) in enumerate(zip(sources, names)):
        if source is None:
            continue
        with ExitStack() as stack:
            read = open_weights(source, coordinates, stack)
            matrices: dict[Site, object] = {}
            for place, seen in sightings.items():
                # Only a site of fused experts has an expert beside the module.
                site = Site(place.module, place.expert)
                site = site if site in coordinates.weights else Site(place.module)
                if site not in matrices:
                    matrices = {site: read(site)}  # one matrix at a time is in memory
                value = float(matrices[site][place.row, place.column])
                known = seen[number].value
                if known is None:
                    seen[number] = replace(seen[number], value=value)
                elif not math.isclose(known, value, rel_tol=_AGREE):
                    notes.append(
                        f"{place.label} is {known:.4g} in the report {name} and {value:.4g} in the "
                        "checkpoint beside it: are they of one model?"
                    )


def _activations(reports: list[Report]) -> list[ActivationTrace]:
    series = {layer: tuple(report.peaks[layer] for report in reports) for layer in reports[0].peaks}
    channels = {
        layer: [peak.channel if peak.super else None for peak in peaks]
        for layer, peaks in series.items()
    }
    pairs = fates.activation_moves(channels)
    back = {new: old for old, new in pairs.items()}
    traces = []
    for layer, peaks in series.items():
        moved = layer in pairs or layer in back
        fate = fates.MOVES if moved else fates.activation_fate(channels[layer])
        traces.append(ActivationTrace(layer, peaks, fate, pairs.get(layer), back.get(layer)))
    return traces


__all__ = ["ActivationTrace", "Comparison", "Trace", "compare"]
