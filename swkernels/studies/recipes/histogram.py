"""The paper's histograms of ratios, on a logarithmic axis."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from swkernels.train.figure import LINE, MARK, MUTED

from ..recipe import Figure

_BINS = 40


def histogram(
    name: str, caption: str, ratios: Mapping[str, np.ndarray], published: Mapping[str, float]
) -> Figure:
    """Magnitudes of exact and of estimated ratios, with the published median and maximum."""

    def draw(figure) -> None:
        axes = figure.subplots()
        sizes = {kind: np.abs(values).ravel() for kind, values in ratios.items()}
        logs = {k: np.log10(v[np.isfinite(v) & (v > 0)]) for k, v in sizes.items()}
        marks = {kind: np.log10(published[kind]) for kind in ("median", "maximum")}
        shown = np.concatenate([*logs.values(), list(marks.values())])
        bins = np.linspace(shown.min() - 0.01, shown.max() + 0.01, _BINS + 1)
        for (kind, values), color in zip(logs.items(), (MARK, LINE)):
            axes.hist(values, bins, color=color, alpha=0.55, label=kind)
        for (kind, value), style in zip(marks.items(), ("--", ":")):
            axes.axvline(value, color=MUTED, lw=1.2, ls=style, label=f"published {kind}")
        axes.xaxis.set_major_formatter(lambda value, _: f"{10**value:.3g}")
        axes.set(xlabel="ratio to a random position of the same matrix", ylabel="inputs and pairs")
        axes.legend(frameon=False, fontsize=8)

    return Figure(name, caption, draw)
