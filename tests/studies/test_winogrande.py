"""Training on Winogrande: a tiny study of it."""

from __future__ import annotations

import json
from dataclasses import replace

from swkernels.studies.page import PAGE
from swkernels.studies.recipes import RECIPES, direct
from tests.studies import tiny
from tests.studies.made_up import WINOGRANDE, found, trained

PLAN = replace(tiny.PLAN, task="winogrande")


def test_the_parts_follow_the_task():
    parts = {"text", "winogrande/train", "winogrande/dev", "winogrande/test"}
    assert set(RECIPES["direct"].parts(PLAN)) == parts
    assert set(RECIPES["direct"].parts(tiny.PLAN)) == {
        p.replace("winogrande", "arc") for p in parts
    }


def test_a_tiny_study(planted, tmp_path):
    folder = tiny.write_data(tmp_path / "data")
    for name, count in (("train_s", 8), ("train_m", 12)):  # the larger holds the smaller
        lines = [json.dumps(tiny._gap(n)) for n in range(count)]
        (folder / "winogrande" / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    done = tiny.run(["direct"], planted, folder, tmp_path / "out", PLAN)
    figures = done(direct.run_of(PLAN, 8))
    assert figures["choices"]["name"] == "Winogrande" and len(figures["losses"]) == 1
    page = (tmp_path / "out" / PAGE).read_text()
    assert "training questions of Winogrande" in page and "of 1734 that were published" in page
    line = json.loads((tmp_path / "out" / "runs.jsonl").read_text().splitlines()[-1])
    assert "winogrande/dev" in line["identity"] and "arc/dev" not in line["identity"]


def test_no_gain_on_it_was_published():
    for name in ("lora", "lora-down"):
        recipe = RECIPES[name]
        made = {run: trained(240) for run in recipe.runs(WINOGRANDE)[1:]}
        (one,) = recipe.section(found(made, plan=WINOGRANDE)).verdicts
        assert one.claim.endswith("(as published, no method does on Winogrande).")
