"""Super weights beside random positions: the runs that measure both, and how they are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from swkernels.evidence.spread import Spread

from ..lab import DETECT
from ..recipe import Plan, Table, Verdict
from ..run import Run
from ..runs.analyze import DETECTED, LARGEST

EPSILON = 1e-4
GROUPS = {DETECTED: "the detected super weights", LARGEST: "the largest weights of layers"}
LEAST = 5  # inputs, and random positions, without which nothing is decided
CANNOT = f"fewer than {LEAST} inputs or random positions"
_DRAWS = 2000


def bent(plan: Plan, row: bool = False) -> Run:
    """Derivatives and differences of the loss at super weights and at random positions."""
    budget = plan.budget
    config = {
        "inputs": budget.inputs,
        "length": budget.length,
        "top": budget.top,
        "random": 1,
        "row": row,
        "eps": EPSILON,
        "seed": plan.seed,
    }
    return Run("bend", config, (DETECT,))


def described(plan: Plan) -> str:
    """The inputs and the positions of ``bent``, for a section."""
    budget = plan.budget
    return (
        f"{budget.inputs} inputs of {budget.length} tokens of the text; the detected super weights "
        f"and the largest weight of each of {budget.top} layers, one random position of the same "
        "matrix beside each."
    )


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{short(self.value)} [{short(self.low)}, {short(self.high)}]"


@dataclass(frozen=True)
class Positions:
    """Values of a ``bend`` run: of N inputs at P weights and at R random positions for each.

    Attributes:
        own: [N, P]; random: [N, P, R].
        groups: of each weight.
    """

    own: np.ndarray
    random: np.ndarray
    groups: Sequence[str]

    @classmethod
    def of(cls, figures: dict, name: str) -> Positions:
        """The values ``name`` of a record."""
        values = np.array(figures[name], dtype=float)  # [N, Q]
        P = len(figures["entries"])
        random = values[:, P:].reshape(len(values), P, -1)
        return cls(values[:, :P], random, [entry["group"] for entry in figures["entries"]])

    def map(self, function) -> Positions:
        """The same of other values."""
        return Positions(function(self.own), function(self.random), self.groups)

    def only(self, group: str) -> Positions:
        """The weights of a group, with their random positions."""
        which = [name == group for name in self.groups]
        return Positions(self.own[:, which], self.random[:, which], [group] * sum(which))

    @property
    def ratios(self) -> np.ndarray:
        """[N, P, R]: a weight's value over its random position's, as published."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.own[..., None] / self.random

    @property
    def decides(self) -> bool:
        """Whether there are enough of them for an interval."""
        return len(self.own) >= LEAST and self.random[0].size >= LEAST


def short(value: float) -> str:
    """Three digits, thousands without an exponent."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def typical_ratio(positions: Positions, group: str, seed: int = 0) -> Estimate | None:
    """How many times as large values are at the weights of a group as at random positions.

    Of each position the mean magnitude over inputs, of these the geometric means, and their ratio.
    The weights are all there are; inputs and random positions are drawn anew for the interval, the
    latter from those of all groups. Positions that are 0 for all inputs do not count. None where
    the group is empty.
    """
    own = np.abs(positions.only(group).own)
    random = np.abs(positions.random).reshape(len(own), -1)
    if not own.size:
        return None
    generator = np.random.default_rng(seed)
    N, Q = random.shape
    inputs = generator.integers(N, size=(_DRAWS, N))
    drawn = generator.integers(Q, size=(_DRAWS, Q))
    logs = []
    for values in (own, random):
        every = _logs(values.mean(0))
        weights = np.stack([(inputs == n).sum(1) for n in range(N)], 1) / N  # [draws, N]
        logs.append((every, _logs(weights @ values)))
    (one, ones), (other, others) = logs
    others = np.take_along_axis(others, drawn, 1)
    return _exponential(
        np.nanmean(one) - np.nanmean(other), np.nanmean(ones, 1) - np.nanmean(others, 1)
    )


def exponent(bases: np.ndarray, values: np.ndarray, seed: int = 0) -> Estimate | None:
    """b of values = bases^b, both [N, pairs] and ratios of two positions that share all else.

    Least squares of the logarithms, through the origin; inputs and pairs are drawn anew for the
    interval. None where no pair has two finite logarithms.
    """
    x, y = _logs(np.abs(bases)), _logs(np.abs(values))
    fits = np.isfinite(x) & np.isfinite(y)
    if not fits.any() or not x[fits].any():
        return None
    products, squares = np.where(fits, x * y, 0.0), np.where(fits, x * x, 0.0)
    low, high = _both_ways(lambda w: products[w].sum() / squares[w].sum(), x.shape, seed)
    return Estimate(float(products.sum() / squares.sum()), low, high)


def share(true: np.ndarray, seed: int = 0) -> Estimate:
    """The share of [N, positions] that is true; inputs and positions are drawn anew."""
    return Estimate(float(true.mean()), *_both_ways(lambda w: true[w].mean(), true.shape, seed))


def mean_of(values: Sequence[float], seed: int = 0) -> Estimate:
    """A mean with its bootstrap interval."""
    given = np.array(values)
    which = np.random.default_rng(seed).integers(len(given), size=(_DRAWS, len(given)))
    low, high = np.percentile(given[which].mean(1), (2.5, 97.5)).tolist()
    return Estimate(float(given.mean()), low, high)


def larger(claim: str, positions: Positions, unit: str) -> list[Verdict]:
    """Whether values at the weights of each group are larger than at random positions."""
    verdicts = []
    for group, name in GROUPS.items():
        found = typical_ratio(positions, group)
        if found is None:
            continue
        holds = None if not positions.decides else above(found, 1)
        small = "" if positions.decides else f"; {CANNOT}"
        why = f"{found} times the {unit} of random positions (geometric means){small}."
        verdicts.append(Verdict(f"{claim} at {name}.", holds, why))
    return verdicts


def above(found: Estimate, bound: float) -> bool | None:
    """Whether an interval lies above a bound; None where it holds the bound."""
    return True if found.low > bound else False if found.high < bound else None


def ratio_table(rows: dict[str, np.ndarray], published: dict[str, float], source: str) -> Table:
    """Mean, median, maximum and deviation of ratios, as the paper prints them."""
    names = ("mean", "median", "maximum", "deviation")
    spreads = {name: Spread.of(values.ravel().tolist()) for name, values in rows.items()}
    cells = [
        [name, s.count, s.undefined, *(getattr(s, one) for one in names)]
        for name, s in spreads.items()
        if s.count + s.undefined
    ]
    cells.append([source, None, None, *(published[name] for name in names)])
    caption = "Over all inputs and pairs; undefined: over a random position's 0."
    return Table(["ratio", "of", "undefined", *names], cells, caption)


def _both_ways(statistic, shape: tuple[int, int], seed: int) -> list[float]:
    """The 95 % interval of a statistic of rows and columns that are drawn anew, both."""
    generator = np.random.default_rng(seed)
    draws = [
        statistic(np.ix_(*(generator.integers(size, size=size) for size in shape)))
        for _ in range(_DRAWS)
    ]
    return np.nanpercentile(draws, (2.5, 97.5)).tolist()


def _logs(values: np.ndarray) -> np.ndarray:
    return np.log(np.where(values > 0, values, np.nan))


def _exponential(value: float, draws: np.ndarray) -> Estimate:
    low, high = np.percentile(draws, (2.5, 97.5)).tolist()
    return Estimate(float(np.exp(value)), float(np.exp(low)), float(np.exp(high)))
