"""A weight change as a table in the terminal and as a figure."""

from __future__ import annotations

import math
from pathlib import Path

from swkernels.errors import InvalidInput
from swkernels.files import write_atomically

from .figure import LINE, MARK, MUTED, log_where_wide, render

_FORMATS = {".png", ".svg", ".pdf"}


def table(change, limit: int):
    """Return what ``WeightChange.table`` promises: a rich renderable."""
    from rich.console import Group
    from rich.text import Text

    parts = [_spread(change), Text(""), _standing(change)]
    if limit > 0:
        parts += [Text(""), _coordinates(change, limit)]
    return Group(*parts)


def plot(change, path: str | Path) -> None:
    """Do what ``WeightChange.plot`` promises."""
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in _FORMATS:
        raise InvalidInput(f"expected a file name that ends in .png, .svg or .pdf, got {path}")

    def draw(figure) -> None:
        ranked, scattered = figure.subplots(1, 2, sharey=True)
        _draw_ranked(ranked, change)
        _draw_scattered(scattered, change)

    write_atomically(path, render(draw, kind[1:], height=3.8))


def number(value: float) -> str:
    """Write a number with four significant digits."""
    return f"{value:.4g}"


def percent(value: float) -> str:
    """Write a share as percent with three significant digits."""
    return f"{100 * value:.3g} %"


def _table(title: str, columns: list[str], left: int = 1):
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for place, name in enumerate(columns):
        justify = "left" if place < left else "right"
        made.add_column(Text(name), justify=justify, overflow="fold")
    return made


def _add(made, cells: list[str]) -> None:
    from rich.text import Text

    made.add_row(*(Text(cell) for cell in cells))  # a name is no markup


def _spread(change):
    s = change.summary
    above = f"above {percent(s['threshold'])}"
    title = f"Change of {s['coordinates']} coordinates in {s['weights']} weights"
    made = _table(title, ["", "mean", "median", "max", "CV", above])
    for name, word, share in (("relative", percent, s["relative"]["share_above"]),
                              ("absolute", number, None)):  # fmt: skip
        figures = [word(s[name][key]) for key in ("mean", "median", "max")]
        last = "" if share is None else percent(share)
        _add(made, [name, *figures, f"{s[name]['cv']:.2f}", last])
    return made


def _standing(change):
    s = change.summary
    made = _table("How the coordinates stand out", ["", "before", "after", "delta"])
    magnitude = s["magnitude"]
    moved = f"{100 * magnitude['change']:+.3g} %"
    _add(made, ["mean magnitude", number(magnitude["before"]), number(magnitude["after"]), moved])
    for name, label, word in (
        ("percentile", "mean percentile rank", lambda value: percent(value / 100)),
        ("local_maximum", "local maxima", percent),
        ("neighbor_ratio", "mean ratio to neighbours", number),
    ):
        _add(made, [label, *(word(s[name][state]) for state in ("before", "after", "delta"))])
    return made


def _coordinates(change, limit: int):
    rows = sorted(change.rows, key=lambda row: _rank(row["relative"]), reverse=True)[:limit]
    more = f", the {len(rows)} largest changes" if len(rows) < len(change.rows) else ""
    made = _table(
        f"Coordinates{more}",
        ["weight", "[row, column]", "before", "after", "relative", "rank of\n|delta|"],
        left=2,
    )
    for row in rows:
        name = row["name"] if row["expert"] is None else f"{row['name']} expert {row['expert']}"
        cells = [number(row["before"]), number(row["after"]), percent(row["relative"])]
        place = f"[{row['row']}, {row['column']}]"
        _add(made, [name, place, *cells, percent(row["percentile_delta"] / 100)])
    return made


def _rank(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _draw_ranked(axes, change) -> None:
    relative = sorted((_drawable(row["relative"]) for row in change.rows), key=_low, reverse=True)
    s = change.summary
    axes.plot(range(1, len(relative) + 1), relative, ".-", color=LINE, ms=4, lw=1)
    if s["threshold"] > 0:
        label = f"{percent(s['threshold'])}: {percent(s['relative']['share_above'])} above"
        axes.axhline(s["threshold"], color=MARK, ls="--", lw=1, label=label)
    mean = s["relative"]["mean"]
    if not math.isnan(_drawable(mean)):
        axes.axhline(mean, color=MUTED, ls=":", lw=1.2, label=f"mean {percent(mean)}")
    log_where_wide(axes, "x", range(1, len(relative) + 1))
    log_where_wide(axes, "y", relative)
    axes.yaxis.set_major_formatter(lambda value, _: percent(value))
    axes.set_xlabel("coordinates, largest change first")
    axes.set_ylabel("relative change |W' - W| / |W|")
    hidden = sum(math.isnan(value) for value in relative)
    note = f" ({hidden} of 0 or not finite are not drawn)" if hidden else ""
    axes.set_title(f"Relative change{note}", loc="left", fontsize=10)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8.5)
    axes.grid(axis="y", color="#dde2e7")


def _draw_scattered(axes, change) -> None:
    for local, label, marker in ((True, "local maximum before", "*"), (False, "other", "o")):
        rows = [row for row in change.rows if row["local_maximum_before"] is local]
        if rows:
            x = [_drawable(abs(row["before"])) for row in rows]
            y = [_drawable(row["relative"]) for row in rows]
            color = MARK if local else LINE
            axes.plot(x, y, marker, ls="none", color=color, ms=6 if local else 3, label=label)
    log_where_wide(axes, "x", [_drawable(abs(row["before"])) for row in change.rows])
    axes.set_xlabel("magnitude before, |W|")
    axes.set_title("Relative change by magnitude", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8.5)
    axes.grid(color="#dde2e7")


def _drawable(value: float) -> float:
    """What a log scale can show; NaN, which leaves a gap, for everything else."""
    return value if math.isfinite(value) and value > 0 else math.nan


def _low(value: float) -> float:
    return -math.inf if math.isnan(value) else value
