"""How sure an accuracy is, and a difference of two accuracies on the same items."""

from __future__ import annotations

import math

import numpy as np

DRAWS = 2000
_PERCENTILES = (2.5, 97.5)


def interval(right: int, items: int, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of an accuracy, over items.

    Drawing ``items`` items with replacement, of which ``right`` are right, gives a binomial number
    of right ones: that number is drawn, 2,000 times.
    """
    counts = np.random.default_rng(seed).binomial(items, right / items, DRAWS)
    low, high = np.percentile(counts / items, _PERCENTILES)
    return float(low), float(high)


def paired_interval(gained: int, lost: int, items: int, seed: int = 0) -> tuple[float, float]:
    """The same of the difference of two accuracies on the same items.

    Of the items drawn, the numbers that the first model alone has right (``gained``) and that the
    second alone has right (``lost``) are multinomial.
    """
    shares = [gained / items, lost / items, (items - gained - lost) / items]
    counts = np.random.default_rng(seed).multinomial(items, shares, DRAWS)  # [DRAWS, 3]
    low, high = np.percentile((counts[:, 0] - counts[:, 1]) / items, _PERCENTILES)
    return float(low), float(high)


def sign_test(gained: int, lost: int) -> float:
    """The exact two-sided p-value of McNemar's test: each item that differs is a fair coin."""
    tosses = gained + lost
    tail = sum(math.comb(tosses, heads) for heads in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**tosses)
