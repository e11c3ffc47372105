"""The page of a folder: tables, plots and verdicts of every study that has runs, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from swkernels.files import write_atomically
from swkernels.train.figure import render

from .book import Book
from .recipe import Figure, Found, Plan, Recipe, Section, Table, Verdict
from .run import in_order

PAGE = "README.md"
FIGURES = "figures"
SHARED = ("detect", "evaluate")  # kinds of runs
_HOLDS = {True: "holds", False: "does not hold", None: "cannot be decided"}


def write_page(folder: Path, recipes: Sequence[Recipe], book: Book, plan: Plan, head: str) -> Path:
    """Write the page and its figures; what has no run yet is left out.

    Args:
        folder: of the studies.
        recipes: in the order of the page.
        book: the runs.
        plan: what was asked for.
        head: about the model, the data and the machine.
    """
    found = Found(book, plan)
    begun = [recipe for recipe in recipes if _is_begun(recipe, book, plan)]
    said = [(recipe, recipe.section(found)) for recipe in begun]
    sections = [(recipe, section) for recipe, section in said if section is not None]
    parts = ["# Studies", head, *_overview(sections)]
    for recipe, section in sections:
        parts += _section(folder, recipe, section, book, plan)
    path = folder / PAGE
    write_atomically(path, "\n\n".join(parts) + "\n")
    return path


def _is_begun(recipe: Recipe, book: Book, plan: Plan) -> bool:
    """Whether it has a run of its own, not only those that most studies need."""
    runs = recipe.runs(plan)
    return any(run in book for run in runs if run.kind not in SHARED) or all(
        run in book for run in runs
    )


def _overview(sections: Sequence[tuple[Recipe, Section]]) -> list[str]:
    rows = [
        [f"[{recipe.name}](#{recipe.name})", verdict.claim, f"**{_HOLDS[verdict.holds]}**"]
        for recipe, section in sections
        for verdict in section.verdicts
    ]
    if not rows:
        return []
    return ["## Does the published pattern hold here?", markdown(["study", "claim", "here"], rows)]


def _section(folder: Path, recipe: Recipe, section: Section, book: Book, plan: Plan) -> list[str]:
    runs = in_order(recipe.runs(plan))
    done = [run for run in runs if run in book]
    seconds = sum(book.record(run)["seconds"] for run in done)
    parts = [
        f"## {recipe.name}",
        f"**{recipe.title}** ({recipe.published}). {recipe.shows}",
        f"{section.settings} {len(done)} of {len(runs)} runs are done; they took "
        f"{seconds / 60:.1f} minutes in all.",
    ]
    for part in section.parts:
        parts += _figure(folder, part) if isinstance(part, Figure) else _table(part)
    parts += ["\n".join(map(_verdict, section.verdicts))] if section.verdicts else []
    parts += ["\n".join(f"- {note}" for note in section.notes)] if section.notes else []
    return parts


def _verdict(verdict: Verdict) -> str:
    return f"- {verdict.claim} **This {_HOLDS[verdict.holds]}**: {verdict.why}"


def _figure(folder: Path, figure: Figure) -> list[str]:
    path = folder / FIGURES / f"{figure.name}.svg"
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, render(figure.draw, "svg", figure.height))
    return [f"![{figure.caption}]({FIGURES}/{figure.name}.svg)", f"*{figure.caption}*"]


def _table(table: Table) -> list[str]:
    caption = [f"*{table.caption}*"] if table.caption else []
    return [markdown(table.columns, table.rows), *caption]


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table: numbers stand right, empty cells for None."""
    right = [any(isinstance(row[n], (int, float)) for row in rows) for n in range(len(columns))]
    lines = [
        "| " + " | ".join(columns) + " |",
        "|" + "|".join("---:" if number else "---" for number in right) + "|",
    ]
    lines += ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
    return "\n".join(lines)


def cell(value: object) -> str:
    """A value as a table shows it."""
    if value is None:
        return ""
    if isinstance(value, float):
        if not math.isfinite(value):
            return "∞" if value > 0 else str(value)
        return f"{value:,.3g}" if abs(value) >= 1e5 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def percent(share: float | None, low: float | None = None, high: float | None = None) -> str | None:
    """A share as "49.3 %", with its interval where there is one."""
    if share is None:
        return None
    interval = "" if low is None else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{100 * share:.1f} %{interval}"
