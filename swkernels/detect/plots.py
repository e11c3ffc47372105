"""Figures of a scan report, as PNG or SVG: no display, no pyplot, no state left behind."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatter, MaxNLocator

from .table import number, position

COLORS = {  # every colour of a figure by its role, so that a page can put its own in place
    "ink": "#1f2a35",
    "muted": "#66727f",
    "grid": "#dde2e7",
    "output": "#3d5873",
    "input": "#2a7f79",
    "super-weight": "#c3312f",
    "part-of-set": "#d9822b",
    "mild": "#8059a8",
    "inert": "#737f8b",
    "candidate": "#2f74d0",
}
VERDICTS = {  # role of the colour and marker, least severe first
    "inert": ("inert", "o"),
    "mild": ("mild", "s"),
    "candidate": ("candidate", "D"),
    "part of a critical set": ("part-of-set", "^"),
    "critical set": ("super-weight", "P"),
    "super weight": ("super-weight", "*"),
}
_STYLE = {
    "font.size": 9.5,
    "font.family": "sans-serif",
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "swkernels",  # the same report gives the same bytes
    "text.parse_math": False,
    "figure.facecolor": "none",  # the page's own ground shows through
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": COLORS["ink"],
    "axes.edgecolor": COLORS["muted"],
    "axes.labelcolor": COLORS["ink"],
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": COLORS["muted"],
    "ytick.color": COLORS["muted"],
    "xtick.labelcolor": COLORS["ink"],
    "ytick.labelcolor": COLORS["ink"],
    "grid.color": COLORS["grid"],
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
WIDTH = 9.2  # inches
_PLAIN = FuncFormatter(lambda value, _: f"{value:g}")  # an SVG's text would show markup raw


class _Between(LogFormatter):
    """Labels between the powers of ten, where there are few of these; plain as they are."""

    def __call__(self, value, position=None) -> str:
        return _PLAIN(value) if super().__call__(value, position) else ""


_ANNOTATIONS = 6  # per panel: more would cover each other


def spikes_png(report: dict) -> bytes:
    """Draw the peaks of every layer as PNG, 150 dots an inch. See ``spikes_svg``."""
    return png_of(_spikes, report)


def spikes_svg(report: dict) -> str:
    """Draw the peaks of every layer: outputs above, inputs below, on a log scale.

    For each layer the largest channel peak and the median channel peak; of a layer with experts
    the maximum over them. A channel that stands out by the scan's ``prominence`` is named, and
    candidates are marked in the colour of their verdict.
    """
    return svg_of(_spikes, report)


def consistency_svg(report: dict) -> str:
    """Draw how many positions spike in which share of the samples, and how that settled."""
    return svg_of(_consistency, report)


def ratios_svg(report: dict) -> str:
    """Draw the perplexity ratio of every candidate and set with its 95 % interval.

    The band is the range of the null draws; the dashed lines are the scan's two thresholds.
    Infinite and NaN ratios stand at the right edge, with their name.
    """
    return svg_of(_ratios, report)


_PNG = {"Software": None}
_SVG = {"Date": None, "Creator": None, "Format": None, "Type": None}


def png_of(draw: Callable[[dict], Figure], report: dict) -> bytes:
    """Draw a figure of a report as PNG, 150 dots an inch, on white."""
    with matplotlib.rc_context(_STYLE):
        file = io.BytesIO()
        canvas = FigureCanvasAgg(draw(report))
        canvas.print_figure(file, dpi=150, facecolor="white", metadata=_PNG)
    return file.getvalue()


def svg_of(draw: Callable[[dict], Figure], report: dict) -> str:
    """Draw a figure of a report as an SVG element that can stand in HTML."""
    with matplotlib.rc_context(_STYLE):
        file = io.StringIO()
        FigureCanvasSVG(draw(report)).print_svg(file, metadata=_SVG)
    text = file.getvalue()
    return text[text.index("<svg") :]  # without the XML prolog it can stand in HTML


def _spikes(report: dict) -> Figure:
    figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
    outputs, inputs = figure.subplots(2, 1, sharex=True)
    layers = sorted({entry["layer"] for entry in report["layers"]})
    for axes, side, title in (
        (outputs, "out", "Output of the down projection: largest |y| per layer"),
        (inputs, "in", "Input of the down projection: largest |x| per layer"),
    ):
        _peaks_panel(axes, report, layers, side)
        axes.set_title(title)
        axes.set_ylabel("magnitude")
    inputs.set_xlabel("layer")
    inputs.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16, min_n_ticks=1))
    if layers:
        inputs.set_xlim(layers[0] - 0.6, layers[-1] + 0.6)
    _legend(figure, [outputs, inputs])
    return figure


def _legend(figure: Figure, panels: list[Axes]) -> None:
    """One legend below the panels: each label once, verdicts last and least severe first."""
    handles = {}
    for axes in panels:
        handles.update(zip(*reversed(axes.get_legend_handles_labels())))
    order = [label for label in handles if label not in VERDICTS]
    order += [label for label in VERDICTS if label in handles]
    entries = [handles[label] for label in order]
    figure.legend(entries, order, loc="outside lower center", ncols=len(order), columnspacing=1.4)


def _peaks_panel(axes: Axes, report: dict, layers: list[int], side: str) -> None:
    color = COLORS["output" if side == "out" else "input"]
    strongest = {}
    for entry in report["layers"]:
        known = strongest.get(entry["layer"])
        if known is None or entry[f"{side}_peak"]["value"] > known[f"{side}_peak"]["value"]:
            strongest[entry["layer"]] = entry
    peaks = [_positive(strongest[layer][f"{side}_peak"]["value"]) for layer in layers]
    medians = [_positive(strongest[layer][f"{side}_median"]) for layer in layers]
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(_PLAIN)
    axes.yaxis.set_minor_formatter(_Between())
    axes.grid(axis="y")
    size = 4 if len(layers) <= 40 else 2.5
    side_name = "output" if side == "out" else "input"
    axes.plot(layers, peaks, "o-", color=color, ms=size, lw=1.3, label=f"{side_name} peak")
    axes.plot(layers, medians, ":", color=COLORS["muted"], lw=1.3, label="median channel")
    if len(layers) == 1:
        axes.plot(layers, medians, "_", color=COLORS["muted"], ms=12)
    for verdict, (role, marker) in VERDICTS.items():
        marked = {
            (c["layer"], c[f"{side}_peak"])
            for c in report["candidates"]
            if c["verdict"] == verdict and _drawable(c[f"{side}_peak"])
        }
        if marked:
            x, y = zip(*sorted(marked))
            style = {"color": COLORS[role], "ms": 11 if marker == "*" else 7, "mec": "white"}
            axes.plot(x, y, marker, ls="none", mew=0.6, label=verdict, zorder=4, **style)
    _annotate(axes, strongest, side, report["settings"]["prominence"])
    axes.margins(y=0.2)


def _annotate(axes: Axes, strongest: dict[int, dict], side: str, limit: float) -> None:
    """Name the largest channel of the layers that stand out most, none beside another."""

    def stand_out(entry: dict) -> float:
        median, peak = entry[f"{side}_median"], entry[f"{side}_peak"]["value"]
        return peak / median if median else (math.inf if peak else 0.0)

    room = max(1.0, len(strongest) / 12)
    named: list[int] = []
    for layer, entry in sorted(strongest.items(), key=lambda item: -stand_out(item[1])):
        value = entry[f"{side}_peak"]["value"]
        crowded = any(abs(layer - other) < room for other in named)
        if stand_out(entry) < limit or crowded or not _drawable(value):
            continue
        if len(named) == _ANNOTATIONS:
            break
        named.append(layer)
        expert = "" if entry["expert"] is None else f"expert {entry['expert']}, "
        axes.annotate(
            f"{expert}ch {entry[f'{side}_peak']['channel']}",
            (layer, value),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            color=COLORS["ink"],
        )


def _drawable(value: float | None) -> bool:
    """Whether a log scale with margins can show it; no float32 and no loss is beyond."""
    return value is not None and 1e-150 <= value <= 1e150


def _positive(value: float | None) -> float:
    """What a log scale can show; NaN, which leaves a gap, for everything else."""
    return value if _drawable(value) else math.nan


def _consistency(report: dict) -> Figure:
    consistency = report["consistency"]
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    shares, settling = figure.subplots(1, 2)
    samples = max(consistency["samples"], 1)
    bins = min(samples, 20)
    heights = [0] * bins
    for entry in consistency["positions"]:
        heights[math.ceil(entry["count"] * bins / samples) - 1] += 1
    edges = [100 * (i + 1) / bins for i in range(bins)]
    shares.bar(edges, heights, width=-90 / bins, align="edge", color=COLORS["output"])
    shares.set_title("Positions by share of samples")
    shares.set_xlabel("share of the samples in which a position spikes (%)")
    shares.set_ylabel("positions")
    shares.set_xlim(-2, 102)
    curve = consistency["settling"]
    tiers = list(zip(("all", "half", "fifth", "any"), consistency["tiers"], (1.2, 2.4, 3.8, 5.4)))
    roles = ("super-weight", "part-of-set", "mild", "inert")
    for (key, label, width), role in reversed(list(zip(tiers, roles))):  # equal tiers all show
        xs, ys = [point["samples"] for point in curve], [point[key] for point in curve]
        style = {"ms": width + 3, "lw": width, "color": COLORS[role]}
        settling.plot(xs, ys, "o-", label=label, **style)
    settling.set_title("How the tiers settle")
    settling.set_xlabel("samples read")
    settling.set_ylabel("positions")
    settling.set_xscale("log")
    ticks = [point["samples"] for point in curve]
    settling.set_xticks(ticks, [str(tick) for tick in ticks])
    settling.minorticks_off()
    settling.legend(title="spikes in", reverse=True, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axes in (shares, settling):
        axes.grid(axis="y")
        axes.margins(y=0.08)
        axes.set_ylim(bottom=0, top=None if consistency["positions"] else 1)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    return figure


def _ratios(report: dict) -> Figure:
    rows = _ratio_rows(report)
    figure = Figure(figsize=(WIDTH, 1.5 + 0.27 * max(len(rows), 1)), layout="constrained")
    axes = figure.subplots()
    if not rows:
        axes.set_axis_off()
        message = "No candidate" if not report["candidates"] else "Not verified by measurement"
        axes.text(0.5, 0.5, message, ha="center", va="center", color=COLORS["muted"])
        return figure
    axes.set_xscale("log")
    axes.grid(axis="x")
    null = report["null_distribution"]
    draws = [ratio for ratio in (null["ratios"] if null else []) if _drawable(ratio)]
    if draws:
        label = f"null: {null['draws']} random weights"
        axes.axvspan(min(draws), max(draws), color=COLORS["inert"], alpha=0.35, label=label)
    for name, height in (("mild_ratio", -1.4), ("critical_ratio", -0.8)):
        value = report["settings"][name]
        axes.plot([value] * 2, [len(rows), height], "--", color=COLORS["muted"], lw=1)
        text = f" {name.removesuffix('_ratio')} x{value:g}"
        axes.text(value, height, text, color=COLORS["muted"], fontsize=8.5, va="center")
    low, high = _limits(rows, report["settings"])
    axes.set_xlim(low, high)
    for y, (_, entry) in enumerate(rows):
        _ratio_row(axes, y, entry, high)
    sets = sum("members" in entry for _, entry in rows)
    if sets:
        axes.axhline(len(rows) - sets - 0.5, color=COLORS["muted"], lw=0.8)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -1.8)
    axes.set_xlabel("perplexity with the weight(s) zeroed / perplexity of the intact model")
    if high / low < 100:
        marks = (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 50)
        axes.set_xticks([mark for mark in marks if low <= mark <= high])
        axes.minorticks_off()
    axes.xaxis.set_major_formatter(_PLAIN)
    _legend(figure, [axes])
    return figure


def _ratio_rows(report: dict) -> list[tuple[str, dict]]:
    """Label and entry of every measured candidate, then of every set, worst first."""

    def worst_first(entries: list[dict]) -> list[dict]:
        measured = [entry for entry in entries if entry["ratio"] is not None]
        return sorted(measured, key=lambda e: -(math.inf if math.isnan(e["ratio"]) else e["ratio"]))

    rows = [(f"#{c['id']}  {position(c)}", c) for c in worst_first(report["candidates"])]
    for s in worst_first(report["sets"]):
        members = ", ".join(f"#{i}" for i in s["members"][:6])
        more = ", ..." if len(s["members"]) > 6 else ""
        rows.append((f"set {s['id']}  {{{members}{more}}}", s))
    return rows


def _limits(rows: list[tuple[str, dict]], settings: dict) -> tuple[float, float]:
    """Limits of the axis that hold every finite value, with room for the labels."""
    values = [1.0, settings["critical_ratio"], settings["mild_ratio"]]
    for _, entry in rows:
        values += [_positive(entry[name]) for name in ("ratio", "ratio_low", "ratio_high")]
    shown = [value for value in values if not math.isnan(value)]
    span = max(shown) / min(shown)
    return min(shown) / span**0.05, max(shown) * span**0.14


def _ratio_row(axes: Axes, y: int, entry: dict, edge: float) -> None:
    role, marker = VERDICTS.get(entry["verdict"], VERDICTS["candidate"])
    color, value = COLORS[role], entry["ratio"]
    low, high = _positive(entry["ratio_low"]), entry["ratio_high"]
    if not math.isnan(low) and not math.isnan(high):
        axes.plot([low, min(high, edge)], [y, y], color=color, lw=1.8, solid_capstyle="butt")
    style = {"color": color, "ms": 10 if marker == "*" else 6, "ls": "none"}
    if not _drawable(value):
        axes.plot([edge], [y], ">", color=color, ms=7, clip_on=False)
        axes.annotate(
            number(value),
            (edge, y),
            xytext=(-9, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            color=color,
        )
        axes.plot([], [], marker, label=entry["verdict"], **style)
        return
    axes.plot([value], [y], marker, label=entry["verdict"], **style)
