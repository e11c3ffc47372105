"""How accuracies are compared: on the same questions, in pairs, with intervals."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from swkernels.evidence import bootstrap

from ..page import percent


@dataclass(frozen=True)
class Accuracy:
    """The accuracy of a run on its questions.

    Attributes:
        correct: of each question.
    """

    correct: tuple[bool, ...]

    @classmethod
    def of(cls, choices: dict) -> Accuracy:
        """From a ``ChoiceScores.to_dict``."""
        return cls(tuple(p == a for p, a in zip(choices["predictions"], choices["answers"])))

    @property
    def value(self) -> float:
        return sum(self.correct) / len(self.correct)

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, bootstrap over questions."""
        return bootstrap.interval(sum(self.correct), len(self.correct))

    def less(self, other: Accuracy) -> Difference:
        """This one less another, on the same questions."""
        pairs = list(zip(self.correct, other.correct, strict=True))
        gained, lost = pairs.count((True, False)), pairs.count((False, True))
        low, high = bootstrap.paired_interval(gained, lost, len(pairs))
        return Difference(
            (gained - lost) / len(pairs),
            low,
            high,
            bootstrap.sign_test(gained, lost),
        )

    def __str__(self) -> str:
        return percent(self.value, *self.interval)


@dataclass(frozen=True)
class Difference:
    """A difference of two accuracies.

    Attributes:
        value, low, high: a share of the questions, with its 95 % interval.
        p_value: of the exact sign test (McNemar).
    """

    value: float
    low: float
    high: float
    p_value: float

    @property
    def is_gain(self) -> bool:
        """Above 0 by the interval, and by the exact test: few questions make the first too sure."""
        return self.low > 0 and self.p_value < 0.05

    @property
    def is_loss(self) -> bool:
        """Below 0, by the same."""
        return self.high < 0 and self.p_value < 0.05

    @property
    def is_clear(self) -> bool:
        """Whether it is one of the two."""
        return self.is_gain or self.is_loss

    def gains_less_than(self, margin: float) -> bool:
        """Whether a gain of ``margin`` can be excluded."""
        return self.high < margin

    def loses_less_than(self, margin: float) -> bool:
        """Whether a loss of ``margin`` can be excluded."""
        return self.low > -margin

    def __str__(self) -> str:
        points = f"{100 * self.value:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"
        return f"{points} points, p = {self.p_value:.2g}"


def fell_to_chance(accuracy: Accuracy, base: Accuracy, chance: float) -> bool | None:
    """Whether an accuracy collapsed from that of ``base`` to chance.

    Returns:
        True: its interval holds chance (or lies below) and ends nearer to chance than to the
        baseline, and it lost on the same questions. False: its interval lies above chance. None:
        neither, or the baseline's does not lie above chance itself.
    """
    low, high = accuracy.interval
    if base.interval[0] <= chance:
        return None
    if low > chance:
        return False
    near = high < (chance + base.value) / 2
    return True if near and accuracy.less(base).is_loss else None


def stands_above_chance(accuracy: Accuracy, base: Accuracy, chance: float) -> bool:
    """Whether its interval is nearer to the baseline, above chance itself, than to chance."""
    return base.interval[0] > chance and accuracy.interval[0] > (chance + base.value) / 2


def all_of(states: Iterable[bool | None]) -> bool | None:
    """Whether all hold: False where one does not, else None where one is undecided."""
    states = list(states)
    return False if False in states else None if None in states else True
