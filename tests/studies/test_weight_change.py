"""``weight-change``: its tables and verdicts from made-up changes, and its page."""

from __future__ import annotations

import math

import pytest

from swkernels.studies.recipes import direct, lora, lora_down
from swkernels.studies.recipes.weight_change import runs, section
from tests.studies import tiny
from tests.studies.made_up import PLAN, found, trained, verdict

GROUPS = [{"weight": 0.1 * n, "delta": 1e-3, "relative": 1e-2 / n} for n in range(1, 11)]


def change(mean, cv=0.5, coordinates=100, largest=None) -> dict:
    relative = {"mean": mean, "median": 0.9 * mean, "max": largest or 3 * mean, "cv": cv}
    return {
        "coordinates": coordinates,
        "absolute": {"mean": 2e-4},
        "relative": relative | {"share_above": 0.355},
    }


def standing(rank=(100.0, 100.0), local=(1.0, 1.0)) -> dict:
    both = lambda pair: dict(zip(("before", "after"), pair))  # noqa: E731
    return {
        "coordinates": 2,
        "magnitude": {"before": 0.5, "after": 0.51, "change": 0.02},
        "percentile": both(rank),
        "local_maximum": both(local),
        "neighbor_ratio": both((50.0, 51.0)),
    }


def page(by_direct, by_lora, steps=422, stands=None, groups=GROUPS, down=True):
    """Section where each change is a summary, for every k."""
    counts = PLAN.budget.counts
    made = {
        direct.run_of(PLAN, k): trained(240, steps=steps) | {"change": by_direct} for k in counts
    }
    figures = {
        "change": {str(k): by_lora for k in counts} | {"super weights": by_lora},
        "super_weights": stands or standing(),
        "update": {"groups": groups},
    }
    made[lora.run_of(PLAN)] = trained(280, steps=steps) | figures
    if down:
        made[lora_down.run_of(PLAN)] = trained(280, steps=steps) | figures
    return section(found(made))


@pytest.mark.parametrize(
    ("ours", "theirs", "steps", "holds"),
    [
        (change(0.08), change(0.0015), 422, True),
        (change(0.001), change(0.002), 422, False),
        (change(0.001), change(0.002), 48, None),  # it may still come
        (change(0.0022, cv=3), change(0.002, cv=3), 422, None),  # the intervals overlap
        (change(math.inf, cv=math.nan), change(0.002), 422, None),
    ],
)
def test_whether_direct_training_changes_more(ours, theirs, steps, holds):
    one = verdict(page(ours, theirs, steps), "far more than LoRA")
    assert one.holds is holds
    if ours["relative"]["mean"] == 0.08:
        assert "k = 100: 8 % and 0.15 %, 53.3 times" in one.why


@pytest.mark.parametrize(
    ("stands", "holds"),
    [
        (standing(), True),
        (standing(rank=(100.0, 98.0)), False),
        (standing(local=(1.0, 0.5)), False),
        (standing(local=(0.5, 0.5)), True),
        (standing(rank=(80.0, 80.0)), None),  # they did not stand out before
    ],
)
def test_whether_super_weights_stay(stands, holds):
    made = page(change(0.08), change(0.001), stands=stands)
    for label in (lora.LABEL, lora_down.LABEL):
        assert verdict(made, rf"keep their rank .*\({label}\)").holds is holds


def test_whether_larger_weights_change_less():
    flat = [group | {"relative": 0.01} for group in GROUPS]
    bump = [*GROUPS[:3], GROUPS[3] | {"relative": 0.5}, *GROUPS[4:]]
    for groups, holds in ((GROUPS, True), (flat, False), (bump, None)):
        made = page(change(0.08), change(0.001), groups=groups, down=False)
        assert verdict(made, "The larger a weight").holds is holds


def test_tables_beside_the_published_figures():
    changes, stands, groups, _ = page(change(0.0819, largest=0.3089), change(0.0015)).parts
    rows = {row[0]: row[1:] for row in changes.rows}
    assert rows["pruning, by definition"] == [None, None, "100 %", "100 %", "100 %", 0.0, "100 %"]
    assert rows["direct, k = 1,000"] == [2e-4, 100, "8.19 %", "7.37 %", "30.9 %", 0.5, "35.5 %"]
    assert rows["LoRA, attention, k = 100"][2] == "0.15 %"
    assert rows["published, OLMo-1B: direct"][2:] == ["8.19 %", "7.55 %", "30.89 %", 0.66, "35.5 %"]
    assert stands.rows[0] == ["LoRA, attention: mean |W|", 0.5, 0.51, "0.206", "0.206"]
    assert stands.rows[-1] == [
        "LoRA, down projections: ratio to neighbours",
        50.0,
        51.0,
        None,
        None,
    ]
    assert groups.rows[9] == ["90 to 100 %", 1.0, 1e-3, "0.1 %"]


def test_where_a_weight_was_zero_its_k_does_not_count():
    plan = PLAN
    made = {
        direct.run_of(plan, k): trained(240) | {"change": change(0.08)} for k in plan.budget.counts
    }
    changes = dict.fromkeys(map(str, plan.budget.counts), change(0.001))
    changes["8192"] = change(math.inf, cv=math.nan)
    figures = {"change": changes, "super_weights": standing(), "update": {"groups": GROUPS}}
    made[lora.run_of(plan)] = trained(280) | figures
    one = verdict(section(found(made)), "far more than LoRA")
    assert one.holds is True and "k = 8,192: 8 % and ∞, no ratio" in one.why


def test_a_lora_that_has_no_weight_at_these_places():
    made = page(change(0.08), None)
    assert made.parts[0].rows[5][:3] == ["LoRA, attention, k = 100", None, 0]
    assert not any("far more" in one.claim for one in made.verdicts)


def test_it_takes_the_runs_of_other_studies(planted, data, tmp_path):
    plan = tiny.PLAN
    others = [direct.run_of(plan, k) for k in plan.budget.counts]
    assert runs(plan) == [*others, lora.run_of(plan), lora_down.run_of(plan)]
    done = tiny.run(["weight-change"], planted, data, tmp_path / "out")
    made = section(done)
    assert verdict(made, r"keep their rank .*attention").holds is True  # they are not touched
    assert done(lora.run_of(plan))["super_weights"]["magnitude"]["change"] == 0
    assert done(lora_down.run_of(plan))["super_weights"]["absolute"]["max"] > 0
    moved = done(direct.run_of(plan, 4))["change"]["relative"]["mean"]
    cell = f"{100 * moved:.3g} %"
    assert cell in (tmp_path / "out" / "README.md").read_text()
    assert section(found({})) is None
