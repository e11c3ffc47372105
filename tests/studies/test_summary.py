"""``summary``: its table and its verdicts, of figures that are made up."""

from __future__ import annotations

from dataclasses import replace

import pytest

from swkernels.studies.recipes import RECIPES, summary
from swkernels.studies.run import in_order
from tests.studies.made_up import BASE, PLAN, choices, found, trained, verdict

METHODS = [method for group in summary.groups(PLAN).values() for method in group]
AT, OTHERS = METHODS[1:5], METHODS[5:]


def section(at=100, others=260, *, names=None, steps=422, right=BASE, task="arc"):
    """Of methods with so many right answers; ``names`` are those that are done, None all."""
    plan = replace(PLAN, task=task)
    zeroed, *training = [m for group in summary.groups(plan).values() for m in group]
    edited = {"ARC-Easy": choices(104), "Winogrande": choices(200)}
    made = {zeroed.run: {"weights": [{}, {}], "choices": edited}}
    made |= {
        method.run: trained(at if n < 4 else others, steps=steps, values=n)
        for n, method in enumerate(training)
    }
    names = {method.name for method in METHODS} if names is None else names
    done = {m.run: made[m.run] for m in (zeroed, *training) if m.name in names}
    return summary.section(found(done, plan=plan, right=right))


def test_the_rows_are_those_of_table_6():
    table = section().parts[0]
    rows = {row[0]: row for row in table.rows}
    assert list(rows) == [
        "no training",
        "*at super weights*", "the super weights set to 0", "direct, k = 100", "direct, k = 4,096",
        "neighborhood, k = 100", "neighborhood, k = 4,096",
        "*controls on down_proj*", "random, k = 4,096", "LoRA on down_proj",
        "*LoRA on attention*", "LoRA", "LoRA, rows and columns of super weights at 0",
        "LoRA without its own largest updates",
    ]  # fmt: skip
    published = {name: tuple(row[-2:]) for name, row in rows.items() if row[4]}
    assert published == {
        "no training": ("60.65 %", "73.3 %"),
        "the super weights set to 0": ("26.98 %", "60.5 %"),
        "direct, k = 100": ("25.30 %", "26.3 %"),
        "direct, k = 4,096": ("26.30 %", "26.1 %"),
        "neighborhood, k = 100": ("24.96 %", "26.3 %"),
        "neighborhood, k = 4,096": ("25.59 %", "26.1 %"),
        "random, k = 4,096": ("64.18 %", None),
        "LoRA on down_proj": ("68.77 %", None),
        "LoRA": ("66.88 %", "77.3 %"),
        "LoRA, rows and columns of super weights at 0": ("66.50 %", "76.7 %"),
        "LoRA without its own largest updates": ("62.77 %", "64.09 %"),
    }
    zeroed, random = rows["the super weights set to 0"], rows["random, k = 4,096"]
    assert zeroed[1:4] == [0, "remove", None] and zeroed[4].startswith("26.0 % [")
    assert random[1:4] == [4, "sparse", 422] and random[4].startswith("65.0 % [")
    assert zeroed[5].startswith("-34.0 [") and random[5].startswith("+5.0 [")
    assert rows["LoRA"][2] == "full layer"


def test_it_needs_three_methods_and_shows_those_that_are_done():
    names = [method.name for method in METHODS]
    assert section(names=names[:2]) is None
    some = section(names=[names[1], names[5], names[7]])
    shown = [row[0] for row in some.parts[0].rows]
    assert shown == [
        "no training", "*at super weights*", names[1], "*controls on down_proj*", names[5],
        "*LoRA on attention*", names[7],
    ]  # fmt: skip
    assert some.verdicts == []
    assert len(section(names=names[:5]).verdicts) == 1


@pytest.mark.parametrize(
    ("at", "steps", "right", "holds"),
    [(100, 48, 240, True), (240, 48, 240, None), (240, 422, 240, False), (100, 422, 104, None)],
)
def test_whether_all_at_super_weights_collapses(at, steps, right, holds):
    assert verdict(section(at, steps=steps, right=right), "drops accuracy").holds is holds


@pytest.mark.parametrize(("others", "holds"), [(260, True), (242, None), (240, None), (200, False)])
def test_whether_all_else_improves(others, holds):
    assert verdict(section(others=others), "improves over").holds is holds


def test_of_winogrande_other_accuracies_count():
    rows = {row[0]: row for row in section(task="winogrande").parts[0].rows}
    assert rows["the super weights set to 0"][4].startswith("50.0 %")
    assert rows["no training"][-2:] == ["61.6 %", "67.5 %"]
    assert rows["direct, k = 100"][-2:] == ["53.2 %", None]
    assert rows["LoRA"][-2:] == [None, None]


def test_its_runs_are_those_of_other_studies():
    assert next(iter(RECIPES)) == "summary"  # first on the page
    others = [
        run for recipe in RECIPES.values() if recipe.name != "summary" for run in recipe.runs(PLAN)
    ]
    assert set(in_order(summary.runs(PLAN))) <= set(in_order(others))
    assert {run for recipe in ("direct", "lora") for run in RECIPES[recipe].runs(PLAN)[1:2]} <= set(
        summary.runs(PLAN)
    )
