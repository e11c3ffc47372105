"""The figure of a ranking: the share of each kind, and the largest magnitude of each layer."""

from __future__ import annotations

import math

from swkernels.train.figure import MARK, MUTED, log_where_wide

_COLORS = {
    "q": "#9ecae1", "k": "#6baed6", "v": "#4292c6", "kv": "#2171b5", "qkv": "#2171b5",
    "o": "#3d5873", "gate": "#a1d99b", "up": "#41ab5d", "gate_up": "#41ab5d", "down": MARK,
}  # fmt: skip


def draw(figure, ranking) -> None:
    """Fill a matplotlib figure."""
    shares, layers = figure.subplots(1, 2, width_ratios=(2, 3))
    _draw_shares(shares, ranking)
    _draw_layers(layers, ranking)
    handles, labels = layers.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8.5)


def _draw_shares(axes, ranking) -> None:
    rows = ranking.shares()
    bottom = [0.0] * len(rows)
    for kind in reversed(ranking.kinds):  # down first, at the foot
        heights = [100 * row[kind] for row in rows]
        axes.bar(range(len(rows)), heights, 0.7, bottom=bottom, color=_COLORS[kind])
        bottom = [below + height for below, height in zip(bottom, heights)]
    axes.set_xticks(range(len(rows)), [f"{row['top']:,}" for row in rows])
    axes.set(xlabel="the largest n entries", ylabel="share in %", ylim=(0, 100))
    axes.set_title("Kind of projection", loc="left", fontsize=10)


def _draw_layers(axes, ranking) -> None:
    rows = ranking.layers()
    places = {block: place for place, block in enumerate(dict.fromkeys(r["block"] for r in rows))}
    for kind in ranking.kinds:
        own = [row for row in rows if row["kind"] == kind]
        x, y = [places[row["block"]] for row in own], [row["largest"] for row in own]
        width = 1.8 if kind == "down" else 1.0
        axes.plot(x, y, ".-", color=_COLORS[kind], lw=width, ms=4, label=kind)
    least = ranking.value.abs().min().item()
    axes.axhline(least, color=MUTED, ls=":", lw=1)
    axes.annotate(
        f"ranked from {least:.3g}", (1, least), xycoords=axes.get_yaxis_transform(),
        ha="right", va="bottom", fontsize=8, color=MUTED,
    )  # fmt: skip
    log_where_wide(axes, "y", [row["largest"] for row in rows if 0 < row["largest"] < math.inf])
    axes.set(xlabel="layer", ylabel="largest |W|")
    numbers = [int(block.rpartition(".")[2]) for block in places]
    if numbers != list(range(len(numbers))):  # several lists of blocks, or blocks without
        step = max(1, len(numbers) // 12)
        axes.set_xticks(range(0, len(numbers), step), numbers[::step])
    else:
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title("Largest magnitude of each kind", loc="left", fontsize=10)
    axes.grid(axis="y", color="#dde2e7")
