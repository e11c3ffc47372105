"""A scan report as one HTML page that needs nothing but itself."""

from __future__ import annotations

import math
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from . import plots
from .mixtures import Mixture, mixtures, ranges, unseen_sentence
from .routing_plot import routing_svg
from .table import interval, number, percent, position, visible

POSITIONS_SHOWN = 20
TOKEN_LENGTH = 32
UNSEEN_OPEN = 8  # a longer list of layers with unseen experts is folded
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
    experts = mixtures(report)
    if experts:
        figures["routing"] = routing_svg(report)
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            report=report,
            figures={name: _inline(name, svg) for name, svg in figures.items()},
            headline=_headline(report),
            tiles=_tiles(report, experts),
            mixtures=experts,
            unseen=[mixture for mixture in experts if mixture.unseen],
            unseen_sentence=unseen_sentence(report),
            unseen_open=UNSEEN_OPEN,
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
        num=lambda value, digits=4: _data(value, number(value, digits)),
        written=_data,
        pct=lambda value: _data(value, percent(value)),
        interval=interval,
        position=position,
        ranges=ranges,
        role=lambda verdict: _ROLES.get(verdict, "candidate"),
        without=lambda s: {entry["candidate"]: entry for entry in s["leave_one_out"]},
        token=lambda text: "" if text is None else visible(text, TOKEN_LENGTH),
    )
    return environment


def _printable(value):
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _data(value: float | int | None, written: str) -> Markup:
    if value is None:
        return Markup('<span class="none">–</span>')
    return Markup('<data value="{}">{}</data>').format(repr(value), written)


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
    reached = " in what tokens reached" if report.get("unseen") else ""
    return {"text": f"No super weight found{reached}", "role": "input"}


def _tiles(report: dict, experts: list[Mixture]) -> list[dict]:
    """The key numbers: each a label, a value, how it is written, and a note."""
    inputs, model = report["inputs"], report["model"]
    baseline, null = report["baseline"] or {}, report["null_distribution"] or {}
    worst, where = _worst(report)
    perplexity, null_ratio = baseline.get("perplexity"), null.get("ratio_max")
    size = model["parameters"]
    rows = [
        ("candidates", len(report["candidates"]), None, f"in {_plural(model['layers'], 'layer')}"),
        ("largest ratio", worst, None, where),
        ("largest null ratio", null_ratio, number(null_ratio, 6), "of random weights"),
        ("baseline perplexity", perplexity, None, "of the intact model"),
        ("tokens read", inputs["tokens"], None, f"in {_plural(inputs['samples'], 'sample')}"),
        ("parameters", size, _size(size), model["dtype"]),
    ]
    if experts:
        every = sum(len(mixture.routed) for mixture in experts)
        unseen = sum(len(mixture.unseen) for mixture in experts)
        rows.append(("experts unseen", unseen, None, f"of {every}"))
    names = ("label", "value", "written", "note")
    return [dict(zip(names, (label, v, w or number(v), note))) for label, v, w, note in rows]


def _worst(report: dict) -> tuple[float | None, str]:
    """The largest ratio of a candidate or set, NaN before everything, and whose it is."""
    measured = [e for e in report["candidates"] + report["sets"] if e["ratio"] is not None]
    if not measured:
        return None, "not measured"
    worst = max(measured, key=lambda e: (math.isnan(e["ratio"]), e["ratio"]))
    where = position(worst) if "row" in worst else f"set {worst['id']}, jointly"
    return worst["ratio"], where


def _size(parameters: int) -> str:
    for unit, scale in (("B", 1e9), ("M", 1e6)):
        if parameters >= scale:
            return f"{parameters / scale:.4g} {unit}"
    return str(parameters)


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
