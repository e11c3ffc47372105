"""Interleaved timing: order, rotation, medians."""

from __future__ import annotations

import time

import pytest

from swkernels.timing import interleaved


def test_medians_tell_a_slow_variant_from_a_fast_one():
    timings = interleaved(
        {"fast": lambda _: time.sleep(0.001), "slow": lambda _: time.sleep(0.004)}, seconds=0.1
    )
    assert timings["fast"].median == pytest.approx(0.001, rel=0.5)
    assert timings["slow"].median >= 0.004
    assert timings["slow"].p20 <= timings["slow"].median <= timings["slow"].p80
    assert not timings["fast"].graph


def test_variants_take_turns_and_none_always_follows_the_same():
    order = []

    def variant(name):
        def call(_):
            order.append(name)
            time.sleep(0.002)

        return call

    timings = interleaved({name: variant(name) for name in "abc"}, seconds=0.06)
    rounds = timings["a"].runs
    assert rounds == timings["b"].runs == timings["c"].runs >= 3
    timed = order[-3 * rounds :]
    turns = [timed[3 * i : 3 * i + 3] for i in range(rounds)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert {turn[0] for turn in turns} == {"a", "b", "c"}


def test_the_running_number_passes_over_every_set_of_inputs():
    numbers = []
    interleaved({"one": numbers.append}, seconds=0.01, most=5)
    assert numbers == list(range(len(numbers)))
    assert len(numbers) > 5  # short work is repeated inside a sample


def test_at_least_three_rounds_however_long_they_take():
    assert interleaved({"long": lambda _: time.sleep(0.02)}, seconds=0.0)["long"].runs == 3
