"""The scores of a model, and of models side by side, each with what chance makes of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from torch import nn

from swkernels.detect.evaluate import exp
from swkernels.detect.perplexity import Perplexity
from swkernels.detect.report import versions
from swkernels.errors import InvalidInput
from swkernels.quant.model import size_of

from .bootstrap import DRAWS
from .choices import RULES
from .evaluate_views import draw, panels
from .results import Progress, Result, silent
from .yardstick import Scores, Yardstick

MODEL = "model"


@dataclass(frozen=True)
class Condition:
    """One model as the yardstick read it.

    Attributes:
        which: what it is called; unique in its result.
        scores: with losses that are not finite as they are.
        by_text: perplexity by words and bytes, see ``Perplexity.of_text``; None where it is not
            known.
        bytes: of the model's parameters and buffers.
    """

    which: str
    scores: Scores
    by_text: dict[str, float] | None
    bytes: int


@dataclass(frozen=True)
class Evaluation(Result):
    """The result of ``evaluate``, of one model or of several by the same yardstick.

    Intervals are of 95 %, by 2,000 bootstrap draws: over windows for a perplexity (rough where
    there are few), over questions for an accuracy, in pairs for what is compared.

    Attributes:
        model: the name of the first one.
        measures: what they were measured by, as ``Yardstick.to_dict`` says it.
        conditions: the first is the model.
        against: the one that all are compared with; None compares nothing.
        seed: of the bootstrap over windows.
        details: what else belongs into the document.
    """

    model: str
    measures: dict
    conditions: tuple[Condition, ...]
    against: str | None = None
    seed: int = 0
    details: dict = field(default_factory=dict)

    schema = "swkernels.eval/2"

    @property
    def scores(self) -> Scores:
        """Those of the model."""
        return self.conditions[0].scores

    @property
    def height(self) -> float:
        return 1.0 + sum(inches for _, inches in panels(self))

    def beside(self, *others: Evaluation, against: str | None = None) -> Evaluation:
        """Put other models behind this one.

        Args:
            others: measured by the same yardstick.
            against: ``which`` of the one that all are compared with; None compares nothing.

        Raises:
            InvalidInput: another yardstick, two conditions of one name, or none called ``against``.
        """
        conditions = [c for evaluation in (self, *others) for c in evaluation.conditions]
        names = [condition.which for condition in conditions]
        if any(other.measures != self.measures for other in others):
            raise InvalidInput(
                "evaluations by different yardsticks cannot stand side by side: measure all "
                "models by one text, its tokens and windows, and the same tasks"
            )
        if len(set(names)) < len(names) or against not in (None, *names):
            raise InvalidInput(
                f"expected conditions of different names, and {against!r} among them or None, got "
                f"{', '.join(names)}"
            )
        return replace(self, conditions=tuple(conditions), against=against)

    def to_dict(self) -> dict:
        """The whole result, with the losses of every window and the scores of every choice."""
        return {
            "schema": self.schema,
            "model": self.model,
            **self.measures,
            "against": self.against,
            **self.details,
            "results": [self._entry(condition) for condition in self.conditions],
            "versions": versions("torch", "transformers"),
        }

    def rows(self) -> list[dict]:
        """One row for each model and figure: value and interval, and the same compared.

        What is compared is a ratio of perplexities, a difference of accuracies.
        """
        rows = []
        for condition in self.conditions:
            for measure, rule, figures in self._figures(condition):
                low, high = figures["interval"] or (None, None)
                compared_low, compared_high = figures.get("compared_interval") or (None, None)
                rows.append(
                    {
                        "which": condition.which,
                        "measure": measure,
                        "rule": rule,
                        "value": figures["value"],
                        "low": low,
                        "high": high,
                        "compared": figures.get("compared"),
                        "compared_low": compared_low,
                        "compared_high": compared_high,
                    }
                )
        return rows

    def _figures(self, condition: Condition) -> Iterator[tuple[str, str | None, dict]]:
        """Measure, rule and figures of one model."""
        found, base = condition.scores, self._base()
        if found.perplexity is not None:
            figures = {
                "value": found.perplexity.value,
                "interval": interval(found.perplexity, seed=self.seed),
            }
            if base is not None:
                figures["compared"] = found.perplexity.ratio(base.perplexity)[0]
                figures["compared_interval"] = interval(
                    found.perplexity, base.perplexity, seed=self.seed
                )
            yield "perplexity", None, figures
        for name, value in (condition.by_text or {}).items():
            yield name, None, {"value": value, "interval": None}
        for name, scores in found.choices.items():
            for rule in RULES:
                by_rule = replace(scores, rule=rule)
                figures = {"value": by_rule.accuracy, "interval": by_rule.interval}
                if base is not None:
                    compared = by_rule.compare(base.choices[name])
                    figures["compared"] = compared.difference
                    figures["compared_interval"] = compared.interval
                yield name, rule, figures
        if found.stop_words is not None:
            yield "stop words", None, {"value": found.stop_words.mean, "interval": None}

    def _base(self) -> Scores | None:
        """The scores that all are compared with."""
        return next((c.scores for c in self.conditions if c.which == self.against), None)

    def _entry(self, condition: Condition) -> dict:
        scores, base = condition.scores, self._base()
        entry: dict = {"which": condition.which, "bytes": condition.bytes}
        entry |= {"ratio": None, "ratio_error": None, "ratio_interval": None, "perplexity": None}
        if scores.perplexity is not None:
            if base is not None:
                ratio, error = scores.perplexity.ratio(base.perplexity)
                compared = interval(scores.perplexity, base.perplexity, seed=self.seed)
                entry |= {"ratio": ratio, "ratio_error": error, "ratio_interval": compared}
            entry |= scores.perplexity.to_dict()
            entry |= {
                "interval": interval(scores.perplexity, seed=self.seed),
                "not_finite": scores.perplexity.not_finite,
            }
        entry |= condition.by_text or {}
        entry["choices"] = {
            name: found.to_dict()
            | {"compared": None if base is None else found.compare(base.choices[name]).to_dict()}
            for name, found in scores.choices.items()
        }
        entry["stop_words"] = None if scores.stop_words is None else scores.stop_words.to_dict()
        return entry

    def _draw(self, figure) -> None:
        if not panels(self):
            raise InvalidInput("there is nothing to draw: no perplexity and no task was measured")
        draw(figure, self)


def evaluate(
    model: nn.Module,
    yardstick: Yardstick | None,
    *,
    which: str = MODEL,
    name: str | None = None,
    text: str | None = None,
    seed: int = 0,
    strict: bool = False,
    progress: Progress = silent,
) -> Evaluation:
    """Measure a model as it is now.

    Args:
        model: a decoder; run in eval mode, and given back as it was.
        yardstick: what it is measured by; with a ``prefix``, by lm-eval's rolling windows. None
            measures its size alone, for a caller with figures of another kind.
        which: what it is called beside others, see ``Evaluation.beside``.
        name: of the model, for reports; None: its class.
        text: all of what the yardstick's tokens say: with a prefix, it gives the perplexity by
            words and bytes too.
        seed: of the bootstrap over windows.
        strict: a loss that is not finite is an error; else it is in the result as it is.
        progress: called with (stage, done, total).

    Raises:
        InvalidInput: as ``perplexity`` and ``score_choices`` do, or a text without a prefix.
    """
    scores, measures = Scores(), {}
    if yardstick is not None:
        scores = yardstick.read(model, strict=strict, progress=progress)
        measures = yardstick.to_dict()
    known = text is not None and scores.perplexity is not None
    by_text = scores.perplexity.of_text(text) if known else None
    condition = Condition(which, scores, by_text, size_of(model))
    return Evaluation(name or type(model).__name__, measures, (condition,), seed=seed)


def interval(
    found: Perplexity, other: Perplexity | None = None, *, seed: int = 0
) -> tuple[float, float] | None:
    """The 95 % percentile bootstrap interval of a perplexity, or of its ratio to another's.

    Windows are drawn with replacement, 2,000 times. None where there is one window, NaN where a
    loss is not finite.
    """
    sums = np.array(found.losses)
    if other is not None:
        sums = sums - np.array(other.losses)
    if len(sums) < 2:
        return None
    if not np.isfinite(sums).all():
        return math.nan, math.nan
    counts, generator = np.array(found.tokens), np.random.default_rng(seed)
    means = []
    for _ in range(DRAWS):  # one at a time: a short stride makes very many windows
        drawn = generator.integers(len(sums), size=len(sums))
        means.append(sums[drawn].sum() / counts[drawn].sum())
    low, high = np.percentile(means, (2.5, 97.5))
    return exp(float(low)), exp(float(high))


__all__ = ["MODEL", "Condition", "Evaluation", "evaluate", "interval"]
