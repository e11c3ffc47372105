"""A scan report as one HTML page that needs nothing but itself."""

from __future__ import annotations

import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from . import plots
from .table import interval, number, percent, position, visible

POSITIONS_SHOWN = 20
TOKEN_LENGTH = 32
_ROLES = {verdict: role for verdict, (role, _) in plots.VERDICTS.items()}


def render(report: dict) -> str:
    """Return the page of a report: HTML with its style and figures inside, no script.

    Light or dark as the reader's system is. Everything that comes from the report is escaped, and
    what cannot be printed is shown as an escape. Every number is a ``<data>`` element whose
    ``value`` has it in full.

    Args:
        report: the document of a scan (docs/report.md).
    """
    figures = {
        "spikes": plots.spikes_svg(report),
        "ratios": plots.ratios_svg(report),
        "consistency": plots.consistency_svg(report),
    }
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            report=report,
            figures={name: _inline(name, svg) for name, svg in figures.items()},
            headline=_headline(report),
            tiles=_tiles(report),
            methods=_methods(report),
            positions=report["consistency"]["positions"][:POSITIONS_SHOWN],
            colors=plots.COLORS,
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        num=_data,
        pct=lambda value: _data(value, percent),
        interval=interval,
        position=position,
        role=lambda verdict: _ROLES.get(verdict, "candidate"),
        without=lambda s: {entry["candidate"]: entry for entry in s["leave_one_out"]},
        token=lambda text: "" if text is None else visible(text, TOKEN_LENGTH),
    )
    return environment


def _printable(value):
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _data(value: float | int | None, write=number) -> Markup:
    if value is None:
        return Markup('<span class="none">–</span>')
    return Markup('<data value="{}">{}</data>').format(repr(value), write(value))


def _inline(name: str, svg: str) -> Markup:
    """Make a figure part of the page: ids of its own, colours by the page's variables."""
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    for role, color in plots.COLORS.items():
        svg = svg.replace(color, f"var(--{role})")
    return Markup(svg)


def _count(entries: list[dict], verdict: str) -> int:
    return sum(entry["verdict"] == verdict for entry in entries)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _headline(report: dict) -> dict:
    """The verdict in a few words, with the role of its colour."""
    candidates = report["candidates"]
    alone = _count(candidates, "super weight")
    critical = _count(report["sets"], "critical set")
    if alone or critical:
        parts = [_plural(alone, "super weight")] * bool(alone)
        parts += [_plural(critical, "critical set")] * bool(critical)
        return {"text": ", ".join(parts), "role": "super-weight"}
    if _count(candidates, "candidate"):
        return {
            "text": f"{_plural(len(candidates), 'candidate')}, not verified",
            "role": "candidate",
        }
    return {"text": "No super weight found", "role": "input"}


def _tiles(report: dict) -> list[dict]:
    """The key numbers: each a label, a value and a note."""
    candidates, baseline, null = (
        report["candidates"],
        report["baseline"],
        report["null_distribution"],
    )
    measured = [e for e in candidates + report["sets"] if e["ratio"] is not None]
    worst = max(
        measured, key=lambda entry: (entry["ratio"] != entry["ratio"], entry["ratio"]), default=None
    )
    inputs, model = report["inputs"], report["model"]
    where = ""
    if worst is not None:
        where = position(worst) if "row" in worst else f"set {worst['id']}, jointly"
    return [
        {"label": "candidates", "value": len(candidates), "note": f"in {model['layers']} layers"},
        {"label": "largest ratio", "value": worst and worst["ratio"], "note": where},
        {
            "label": "largest null ratio",
            "value": null and null["ratio_max"],
            "note": f"{null['draws']} random weights" if null else "",
        },
        {
            "label": "baseline perplexity",
            "value": baseline and baseline["perplexity"],
            "note": f"{baseline['tokens']} tokens" if baseline else "",
        },
        {"label": "tokens read", "value": inputs["tokens"], "note": f"{inputs['samples']} samples"},
        {"label": "parameters", "value": model["parameters"], "note": model["dtype"]},
    ]


def _methods(report: dict) -> list[dict]:
    """For each method: how many candidates it names, and how many of those that are critical."""
    wanted = ("super weight", "part of a critical set")
    rows = []
    for name in ("dominance", "outlier", "threshold"):
        verdicts = [(c["methods"][name], c["verdict"] in wanted) for c in report["candidates"]]
        computed = any(named is not None for named, _ in verdicts)
        rows.append(
            {
                "name": name,
                "used": name in report["settings"]["methods"],
                "named": sum(bool(named) for named, _ in verdicts) if computed else None,
                "critical": sum(bool(named) and c for named, c in verdicts) if computed else None,
            }
        )
    return rows
