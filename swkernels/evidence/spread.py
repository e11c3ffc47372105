"""Mean, median, maximum and standard deviation, as tables print them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Spread:
    """How values are spread.

    Attributes:
        count: how many of them are finite; the figures below are of these, NaN where count is 0.
        undefined: how many are not (a ratio whose denominator is 0, for instance).
        mean, median, maximum: of the values as they are, signs included.
        deviation: standard deviation, of the values as a population.
    """

    count: int
    undefined: int
    mean: float
    median: float
    maximum: float
    deviation: float

    @classmethod
    def of(cls, values: Iterable[float] | torch.Tensor) -> Spread:
        """Describe values in any order and shape."""
        listed = values.flatten().tolist() if isinstance(values, torch.Tensor) else list(values)
        finite = [value for value in listed if math.isfinite(value)]
        undefined = len(listed) - len(finite)
        if not finite:
            return cls(0, undefined, *[math.nan] * 4)
        mean = math.fsum(finite) / len(finite)
        squares = math.fsum((value - mean) ** 2 for value in finite)
        deviation = math.sqrt(squares / len(finite))
        median = statistics.median(finite)
        return cls(len(finite), undefined, mean, median, max(finite), deviation)

    def to_dict(self) -> dict:
        """The figures."""
        return asdict(self)
