"""The page of a folder: tables, plots and verdicts of every study that has runs, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from swkernels.files import write_atomically
from swkernels.train.figure import render

from .book import RUNS, Book
from .data import NAMES
from .lab import DETECT
from .recipe import Figure, Found, Plan, Recipe, Section, Table, Verdict
from .run import in_order
from .words import duration, labels

PAGE = "README.md"
FIGURES = "figures"
SHARED = ("detect", "evaluate")  # kinds of runs
_HOLDS = {True: "holds", False: "does not hold", None: "cannot be decided"}


def write_page(folder: Path, recipes: Sequence[Recipe], book: Book, plan: Plan) -> Path:
    """Write the page and its figures; what has no run yet is left out.

    Args:
        folder: of the studies.
        recipes: in the order of the page.
        book: the runs.
        plan: which of them are shown.
    """
    found = Found(book, plan)
    begun = [recipe for recipe in recipes if _is_begun(recipe, book, plan)]
    said = [(recipe, recipe.section(found)) for recipe in begun]
    sections = [(recipe, section) for recipe, section in said if section is not None]
    parts = ["# Studies", *_head(recipes, book, plan)]
    parts += _overview(sections, book, plan)
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


def _head(recipes: Sequence[Recipe], book: Book, plan: Plan) -> list[str]:
    """What the figures are of, as the records of the plan's runs have it."""
    runs = in_order(run for recipe in recipes for run in recipe.runs(plan))
    shown = [book.record(run) for run in runs if run in book]
    others = [record for record in book if record not in shown]
    models = _each(Path(record["model"]).name for record in shown)
    dtypes = _each(record["identity"]["dtype"] for record in shown)
    places = _each(
        f"{record['device']} with {record['threads']} thread{'s' * (record['threads'] > 1)}"
        for record in shown
    )
    versions = _each(
        f"{name} {version}"
        for record in shown
        for name, version in record["versions"].items()
        if version is not None
    )
    weights = _each(record["identity"]["super weights"] for record in shown)
    about = (
        f"**{models}** in {dtypes}, on {places}. Budget `{plan.budget.name}`, seeds "
        f"{_each(plan.seeds)}; training on {NAMES[f'{plan.task}/test']}. Super weights: {weights}"
        f"{_named(book)}. "
        f"{len(shown)} runs, {duration(sum(record['seconds'] for record in shown))} in all, with "
        f"{versions}. Made by `swkernels study`; every figure comes from [{RUNS}]({RUNS})."
    )
    if not others:
        return [about]
    budgets = _each(f"`{record['budget']}`" for record in others)
    return [
        about,
        f"The file holds {len(others)} more runs, of other plans (budget {budgets}): "
        "`swkernels study page` with `--budget`, `--seeds` or `--task` shows those.",
    ]


def _named(book: Book) -> str:
    """The super weights that were detected, where they are few, and what k of them are."""
    listed = (book.figures(DETECT)["super_weights"] if DETECT in book else None) or []
    if not listed:
        return ""
    return (
        f" ({labels(listed)}); where k weights are trained, these come first and then the largest "
        "of the down projections"
    )


def _each(values: Iterable[object]) -> str:
    """Each value once."""
    return ", ".join(dict.fromkeys(map(str, values)))


def _overview(sections: Sequence[tuple[Recipe, Section]], book: Book, plan: Plan) -> list[str]:
    """Every claim and what became of it; studies that say nothing yet, with how far they are."""
    rows = []
    for recipe, section in sections:
        link = f"[{recipe.name}](#{recipe.name})"
        rows += [[link, v.claim, f"**{_HOLDS[v.holds]}**"] for v in section.verdicts]
        done, total = _progress(recipe, book, plan)
        if done < total or not section.verdicts:
            rows.append([link, recipe.title, f"{done} of {total} runs"])
    if not rows:
        return []
    return ["## Does the published pattern hold here?", markdown(["study", "claim", "here"], rows)]


def _progress(recipe: Recipe, book: Book, plan: Plan) -> tuple[int, int]:
    """How many of its runs are done, and how many there are."""
    runs = in_order(recipe.runs(plan))
    return sum(run in book for run in runs), len(runs)


def _section(folder: Path, recipe: Recipe, section: Section, book: Book, plan: Plan) -> list[str]:
    done, total = _progress(recipe, book, plan)
    seconds = sum(book.record(r)["seconds"] for r in in_order(recipe.runs(plan)) if r in book)
    parts = [
        f"## {recipe.name}",
        f"**{recipe.title}** ({recipe.published}). {recipe.shows}",
        f"{section.settings} {done} of {total} runs are done; they took {duration(seconds)}.",
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
        "| " + " | ".join(map(cell, columns)) + " |",
        "|" + "|".join("---:" if number else "---" for number in right) + "|",
    ]
    lines += ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
    return "\n".join(lines)


def cell(value: object) -> str:
    """A value as a table shows it."""
    if value is None:
        return ""
    if isinstance(value, float):
        if math.isnan(value):
            return "undefined"
        if math.isinf(value):
            return "∞" if value > 0 else "-∞"
        if 1e3 <= abs(value) < 1e7:
            return f"{value:,.0f}"
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def percent(share: float | None, low: float | None = None, high: float | None = None) -> str | None:
    """A share as "49.3 %", with its interval where there is one."""
    if share is None:
        return None
    interval = "" if low is None else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{100 * share:.1f} %{interval}"
