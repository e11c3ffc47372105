"""``weight-change``: its tables and verdicts from made-up changes, and its page."""

from __future__ import annotations

import math

import pytest

from swkernels.studies.recipes import direct, lora, lora_down
from swkernels.studies.recipes.weight_change import runs, section
from tests.studies import tiny
from tests.studies.made_up import PLAN, found, trained, verdict

SAME = r"Direct training changes the same weights more than LoRA does \(LoRA, down projections\)"
TIMES = "Direct training changes weights 55 times as much as LoRA on attention does"
GROUPS = [{"weight": 0.1 * n, "delta": 1e-3, "relative": 1e-2 / n} for n in range(1, 11)]


def change(mean, cv=0.5, coordinates=100, largest=None, absolute=2e-4) -> dict:
    relative = {"mean": mean, "median": 0.9 * mean, "max": largest or 3 * mean, "cv": cv}
    return {
        "coordinates": coordinates,
        "absolute": {"mean": absolute},
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


def page(by_direct, by_lora, steps=422, stands=None, groups=GROUPS, down=True, by_down=None):
    """Section where each change is a summary, for every k; ``by_down``: of down projections."""
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
        other = by_down or by_lora
        changes = {"change": {str(k): other for k in counts} | {"super weights": other}}
        made[lora_down.run_of(PLAN)] = trained(280, steps=steps) | figures | changes
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
def test_whether_direct_training_changes_the_same_weights_more(ours, theirs, steps, holds):
    one = verdict(page(ours, change(5.0), steps, by_down=theirs), SAME)
    assert one.holds is holds
    if ours["relative"]["mean"] == 0.08:
        assert "k = 100: 8 % and 0.15 %, 53.3 times" in one.why


def test_without_lora_on_down_projections_no_same_weights_are_compared():
    made = page(change(0.08), change(0.0015), down=False)
    assert not any("the same weights" in one.claim for one in made.verdicts)
    assert verdict(made, TIMES).holds is True


@pytest.mark.parametrize(
    ("ours", "theirs", "steps", "holds"),
    [
        (change(0.055), change(0.001), 422, True),
        (change(0.030), change(0.001), 422, True),  # within a factor of 2
        (change(0.020), change(0.001), 422, False),
        (change(0.120), change(0.001), 422, False),
        (change(0.055), change(math.inf, cv=math.nan), 422, None),
        (change(0.055), change(0.0), 422, None),
        (change(math.nan, cv=math.nan), change(0.001), 422, None),
        (change(0.055), change(0.001, absolute=1e-3), 48, None),  # so far
        (change(491e-6, absolute=1437e-6), change(0.00167), 48, False),
        # By the number of steps alone, 423 / 49, it would be excluded; but weights that went back
        # and forth may go straight.
        (change(0.002, absolute=1437e-6), change(0.001), 48, None),
        (change(0.0, absolute=0.0), change(0.001), 48, None),
        (change(491e-6), change(math.inf, cv=math.nan), 48, None),
    ],
)
def test_whether_direct_training_changes_55_times_as_much(ours, theirs, steps, holds):
    one = verdict(page(ours, theirs, steps, by_down=change(0.01)), TIMES)
    assert one.holds is holds
    assert "From 27.5 to 110 times, within a factor of 2, counts as 55" in one.why
    assert ("0.0001 x (422 + 1) / 2 = 0.0212" in one.why) is (steps == 48)
    if holds is False and steps == 48:
        assert "0.294 times, at most 14.7 x 0.294 = 4.33 times" in one.why


@pytest.mark.parametrize(("steps", "last", "holds"), [(422, 0.05, None), (48, 0.002, None)])
def test_every_k_must_agree_on_how_many_times(steps, last, holds):
    """One k is 55-fold, or may become so, and the others are not."""
    plan = PLAN
    ours = dict.fromkeys(plan.budget.counts, change(491e-6, absolute=1437e-6))
    ours[8192] = change(last, absolute=1437e-6)
    made = {
        direct.run_of(plan, k): trained(240, steps=steps) | {"change": ours[k]} for k in ours
    }  # fmt: skip
    changes = dict.fromkeys(map(str, ours), change(0.001))
    figures = {"change": changes, "super_weights": standing(), "update": {"groups": GROUPS}}
    made[lora.run_of(plan)] = trained(280, steps=steps) | figures
    assert verdict(section(found(made)), TIMES).holds is holds


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
        one = verdict(made, rf"keep their rank .*\({label}\)")
        assert one.holds is holds
        assert ("It holds by definition" in one.why) is (label == lora.LABEL and holds is True)
    rank, after = stands["percentile"].values()
    assert f"mean percentile rank {rank:.1f} % → {after:.1f} %" in one.why


def test_whether_larger_weights_change_less():
    flat = [group | {"relative": 0.01} for group in GROUPS]
    bump = [*GROUPS[:3], GROUPS[3] | {"relative": 0.5}, *GROUPS[4:]]
    for groups, holds in ((GROUPS, True), (flat, False), (bump, None)):
        made = page(change(0.08), change(0.001), groups=groups, down=False)
        one = verdict(made, "The larger a weight")
        assert one.holds is holds
        assert "The mean |dW| itself is 0.001 to 0.001 in the ten groups" in one.why
        assert ("the division by |W|, and no protection" in one.why) is (groups != flat)
    less = [group | {"delta": 1e-3 / n} for n, group in enumerate(GROUPS, 1)]
    one = verdict(page(change(0.08), change(0.001), groups=less, down=False), "The larger a weight")
    assert "0.0001 to 0.001 in the ten groups." in one.why and "protection" not in one.why


def test_tables_beside_the_published_figures():
    changes, stands, groups, _ = page(change(0.0819, largest=0.3089), change(0.0015)).parts
    rows = {row[0]: row[1:] for row in changes.rows}
    assert changes.columns[2:4] == ["entries compared", "relative change: mean"]
    assert "up to 4 matrices per position" in changes.caption
    assert rows["pruning, by definition"] == [None, None, "100 %", "100 %", "100 %", 0.0, "100 %"]
    assert rows["direct, k = 1,000"] == [2e-4, 100, "8.19 %", "7.37 %", "30.9 %", 0.5, "35.5 %"]
    assert rows["LoRA, attention, k = 100"][2] == "0.15 %"
    assert rows["published, OLMo-1B: direct"][2:] == ["8.19 %", "7.55 %", "30.89 %", 0.66, "35.5 %"]
    assert stands.rows[0] == ["LoRA, attention: mean |W|", 0.5, 0.51, "0.206", "0.206"]
    assert stands.rows[1][1:] == ["100.0 %"] * 4
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
    one = verdict(section(found(made)), TIMES)
    assert one.holds is True and "k = 8,192: 8 % and ∞, no ratio" in one.why
    made[lora_down.run_of(plan)] = trained(280) | figures
    one = verdict(section(found(made)), SAME)
    assert one.holds is True and "k = 8,192: 8 % and ∞, no ratio" in one.why


def test_a_lora_that_has_no_weight_at_these_places():
    made = page(change(0.08), None)
    assert made.parts[0].rows[5][:3] == ["LoRA, attention, k = 100", None, 0]
    assert not any("Direct training" in one.claim for one in made.verdicts)


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
