"""Plots: our time over the fastest other way by the size of the case, one a machine; and the
perplexity after quantization by the size of a block."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

from benchmarks import quality  # noqa: E402
from benchmarks.book import Entry  # noqa: E402
from benchmarks.suites import OPERATIONS  # noqa: E402

_COLOURS = (
    "#1b6ca8", "#c1440e", "#3b7d3a", "#7a4f9a", "#8a6d00", "#2a9d8f", "#b5179e", "#5c677d",
    "#e09f3e", "#457b9d", "#9d0208", "#606c38", "#6d597a", "#264653", "#bc6c25", "#3d405b",
    "#4d908e", "#780000", "#ff6b6b", "#118ab2", "#073b4c",
)  # fmt: skip
_STYLE = {"svg.hashsalt": "swkernels", "svg.fonttype": "none"}
_METHODS = dict(zip(quality.METHODS, zip(("#5c677d", "#e09f3e", "#c1440e", "#1b6ca8"), "osD^")))


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
    with matplotlib.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 4.0), layout="constrained")
        for op, points in groups.items():
            colour = _COLOURS[OPERATIONS.index(op)]
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


def draw_quality(table: quality.Table, path: Path) -> bool:
    """Write an SVG of perplexity by block size, a panel for each number of bits; False, and no
    file, where there is nothing to draw."""
    if len(table.cells) < 2:
        return False
    with matplotlib.rc_context(_STYLE):
        figure, panels = plt.subplots(
            1, len(quality.BITS), figsize=(9.2, 4.0), sharey=True, layout="constrained"
        )
        for axes, bits in zip(panels, quality.BITS):
            _quality_panel(axes, table, bits)
        panels[0].set_ylabel(f"perplexity, {table.study.text}")
        panels[0].legend(frameon=False, fontsize=9)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
    return True


def _quality_panel(axes, table: quality.Table, bits: int) -> None:
    places = range(len(quality.BLOCKS))
    for method, (colour, marker) in _METHODS.items():
        found = [(at, table.perplexity((bits, quality.BLOCKS[at], method))) for at in places]
        points = [(at, cell.value, cell.error or 0.0) for at, cell in found if cell]
        if points:
            at, values, errors = zip(*points)
            axes.errorbar(
                at, values, yerr=errors, color=colour, marker=marker, markersize=5, linewidth=1.4,
                capsize=2, label=method,
            )  # fmt: skip
    original = table.original.value
    axes.axhline(original, color="#444444", linewidth=1, linestyle="--", label="original")
    axes.set(yscale="log", title=f"{bits} bits", xlabel="elements of a block")
    axes.set_xticks(places, [f"{block:,}" if block != quality.TENSOR else block
                             for block in quality.BLOCKS], rotation=40, ha="right")  # fmt: skip
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
