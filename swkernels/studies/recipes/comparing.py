"""How accuracies are compared: on the same questions, in pairs, with intervals."""

from __future__ import annotations

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
            (gained - lost) / len(pairs), low, high, bootstrap.sign_test(gained, lost)
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
    def is_clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        points = f"{100 * self.value:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"
        return f"{points} points, p = {self.p_value:.2g}"
