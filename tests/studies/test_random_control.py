"""``random-control`` at a tiny size, its page, and what it says of figures that are made up."""

from __future__ import annotations

import pytest
import torch

from swkernels.detect.loading import load_model
from swkernels.studies.adapters import positions
from swkernels.studies.lab import Lab
from swkernels.studies.page import PAGE
from swkernels.studies.recipes import direct
from swkernels.studies.recipes import random_control as recipe
from tests.studies import tiny
from tests.studies.made_up import BASE, PLAN, WINOGRANDE, found, trained, verdict

COUNTS = PLAN.budget.counts


def section(drawn=BASE, largest=100, *, plan=PLAN, steps=422, **intact):
    """Of controls, and of the super weights, with so many right answers; None is not done."""
    rights = drawn if isinstance(drawn, tuple) else (drawn,) * 4
    made = {
        recipe.run_of(plan, k): trained(right, steps=steps)
        for k, right in zip(COUNTS, rights)
        if right is not None
    }
    if largest is not None:
        made[direct.run_of(plan, 4096)] = trained(largest, steps=steps)
    return recipe.section(found(made, plan=plan, **intact))


def test_a_tiny_study(planted, data, tmp_path):
    done = tiny.run(["random-control"], planted, data, tmp_path)
    page = (tmp_path / PAGE).read_text()
    for k in tiny.TINY.counts:
        figures = done(recipe.run_of(tiny.PLAN, k))
        assert figures["parameters"] == figures["change"]["coordinates"] == k
        assert f"| k = {k} | {k} " in page
    assert done(direct.run_of(tiny.PLAN, 16)) and done(direct.run_of(tiny.PLAN, 4)) is None
    assert page.count("**This cannot be decided**") == page.count("**This ") > 2


def test_the_places_are_random_and_none_of_the_largest(planted):
    model = load_model(str(planted), dtype="float32")[0]
    lab = Lab(None, None, None, None, model, None, tiny.PLANTED)
    adapter = recipe.run_of(tiny.PLAN, 32).config["adapter"]
    first, again, other = (listed(positions(lab, adapter, seed)) for seed in (42, 42, 43))
    assert first == again != other and len(first) == len(other) == 32
    sizes = torch.stack([layer.mlp.down_proj.weight.detach().abs() for layer in model.model.layers])
    largest = sizes.flatten().topk(64).values[-1]
    assert all(sizes[place] < largest for place in (first | other))
    assert {layer for layer, _, _ in first} == {0, 1}


def listed(coordinates) -> set:
    return {
        (int(site.name.split(".")[2]), *pair)
        for site, pairs in coordinates.weights.items()
        for pair in pairs.tolist()
    }


def test_it_says_nothing_before_a_run_of_its_own():
    assert section((None,) * 4) is None
    begun = section((240, None, None, None))
    assert [row[0] for row in begun.parts[0].rows] == ["nothing", "k = 100"]
    assert begun.verdicts == []
    assert [v.claim for v in section((None, None, 240, None)).verdicts] == [
        "The collapse is specific to super-weight coordinates."
    ]
    assert len(section(largest=None).verdicts) == 2


def test_what_was_published_stands_beside():
    rows = section().parts[0].rows
    assert [row[-1] for row in rows] == ["60.65 %", None, None, "64.18 %", None]


@pytest.mark.parametrize(
    ("drawn", "more", "holds"),
    [
        (240, {}, True),
        (200, {}, True),  # 50 %: worse, but no collapse
        (160, {}, None),  # 40 %: nearer to chance than to 60 %
        ((240, 240, 240, 100), {}, False),
        (240, {"steps": 48}, None),  # it may happen later
        (100, {"steps": 48}, False),  # it has happened
        (240, {"right": 104}, None),
    ],
)
def test_whether_random_positions_collapse(drawn, more, holds):
    assert verdict(section(drawn, **more), "does not collapse").holds is holds


@pytest.mark.parametrize(
    ("right", "holds"), [(256, True), (244, None), (243, None), (240, None), (224, False)]
)
def test_whether_it_improves(right, holds):
    # 4 of 4 that differ are gained: p = 0.125.
    found_here = verdict(section((100, 100, right, 100)), "improves over")
    assert found_here.holds is holds and "4,096" in found_here.claim


@pytest.mark.parametrize(
    ("drawn", "largest", "steps", "holds"),
    [
        (240, 100, 422, True),
        (240, 100, 48, True),  # as many steps each
        (200, 100, 48, True),
        (160, 100, 48, None),  # they lose most of it, too
        (100, 100, 422, False),  # random ones collapse too
        (240, 240, 422, False),  # nothing has collapsed
        (240, 240, 48, None),
        (240, 200, 48, None),  # a loss, but no collapse yet
        (110, 100, 422, False),  # at chance, too
    ],
)
def test_whether_the_collapse_is_specific(drawn, largest, steps, holds):
    made = section((None, None, drawn, None), largest, steps=steps)
    found_here = verdict(made, "specific")
    assert found_here.holds is holds
    gap = 100 * (drawn - largest) / 400
    assert f"random minus super weights {gap:+.1f} [" in found_here.why


def test_winogrande_has_no_published_control():
    rows = section(plan=WINOGRANDE).parts[0].rows
    assert [row[-1] for row in rows] == ["61.6 %", None, None, None, None]
