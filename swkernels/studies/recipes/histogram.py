"""The paper's histograms of ratios, on a logarithmic axis."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from swkernels.train.figure import INK, LINE, MARK, MUTED, legend_above, log_where_wide

from ..recipe import Figure

_BINS = 40


def histogram(
    name: str, caption: str, exact: np.ndarray, seen: np.ndarray, published: Mapping[str, float]
) -> Figure:
    """Magnitudes of exact ratios and of those that were seen through rounding.

    Beside them the published median and maximum, and what ratios of two values would be that are
    nothing but rounding: of two normal variables of one deviation, whose ratio is a Cauchy
    variable, P(|ratio| < t) = 2 / pi arctan t.
    """

    def draw(figure) -> None:
        axes = figure.subplots()
        sizes = [_positive(values) for values in (exact, seen)]
        marks = published["median"], published["maximum"]
        shown = np.concatenate([*sizes, marks])
        bins = np.geomspace(shown.min() / 1.01, shown.max() * 1.01, _BINS + 1)
        for values, color, label in zip(sizes, (MARK, LINE), ("exact", "as seen")):
            axes.hist(values, bins, color=color, alpha=0.55, label=label)
        noise = np.diff(2 / np.pi * np.arctan(bins)) * len(sizes[1])
        axes.stairs(noise, bins, color=INK, lw=1, label="rounding over rounding")
        for value, style, label in zip(marks, ("--", ":"), ("median", "maximum")):
            axes.axvline(value, color=MUTED, lw=1.2, ls=style, label=f"published {label}")
        log_where_wide(axes, "x", bins.tolist())
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="ratio to a random position of the same matrix", ylabel="inputs and pairs")
        legend_above(axes)

    return Figure(name, caption, draw)


def _positive(values: np.ndarray) -> np.ndarray:
    sizes = np.abs(values).ravel()
    return sizes[np.isfinite(sizes) & (sizes > 0)]
