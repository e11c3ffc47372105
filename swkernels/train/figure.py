"""What the figures of training share: no display, no pyplot, no state left behind."""

from __future__ import annotations

import io
from collections.abc import Callable

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
        figure.savefig(file, format=kind, dpi=150)
    return file.getvalue()
