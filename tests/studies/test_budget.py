"""Budgets that make sense beside each other, and the text of seeds."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swkernels.errors import InvalidInput
from swkernels.studies.budget import BUDGETS, FULL, LONG, SMALL, budget_named, parse_seeds
from tests.studies.tiny import TINY

ALL_OF_IT = ("tokens", "questions", "train_questions", "sweep_questions")  # may be None
SEED = st.integers(0, 2**31 - 1)


def test_a_name_is_that_of_a_budget():
    assert {name: budget_named(name) for name in BUDGETS} == {
        "small": SMALL, "long": LONG, "full": FULL
    }  # fmt: skip
    assert [b.name for b in BUDGETS.values()] == list(BUDGETS)
    with pytest.raises(InvalidInput, match="^expected a budget of small, long, full, got 'large'$"):
        budget_named("large")


def _amount(value):
    """How much a field takes: all is more than any number; a list takes as many as it has."""
    if value is None:
        return float("inf")
    return len(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", [f.name for f in fields(SMALL) if f.name != "name"])
def test_the_full_budget_takes_no_less_of_anything(name):
    tiny, small, full = (getattr(budget, name) for budget in (TINY, SMALL, FULL))
    assert 0 < _amount(tiny) <= _amount(small) <= _amount(full)
    assert name in ALL_OF_IT or None not in (small, full)
    if name in ("counts", "blocks", "seeds"):
        for listed in (tiny, small, full):
            assert list(listed) == sorted(set(listed))


@pytest.mark.parametrize("budget", [SMALL, FULL], ids=lambda budget: budget.name)
def test_a_budget_holds_what_the_papers_name(budget):
    assert budget.counts == (100, 1000, 4096, 8192) and budget.epochs == 3
    assert max(budget.counts) <= budget.ranked  # what random controls avoid holds what is trained
    assert budget.length <= budget.window
    assert _amount(budget.sweep_questions) <= _amount(budget.train_questions)
    assert budget.seeds[0] == 42 and len(budget.seeds) >= 5  # of a paired test over seeds
    assert FULL.seeds == tuple(range(42, 52))


def test_a_budget_that_lacks_nothing_is_equal_to_its_copy():
    assert replace(SMALL) == SMALL and replace(SMALL, epochs=1) != SMALL


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("42", (42,)),
        ("42-51", tuple(range(42, 52))),
        ("42,44", (42, 44)),
        (" 3 , 1-2 ", (3, 1, 2)),
        ("0", (0,)),
        ("7-7", (7,)),
        ("007", (7,)),
        ("0-999", tuple(range(1000))),
        (str(2**31 - 1), (2**31 - 1,)),
    ],
)
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    ("text", "says"),
    [
        *((text, "expected seeds such as 42-51 or 42,43") for text in (
            "", " ", ",", "42,", "-", "-42", "42-", "42--51", "1-2-3", "a", "4.2", "1e3", "42;43",
            "0x2a", "²", "٤٢", "4 2", "42 - 51", "9" * 5000,
        )),
        *((text, "from a smaller to a larger one") for text in (
            "51-42", str(2**31), f"0-{2**31}", "0-1000", "0-499,1000-1500", "9999999999",
        )),
        *((text, "names a seed twice") for text in ("42,42", "42-51,45", "1,01")),
    ],
)  # fmt: skip
def test_text_that_is_no_seeds_is_one_line(text, says):
    with pytest.raises(InvalidInput, match=says) as caught:
        parse_seeds(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@given(st.lists(SEED, min_size=1, max_size=20, unique=True))
def test_any_list_of_seeds_is_read_back(seeds):
    assert parse_seeds(",".join(map(str, seeds))) == tuple(seeds)


@given(st.integers(0, 2**31 - 1000), st.integers(0, 999))
def test_any_range_is_read_back(low, more):
    assert parse_seeds(f"{low}-{low + more}") == tuple(range(low, low + more + 1))


@given(st.text(st.sampled_from("0123456789-, ab²٤"), max_size=12) | st.text(max_size=8))
def test_any_text_gives_seeds_or_one_error(text):
    try:
        found = parse_seeds(text)
    except InvalidInput:
        return
    assert found and len(set(found)) == len(found) <= 1000
    assert all(0 <= seed < 2**31 for seed in found)
    assert parse_seeds(",".join(map(str, found))) == found
