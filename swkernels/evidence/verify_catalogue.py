"""What was published of a model, measured on the checkpoint that is here.

Published coordinates hold for the weights that they were found in. Most of them do nothing when
they are zeroed alone, and a descendant or a quantized copy may have moved on: so every entry is
zeroed alone, all of them together, and random weights beside them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from swkernels.detect.scan import ScanConfig
from swkernels.detect.verify import CRITICAL_SET, INERT, MILD, SUPER_WEIGHT
from swkernels.errors import InvalidInput
from swkernels.train import CatalogueEntry, Coordinates
from swkernels.train.published import find_entry

from .ablate import ablate
from .ablation import CONTROLS, Ablation, Condition
from .edits import TOGETHER, Entry
from .results import Progress, Result, silent
from .yardstick import Yardstick

_MORE = 1.2  # log ratios: a set matters beyond its worst member, as the scan has it
_AGREE = 0.01  # of a published value: it is printed with four digits, bfloat16 has 2^-9


@dataclass(frozen=True)
class CheckedEntry:
    """One published coordinate.

    Attributes:
        entry: where it is and what its value is here.
        published: its published value, or None.
        condition: it alone zeroed.
        verdict: "super weight", "mild" or "inert".
    """

    entry: Entry
    published: float | None
    condition: Condition
    verdict: str

    @property
    def as_published(self) -> bool | None:
        """Whether its value is the published one to within 1 %; None where none was published."""
        if self.published is None:
            return None
        return math.isclose(self.entry.value, self.published, rel_tol=_AGREE)

    def to_dict(self) -> dict:
        return self.entry.to_dict() | {
            "published": self.published,
            "as_published": self.as_published,
            "ratio": self.condition.ratio,
            "error": self.condition.error,
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class CatalogueCheck(Result):
    """The result of ``verify_catalogue``.

    Attributes:
        published: the entry of the catalogue.
        entries: each coordinate, checked.
        together: all of them zeroed.
        verdict: of the set: "critical set", "mild" or "inert"; of a single coordinate its own.
        ablation: everything that was measured.
    """

    published: CatalogueEntry
    entries: tuple[CheckedEntry, ...]
    together: Condition
    verdict: str
    ablation: Ablation

    schema = "swkernels.catalogue-check/1"

    @property
    def controls(self) -> list[Condition]:
        """Random weights zeroed, as many as the set has."""
        return _controls(self.ablation)

    def to_dict(self) -> dict:
        """The whole result as plain values; see docs/evidence/catalogue.md."""
        return {
            "schema": self.schema,
            "published": self.published.to_dict(),
            "entries": [checked.to_dict() for checked in self.entries],
            "together": {
                "ratio": self.together.ratio,
                "error": self.together.error,
                "verdict": self.verdict,
            },
            "ablation": self.ablation.to_dict(),
            "summary": str(self),
        }

    def rows(self) -> list[dict]:
        """One row for each coordinate, for the set where it has several, and for each control."""
        rows = [
            {
                "zeroed": checked.entry.label,
                "value": checked.entry.value,
                "published": checked.published,
                "ratio": checked.condition.ratio,
                "error": checked.condition.error,
                "verdict": checked.verdict,
            }
            for checked in self.entries
        ]
        others = [(self.together, self.verdict)] if len(self.entries) > 1 else []
        rows += [
            {"zeroed": c.label, "ratio": c.ratio, "error": c.error, "verdict": verdict}
            for c, verdict in [*others, *((control, None) for control in self.controls)]
        ]
        return rows

    def __str__(self) -> str:
        """What holds on this checkpoint, in sentences."""
        return " ".join([_holds(self), *_warnings(self)])

    @property
    def height(self) -> float:
        return self.ablation.height

    def _draw(self, figure) -> None:
        self.ablation._draw(figure)


def verify_catalogue(
    model: nn.Module,
    name: str,
    yardstick: Yardstick,
    *,
    controls: int = 3,
    seed: int = 42,
    progress: Progress = silent,
) -> CatalogueCheck:
    """Zero what was published of a model, as a set and one by one, and say what holds.

    The verdicts are the scan's (docs/report.md), by the perplexity ratio alone: "super weight" (of
    a set "critical set") from 4, "mild" from 1.05, both only above every control; else "inert". A
    ratio that is not finite is above every number. The weights are put back bit for bit.

    Args:
        model: its weights are in memory, neither packed nor sharded.
        name: of the catalogue's entry; see ``find_entry``.
        yardstick: with a text.
        controls: draws of random weights of the same matrices, and as many of about the same
            magnitude, each as large as the set.
        seed: of the draws.
        progress: see ``ablate``.

    Raises:
        InvalidInput: no such entry, a model of other shapes, no text, a coordinate that is zero
            already, or as ``ablate``.
    """
    published = find_entry(name)
    if yardstick.tokens is None:
        raise InvalidInput("verdicts go by perplexity, which needs a text: give one")
    coordinates = Coordinates.from_catalogue(name, model)
    ablation = ablate(
        model,
        coordinates,
        yardstick,
        conditions=("set", "each", *CONTROLS),
        controls=controls,
        seed=seed,
        name=published.model,
        progress=progress,
    )
    [together] = ablation.of_kind("set")
    alone = ablation.of_kind("each") or [together]
    highest = max((_severity(c) for c in _controls(ablation)), default=0.0)
    known = dict(zip(published.positions, published.values))
    checked = []
    for entry, condition in zip(ablation.sets[TOGETHER], alone):
        place = entry.layer, entry.expert, entry.row, entry.column
        verdict = _verdict(condition, highest, SUPER_WEIGHT)
        checked.append(CheckedEntry(entry, known.get(place), condition, verdict))
    critical = CRITICAL_SET if len(checked) > 1 else SUPER_WEIGHT
    verdict = _verdict(together, highest, critical)
    return CatalogueCheck(published, tuple(checked), together, verdict, ablation)


def _controls(ablation: Ablation) -> list[Condition]:
    return [condition for kind in CONTROLS for condition in ablation.of_kind(kind)]


def _severity(condition: Condition) -> float:
    """The perplexity ratio; of a loss that is no number infinity."""
    return math.inf if math.isnan(condition.ratio) else condition.ratio


def _verdict(condition: Condition, highest: float, critical: str) -> str:
    ratio = _severity(condition)
    if ratio < ScanConfig.mild_ratio or ratio <= highest:
        return INERT
    return critical if ratio >= ScanConfig.critical_ratio else MILD


def _holds(check: CatalogueCheck) -> str:
    total, by = len(check.entries), f"perplexity x{check.together.ratio:.4g}"
    if total == 1:
        found = "a super weight" if check.verdict == SUPER_WEIGHT else check.verdict
        return f"The published coordinate {check.entries[0].entry.label} is {found} here: {by}."
    counts = {v: sum(e.verdict == v for e in check.entries) for v in (SUPER_WEIGHT, MILD, INERT)}
    said = [_counted(verdict, count) for verdict, count in counts.items() if count]
    alone = f"Of the {total} published coordinates {', '.join(said)} when zeroed alone"
    if len(said) == 1:
        alone = f"All {total} published coordinates {said[0].partition(' ')[2]} when zeroed alone"
    if check.verdict != CRITICAL_SET:
        return f"{alone}; together they are {check.verdict}: {by}."
    worst = max(_severity(e.condition) for e in check.entries)
    more = _severity(check.together) > worst**_MORE
    matters = "; the set is what matters" if more else ""
    return f"{alone}; together they are a critical set: {by}{matters}."


def _counted(verdict: str, count: int) -> str:
    words = {SUPER_WEIGHT: "a super weight" if count == 1 else "super weights"}
    return f"{count} {'is' if count == 1 else 'are'} {words.get(verdict, verdict)}"


def _warnings(check: CatalogueCheck) -> list[str]:
    said = []
    controls = [c.ratio for c in check.controls]
    if controls:
        said.append(f"Random weights: x{min(controls):.4g} to x{max(controls):.4g}.")
    else:
        said.append("No random weights were zeroed for comparison.")
    other = [e.entry.label for e in check.entries if e.as_published is False]
    if other:
        said.append(f"Other values than published: {', '.join(other)}; it may be another model.")
    broken = [c.label for c in check.ablation.conditions if c.not_finite]
    if broken:
        said.append(f"Losses are not finite: {', '.join(broken)}.")
    return said


__all__ = ["CatalogueCheck", "CheckedEntry", "verify_catalogue"]
