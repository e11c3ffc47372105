"""How readings are compared: intervals over windows and questions, and what is harmless."""

from __future__ import annotations

import math

import numpy as np
import pytest

from swkernels.studies.recipes.edited import Change, Ratio
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


def test_few_questions_show_no_harmlessness():
    few = {"ARC-Easy": {"predictions": [0] * 59, "answers": [0] * 59}}
    enough = {"ARC-Easy": {"predictions": [0] * 60, "answers": [0] * 60}}
    said = [
        Change.of(INTACT | {"choices": asked}, INTACT | {"choices": asked}).harmless
        for asked in (few, enough)
    ]
    assert said == [None, True]
