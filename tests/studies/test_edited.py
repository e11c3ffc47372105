"""How readings are compared: intervals over windows and questions, and what is harmless."""

from __future__ import annotations

import math

import numpy as np
import pytest

from swkernels.studies.recipes.edited import Change, Ratio, guessed_notes
from tests.studies.by_hand import reading

T3 = 3.182446  # Student's t within which 95 % lie, 3 degrees of freedom


def test_ratio_of_perplexities():
    ours, theirs = [3.1, 2.9, 3.3, 3.0], [3.0, 2.95, 3.0, 2.8]
    ratio = Ratio.of(reading(ours), reading(theirs))
    by_window = np.subtract(ours, theirs)
    error = by_window.std(ddof=1) / math.sqrt(4)  # windows of one length: an ordinary mean
    expected = np.exp(by_window.mean() + np.array([0, -T3, T3]) * error)
    assert [ratio.value, ratio.low, ratio.high] == pytest.approx(expected.tolist(), rel=1e-5)
    assert ratio.bounded and str(ratio) == "×1.147 [0.9048, 1.455]"


def test_ratio_of_sums():
    ours, theirs = np.array([1.0, 2.0, 1.5, 1.2]), np.array([0.5, 1.2, 0.7, 0.6])
    ratio = Ratio.of_sums(list(ours), list(theirs))
    value = ours.sum() / theirs.sum()
    residuals = (ours - value * theirs) / theirs.mean()
    error = residuals.std(ddof=1) / math.sqrt(4) / value
    assert ratio.value == pytest.approx(value)
    assert ratio.low == pytest.approx(value * math.exp(-T3 * error), rel=1e-5)
    assert ratio.high == pytest.approx(value * math.exp(T3 * error), rel=1e-5)


@pytest.mark.parametrize(
    "ratio, expected",
    [
        (Ratio(1.000011, 0.999998, 1.000024), "+0.0011 % [-0.0002, +0.0024]"),
        (Ratio(0.9996, 0.99, 1.012), "-0.0 % [-1.0, +1.2]"),
        (Ratio(1 + 2e-9, 1 - 1e-9, 1 + 3e-9), "+0.000000 % [-0.000000, +0.000000]"),
        (Ratio(0.9994, 0.9993, 0.9995), "×0.9994 [0.9993, 0.9995]"),
        (Ratio(1.0, 1.0, 1.0), "×1 [1, 1]"),
        (Ratio(1.0001, 0.0, math.inf), "×1 [0, ∞]"),
        (Ratio(58_943.0, 6486.6, 535_512.0), "×58,940 [6,487, 535,500]"),
        (Ratio(999.96, 12.5, 9_999_600.0), "×1,000 [12.5, 1e+07]"),
        (Ratio(math.inf, math.inf, math.inf), "×∞ [∞, ∞]"),
        (Ratio(math.nan, math.nan, math.nan), "×undefined [undefined, undefined]"),
    ],
)
def test_ratios_in_words(ratio, expected):
    assert str(ratio) == expected


def test_what_cannot_be_bounded():
    one = Ratio.of(reading([4.0]), reading([3.0]))
    assert (one.value, one.low, one.high) == (pytest.approx(math.e), 0, math.inf)
    lost = Ratio.of(reading([math.inf, 3.0]), reading([3.0, 3.0]))
    assert (lost.value, lost.low, lost.high) == (math.inf,) * 3
    for ours, theirs in (([0.0, 0.0], [1.0, 2.0]), ([1.0, 2.0], [0.0, 0.0])):
        ratio = Ratio.of_sums(ours, theirs)
        assert not ratio.bounded and ratio.low == 0 and ratio.high == math.inf
    assert not one.bounded and not lost.bounded


INTACT = reading([3.0, 3.1, 2.9, 3.0])


@pytest.mark.parametrize(
    "losses, right, expected",
    [
        ([3.0, 3.1, 2.9, 3.0], 0.6, True),
        ([3.001, 3.102, 2.9, 3.0], 0.59, True),
        ([3.2, 3.3, 3.1, 3.2], 0.6, False),  # perplexity
        ([3.0, 3.1, 2.9, 3.0], 0.4, False),  # accuracy
        ([3.3, 3.1, 2.7, 3.1], 0.6, None),
        ([3.0, 3.1, 2.9, 3.0], 0.56, None),
    ],
)
def test_harmless(losses, right, expected):
    assert Change.of(reading(losses, right), INTACT).harmless is expected


def _choices(right: int) -> dict:
    return {"predictions": [0] * right + [1] * (400 - right), "answers": [0] * 400}


def _asked(arc: int, winogrande: int, losses=(3.0, 3.1, 2.9, 3.0)) -> dict:
    """Right answers of 400 each."""
    choices = {"ARC-Easy": _choices(arc), "Winogrande": _choices(winogrande)}
    return reading(losses) | {"choices": choices}


@pytest.mark.parametrize(
    "before, after, expected",
    [
        ((240, 210), (240, 210), True),
        ((240, 210), (240, 160), True),  # at chance before: a loss of nothing
        ((240, 240), (240, 160), False),
        ((240, 210), (160, 210), False),
        ((240, 210), (228, 210), None),
        ((105, 210), (105, 210), None),  # no task is left
        ((105, 240), (60, 240), True),
    ],
)
def test_a_task_that_was_guessed_is_left_out(before, after, expected):
    change = Change.of(_asked(*after), _asked(*before))
    assert change.harmless is expected
    for task, right, bound in (("ARC-Easy", before[0], 105), ("Winogrande", before[1], 210)):
        said = str(change).partition(task)[2].partition(";")[0]
        assert ("(left out: intact at chance)" in said) == (right <= bound)


def test_a_perplexity_that_rises_is_a_loss_though_every_task_was_guessed():
    intact = _asked(105, 210)
    assert Change.of(_asked(105, 210, (3.2, 3.3, 3.1, 3.2)), intact).harmless is False


def test_notes_of_tasks_that_were_guessed():
    (note,) = guessed_notes(_asked(240, 210))
    assert "not clearly above chance on Winogrande (52.5 % [" in note and "chance is 50.0 %" in note
    assert "these 400 of all 800 questions cannot show a loss" in note
    assert guessed_notes(_asked(240, 240)) == []


def test_few_questions_show_no_harmlessness():
    few = {"ARC-Easy": {"predictions": [0] * 59, "answers": [0] * 59}}
    enough = {"ARC-Easy": {"predictions": [0] * 73, "answers": [0] * 73}}
    said = [
        Change.of(INTACT | {"choices": asked}, INTACT | {"choices": asked}).harmless
        for asked in (few, enough)
    ]
    assert said == [None, True]
