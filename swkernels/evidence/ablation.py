"""What an ablation found: conditions beside the intact model, as a document, a table, a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from swkernels.detect.report import versions
from swkernels.train.figure import LINE, MARK, MUTED, log_where_wide

from .edits import Entry
from .results import Result
from .yardstick import Scores

KINDS = ("intact", "set", "restored", "each", "all-but-one", "random", "magnitude")
CONTROLS = ("random", "magnitude")
_LINES = 40  # of a figure


@dataclass(frozen=True)
class Condition:
    """One state of the model and what the yardstick read on it.

    Attributes:
        kind: one of ``KINDS``.
        of: the name of the set that it belongs to; None of the intact model.
        label: unique in its ablation.
        entries: the weights that were zero.
        scores: what was read.
        intact: what was read on the intact model.
        matched: of a control of equal magnitude, the median over its weights of the smaller
            magnitude over the larger (1 is a perfect match); None of the others.
    """

    kind: str
    of: str | None
    label: str
    entries: tuple[Entry, ...]
    scores: Scores
    intact: Scores = field(repr=False)
    matched: float | None = None

    @property
    def ratio(self) -> float | None:
        """Perplexity over the intact model's; None without a text."""
        return self.scores.ratio(self.intact)[0]

    @property
    def error(self) -> float | None:
        """Standard error of ``ratio`` over windows; see ``Scores.ratio``."""
        return self.scores.ratio(self.intact)[1]

    @property
    def stop_words(self) -> dict[str, float]:
        """Of each stop word how many times as likely it is as in the intact model."""
        if self.scores.stop_words is None:
            return {}
        return self.scores.stop_words.ratios(self.intact.stop_words)

    @property
    def not_finite(self) -> int:
        """Windows and questions whose score is NaN or infinite."""
        return self.scores.not_finite

    def changes(self) -> dict:
        """Of each task the comparison with the intact model, question by question."""
        pairs = self.scores.choices.items()
        return {name: scores.compare(self.intact.choices[name]) for name, scores in pairs}

    def row(self) -> dict:
        """The figures that fit into one row of a table."""
        row = {"condition": self.label, "weights": len(self.entries)}
        row |= self.scores.row()
        if self.scores.perplexity is not None:
            row |= {"ratio": self.ratio, "error": self.error}
        for name, change in self.changes().items():
            row[f"{name} change"] = change.difference
        if self.scores.stop_words is not None:
            mean = self.intact.stop_words.mean
            row["stop words ratio"] = self.scores.stop_words.mean / mean if mean else math.nan
        if self.matched is not None:
            row["matched"] = self.matched
        if self.not_finite:
            row["not finite"] = self.not_finite
        return row

    def to_dict(self) -> dict:
        """What was done, what was read, and what follows from it."""
        return {
            "kind": self.kind,
            "set": self.of,
            "label": self.label,
            "weights": [entry.to_dict() for entry in self.entries],
            "matched": self.matched,
            "ratio": self.ratio,
            "error": self.error,
            "changes": {name: change.to_dict() for name, change in self.changes().items()},
            "stop_words": self.stop_words,
            "not_finite": self.not_finite,
            "scores": self.scores.to_dict(),
        }


@dataclass(frozen=True)
class Ablation(Result):
    """The result of ``ablate``.

    Attributes:
        model: its name, or its class.
        measures: what it was measured by, as ``Yardstick.to_dict`` says it.
        sets: the weights of each set, with their values.
        conditions: the intact model first, then those of one set after another.
        notes: what else changes with the weights, and what was left out.
        seed: of the controls.
        activations: what was put back: of each channel its largest peak, and at which tokens.
    """

    model: str
    measures: dict
    sets: Mapping[str, tuple[Entry, ...]]
    conditions: tuple[Condition, ...]
    notes: tuple[str, ...]
    seed: int
    activations: tuple[dict, ...] = ()

    schema = "swkernels.ablate/1"

    @property
    def intact(self) -> Condition:
        return self.conditions[0]

    def __getitem__(self, label: str) -> Condition:
        """The condition of this label; raises KeyError."""
        for condition in self.conditions:
            if condition.label == label:
                return condition
        raise KeyError(label)

    def of_kind(self, kind: str, of: str | None = None) -> list[Condition]:
        """The conditions of one kind, of all sets or of one."""
        return [c for c in self.conditions if c.kind == kind and of in (None, c.of)]

    def recovered(self, of: str) -> dict[str, float]:
        """What the activation, put back, recovers of what a set loses: 1 is all, 0 nothing.

        Of "perplexity" the share of the loss in nats, of each task the share of its accuracy.
        Left out where nothing was lost, or where a score is not finite; empty if the set was not
        both zeroed and restored.
        """
        gone, back = self.of_kind("set", of), self.of_kind("restored", of)
        if not gone or not back:
            return {}
        scores = [c.scores for c in (self.intact, gone[0], back[0])]
        found = {}
        if scores[0].perplexity is not None:
            found["perplexity"] = [-score.perplexity.loss for score in scores]
        for name in scores[0].choices:
            found[name] = [score.choices[name].accuracy for score in scores]
        return {
            name: (restored - lost) / (intact - lost)
            for name, (intact, lost, restored) in found.items()
            if intact > lost and math.isfinite(lost) and math.isfinite(restored)
        }

    def rows(self) -> list[dict]:
        """One row for each condition, the intact model's first."""
        return [condition.row() for condition in self.conditions]

    def to_dict(self) -> dict:
        """The whole result as plain values; see docs/evidence/ablate.md."""
        return {
            "schema": self.schema,
            "versions": versions("torch", "transformers"),
            "model": self.model,
            "measures": self.measures,
            "seed": self.seed,
            "sets": {
                name: [entry.to_dict() for entry in entries] for name, entries in self.sets.items()
            },
            "notes": list(self.notes),
            "activations": list(self.activations),
            "recovered": {name: self.recovered(name) for name in self.sets},
            "conditions": [condition.to_dict() for condition in self.conditions],
            "summary": str(self),
        }

    def __str__(self) -> str:
        """What each set does, in sentences."""
        return " ".join(said for name in self.sets for said in _sentences(self, name))

    @property
    def height(self) -> float:
        lines = len(_lines(self, *_panels(self)[0]))
        return 0.9 + 0.24 * lines + 0.5

    def _draw(self, figure) -> None:
        panels = _panels(self)
        every = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axes, panel in zip(every, panels):
            _draw_panel(axes, _lines(self, *panel), *panel)


def _sentences(ablation: Ablation, name: str) -> list[str]:
    said = []
    for condition in ablation.of_kind("set", name) + ablation.of_kind("restored", name):
        if condition.not_finite:
            said.append(f"{condition.label}: {condition.not_finite} scores are not finite.")
        if condition.ratio is not None and math.isfinite(condition.ratio):
            error = "" if condition.error is None else f" ± {condition.error:.2g}"
            said.append(f"{condition.label}: perplexity x{condition.ratio:.4g}{error}.")
    for measure, share in ablation.recovered(name).items():
        said.append(f"The activation put back recovers {share:.0%} of the loss ({measure}).")
    for kind, what in zip(CONTROLS, ("Random weights of the same matrices", "Of equal magnitude")):
        ratios = [c.ratio for c in ablation.of_kind(kind, name) if c.ratio is not None]
        if ratios:
            said.append(f"{what}: x{min(ratios):.4g} to x{max(ratios):.4g}.")
    return said


def _panels(ablation: Ablation) -> list[tuple[str, str | None]]:
    """(title, task) of what is drawn: the perplexity (task None), then each task."""
    tasks = [(f"{name}, change of accuracy", name) for name in ablation.intact.scores.choices]
    has_text = ablation.intact.scores.perplexity is not None
    return ([("perplexity / intact", None)] if has_text else []) + tasks


def _lines(ablation: Ablation, title: str, task: str | None) -> list[tuple[str, bool, list]]:
    """(label, whether these are controls, [(value, error or None)]) from top to bottom."""
    lines: dict[tuple, list] = {}
    labels: dict[tuple, str] = {}
    for condition in ablation.conditions[1:]:
        control = condition.kind in CONTROLS
        key = (condition.of, condition.kind) if control else (condition.label,)
        labels[key] = condition.label.rpartition(" ")[0] if control else condition.label
        value = condition.ratio, condition.error
        if task is not None:
            change = condition.changes()[task]
            low, high = change.interval
            value = change.difference, (high - low) / (2 * 1.96)
        lines.setdefault(key, []).append(value)
    drawn = [(labels[key], key[-1] in CONTROLS, values) for key, values in lines.items()]
    return drawn[:_LINES]


def _draw_panel(axes, lines: list, title: str, task: str | None) -> None:
    for place, (_, control, values) in enumerate(lines):
        color = MUTED if control else LINE
        for value, error in values:
            if not math.isfinite(value):  # no place on the axis is theirs: at the right edge
                axes.plot(0.98, place, "x", color=MARK, transform=axes.get_yaxis_transform())
                continue
            axes.errorbar(value, place, xerr=error, fmt="o", ms=5, color=color, elinewidth=1)
    axes.set_yticks(range(len(lines)), [label for label, *_ in lines])
    axes.set_ylim(max(1, len(lines)) - 0.5, -0.5)
    axes.axvline(1 if task is None else 0, color=MUTED, lw=1, ls=":")
    if task is None:
        log_where_wide(axes, "x", [1, *(value for _, _, values in lines for value, _ in values)])
    axes.set_xlabel(title)
    axes.grid(axis="x", color="#dde2e7", linewidth=0.8)


__all__ = ["CONTROLS", "KINDS", "Ablation", "Condition"]
