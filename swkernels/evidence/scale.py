"""Chosen weights multiplied by one factor after another: what each dose does to the model.

The super-weight paper (Yu et al. 2024, arXiv 2411.07191) scales the super weight of Llama-7B and
finds the best zero-shot average 0.39 points higher (Table 5; its notebook has 0.43, at twice its
value).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import nn

from swkernels.detect.report import versions
from swkernels.errors import InvalidInput
from swkernels.train.figure import LINE, MARK, MUTED, log_where_wide

from .edits import TOGETHER, Edits, Entry, weights_of
from .results import Progress, Result, silent
from .yardstick import Scores, Yardstick

FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
_LINES = 8  # curves of single weights in a figure: more would cover each other


@dataclass(frozen=True)
class Dose:
    """What one factor does.

    Attributes:
        factor: what the weights were multiplied by.
        scores: what the yardstick read.
        ratio, error: the perplexity over the intact model's, see ``Scores.ratio``.
    """

    factor: float
    scores: Scores
    ratio: float | None
    error: float | None

    @property
    def finite(self) -> bool:
        """Whether every loss that was measured is a finite number."""
        return not self.scores.not_finite


@dataclass(frozen=True)
class Curve:
    """The doses of some weights, in the order of the factors.

    Attributes:
        name: "all together", or the label of the weight that was scaled alone.
        entries: which weights.
        doses: one for each factor.
    """

    name: str
    entries: tuple[Entry, ...]
    doses: tuple[Dose, ...]


@dataclass(frozen=True)
class Scaling(Result):
    """The result of ``scale``.

    Attributes:
        model: its name, or its class.
        measures: what it was measured by, as ``Yardstick.to_dict`` says it.
        entries: every weight, with its value before.
        notes: what else changes with them (tied weights).
        intact: the scores of the unchanged model.
        curves: that of the set first, then those of single weights where they were asked for.
    """

    model: str
    measures: dict
    entries: tuple[Entry, ...]
    notes: tuple[str, ...]
    intact: Scores
    curves: tuple[Curve, ...]

    schema = "swkernels.scale/1"

    @property
    def height(self) -> float:
        return 1.0 + 3.0 * len(_panels(self))

    def to_dict(self) -> dict:
        """The whole result as plain values; see docs/evidence/scale.md."""
        places = {id(entry): place for place, entry in enumerate(self.entries)}
        return {
            "schema": self.schema,
            "versions": versions("torch", "transformers"),
            "model": self.model,
            "measures": self.measures,
            "weights": [entry.to_dict() for entry in self.entries],
            "notes": list(self.notes),
            "intact": self.intact.to_dict(),
            "curves": [
                {
                    "name": curve.name,
                    "weights": [places[id(entry)] for entry in curve.entries],
                    "doses": [
                        {
                            "factor": dose.factor,
                            "ratio": dose.ratio,
                            "error": dose.error,
                            "scores": dose.scores.to_dict(),
                        }
                        for dose in curve.doses
                    ],
                }
                for curve in self.curves
            ],
            "summary": str(self),
        }

    def rows(self) -> list[dict]:
        """One row a factor and curve: the scores, the ratio to the intact model, its error."""
        rows = []
        for curve in self.curves:
            for dose in curve.doses:
                row = {"weights": curve.name, "factor": dose.factor} | dose.scores.row()
                if dose.ratio is not None:
                    row |= {"ratio": dose.ratio, "error": dose.error}
                rows.append(row)
        return rows

    def __str__(self) -> str:
        """What the set does, in sentences."""
        doses = self.curves[0].doses
        said = []
        finite = [d for d in doses if d.ratio is not None and math.isfinite(d.ratio)]
        if finite:
            best, worst = (pick(finite, key=lambda d: d.ratio) for pick in (min, max))
            said.append(
                f"Perplexity {self.intact.perplexity.value:.4g} intact; lowest with {_dose(best)}, "
                f"highest with {_dose(worst)}."
            )
        broken = ", ".join(f"x{d.factor:g}" for d in doses if not d.finite)
        if broken:
            said.append(f"Losses are not finite with {broken}.")
        for name, intact in self.intact.choices.items():
            best = max(doses, key=lambda d: (d.scores.choices[name].accuracy, -abs(d.factor - 1)))
            scores = best.scores.choices[name]
            gain = scores.compare(intact)
            low, high = (f"{100 * end:+.2f}" for end in gain.interval)
            said.append(
                f"{name}: {intact.accuracy:.2%} right intact, at best {scores.accuracy:.2%} with "
                f"x{best.factor:g} ({100 * gain.difference:+.2f} points, {low} to {high})."
            )
        return " ".join(said)

    def _draw(self, figure) -> None:
        panels = _panels(self)
        for axes, task in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels):
            _draw_panel(axes, self, task)


def scale(
    model: nn.Module,
    weights: object,
    yardstick: Yardstick,
    factors: Iterable[float] = FACTORS,
    *,
    each: bool = False,
    name: str | None = None,
    progress: Progress = silent,
) -> Scaling:
    """Multiply chosen weights by each factor in turn and measure the model.

    The weights are changed in place and put back bit for bit, whatever ends a measurement. The
    intact model is measured once, and is the dose of factor 1; every other factor costs one
    measurement, and with ``each`` one more for every weight.

    Args:
        model: its weights are in memory, neither packed nor sharded.
        weights: see ``weights_of``.
        yardstick: what it is measured by.
        factors: finite numbers, one at least, all different; 0 zeroes, 1 is the intact model.
        each: scale every weight alone too.
        name: of the model, as it was loaded; needed for weights "catalogue".
        progress: called with ("scaling", measurements done, measurements).

    Raises:
        InvalidInput: an argument that is not as above, weights that are not there, zero already or
            packed, a factor that takes a weight beyond the range of its dtype, or a loss of the
            intact model that is not finite. A loss that is not finite once weights are scaled is
            in the result as it is.
    """
    factors = check_factors(factors)
    edits = Edits(model, weights_of(model, weights, name))
    _check_range(edits.entries, factors)
    groups = [(TOGETHER, tuple(edits.entries))]
    if each and len(edits.entries) > 1:
        groups += [(entry.label, (entry,)) for entry in edits.entries]
    changed = sum(factor != 1 for factor in factors)
    total, done = 1 + changed * len(groups), 0

    def read(strict: bool) -> Scores:
        nonlocal done
        progress("scaling", done, total)
        scores = yardstick.read(model, strict=strict)
        done += 1
        progress("scaling", done, total)
        return scores

    intact = read(strict=True)
    curves = []
    for label, entries in groups:
        doses = []
        for factor in factors:
            scores = intact
            if factor != 1:
                with edits.scaled(factor, entries):
                    scores = read(strict=False)
            doses.append(Dose(factor, scores, *scores.ratio(intact)))
        curves.append(Curve(label, entries, tuple(doses)))
    return Scaling(
        name or type(model).__name__,
        yardstick.to_dict(),
        tuple(edits.entries),
        tuple(edits.notes),
        intact,
        tuple(curves),
    )


def check_factors(factors: Iterable[float]) -> tuple[float, ...]:
    """Return the factors as floats.

    Raises:
        InvalidInput: none, one that is not finite, or one that is there twice.
    """
    given = list(factors) if isinstance(factors, Iterable) and not isinstance(factors, str) else []
    if not given:
        raise InvalidInput(f"expected factors, one number at least, got {factors!r:.200}")
    for factor in given:
        number = isinstance(factor, Real) and not isinstance(factor, bool)
        if not number or not math.isfinite(factor):
            raise InvalidInput(f"a factor must be a finite number, got {factor!r:.200}")
    twice = next((factor for factor in given if given.count(factor) > 1), None)
    if twice is not None:
        raise InvalidInput(f"the factor {twice:g} is given more than once: name each one once")
    return tuple(map(float, given))


def _check_range(entries: Sequence[Entry], factors: Sequence[float]) -> None:
    for entry in entries:
        value = entry.weight.matrix()[entry.row, entry.column].clone()
        for factor in factors:
            if math.isfinite(entry.value) and not torch.isfinite(value * factor):
                dtype = str(value.dtype).removeprefix("torch.")
                raise InvalidInput(
                    f"{factor:g} times {entry.label}, which is {entry.value:g}, does not fit "
                    f"{dtype}: give a smaller factor, or load the model in a wider dtype"
                )


def _dose(dose: Dose) -> str:
    error = "" if dose.error is None else f" ± {dose.error:.2g}"
    return f"x{dose.factor:g} (ratio {dose.ratio:.4g}{error})"


def _panels(scaling: Scaling) -> list[str | None]:
    """What is drawn: the perplexity (None), and the accuracy of each task by its name."""
    return ([] if scaling.intact.perplexity is None else [None]) + list(scaling.intact.choices)


def _draw_panel(axes, scaling: Scaling, task: str | None) -> None:
    """Perplexity (on a log scale) or a task's accuracy over the factor, a line a curve."""

    def height(scores: Scores) -> float:
        return scores.perplexity.value if task is None else 100 * scores.choices[task].accuracy

    for number, curve in enumerate(scaling.curves[: 1 + _LINES]):
        doses = sorted(curve.doses, key=lambda dose: dose.factor)
        points = [(dose.factor, height(dose.scores)) for dose in doses]
        finite = [point for point in points if math.isfinite(point[1])]
        style = {"color": LINE, "lw": 1.8} if number == 0 else {"lw": 0.9, "alpha": 0.8}
        xs, ys = [x for x, _ in finite], [y for _, y in finite]
        axes.plot(xs, ys, "o-", ms=4, label=curve.name, **style)
        # No height of the scale is theirs: they stand at the upper edge.
        broken = [x for x, y in points if not math.isfinite(y)]
        axes.plot(broken, [0.97] * len(broken), "x", color=MARK,
                  transform=axes.get_xaxis_transform())  # fmt: skip
    axes.axhline(height(scaling.intact), color=MUTED, ls=":", lw=1, label="intact")
    if task is None:
        log_where_wide(axes, "y", [height(d.scores) for c in scaling.curves for d in c.doses])
    left_out = len(scaling.curves) - 1 - _LINES
    axes.set_title(f"{left_out} more weights are not drawn" if left_out > 0 else "", fontsize=9)
    axes.set_xlabel("factor")
    axes.set_ylabel("perplexity" if task is None else f"{task}, % correct")
    axes.grid(True, color="#dde2e7", linewidth=0.8)
    axes.legend(frameon=False, fontsize=8)


__all__ = ["FACTORS", "Curve", "Dose", "Scaling", "check_factors", "scale"]
