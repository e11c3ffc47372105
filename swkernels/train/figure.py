"""What the figures of training share: no display, no pyplot, no state left behind."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable

INK, MUTED, LINE, MARK = "#1f2a35", "#66727f", "#3d5873", "#c3312f"
_STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "svg.hashsalt": "swkernels",  # the same figure gives the same bytes
    "text.parse_math": False,
}

_DATES = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}  # left out, for the same reason


def render(draw: Callable, kind: str, height: float) -> bytes:
    """Let ``draw`` fill a matplotlib figure and return it as "png", "svg" or "pdf".

    Args:
        height: in inches; the width is 9.2.
    """
    import matplotlib
    from matplotlib.figure import Figure

    file = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        # A Figure of its own has the backend of its format.
        figure = Figure(figsize=(9.2, height), layout="constrained")
        draw(figure)
        figure.savefig(file, format=kind, dpi=150, metadata=_DATES.get(kind))
    return file.getvalue()


def log_where_wide(axes, direction: str, values: Iterable[float]) -> None:
    """Make an axis logarithmic if its values spread, with about three to nine plain labels.

    Args:
        axes: of matplotlib.
        direction: "x" or "y".
        values: above zero; those that are not finite do not count.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    shown = [value for value in values if math.isfinite(value)]
    spread = max(shown) / min(shown) if shown else 1
    if spread < 3:
        return
    axes.set(**{f"{direction}scale": "log"})
    axis = getattr(axes, f"{direction}axis")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if spread < 200 else (1,), numticks=9))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def legend_above(axes) -> None:
    """Put the legend above the axes, where it hides nothing, in as few rows as fit."""
    handles, labels = axes.get_legend_handles_labels()
    characters = 120 / axes.get_gridspec().ncols  # that fit beside each other
    longest = max(map(len, labels), default=0) + 6  # the line before a label
    axes.legend(
        handles, labels, loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=8,
        ncols=max(1, min(len(labels), int(characters / longest))), columnspacing=1.4,
    )  # fmt: skip
