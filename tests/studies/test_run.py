"""Runs: keys that stay, and differ wherever the figures could; what is needed comes first."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest

from swkernels.studies.book import Book
from swkernels.studies.budget import FULL, SMALL
from swkernels.studies.data import PARTS
from swkernels.studies.kinds import KINDS
from swkernels.studies.lab import DETECT
from swkernels.studies.recipe import Found, Plan
from swkernels.studies.recipes import RECIPES, direct, neighborhood, random_control
from swkernels.studies.recipes.settings import baseline
from swkernels.studies.run import Run, in_order

PLAN = Plan(SMALL, SMALL.seeds)
# Of what ``swkernels study --budget small`` has measured on many a machine: another key means that
# hours are measured again, and that records which are kept have lost their study.
KEYS = {
    "af47f2da5eb93748": DETECT,
    "b59bd6c1aa5e2881": baseline(PLAN),
    "ae1c64699078cdb1": direct.run_of(PLAN, 100),
    "1cf8652006011122": direct.run_of(PLAN, 4096),
    "7c1e4b33c71f4953": neighborhood.run_of(PLAN, 100),
    "c703719ba0485ea8": random_control.run_of(PLAN, 4096),
}
CONFIG = {"a": 1, "b": [1, 2], "c": {"d": None}, "seed": 42}


@pytest.mark.parametrize("key", KEYS)
def test_the_keys_of_kept_records_stay(key):
    assert KEYS[key].key == key


def test_a_key_is_that_of_what_json_has_in_any_order():
    run = Run("train", CONFIG, (DETECT,))
    same = Run("train", dict(reversed(CONFIG.items())) | {"b": (1, 2)}, (Run(*_of(DETECT)),))
    assert run.key == same.key and run == same and len({run, same}) == 1
    assert len(run.key) == 16 and int(run.key, 16) >= 0
    assert run != run.key


@pytest.mark.parametrize(
    "other",
    [
        Run("evaluate", CONFIG, (DETECT,)),
        *(Run("train", CONFIG | {name: 2}, (DETECT,)) for name in CONFIG),
        Run("train", CONFIG | {"new": None}, (DETECT,)),
        Run("train", CONFIG | {"b": [2, 1]}, (DETECT,)),
        Run("train", CONFIG | {"c": {}}, (DETECT,)),
        Run("train", {k: v for k, v in CONFIG.items() if k != "seed"}, (DETECT,)),
        Run("train", CONFIG),
        Run("train", CONFIG, (Run("detect", {"samples": 5, "length": 512}),)),
        Run("train", CONFIG, (DETECT, DETECT)),
        Run("train", CONFIG, (Run("other", {}, (DETECT,)),)),
    ],
)
def test_another_kind_configuration_or_need_is_another_run(other):
    assert other != Run("train", CONFIG, (DETECT,))


def test_a_need_of_a_need_counts():
    deep = lambda n: Run("c", {}, (Run("b", {}, (Run("a", {"n": n}),)),))  # noqa: E731
    assert deep(1) == deep(1) and deep(1) != deep(2)


def test_what_json_cannot_say_is_no_configuration():
    with pytest.raises(ValueError):
        _ = Run("train", {"rate": float("nan")}).key


@pytest.mark.parametrize("task", ["arc", "winogrande"])
@pytest.mark.parametrize("budget", [SMALL, FULL], ids=lambda budget: budget.name)
@pytest.mark.parametrize("name", RECIPES)
def test_every_study_knows_its_runs_before_any_is_made(name, budget, task, tmp_path):
    plan = Plan(budget, budget.seeds, task)
    runs = RECIPES[name].runs(plan)
    assert runs and len({run.key for run in runs}) == len(runs)
    assert [run.key for run in RECIPES[name].runs(plan)] == [run.key for run in runs]
    for run in in_order(runs):
        assert run.kind in KINDS and json.loads(json.dumps(run.config)) == run.config
    assert set(RECIPES[name].parts(plan)) <= set(PARTS)
    section = RECIPES[name].section(Found(Book(tmp_path / "none.jsonl"), plan))
    assert section is None or not [v for v in section.verdicts if v.holds is not None]


@pytest.mark.parametrize("budget", [SMALL, FULL], ids=lambda budget: budget.name)
def test_seeds_and_tasks_are_other_runs(budget):
    plan = Plan(budget, budget.seeds)
    apart = {direct.run_of(plan, 100, seed).key for seed in plan.seeds}
    assert len(apart) == len(plan.seeds) and direct.run_of(plan, 100).key in apart
    other = direct.run_of(Plan(budget, budget.seeds, "winogrande"), 100)
    assert other.key not in apart


def test_in_order_has_each_run_once_behind_what_it_needs():
    a, b = Run("a", {}), Run("b", {})
    c = Run("c", {}, (b, a))
    d = Run("d", {}, (c, a))
    again = deepcopy(a)
    assert [run.kind for run in in_order([d, again, Run("e", {}), c])] == ["b", "a", "c", "d", "e"]
    assert in_order([]) == []


def _of(run):
    return run.kind, run.config, run.needs
