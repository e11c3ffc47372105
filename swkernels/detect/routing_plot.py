"""The figure of a scan report that shows how many tokens each expert has seen."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from .mixtures import Mixture, mixtures
from .plots import COLORS, WIDTH, png_of, svg_of

_BOUNDS = (0.25, 0.5, 1.0, 2.0, 4.0)  # times an even share of the layer's tokens
_LABELS = ("< 1/4", "1/4 to 1/2", "1/2 to 1", "1 to 2", "2 to 4", ">= 4")
_SHADES = (0.12, 0.26, 0.42, 0.6, 0.8, 1.0)
_UNSEEN = -1


def routing_svg(report: dict) -> str:
    """Draw how tokens were spread over the experts: a row a mixture, a cell an expert.

    The shade is the expert's tokens over an even share; an expert that no token reached has a
    colour of its own; super experts are starred.
    """
    return svg_of(_routing, report)


def routing_png(report: dict) -> bytes:
    """Draw how tokens were spread over the experts as PNG. See ``routing_svg``."""
    return png_of(_routing, report)


def _routing(report: dict) -> Figure:
    rows = mixtures(report)
    height = min(11.0, max(2.2, 1.5 + 0.17 * len(rows)))
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    if not rows:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "No experts", ha="center", va="center", color=COLORS["muted"])
        return figure
    levels = _fill(axes, rows)
    _star(axes, rows, report.get("super_experts", ()))
    axes.set_xlim(-0.5, max(mixture.experts for mixture in rows) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    step = math.ceil(len(rows) / 24)
    axes.set_yticks(range(0, len(rows), step), [str(m.layer) for m in rows[::step]])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16, min_n_ticks=1))
    axes.set_title("Tokens of each expert, over an even share of its layer's")
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    shown = [level for level in range(_UNSEEN, len(_LABELS)) if level in levels]
    figure.legend(
        [Patch(**_style(level)) for level in shown] + axes.get_legend_handles_labels()[0],
        ["unseen" if level == _UNSEEN else _LABELS[level] for level in shown]
        + axes.get_legend_handles_labels()[1],
        loc="outside lower center",
        ncols=len(shown) + 1,
        columnspacing=1.4,
        handlelength=1.2,
    )
    return figure


def _fill(axes: Axes, rows: list[Mixture]) -> set[int]:
    """Draw the cells, one path a level: neighbours of a level are one rectangle."""
    runs: dict[int, list[tuple[int, int, int]]] = {}
    for y, mixture in enumerate(rows):
        start = before = level = None
        for expert in sorted(mixture.routed):
            if expert - 1 != before or _level(mixture, expert) != level:
                start, level = expert, _level(mixture, expert)
                runs.setdefault(level, []).append((y, start, expert))
            before = expert
            runs[level][-1] = (y, start, expert)
    for level, cells in runs.items():
        corners, codes = [], []
        for y, first, last in cells:
            left, right, top, bottom = first - 0.5, last + 0.5, y - 0.46, y + 0.46
            corners += [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
            codes += [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
        axes.add_patch(PathPatch(Path(corners, codes), **_style(level)))
    return set(runs)


def _level(mixture: Mixture, expert: int) -> int:
    if not mixture.routed[expert]:
        return _UNSEEN
    load = mixture.load(expert)
    return sum(load >= bound for bound in _BOUNDS)


def _style(level: int) -> dict:
    if level == _UNSEEN:
        return {"facecolor": COLORS["part-of-set"], "linewidth": 0}
    return {"facecolor": COLORS["output"], "alpha": _SHADES[level], "linewidth": 0}


def _star(axes: Axes, rows: list[Mixture], supers) -> None:
    places = {(mixture.layer, mixture.name): y for y, mixture in enumerate(rows)}
    at = [
        (e["expert"], places[e["layer"], e.get("mixture")])
        for e in supers
        if (e["layer"], e.get("mixture")) in places
    ]
    if at:
        x, y = zip(*at)
        style = {"color": COLORS["super-weight"], "mec": "white", "mew": 0.6, "ms": 11}
        axes.plot(x, y, "*", ls="none", label="super expert", zorder=4, **style)
