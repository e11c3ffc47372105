"""A scan report in the terminal, and the wording of its numbers that the page shares."""

from __future__ import annotations

import math

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .mixtures import mixtures, ranges

STYLES = {
    "super weight": "bold red",
    "critical set": "bold red",
    "part of a critical set": "red",
    "mild": "yellow",
    "inert": "dim",
    "candidate": "cyan",
}
NOTHING = "-"
UNSEEN_SHOWN = 6  # layers


def render(report: dict, console: Console) -> None:
    """Print a report: candidates, sets, what they are compared with, and the summary last.

    Fits 100 columns, and says everything in words, so that it reads without colour too.

    Args:
        report: the document of a scan (docs/report.md).
        console: where to print.
    """
    if report["candidates"]:
        console.print(_candidates(report))
    if report["sets"]:
        console.print(_sets(report))
    if report.get("super_experts"):
        console.print(_super_experts(report))
    for line in _experts(report):
        console.print(Text(line))
    for line in (_stored(report), _baseline(report), _null(report), _consistency(report)):
        if line:
            console.print(Text(line))
    console.print()
    console.print(Text(visible(report["summary"]), style="bold"))


def number(value: float | int | None, digits: int = 4) -> str:
    """Write a number with ``digits`` significant digits; integers in full, None as "-"."""
    if value is None:
        return NOTHING
    if isinstance(value, int) or math.isnan(value) or math.isinf(value):
        return str(value).replace("nan", "NaN")
    if digits <= math.log10(abs(value) or 1) < 6:
        return f"{value:.0f}"
    return f"{value:.{digits}g}"


def percent(value: float | None) -> str:
    """Write a share as percent; what would round to 0 % or to 100 % keeps a digit."""
    if value is None or not math.isfinite(value):
        return number(value)
    return f"{value:.1%}" if 0 < value < 0.01 or 0.99 < value < 1 else f"{value:.0%}"


def interval(entry: dict, digits: int = 4) -> str:
    """Write the 95 % interval of a ratio, or "" where nothing was measured."""
    if entry["ratio"] is None:
        return ""
    return f"{number(entry['ratio_low'], digits)}..{number(entry['ratio_high'], digits)}"


def position(entry: dict) -> str:
    """Name a weight by "layer 2 expert 5 [row, column]", the expert only where there is one."""
    expert = "" if entry["expert"] is None else f" expert {entry['expert']}"
    return f"layer {entry['layer']}{expert} [{entry['row']}, {entry['column']}]"


def visible(text: str, limit: int | None = None) -> str:
    """Write what cannot be printed (control, bidirectional, surrogate ...) as an escape.

    A token's text can hold anything; nothing of it may steer the terminal or the page.

    Args:
        text: any string.
        limit: characters of ``text`` to keep; what is cut is marked by "...".
    """
    cut = limit is not None and len(text) > limit
    kept = text[:limit] if cut else text
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in kept)
    return "".join(escaped) + ("..." if cut else "")


def _table(title: str, columns: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    for name, justify in columns:
        table.add_column(Text(name), justify=justify, overflow="fold")
    return table


def _row(table: Table, verdict: str, cells: list[str]) -> None:
    table.add_row(*(Text(cell) for cell in cells), style=STYLES.get(verdict, ""))


def _candidates(report: dict) -> Table:
    entries = report["candidates"]
    experts = any(c["expert"] is not None for c in entries)
    columns = [
        ("#", "right"),
        ("layer", "right"),
        *([("expert", "right")] if experts else []),
        ("[row, column]", "left"),
        ("weight", "right"),
        ("in peak\nout peak", "right"),
        ("share\npersist.", "right"),
        ("spikes", "right"),
        ("ratio\n(95 % interval)", "left"),
        ("verdict", "left"),
        ("set", "right"),
    ]
    table = _table("Candidates (ratio: perplexity zeroed / intact)", columns)
    for c in entries:
        cells = [
            str(c["id"]),
            str(c["layer"]),
            *([number(c["expert"])] if experts else []),
            f"[{c['row']}, {c['column']}]",
            number(c["weight"]),
            f"{number(c['in_peak'])}\n{number(c['out_peak'])}",
            f"{percent(c['share'])}\n{percent(c['persistence'])}",
            f"{c['spikes']}/{report['inputs']['samples']}",
            f"{number(c['ratio'])}\n{interval(c, 3)}".rstrip(),
            c["verdict"].replace("part of a ", "part of a\n"),
            number(c["set"]),
        ]
        _row(table, c["verdict"], cells)
    return table


def _sets(report: dict) -> Table:
    columns = [
        ("set", "right"),
        ("members", "left"),
        ("joint ratio\n(95 % interval)", "left"),
        ("ratio without this one", "left"),
        ("verdict", "left"),
    ]
    table = _table("Sets, zeroed together", columns)
    for s in report["sets"]:
        without = {entry["candidate"]: entry["ratio"] for entry in s["leave_one_out"]}
        members = [f"#{i} {position(report['candidates'][i])}" for i in s["members"]]
        cells = [
            str(s["id"]),
            "\n".join(members),
            f"{number(s['ratio'])}\n{interval(s, 3)}".rstrip(),
            "\n".join(f"#{i}: {number(without.get(i))}" for i in s["members"]),
            s["verdict"],
        ]
        _row(table, s["verdict"], cells)
    return table


def _super_experts(report: dict) -> Table:
    columns = [
        ("layer", "right"),
        ("expert", "right"),
        ("tokens", "right"),
        ("holds", "left"),
        ("ratio\n(95 % interval)", "left"),
        ("of zeroing", "left"),
    ]
    table = _table("Super experts (hold a super weight or a member of a critical set)", columns)
    for e in report["super_experts"]:
        held = [report["candidates"][i] for i in e["candidates"]]
        cells = [
            str(e["layer"]),
            str(e["expert"]),
            f"{e['routed']}\n{percent(e['routed_share'])}",
            "\n".join(f"#{c['id']} [{c['row']}, {c['column']}]" for c in held),
            f"{number(e['ratio'])}\n{interval(e, 3)}",
            ", ".join(f"#{i}" for i in e["zeroed"]),
        ]
        _row(table, "super weight", cells)
    return table


def _experts(report: dict) -> list[str]:
    """How tokens were routed, and which experts none has reached, in a few lines."""
    found = mixtures(report)
    if not found:
        return []
    counts = sorted(count for mixture in found for count in mixture.routed.values())
    middle = counts[(len(counts) - 1) // 2]
    lines = [
        f"Experts: {len(counts)} in {len(found)} mixtures; tokens of an expert: least "
        f"{counts[0]}, median {middle}, most {counts[-1]}"
    ]
    unseen = [mixture for mixture in found if mixture.unseen]
    for mixture in unseen[:UNSEEN_SHOWN]:
        experts = visible(ranges(mixture.unseen), 70)
        lines.append(f"Unseen in layer {mixture.layer}: {experts}")
    if len(unseen) > UNSEEN_SHOWN:
        lines.append(f"Unseen in {len(unseen) - UNSEEN_SHOWN} more layers: the report has them")
    return lines


def _stored(report: dict) -> str:
    """How the weights are packed; "" where they are not."""
    stored = report["model"].get("quantization")
    if not stored:
        return ""
    rest = [
        *([f"{stored['bits']} bits"] if "bits" in stored else []),
        *(f"{name} {stored[name]}" for name in ("code", "block") if name in stored),
    ]
    return visible("Weights: " + ", ".join([stored["method"], *rest]), 200)


def _baseline(report: dict) -> str:
    baseline = report["baseline"]
    if baseline is None:
        return "Baseline: not measured"
    return (
        f"Baseline: perplexity {number(baseline['perplexity'])} on {baseline['tokens']} tokens "
        f"in {baseline['windows']} windows, information {number(baseline['information'])} nats"
    )


def _null(report: dict) -> str:
    null = report["null_distribution"]
    if null is None:
        return "Null: not measured"
    if not null["draws"]:
        return "Null: no random weight was drawn"
    return (
        f"Null: {null['draws']} random weights zeroed, largest ratio "
        f"{number(null['ratio_max'], 6)}, magnitude match {percent(null['matched'])}"
    )


def _consistency(report: dict) -> str:
    consistency = report["consistency"]
    tiers = ", ".join(f"{name}: {count}" for name, count in consistency["tiers"].items())
    return f"Consistency: positions by share of {consistency['samples']} samples: {tiers}"
