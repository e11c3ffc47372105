"""Student's t distribution: intervals of means over few windows, texts or seeds."""

from __future__ import annotations

import math

COVERAGE = 0.95


def coverage(t: float, degrees: int) -> float:
    """The probability that a t variable of ``degrees`` degrees of freedom lies within -t to t.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for n in range(1 + odd, degrees, 2):  # n / (n + 1): the next even or odd factors
        total += term
        term *= n / (n + 1) * cosine**2
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def quantile(degrees: int, within: float = COVERAGE) -> float:
    """The t within which, either side of 0, a t variable lies with this probability.

    Args:
        degrees: of freedom, from 1.
        within: above 0, below 1.
    """
    low, high = 0.0, 1.0
    while coverage(high, degrees) < within:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if coverage(middle, degrees) < within else (low, middle)
    return (low + high) / 2
