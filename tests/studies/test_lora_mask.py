"""``lora-mask`` and ``lora-delta-freeze``: their runs, tables and verdicts."""

from __future__ import annotations

import pytest
import torch

from swkernels.studies.recipes import lora, lora_delta_freeze, lora_mask
from tests.studies import tiny
from tests.studies.made_up import (
    BASE,
    PLAN,
    QUESTIONS,
    WINOGRANDE,
    choices,
    found,
    trained,
    verdict,
)

GAIN = BASE + 60  # LoRA has an effect
TOUCHED = {
    "parameters": 1000, "rows": 30, "columns": 38, "entries": 5000, "positions": 50, "outside": 7
}  # fmt: skip


def masks(first, by_scale, mask="rows", plan=PLAN, right=BASE, of=QUESTIONS):
    """Section where LoRA has ``first`` right, and each scale of a mask its number."""
    made = {lora.run_of(plan, sweep=True): trained(first, of)}
    for scale, there in by_scale.items():
        made[lora_mask.run_of(plan, mask, scale)] = trained(there, of) | {"touched": TOUCHED}
    return lora_mask.section(found(made, plan=plan, right=right, of=of))


def alike(right):
    return dict.fromkeys(lora_mask.SCALES, right)


@pytest.mark.parametrize("mask", lora_mask.MASKS)
@pytest.mark.parametrize(
    ("first", "by_scale", "holds"),
    [
        (GAIN, alike(GAIN), True),
        (GAIN, alike(GAIN) | {0.5: GAIN - 2}, True),  # half a point
        (GAIN, alike(GAIN) | {0.5: GAIN - 7}, None),  # its interval leaves the margin
        (GAIN, alike(GAIN) | {0.0: GAIN - 40}, False),
        (GAIN, alike(GAIN) | {0.8: GAIN + 30}, False),  # a gain is an effect too
        (BASE, alike(BASE), None),  # LoRA has no effect that a mask could undo
    ],
)
def test_whether_a_mask_has_an_effect(mask, first, by_scale, holds):
    section = masks(first, by_scale, mask)
    one = verdict(section, f"at the {mask} of super weights has no effect")
    assert one.holds is holds and len(section.verdicts) == 1
    assert ("LoRA itself does not differ clearly" in one.why) == (first == BASE)


def test_one_of_many_differences_may_be_large_by_chance():
    # 6 of 400 lost and none gained: p = 0.031 alone, of five runs it is to be expected.
    one = masks(GAIN, alike(GAIN) | {0.2: GAIN - 6}).verdicts[0]
    assert one.holds is None and "p = 0.031" in one.why


@pytest.mark.parametrize(("of", "holds"), [(188, None), (189, True)])
def test_few_questions_do_not_say_that_nothing_differs(of, holds):
    assert masks(120, alike(120), right=60, of=of).verdicts[0].holds is holds


def test_what_a_mask_loses_of_the_gain_in_loss_is_told():
    made = {lora.run_of(PLAN, sweep=True): trained(GAIN)}  # from 4.5 to 4.25
    for scale in lora_mask.SCALES:
        figures = trained(GAIN) | {"touched": TOUCHED}
        figures["curve"] = [{"step": 422, "held_out": 4.25 + 0.1 * (1 - scale), "perplexity": 20}]
        made[lora_mask.run_of(PLAN, "rows", scale)] = figures
    (one,) = lora_mask.section(found(made)).verdicts
    assert "goes from 4.5 to 4.25; with the mask at 0 40 % of that is missing" in one.why
    made[lora.run_of(PLAN, sweep=True)]["curve"][-1]["held_out"] = 4.5
    (one,) = lora_mask.section(found(made)).verdicts
    assert "LoRA gains nothing in held-out loss" in one.why


def test_tables_of_masks():
    section = masks(GAIN, {0.0: GAIN - 4}, "rows and columns")
    accuracies, losses, touched = section.parts[:3]
    assert accuracies.columns == ["s", *lora_mask.MASKS, "OLMo-1B", "OLMo-7B"]
    assert accuracies.rows[0][1].startswith("75.0 %") and accuracies.rows[0][-2:] == [
        "66.88 %", "77.3 %",
    ]  # fmt: skip
    last = accuracies.rows[-1]
    assert last[:3] == ["0", None, None] and last[3].startswith("74.0 % (-1.0 [")
    assert last[-2:] == ["66.50 %", "76.7 %"]
    assert losses.rows[0][:2] == ["1 (no mask)", 4.25]
    assert losses.rows[-1] == ["0", None, None, 4.25, None, None, "99.0 %"]
    assert touched.rows == [["rows and columns", 68, 1000, "6.8 %", "50 of 57", "6.8 %", "0.5 %"]]
    assert section.verdicts == []  # not every scale is there
    assert not any(
        "66.88 %" in row for row in masks(220, alike(220), plan=WINOGRANDE).parts[0].rows
    )


def test_fewer_steps_are_told():
    made = {lora.run_of(PLAN, sweep=True): trained(GAIN, steps=24)}
    made[lora_mask.run_of(PLAN, "rows", 0.0)] = trained(GAIN, steps=24) | {"touched": TOUCHED}
    assert lora_mask.section(found(made)).notes[-1].startswith("24 steps where 422 were published")


def test_nothing_is_said_before_there_is_something():
    assert lora_mask.section(found({})) is None
    assert lora_delta_freeze.section(found({})) is None
    only = found({lora.run_of(PLAN, sweep=True): trained(GAIN)})
    assert lora_mask.section(only) is None and lora_delta_freeze.section(only) is None


# --- lora-delta-freeze ---


def frozen(pairs, plan=PLAN):
    made = {}
    for seed, (first, second) in zip(plan.seeds, pairs):
        made[lora.run_of(plan, seed=seed, sweep=True)] = trained(first)
        made[lora_delta_freeze.run_of(plan, seed)] = trained(second) | {"touched": TOUCHED}
    return lora_delta_freeze.section(found(made, plan=plan))


@pytest.mark.parametrize(
    ("pairs", "holds"),
    [
        ([(GAIN, GAIN), (GAIN + 4, GAIN + 2), (GAIN - 4, GAIN - 4)], True),
        ([(GAIN, GAIN), (GAIN, GAIN - 6), (GAIN, GAIN)], None),
        ([(GAIN, GAIN), (GAIN, GAIN - 40), (GAIN, GAIN)], False),
        ([(BASE, BASE)] * 3, None),
    ],
)
def test_whether_freezing_has_an_effect(pairs, holds):
    assert verdict(frozen(pairs), "Freezing the largest updates").holds is holds


def test_tables_of_freezing():
    section = frozen([(300, 300), (304, 302), (296, 292)])
    summary, each = section.parts
    assert summary.rows[0] == ["LoRA", "none", "75.00 ± 1.00 %", "62.72 ± 0.62 %", "65.07 ± 1.46 %"]
    assert summary.rows[1][:3] == ["frozen", "6 positions", "74.50 ± 1.32 %"]
    row = each.rows[2]
    assert (
        row[0] == "44"
        and row[3].startswith("-1.0 [")
        and row[4:] == ["99.0 %", 4.25, 4.25, "6.8 %"]
    )
    assert frozen([(300, 300)]).verdicts == []  # two seeds are missing


def test_what_is_frozen_is_where_lora_of_the_same_seed_moved_most(planted, data, tmp_path):
    plan = tiny.PLAN
    done = tiny.run(["lora-delta-freeze"], planted, data, tmp_path / "out")
    shares = set()
    for seed in plan.seeds:
        run, first = lora_delta_freeze.run_of(plan, seed), lora.run_of(plan, seed=seed, sweep=True)
        assert first in run.needs and run.config["adapter"]["at"]["of"] == first.key
        listed = done(first)["delta_top"]
        assert sum(map(len, listed.values())) == plan.budget.delta_top
        touched = done(run)["touched"]
        rows = sum(len({row for row, _ in pairs}) for pairs in listed.values())
        columns = sum(len({column for _, column in pairs}) for pairs in listed.values())
        assert (touched["rows"], touched["columns"]) == (8 * rows, 8 * columns)
        assert done(run)["losses"][0] == done(first)["losses"][0]  # B is 0: nothing is changed yet
        shares.add(json_of(listed))
    assert len(shares) == len(plan.seeds)
    page = (tmp_path / "out" / "README.md").read_text()
    assert "## lora-delta-freeze" in page and "**This cannot be decided**" in page


def json_of(listed) -> str:
    return repr(sorted((name, sorted(map(tuple, pairs))) for name, pairs in listed.items()))


def test_choices_of_made_up_runs_are_nested():  # what the differences above rest on
    fewer, more = (torch.tensor(choices(n)["predictions"]) for n in (GAIN - 6, GAIN))
    assert int((fewer != more).sum()) == 6 and len(more) == QUESTIONS
