"""``seeds``: its tests by enumeration and simulation, its table and its verdicts."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from swkernels.errors import InvalidInput
from swkernels.studies.recipes import RECIPES
from swkernels.studies.recipes.seeds import (
    at_most,
    mean_interval,
    pair_of,
    section,
    sign_flip,
)  # fmt: skip
from swkernels.studies.study import check_seeds
from tests.studies.made_up import BASE, PLAN, choices, found, trained, verdict

TEN = replace(PLAN, seeds=tuple(range(42, 52)))
GAIN = BASE + 60


def over(pairs, plan=TEN):
    """Section of (right answers of LoRA, of the masked one) by seed."""
    made = {}
    for seed, (first, second) in zip(plan.seeds, pairs):
        vanilla, masked = pair_of(plan, seed)
        made[vanilla], made[masked] = trained(first), trained(second)
    return section(found(made, plan=plan))


@pytest.mark.parametrize("differences", [[3, -1, 2, 5, 0], [1], [0, 0], [4] * 6, [2, -2, 7, -1]])
def test_sign_flips_by_enumeration(differences):
    seen = abs(sum(differences))
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    assert sign_flip(differences) == sum(total >= seen for total in sums) / len(sums)


def test_sign_flips_of_many_seeds():
    assert sign_flip([1] * 40) == 2 / 2**40


def test_binomial_tail_by_enumeration():
    p = 0.8
    chance = sum(
        p ** sum(outcome) * (1 - p) ** (6 - sum(outcome))
        for outcome in itertools.product((0, 1), repeat=6)
        if sum(outcome) <= 4
    )
    assert at_most(4, 6, p) == pytest.approx(chance)
    assert at_most(-1, 6, p) == 0 and at_most(6, 6, p) == pytest.approx(1)


def test_interval_of_a_mean_over_seeds_and_questions():
    draw = np.random.default_rng(1)
    differences = draw.choice([-1, 0, 1], p=[0.05, 0.85, 0.1], size=(8, 300))
    low, high = mean_interval(differences)
    assert low < differences.mean() < high
    # Entries that are independent: both kinds of draws add their variance to that of the mean.
    error = differences.std() * np.sqrt(2 / differences.size)
    assert (high - low) / (2 * 1.96) == pytest.approx(error, rel=0.35)
    assert mean_interval(np.full((3, 5), 1)) == (1, 1)
    # Seeds that differ, but not their questions: the interval is that of a mean of few seeds.
    seeds = np.repeat([[0], [1], [0], [1]], 50, axis=1)
    assert mean_interval(seeds) == (0, 1)


@pytest.mark.parametrize(
    ("pairs", "holds"),
    [
        ([(GAIN, GAIN)] * 10, True),
        ([(GAIN, GAIN)] * 8 + [(GAIN, GAIN - 2), (GAIN, GAIN + 2)], True),
        ([(GAIN, GAIN - 3)] * 10, False),  # all of one sign: p = 2 / 1,024
        ([(GAIN, GAIN - 30)] * 2 + [(GAIN, GAIN + 30)] * 2 + [(GAIN, GAIN)] * 6, None),
        ([(BASE, BASE)] * 10, None),  # LoRA has no effect
    ],
)
def test_whether_the_mask_makes_a_difference(pairs, holds):
    assert verdict(over(pairs), "makes no difference over seeds").holds is holds


@pytest.mark.parametrize(("of", "holds"), [(149, None), (150, True)])
def test_few_questions_do_not_say_that_nothing_differs(of, holds):
    made = {}
    for seed in PLAN.seeds:
        for run in pair_of(PLAN, seed):
            made[run] = trained(120, of)
    said = section(found(made, right=60, of=of))
    assert verdict(said, "makes no difference").holds is holds


@pytest.mark.parametrize(("of", "holds"), [(149, None), (150, True)])
def test_few_questions_do_not_say_that_predictions_are_identical(of, holds):
    plan = replace(PLAN, seeds=tuple(range(10)))
    made = {run: trained(120, of) for seed in plan.seeds for run in pair_of(plan, seed)}
    said = section(found(made, right=60, of=of, plan=plan))
    assert verdict(said, "identical predictions").holds is holds


def test_what_the_mask_costs_in_loss_is_told():
    plan = replace(PLAN, seeds=tuple(range(6)))
    made = {run: trained(GAIN) for seed in plan.seeds for run in pair_of(plan, seed)}
    for seed in plan.seeds:
        made[pair_of(plan, seed)[1]]["curve"][-1]["held_out"] = 4.25 + 0.01 * (seed + 1)
    one = verdict(section(found(made, plan=plan)), "makes no difference over seeds")
    assert "costs +0.035 nats, more than 0 in 6 of 6 seeds, p = 0.031." in one.why


def test_five_seeds_cannot_show_a_difference():
    plan = replace(PLAN, seeds=(1, 2, 3, 4, 5))
    made = over([(GAIN, GAIN - 80)] * 5, plan)
    assert verdict(made, "makes no difference").holds is None
    assert "cannot be below 0.062" in made.notes[0]


@pytest.mark.parametrize(
    ("same", "holds"), [(10, True), (9, True), (8, None), (6, None), (5, False)]
)
def test_whether_predictions_are_identical(same, holds):
    pairs = [(GAIN, GAIN)] * same + [(GAIN, GAIN - 1)] * (10 - same)
    one = verdict(over(pairs), "Most seeds give identical predictions")
    assert one.holds is holds and one.why.startswith(f"{same} of 10 seeds do")


def test_predictions_can_differ_where_accuracies_do_not():
    plan = replace(PLAN, seeds=(42, 43))
    made = {}
    for seed in plan.seeds:
        vanilla, masked = pair_of(plan, seed)
        other = choices(GAIN)
        other["predictions"] = other["predictions"][:-1] + [2]
        made[vanilla], made[masked] = trained(GAIN), trained(GAIN) | {"choices": other}
    summary, each = section(found(made, plan=plan)).parts[:2]
    assert summary.rows[1][2] == "0 of 2" and each.rows[0][4] == "99.8 %"


def test_table_beside_the_published_figures():
    table = over([(300, 300), (304, 302), (296, 296)] + [(300, 300)] * 7).parts[0]
    spread = np.std([75, 76, 74] + [75] * 7, ddof=1)
    assert table.rows[0][:2] == ["LoRA", f"75.00 ± {spread:.2f} %"]
    assert table.rows[1][2:] == ["9 of 10", 1.0]
    assert table.rows[2][1:] == ["62.90 ± 0.45 %", "8 of 10", "> 0.05"]


def test_it_needs_two_seeds():
    with pytest.raises(InvalidInput, match="seeds needs 2 seeds at least, got 1"):
        check_seeds([RECIPES["seeds"]], replace(PLAN, seeds=(42,)))
    assert section(found({})) is None
