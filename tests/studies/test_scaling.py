"""``scaling``: the super weight times a factor by hand, and its verdicts."""

from __future__ import annotations

import pytest

from swkernels.studies.recipes.scaling import run_of, section
from tests.studies import tiny
from tests.studies.by_hand import Checkpoint, made, reading, verdicts
from tests.studies.tiny import PLAN

FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)


def test_readings_by_hand(planted, data, tmp_path):
    found = tiny.run(["scaling"], planted, data, tmp_path / "out")
    hand = Checkpoint(planted, data)
    page = (tmp_path / "out" / "README.md").read_text()
    for factor in FACTORS:
        figures = found(run_of(PLAN, factor))
        hand.down(1)[5, 7] = 10 * factor
        assert figures["perplexity"]["losses"] == pytest.approx(hand.losses(), rel=1e-5), factor
        assert figures["choices"]["ARC-Easy"]["predictions"] == hand.predictions(), factor
        assert f"| ×{factor:g} | {figures['perplexity']['perplexity']:.4g} |" in page
    assert "| ×279 |" in page
    assert (tmp_path / "out" / "figures" / "scaling.svg").exists()


INTACT = [3.0, 3.1, 2.9, 3.0]


def _said(small: list[float], large: list[float], right: float) -> list[bool | None]:
    figures = {
        factor: reading(small if factor < 1 else large if factor > 1 else INTACT,
                        right if factor > 1 else 0.6)
        for factor in FACTORS
    }  # fmt: skip
    said = section(made({run_of(PLAN, factor): found for factor, found in figures.items()}))
    return list(verdicts(said).values())  # accuracy, perplexity, shrinking


def test_verdicts():
    worse, better = [3.5, 3.6, 3.4, 3.5], [2.9, 3.0, 2.8, 2.9]
    noisy = [3.3, 3.1, 2.7, 3.1]
    assert _said(worse, better, 0.7) == [True, True, True]
    assert _said(better, worse, 0.5) == [False, False, False]
    assert _said(noisy, noisy, 0.605) == [None, None, None]
    assert _said(INTACT, INTACT, 0.6) == [None, None, False]  # shrinking does nothing


def test_a_gain_is_tested_as_often_as_it_was_looked_for():
    # 6 of 800 questions more: p = 0.03 with one factor, but 4 are looked at.
    assert _said(INTACT, INTACT, 0.6 + 3 / 400)[0] is None
    assert _said(INTACT, INTACT, 0.6 + 5 / 400)[0] is True


def test_the_best_perplexity_is_one_of_four():
    # Over 4 windows a gain of 5 standard errors: p = 0.015 by Student's t, of four looks 0.06.
    error, noise = 0.01, (1, -1, 1, -1)
    large = [loss - 5 * error + error * 3**0.5 * sign for loss, sign in zip(INTACT, noise)]
    assert _said(INTACT, large, 0.6)[1] is None
    large = [loss - 7 * error + error * 3**0.5 * sign for loss, sign in zip(INTACT, noise)]
    assert _said(INTACT, large, 0.6)[1] is True  # p = 0.006 and 0.024


def test_notes_and_caption():
    said = section(made({run_of(PLAN, 1.0): reading(INTACT, 0.6)}))
    assert said.parts[0].caption.startswith("All super weights times a factor.")
    notes = " ".join(said.notes)
    assert "the questions here are far too few to see such a gain" in notes
    assert "of one super weight, layer 1 [1764, 1710]; here all detected ones" in notes
    assert "the notes of a replication by others" in notes and "chance" not in notes
    said = section(made({run_of(PLAN, 1.0): reading(INTACT, 0.52)}))  # of two choices
    assert "not clearly above chance on Winogrande" in said.notes[-1]
    assert "400 of all 800 questions cannot show a loss" in said.notes[-1]


def test_what_is_missing_is_left_out():
    figures = {run_of(PLAN, 1.0): reading(INTACT), run_of(PLAN, 2.0): reading(INTACT)}
    said = section(made(figures))
    assert [row[0] for row in said.parts[0].rows] == ["×1", "×2"] and not said.verdicts
    assert section(made({run_of(PLAN, 2.0): reading(INTACT)})) is None
