"""``direct`` at a tiny size, its page, and what it says of figures that are made up."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from swkernels.studies.page import PAGE
from swkernels.studies.recipes import direct
from swkernels.studies.recipes.settings import training
from swkernels.studies.recipes.training_views import curves, loss_falls
from swkernels.train.figure import render
from tests.studies import tiny
from tests.studies.made_up import BASE, CHANCE, PLAN, WINOGRANDE, found, trained, verdict

COUNTS = PLAN.budget.counts


def section(*rights, plan=PLAN, right=BASE, of=400, **more):
    """Of runs with so many right answers each."""
    made = {
        direct.run_of(plan, k): trained(r, of, values=k, **more)
        for k, r in zip(plan.budget.counts, rights)
    }
    return direct.section(found(made, plan=plan, right=right, of=of))


def test_a_tiny_study(planted, data, tmp_path):
    done = tiny.run(["direct"], planted, data, tmp_path)
    figures = {k: done(direct.run_of(tiny.PLAN, k)) for k in tiny.TINY.counts}
    layers = AutoModelForCausalLM.from_pretrained(planted).model.layers
    sizes = torch.stack([layer.mlp.down_proj.weight.detach() for layer in layers]).abs()
    sizes[1, 5, 7] = math.inf  # the super weight, then the largest
    page = (tmp_path / PAGE).read_text()
    for k, run in figures.items():
        assert (run["parameters"], run["steps"], len(run["losses"])) == (k, 1, 1)
        largest = sizes.flatten().topk(k).values
        change = run["change"]["magnitude"]
        assert change["before"] == pytest.approx(
            (largest[1:].sum() + 10).item() / k,
            rel=1e-6,  # the super weight is 10
        )
        right = np.mean(np.equal(run["choices"]["predictions"], run["choices"]["answers"]))
        (row,) = [line for line in page.splitlines() if line.startswith(f"| k = {k} | {k} ")]
        assert f"| {100 * right:.1f} % [" in row
        assert f"| {run['curve'][-1]['perplexity']:.4g} |" in row
    assert page.count("**This cannot be decided**") == 2  # six questions, one step
    assert "1 steps of 422 that were published" in page


def test_the_table_has_what_was_published_beside_it():
    table = section(CHANCE, CHANCE, CHANCE, CHANCE, perplexity=4e4).parts[0]
    rows = {row[0]: row for row in table.rows}
    assert rows["nothing"][-2:] == ["60.65 %", "73.3 %"] and rows["nothing"][5:7] == [4.5, 20.0]
    row = rows["k = 4,096"]
    assert (row[1], row[-2:]) == (4096, ["26.30 %", "26.1 %"])
    assert row[2].startswith("25.0 % [2") and row[3].startswith("-35.0 [-")
    assert row[5:7] == [4.25, 4e4]
    first, last = (np.mean([4 - 2 * n / 422 + 0.1 * (-1) ** n for n in part]) for part in (
        range(140), range(282, 422)  # a pass is 140 steps
    ))  # fmt: skip
    assert row[4] == f"{first:.4g} → {last:.4g}"


def test_how_far_the_weights_went_is_told():
    notes = section(240, 240).notes
    assert any("trained weights: k = 100 1.2 %; k = 1,000 1.2 %. Published" in n for n in notes)
    assert not any("trained weights" in note for note in section().notes)


def test_a_run_that_diverged_says_so():
    made = section(CHANCE, CHANCE, CHANCE, CHANCE, losses=[4.0, 5.0], diverged=3)
    assert made.parts[0].rows[1][0] == "k = 100 (diverged in step 3)"
    assert made.parts[0].rows[1][4] == "4 → 5"
    at_once = section(CHANCE, CHANCE, CHANCE, CHANCE, losses=[], diverged=1)
    assert at_once.parts[0].rows[1][4] is None


@pytest.mark.parametrize(
    ("rights", "steps", "holds"),
    [
        ((100, 96, 104, 110), 422, True),
        ((100, 96, 104, 110), 48, True),  # it has happened already
        ((100, 100, 100, 200), 422, False),
        ((240, 240, 240, 240), 422, False),
        ((240, 240, 240, 240), 48, None),  # it may happen later
        ((100, 100, 100, 120), 422, False),  # 30 % is above chance, of 400 questions
    ],
)
def test_whether_it_collapses(rights, steps, holds):
    found_here = verdict(section(*rights, steps=steps), "drops accuracy to chance")
    assert found_here.holds is holds
    assert "no training 60.0 %" in found_here.why and "k = 8,192" in found_here.why
    assert ("48 steps of 422" in found_here.why) is (steps == 48)


def test_what_cannot_collapse_is_not_decided():
    assert verdict(section(100, 100, 100, 100, right=104), "to chance").holds is None
    assert verdict(section(2, 2, 2, 2, right=4, of=6), "to chance").holds is None


def test_one_run_that_does_not_collapse_decides_before_the_others_are_done():
    assert section(100, 100, 100, perplexity=4e4).verdicts == []  # one is missing
    found_here = section(100, 240)
    assert [one.holds for one in found_here.verdicts] == [False, False]
    assert "k = 1,000 60.0 %" in found_here.verdicts[0].why and "4,096" not in str(found_here)
    assert section(100, 240, steps=48).verdicts == []


@pytest.mark.parametrize(
    ("more", "holds"),
    [
        ({"perplexity": 4e4}, True),
        ({"perplexity": math.inf}, True),
        ({"perplexity": math.nan}, True),
        ({"perplexity": 100.0}, None),  # fivefold
        ({"perplexity": 21.0}, False),
        ({"perplexity": 21.0, "steps": 48}, None),
        ({"perplexity": 4e4, "losses": [2 + n / 422 for n in range(422)]}, False),  # it rises
        ({"perplexity": 4e4, "losses": [3 + (-1) ** n for n in range(422)]}, None),
    ],
)
def test_whether_the_loss_falls_while_the_perplexity_explodes(more, holds):
    assert verdict(section(100, 100, 100, 100, **more), "explodes").holds is holds


def test_a_loss_falls_by_the_passes_over_the_same_questions():
    first, middle, last = np.random.default_rng(0).normal(4, 0.3, (3, 16))
    last += first.mean() - last.mean()
    reach = 1.96 * np.sqrt((first.std(ddof=1) ** 2 + last.std(ddof=1) ** 2) / 16)
    for shift, falls in ((0.99, None), (1.01, False), (-0.99, None), (-1.01, True)):
        losses = [*first, *middle, *(last + shift * reach)]
        assert loss_falls({"steps": 48, "losses": losses}, 3) is falls
    assert loss_falls({"steps": 48, "losses": losses}, 1.5) is None  # no two passes
    assert loss_falls({"steps": 48, "losses": losses[:20]}, 3) is None  # it diverged


def test_winogrande_has_its_own_figures():
    rows = section(200, 200, 200, 200, plan=WINOGRANDE).parts[0].rows
    assert [row[-1] for row in rows] == ["61.6 %", "53.2 %", "50.7 %", None, None]
    held = section(200, 200, 200, 200, plan=WINOGRANDE, steps=1734)
    assert verdict(held, "to chance").holds is True and "chance 50.0 %" in held.verdicts[0].why
    assert verdict(section(240, 240, 240, 240, plan=WINOGRANDE), "to chance").holds is None
    assert training(WINOGRANDE, {}).config["task"] == "winogrande"


def test_plots_take_whatever_there_is():
    runs = {
        "none": None, "one step": trained(100, steps=1), "no step": trained(100, losses=[]),
        "infinite": trained(100, perplexity=math.inf), "nan": trained(100, perplexity=math.nan),
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for part in ({}, {"none": None}, *({label: run} for label, run in runs.items()), runs):
            assert b"<svg" in render(curves("x", found({}), part).draw, "svg", 3.4)
