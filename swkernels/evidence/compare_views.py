"""A comparison of scan reports as a sentence, as tables and as a figure."""

from __future__ import annotations

import math

from swkernels.detect.plots import COLORS, VERDICTS
from swkernels.detect.table import STYLES, number, visible
from swkernels.train.figure import log_where_wide

from .compare_fates import FATES, LEVELS, MOVES

_LINES = 10  # coordinates in the figure: more would cover each other
_WORDS = {"stays": "stay", "moves": "move", "appears": "appear", "fades": "fade",
          "flickers": "flicker", "unchanged": "are unchanged"}  # fmt: skip


def summary(comparison) -> str:
    """What ``str(comparison)`` promises."""
    traces = comparison.traces
    counts = {fate: sum(t.fate == fate for t in traces) for fate in FATES}
    said = [_counted(count, fate) for fate, count in counts.items() if count]
    many = f"{len(comparison.names)} reports"
    found = f"No candidate in any of {many}."
    if traces:
        what = "coordinate is" if len(traces) == 1 else "coordinates are"
        found = f"{len(traces)} {what} a candidate in some of {many}: {', '.join(said)}."
    for t in traces:
        if t.moved_to is not None:
            found += f" {t.place.label} moves to {t.moved_to}."
    return f"{found} {_largest(comparison)}"


def _counted(count: int, fate: str) -> str:
    singular = "is unchanged" if fate == "unchanged" else fate
    return f"{count} {singular if count == 1 else _WORDS[fate]}"


def _largest(comparison) -> str:
    largest = comparison.largest
    if not any(peak.super for _, peak in largest):
        return "No super activation stands out in any of them."
    where = [f"layer {layer}, channel {peak.channel}" if peak.super else "none"
             for layer, peak in largest]  # fmt: skip
    if len(set(where)) == 1:
        values = " -> ".join(number(peak.value, 3) for _, peak in largest)
        return f"The largest super activation stays in {where[0]}: {values}."
    found = [f"{place} ({number(peak.value, 3)})" if peak.super else place
             for place, (_, peak) in zip(where, largest)]  # fmt: skip
    return f"The largest super activation: {' -> '.join(found)}."


def table(comparison):
    """What ``Comparison.table`` promises: a rich renderable."""
    from rich.console import Group
    from rich.text import Text

    parts = []
    if comparison.traces:
        parts += [_coordinates(comparison), Text("")]
    shown = [a for a in comparison.activations if any(peak.super for peak in a.peaks)]
    if shown:
        parts += [_activations(comparison, shown), Text("")]
    return Group(*parts)


def _table(title: str, columns):
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in columns:
        made.add_column(Text(visible(name)), overflow="fold")
    return made


def _coordinates(comparison):
    from rich.text import Text

    made = _table(
        "Coordinates (verdict, weight, perplexity zeroed / intact)",
        ["weight", "fate", *comparison.names],
    )
    for t in comparison.traces:
        fate = f"moves to {t.moved_to}" if t.moved_to else t.fate
        cells = [Text(t.place.label), Text(fate)]
        for s in t.sightings:
            ratio = "" if s.ratio is None else f", x{number(s.ratio)}"
            value = "" if s.value is None else f"\n{number(s.value)}{ratio}"
            cells.append(Text((s.verdict or "-") + value, style=STYLES.get(s.verdict, "dim")))
        made.add_row(*cells)
    return made


def _activations(comparison, shown):
    from rich.text import Text

    made = _table(
        "Super activations (output channel, magnitude, token)",
        ["layer", "fate", *comparison.names],
    )
    for a in shown:
        moved = a.fate == MOVES and a.moved_to is not None
        cells = [str(a.layer), f"moves to layer {a.moved_to}" if moved else a.fate]
        for peak in a.peaks:
            token = "" if peak.text is None else f" '{visible(peak.text, 20)}'"
            found = f"{peak.channel}: {number(peak.value)}{token}"
            cells.append(found if peak.super else "-")
        made.add_row(*map(Text, cells))
    return made


def draw(comparison, figure) -> None:
    """Above the values over the series, a marker for each verdict; below the super activations."""
    weights, activations = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    _draw_values(weights, comparison)
    largest = comparison.largest
    values = [peak.value for _, peak in largest]
    positions = range(len(values))
    activations.plot(positions, values, "o-", color=COLORS["output"], ms=5)
    for x, (layer, peak) in enumerate(largest):
        label = f"layer {layer}, channel {peak.channel}"
        activations.annotate(label, (x, peak.value), (0, 6), textcoords="offset points",
                             ha="center", fontsize=8)  # fmt: skip
    activations.set_ylabel("largest output |y|")
    activations.margins(x=0.12, y=0.25)
    if all(value > 0 for value in values):
        log_where_wide(activations, "y", values)
    activations.set_xticks(positions, [visible(name, 24) for name in comparison.names])
    if len(values) > 6:
        activations.tick_params(axis="x", rotation=30)
    for axes in (weights, activations):
        axes.grid(True, color=COLORS["grid"], linewidth=0.8)


def _draw_values(axes, comparison) -> None:
    from matplotlib.lines import Line2D

    def harm(trace) -> tuple:
        levels = [LEVELS.get(s.verdict, 3) for s in trace.sightings]
        return max(levels), max(abs(s.out_peak or 0.0) for s in trace.sightings)

    drawn = sorted(comparison.traces, key=harm, reverse=True)[:_LINES]
    used: set[str] = set()
    for t in drawn:
        values = [math.nan if s.value is None else s.value for s in t.sightings]
        [line] = axes.plot(range(len(values)), values, "-", lw=1.2, label=t.place.label)
        for x, s in enumerate(t.sightings):
            if s.value is None:
                continue
            role, marker = VERDICTS.get(s.verdict, ("muted", "."))
            axes.plot(x, s.value, marker, color=COLORS[role], ms=7,
                      markeredgecolor=line.get_color())  # fmt: skip
            used.add(s.verdict or "no candidate")
    left_out = len(comparison.traces) - len(drawn)
    more = f"; {left_out} more coordinates are not drawn" if left_out else ""
    axes.set_title(f"weights over the reports{more}", fontsize=9.5, loc="left")
    axes.set_ylabel("weight")
    marks = [Line2D([], [], ls="", marker=marker, color=COLORS[role], label=verdict)
             for verdict, (role, marker) in [*VERDICTS.items(), ("no candidate", ("muted", "."))]
             if verdict in used]  # fmt: skip
    if drawn:
        lines = axes.get_legend_handles_labels()[0]
        axes.legend(handles=[*lines, *marks], frameon=False, fontsize=8, loc="center left",
                    bbox_to_anchor=(1, 0.5))  # fmt: skip
