"""The page: what it says of made-up studies, and that every study's part bears missing runs."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from swkernels.errors import InvalidInput
from swkernels.studies import study
from swkernels.studies.book import RUNS, Book
from swkernels.studies.budget import BUDGETS, FULL
from swkernels.studies.page import cell, markdown, percent, write_page
from swkernels.studies.recipe import Figure, Found, Plan, Recipe, Section, Table, Verdict
from swkernels.studies.recipes import RECIPES
from swkernels.studies.run import Run, in_order
from tests.studies import tiny

PLAN = tiny.PLAN


def run_of(plan: Plan, n: int) -> Run:
    return Run("train", {"n": n, "questions": plan.budget.questions, "seed": plan.seed})


def section(found: Found) -> Section | None:
    figures = found(run_of(found.plan, 1))
    if figures is None:
        return None
    return Section(
        "Two runs.",
        [
            Table(["|what|", "value"], [["a|b", figures["value"]], [None, 12345]], "A caption."),
            Figure("curve", "A curve", lambda figure: figure.subplots().plot([1, 2])),
        ],
        [Verdict("It grows.", figures["holds"], "by the interval [1, 2].")],
        ["Once a note."],
    )


def recipe_of(name: str, runs=lambda plan: [run_of(plan, 1), run_of(plan, 2)]) -> Recipe:
    return Recipe(name, f"The title of {name}", "Table 1", "It shows.", (), 1, runs, section)


@pytest.fixture
def book(tmp_path):
    return Book(tmp_path / RUNS)


def add(book: Book, n: int, holds=True, plan: Plan = PLAN, **about) -> None:
    about = tiny.ABOUT | {"budget": plan.budget.name, "seeds": list(plan.seeds)} | about
    book.add(run_of(plan, n), about, {"value": 0.5 * n, "holds": holds})


@pytest.mark.parametrize(
    ("holds", "words"),
    [(True, "holds"), (False, "does not hold"), (None, "cannot be decided")],
)
def test_a_page(book, tmp_path, holds, words):
    add(book, 1, holds)
    add(book, 2, holds, seconds=33.0)
    path = write_page(tmp_path, [recipe_of("a-study")], book, PLAN)
    text = path.read_text()
    head, overview, part = re.split(r"\n\n## ", text)
    assert head.startswith("# Studies\n\n**planted** in float32, on cpu with 1 thread.")
    assert "Budget `tiny`, seeds 42, 43, 44; training on ARC-Easy." in head
    assert "2 runs, 2 min in all, with swkernels 0.1.0. Made" in head and "[runs.jsonl](" in head
    assert "more runs" not in head
    assert overview.endswith(f"|---|---|---|\n| [a-study](#a-study) | It grows. | **{words}** |")
    assert part.startswith("a-study\n\n**The title of a-study** (Table 1). It shows.\n\nTwo runs. ")
    assert "2 of 2 runs are done; they took 2 min." in part
    table = "| \\|what\\| | value |\n|---|---:|\n| a\\|b | 0.5 |\n|  | 12,345 |\n\n*A caption.*"
    assert table in part
    assert f"- It grows. **This {words}**: by the interval [1, 2].\n\n- Once a note.\n" in part
    (figure,) = re.findall(r"!\[A curve\]\((.*)\)", part)
    assert ElementTree.parse(tmp_path / figure).getroot().tag.endswith("svg")


def test_a_study_with_some_of_its_runs(book, tmp_path):
    add(book, 1)
    text = write_page(tmp_path, [recipe_of("a"), recipe_of("b")], book, PLAN).read_text()
    for name in "ab":
        assert f"| [{name}](#{name}) | The title of {name} | 1 of 2 runs |" in text
    assert text.count("1 of 2 runs are done; they took 2 min.") == 2


def test_a_study_that_was_not_begun_or_says_nothing_is_left_out(book, tmp_path):
    shared = Run("evaluate", {})
    only_shared = recipe_of("shared", lambda plan: [shared, run_of(plan, 1)])
    book.add(shared, tiny.ABOUT, {})
    text = write_page(tmp_path, [recipe_of("none"), only_shared], book, PLAN).read_text()
    assert "##" not in text and "1 runs, 2 min in all" in text
    add(book, 2)  # begun, but the section has nothing to say yet
    text = write_page(tmp_path, [recipe_of("none")], book, PLAN).read_text()
    assert "##" not in text


def test_one_budget_in_a_folder_of_two(book, tmp_path, monkeypatch):
    full = Plan(replace(FULL, questions=77), (1, 2))
    monkeypatch.setitem(BUDGETS, "full", full.budget)
    monkeypatch.setitem(BUDGETS, "tiny", tiny.TINY)
    monkeypatch.setattr(study, "RECIPES", {"a": recipe_of("a")})
    for n in (1, 2):
        add(book, n)
    add(book, 1, plan=full, device="cuda")
    text = study.page_again(tmp_path).read_text()  # that of the last run
    assert "on cuda with 1 thread. Budget `full`, seeds 1, 2;" in text
    assert (
        "The file holds 2 more runs, of other plans (budget `tiny`): `swkernels study page`" in text
    )
    text = study.page_again(tmp_path, budget="tiny").read_text()
    assert "on cpu with 1 thread. Budget `tiny`, seeds 42, 43, 44;" in text
    assert "The file holds 1 more runs, of other plans (budget `full`)" in text
    text = study.page_again(tmp_path, seeds=(9,)).read_text()
    assert "Budget `full`, seeds 9;" in text and "The file holds 3 more runs" in text
    for other in ({"task": "winogrande"}, {"budget": "small"}):
        with pytest.raises(InvalidInput, match="holds no such runs"):
            study.page_again(tmp_path, **other)


def test_cells():
    values = [None, 0.5, 1234567.0, 12345.678, 1e-9, 12345, True, "a|b\nc"]
    shown = ["", "0.5", "1,234,567", "12,346", "1e-09", "12,345", "True", "a\\|b c"]
    assert list(map(cell, values)) == shown
    assert list(map(cell, (math.inf, -math.inf, math.nan))) == ["∞", "-∞", "undefined"]
    assert markdown(["a"], []) == "| a |\n|---|"
    assert percent(None) is None and percent(0.5) == "50.0 %"
    assert percent(0.5, 0.25, 1) == "50.0 % [25.0, 100.0]"


@pytest.fixture(scope="module")
def everything(planted, data, tmp_path_factory):
    """The folder of all studies."""
    out = tmp_path_factory.mktemp("all") / "out"
    tiny.run(["all"], planted, data, out)
    return out


def test_all_studies_are_on_the_page(everything, monkeypatch):
    text = (everything / "README.md").read_text()
    for name in RECIPES:
        assert f"\n\n## {name}\n\n" in text and f"[{name}](#{name})" in text
    assert not re.search(r"\b(nan|None|inf)\b", text)
    figures = re.findall(r"!\[[^\]]*\]\((figures/[\w-]+\.svg)\)", text)
    assert len(set(figures)) == len(figures) and {f.name for f in everything.glob("figures/*")} == {
        name.removeprefix("figures/") for name in figures
    }
    for line in text.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) <= 13, f"too wide: {line}"
    monkeypatch.setitem(BUDGETS, "tiny", tiny.TINY)
    assert study.page_again(everything).read_text() == text


class Without(Found):
    """What is found, but for one run."""

    missing: Run

    def __call__(self, run: Run) -> dict | None:
        return None if run == self.missing else super().__call__(run)


def test_every_study_bears_a_run_that_is_missing(everything):
    found = Without(Book(everything / RUNS), PLAN)
    for recipe in RECIPES.values():
        for found.missing in in_order(recipe.runs(PLAN)):
            said = recipe.section(found)
            for part in said.parts if said else ():
                if isinstance(part, Table):
                    markdown(part.columns, part.rows)
