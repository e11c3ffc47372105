"""``neighborhood`` at a tiny size, its page, and what it says of figures that are made up."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM

from swkernels.studies.page import PAGE
from swkernels.studies.recipes import direct, neighborhood
from swkernels.studies.recipes.training_views import by_size
from tests.studies import tiny
from tests.studies.made_up import BASE, PLAN, found, trained, verdict

COUNTS = PLAN.budget.counts[:3]


def made(around, alone, *, steps=422, plan=PLAN, **intact):
    """Figures of runs with so many right answers each; None has not been done."""
    runs = {}
    for of, rights, size in ((neighborhood.run_of, around, 9), (direct.run_of, alone, 1)):
        for k, right in zip(COUNTS, rights):
            if right is not None:
                runs[of(plan, k)] = trained(right, steps=steps, values=size * k)
    return found(runs, plan=plan, **intact)


def test_a_tiny_study(planted, data, tmp_path):
    done = tiny.run(["neighborhood"], planted, data, tmp_path)
    layers = AutoModelForCausalLM.from_pretrained(planted).model.layers
    sizes = torch.stack([layer.mlp.down_proj.weight.detach() for layer in layers]).abs()
    sizes[1, 5, 7] = math.inf  # the super weight, then the largest
    page = (tmp_path / PAGE).read_text()
    for k in tiny.TINY.counts[:3]:
        around = set()
        for place in sizes.flatten().topk(k).indices.tolist():
            layer, row, column = np.unravel_index(place, sizes.shape)
            around |= {
                (layer, r, c)
                for r in range(row - 1, row + 2)
                for c in range(column - 1, column + 2)
                if 0 <= r < 32 and 0 <= c < 48
            }
        assert done(neighborhood.run_of(tiny.PLAN, k))["parameters"] == len(around)
        assert f"| k = {k} | {len(around)} " in page
        assert done(direct.run_of(tiny.PLAN, k))["parameters"] == k  # what it is compared with
    assert "figures/neighborhood-sizes.svg" in page and "## direct" in page


def test_it_says_nothing_before_a_run_of_its_own():
    assert neighborhood.section(made((None,) * 3, (100,) * 3)) is None
    section = neighborhood.section(made((100, None, None), (100,) * 3))
    assert [row[0] for row in section.parts[0].rows] == ["nothing", "k = 100"]
    assert section.verdicts == []


def test_what_was_published_stands_beside():
    rows = neighborhood.section(made((100,) * 3, (100,) * 3)).parts[0].rows
    assert rows[3][1] == 36864 and rows[3][-2:] == ["25.59 %", "26.1 %"]


@pytest.mark.parametrize(
    ("around", "alone", "holds"),
    [
        ((100, 100, 100), (100, 100, 100), True),
        ((80, 80, 80), (100, 100, 100), True),
        ((100, 100, 160), (100, 100, 100), False),  # it helps by 15 points
        ((100, 100, 112), (100, 100, 100), False),  # by 3, clearly
        ((104, 100, 100), (100, 100, 100), True),  # by 1, if at all
    ],
)
def test_whether_neighborhoods_help(around, alone, holds):
    section = neighborhood.section(made(around, alone))
    assert verdict(section, "gain less than 5 points over isolated").holds is holds


def test_few_steps_do_not_say_that_they_do_not_help():
    short = neighborhood.section(made((100, 100, 100), (100, 100, 100), steps=48))
    assert verdict(short, "gain less than 5 points over isolated").holds is None
    short = neighborhood.section(made((100, 100, 160), (100, 100, 100), steps=48))
    assert verdict(short, "gain less than 5 points over isolated").holds is False


def test_few_questions_do_not_say_whether_they_help():
    one, other = [0, 1] * 10, [1, 0] * 10
    runs = {neighborhood.run_of(PLAN, k): trained(0) for k in COUNTS}
    runs |= {direct.run_of(PLAN, k): trained(0) for k in COUNTS}
    for run, figures in runs.items():
        predictions = one if run.config["adapter"]["radius"] else other
        figures["choices"] = {"answers": [0] * 20, "predictions": predictions}
    section = neighborhood.section(found(runs, right=12, of=20))
    # Ten are gained, ten are lost.
    assert verdict(section, "gain less than 5 points over isolated").holds is None


@pytest.mark.parametrize(("of", "holds"), [(72, None), (73, True)])
def test_few_questions_do_not_say_that_none_is_gained(of, holds):
    runs = {run: trained(20, of) for run in neighborhood.runs(PLAN)[1:]}
    section = neighborhood.section(found(runs, right=30, of=of))
    assert verdict(section, "gain less than 5 points over isolated").holds is holds


@pytest.mark.parametrize(("right", "steps", "holds"), [(100, 48, True), (BASE, 48, None)])
def test_whether_it_collapses(right, steps, holds):
    section = neighborhood.section(made((right,) * 3, (100,) * 3, steps=steps))
    assert verdict(section, "drops accuracy to chance").holds is holds
    assert any("48 steps where the published settings make 422" in note for note in section.notes)


def test_the_plot_has_accuracy_by_values_chance_and_baseline():
    here = made((100, 120, 140), (96, 100, 104))
    series = {
        "alone": {str(k): here(direct.run_of(PLAN, k)) for k in COUNTS},
        "around": {str(k): here(neighborhood.run_of(PLAN, k)) for k in COUNTS},
    }
    drawn = Figure()
    by_size("x", "", series, here).draw(drawn)
    (axes,) = drawn.axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert set(lines["no training"].get_ydata()) == {60.0}
    assert set(lines["chance"].get_ydata()) == {25.0}
    bars = {container.get_label(): container[0] for container in axes.containers}
    assert bars["around"].get_xdata().tolist() == [900, 9000, 36864]
    assert bars["around"].get_ydata() == pytest.approx([25, 30, 35])
    assert bars["alone"].get_ydata() == pytest.approx([24, 25, 26])
    assert axes.get_xscale() == "log"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for part in ({}, {"alone": {"k": None}}, {"alone": {"k": trained(0)}}):
            by_size("x", "", part, here).draw(Figure())
