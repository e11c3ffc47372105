"""What the studies of edited weights share: their runs, and how perplexities are compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from swkernels.detect.evaluate import exp
from swkernels.detect.scan import ScanConfig
from swkernels.evidence.student import COVERAGE, quantile

from ..data import NAMES, TEXT
from ..lab import DETECT
from ..page import cell, percent
from ..recipe import Plan
from ..run import Run
from .comparing import Accuracy, Difference
from .settings import CHANCE

DATA = (TEXT, *NAMES)
CHANCE_OF = {name: CHANCE[part.partition("/")[0]] for part, name in NAMES.items()}  # by task
HARMLESS = ScanConfig.mild_ratio  # a perplexity times less is no loss; docs/detection.md
POINTS = 0.05  # of accuracy: the least that zeroing cost in Table 8 is 5.2 points
_ONE = 0.0005  # a ratio nearer to 1 would be shown as 1
_DECIMALS = 6  # of a change in percent: losses are of float32


def reading(
    plan: Plan,
    of: str | None,
    factor: float = 0.0,
    *,
    seed: int | None = None,
    asked: bool = True,
    stop_words: Sequence[str] = (),
) -> Run:
    """The model with a set of weights times a factor; see ``runs.edit``.

    Args:
        of: the name of a set; None is the model as it is.
        seed: of a random set.
        asked: also the accuracy on the tasks.
    """
    budget = plan.budget
    config = {"set": of} | ({} if of is None else {"factor": factor})
    config |= {} if seed is None else {"seed": seed}
    config |= {"tasks": tasks_of(plan) if asked else {}, "stop_words": list(stop_words)}
    config |= {"tokens": budget.tokens, "window": budget.window}
    return Run("edit", config, () if of is None else (DETECT,))


def tasks_of(plan: Plan) -> dict[str, int | None]:
    """How many questions of which parts are asked."""
    return dict.fromkeys(NAMES, plan.budget.questions)


def described(plan: Plan, asked: bool = True) -> str:
    """What the model is measured by, for a section."""
    budget = plan.budget
    tokens = "all" if budget.tokens is None else f"the first {budget.tokens:,}"
    text = f"WikiText-2 test, {tokens} tokens in windows of {budget.window:,}"
    if not asked:
        return f"{text}."
    some = "all" if budget.questions is None else f"the first {budget.questions}"
    return (
        f"{text}; {some} questions of {' and of '.join(NAMES.values())}, answered by the lowest "
        "perplexity."
    )


@dataclass(frozen=True)
class Ratio:
    """A quantity over another on the same windows of the text.

    Attributes:
        value, low, high: with its 95 % interval (Student's t over windows, in logarithms; from 0
            to infinity where there is one window). All are infinite if a loss is not finite.
    """

    value: float
    low: float
    high: float

    @property
    def bounded(self) -> bool:
        """Whether its interval can be drawn."""
        return 0 < self.low and self.high < math.inf

    @classmethod
    def of_logarithm(cls, mean: float, error: float, windows: int, looks: int = 1) -> Ratio:
        """exp(mean), by the standard error of ``mean``; ``looks`` as in ``of``."""
        within = 1 - (1 - COVERAGE) / looks
        width = quantile(windows - 1, within) * error if windows > 1 else math.inf
        return cls(exp(mean), exp(mean - width), exp(mean + width))

    @classmethod
    def of_sums(cls, ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
        """The ratio of two sums over windows (delta method); any, where it is not above zero."""
        n, total = len(ours), sum(theirs)
        ratio = sum(ours) / total if total else math.nan
        if not 0 < ratio < math.inf:
            return cls(ratio, 0.0, math.inf)
        squares = sum((a - ratio * b) ** 2 for a, b in zip(ours, theirs, strict=True))
        error = math.sqrt(n / (n - 1) * squares) / (ratio * total) if n > 1 else math.inf
        return cls.of_logarithm(math.log(ratio), error, n)

    @classmethod
    def of(cls, figures: dict, other: dict, looks: int = 1) -> Ratio:
        """The perplexity of a reading over that of another, from losses of the same windows.

        Args:
            looks: of how many ratios this is the one that was chosen after the fact: the interval
                is so much wider that all of them hold at once (Bonferroni).
        """
        ours, theirs = figures["perplexity"], other["perplexity"]
        counts, n = ours["tokens"], len(ours["tokens"])
        by_window = [a - b for a, b in zip(ours["losses"], theirs["losses"], strict=True)]
        if not all(map(math.isfinite, by_window)):
            return cls(math.inf, math.inf, math.inf)
        mean = sum(by_window) / sum(counts)
        squares = sum((d - mean * c) ** 2 for d, c in zip(by_window, counts))
        error = math.sqrt(n / (n - 1) * squares) / sum(counts) if n > 1 else math.inf
        return cls.of_logarithm(mean, error, n, looks)

    def __str__(self) -> str:
        every = (self.value, self.low, self.high)
        changes = [100 * (ratio - 1) for ratio in every]
        if self.bounded and abs(self.value - 1) < _ONE and any(changes):
            # As many decimals as show two digits of the wider end of the interval.
            widest = max(map(abs, changes))
            decimals = min(_DECIMALS, max(0, 1 - math.floor(math.log10(widest))))
            value, low, high = (f"{change:+.{decimals}f}" for change in changes)
            return f"{value} % [{low}, {high}]"
        value, low, high = map(_times, every)
        return f"×{value} [{low}, {high}]"


def _times(ratio: float) -> str:
    """Four digits of a ratio, written out where it is large."""
    return cell(float(f"{ratio:.4g}"))


@dataclass(frozen=True)
class Change:
    """What a reading lost against another.

    Attributes:
        perplexity: over the other's.
        accuracy: of each task, less the other's, on the same questions.
        guessed: the other's accuracy on the tasks on which it is not above chance: those say
            nothing about what was lost.
    """

    perplexity: Ratio
    accuracy: dict[str, Difference]
    guessed: dict[str, Accuracy]

    @classmethod
    def of(cls, figures: dict, other: dict) -> Change:
        ours, theirs = (
            {task: Accuracy.of(choices) for task, choices in found["choices"].items()}
            for found in (figures, other)
        )
        accuracy = {task: ours[task].less(theirs[task]) for task in ours}
        return cls(Ratio.of(figures, other), accuracy, guessed(other))

    @property
    def harmless(self) -> bool | None:
        """Whether nothing is lost: by perplexity and by every task that is not guessed."""
        low, high = self.perplexity.low, self.perplexity.high
        tasks = [lost for task, lost in self.accuracy.items() if task not in self.guessed]
        if low > HARMLESS or any(d.is_loss and d.high < -POINTS for d in tasks):
            return False
        return True if high < HARMLESS and tasks and all(map(kept, tasks)) else None

    def __str__(self) -> str:
        parts = [f"perplexity {self.perplexity}"]
        for task, difference in self.accuracy.items():
            left_out = " (left out: intact at chance)" if task in self.guessed else ""
            parts.append(f"{task} {difference}{left_out}")
        return "; ".join(parts)


def kept(difference: Difference) -> bool:
    """Whether less than ``POINTS`` are lost."""
    return difference.loses_less_than(POINTS)


def guessed(figures: dict) -> dict[str, Accuracy]:
    """The accuracy on each task on which a model is not above chance, by its interval."""
    scores = {task: Accuracy.of(choices) for task, choices in figures["choices"].items()}
    return {task: score for task, score in scores.items() if score.interval[0] <= CHANCE_OF[task]}


def guessed_notes(intact: dict) -> list[str]:
    """That tasks on which the intact model guesses are among all questions."""
    scores, count = guessed(intact), len(together(intact).correct)
    return [
        f"The intact model is not clearly above chance on {task} ({score}, chance is "
        f"{percent(CHANCE_OF[task])}): these {len(score.correct):,} of all {count:,} questions "
        "cannot show a loss, and hardly a gain."
        for task, score in scores.items()
    ]


def together(figures: dict) -> Accuracy:
    """The accuracy over the questions of all tasks."""
    parts = [Accuracy.of(choices).correct for choices in figures["choices"].values()]
    return Accuracy(tuple(right for part in parts for right in part))


def columns() -> list[str]:
    """Of a table of readings, behind what names them."""
    tasks = [f"{task} [95 %]" for task in NAMES.values()]
    return ["perplexity", "times [95 %]", *tasks, "all questions [95 %]", "against intact"]


def cells(figures: dict, intact: dict | None) -> list[object]:
    """The cells of a reading, beside the intact model where that has been read."""
    scores = [Accuracy.of(choices) for choices in figures["choices"].values()]
    every = together(figures)
    row: list[object] = [figures["perplexity"]["perplexity"], None]
    row += [*map(str, scores), str(every), None]
    if intact is not None and figures is not intact:
        row[1], row[-1] = str(Ratio.of(figures, intact)), str(every.less(together(intact)))
    return row
