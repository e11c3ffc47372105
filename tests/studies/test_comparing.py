"""Accuracies, their differences, and when one has fallen to chance."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from swkernels.studies.recipes.comparing import (
    Accuracy,
    all_of,
    fell_to_chance,
    stands_above_chance,
)
from tests.studies.made_up import choices


def of(right: int, count: int = 400) -> Accuracy:
    return Accuracy.of(choices(right, count))


def test_an_accuracy_and_its_interval():
    found = Accuracy.of({"answers": [0, 1, 2, 3], "predictions": [0, 1, 3, -1]})
    assert found.correct == (True, True, False, False) and found.value == 0.5
    draws = np.random.default_rng(7).random((20_000, 400)) < 0.6
    low, high = np.percentile(draws.mean(1), [2.5, 97.5])
    assert of(240).interval == pytest.approx((low, high), abs=0.006)
    assert str(of(240)).startswith("60.0 % [5")


def test_a_difference_is_of_the_same_questions():
    generator = np.random.default_rng(3)
    first, second = generator.random((2, 150)) < [[0.6], [0.45]]
    found = Accuracy(tuple(first.tolist())).less(Accuracy(tuple(second.tolist())))
    assert found.value == pytest.approx(first.mean() - second.mean())
    drawn = generator.integers(0, 150, (20_000, 150))
    differences = (first[drawn].astype(float) - second[drawn]).mean(1)
    low, high = np.percentile(differences, [2.5, 97.5])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.012)
    with pytest.raises(ValueError):
        of(3, 4).less(of(3, 5))


def test_the_exact_test_is_over_all_signs():
    first = Accuracy((True,) * 6 + (False,) * 2 + (True,) * 5)
    second = Accuracy((False,) * 6 + (True,) * 2 + (True,) * 5)  # 6 gained, 2 lost
    sums = [abs(sum(signs)) for signs in itertools.product((-1, 1), repeat=8)]
    share = sum(total >= 4 for total in sums) / len(sums)
    assert first.less(second).p_value == pytest.approx(share)


def test_what_no_question_shows_may_still_be():
    for count, sure in ((73, True), (72, False)):  # z^2 / (n + z^2) is below 5 % from 73
        nothing = of(20, count).less(of(20, count))
        assert nothing.value == 0 > nothing.low == pytest.approx(-nothing.high)
        assert nothing.gains_less_than(0.05) is nothing.loses_less_than(0.05) is sure
    lost = of(200).less(of(240))
    assert lost.gains_less_than(0.02) and not lost.loses_less_than(0.05)
    assert lost.loses_less_than(0.2) and not of(240).less(of(200)).gains_less_than(0.05)


def test_few_questions_make_no_gain():
    found = of(3, 3).less(of(0, 3))
    assert (found.value, found.p_value) == (1.0, 0.25) and not found.is_gain and not found.is_clear
    assert of(240).less(of(200)).is_gain and not of(240).less(of(200)).is_loss
    assert of(200).less(of(240)).is_loss and not of(200).less(of(240)).is_gain
    assert not of(240).less(of(240)).is_clear


@pytest.mark.parametrize(
    ("right", "base", "count", "holds"),
    [
        (100, 240, 400, True),  # at chance
        (40, 240, 400, True),  # below it: all answers alike, say
        (140, 240, 400, False),  # 35 %, above chance
        (115, 240, 400, True),  # 28.75 %, whose interval holds chance
        (108, 124, 400, None),  # nearer to a baseline of 31 % than the interval is wide
        (100, 104, 400, None),  # a baseline of 26 % cannot fall
        (5, 8, 16, None),  # 31 % of 16 questions is anything
        (0, 3, 3, None),  # by three questions nothing is lost
    ],
)
def test_when_an_accuracy_has_fallen_to_chance(right, base, count, holds):
    assert fell_to_chance(of(right, count), of(base, count), 0.25) is holds


def test_when_an_accuracy_stands_above_chance():
    above = {right for right in range(401) if stands_above_chance(of(right), of(240), 0.25)}
    least = min(above)  # 42.5 % is the middle, the interval reaches 5 points below
    assert above == set(range(least, 401)) and 185 < least < 195
    assert not stands_above_chance(of(240), of(104), 0.25)


def test_several_states():
    assert all_of([True, True]) is True and all_of([True, None]) is None
    assert all_of([None, False, True]) is False
