"""One plot a machine: our time over the fastest other way, by the size of the case."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

from benchmarks.book import Entry  # noqa: E402

_COLOURS = ("#1b6ca8", "#c1440e", "#3b7d3a", "#7a4f9a", "#8a6d00")


def draw(entries: list[Entry], machine: str, path: Path) -> bool:
    """Write an SVG; False, and no file, where there is nothing to draw."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for entry in entries:
        ratio = entry.over_rival()
        if ratio is not None:
            megabytes = entry.results[0]["bytes"] / 1e6
            groups.setdefault(entry.op, []).append((megabytes, ratio))
    if not groups:
        return False
    with matplotlib.rc_context({"svg.hashsalt": "swkernels", "svg.fonttype": "none"}):
        figure, axes = plt.subplots(figsize=(7.2, 4.0), layout="constrained")
        for colour, (op, points) in zip(_COLOURS, groups.items()):
            axes.scatter(*zip(*points), s=22, color=colour, label=op, alpha=0.8, linewidths=0)
        axes.axhline(1.0, color="#444444", linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="least bytes read and written (MB)")
        axes.set_ylabel("our time / fastest other way")
        axes.set_title(f"{machine}: below 1 is faster", fontsize=10)
        axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, fontsize=9)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
    return True
