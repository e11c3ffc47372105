"""The cases of multiple choice run at tiny size, and their judge sees a sum that is wrong."""

from __future__ import annotations

import pytest
import torch

from benchmarks.expected import Ceilings
from benchmarks.measure import measure
from benchmarks.models import choices
from benchmarks.targets import TARGETS
from tests.cli.checkpoints import TEXT, make_model, make_tokenizer

CPU = torch.device("cpu")
CEILINGS = Ceilings(1e10, 1e10, {"float32": 1e11})


def load(dtype, device):
    return make_model(initializer_range=0.3).to(device, getattr(torch, dtype))


def tiny(kind):
    return choices.case(
        kind, CPU, load=load, load_tokenizer=make_tokenizer, items=9, text=TEXT * 20
    )


@pytest.mark.parametrize("kind", choices.KINDS)
def test_every_provider_is_right(kind):
    results = measure(tiny(kind), CPU, CEILINGS, 1 << 10, seconds=0.005)
    assert [(r["provider"], r["status"], r["reason"]) for r in results] == [
        ("swkernels", "ok", None), ("each choice in full", "ok", None), ("lm-eval HFLM", "ok", None)
    ]  # fmt: skip
    assert all(r["median"] > 0 for r in results)


@torch.no_grad()
@pytest.mark.parametrize("kind", choices.KINDS)
def test_the_judge_sees_a_wrong_sum(kind):
    case = tiny(kind)
    inputs = case.make(1)
    error, right = case.judge(inputs), case.providers()[0].call(inputs)
    assert error(right).passed
    for place in (0, 7):
        wrong = right["sums"].clone()
        wrong[place] *= 1 + 1e-4
        assert not error({"sums": wrong}).passed


def test_the_target_names_cases_that_there_are():
    """Those that SmolLM2 is measured by, for which no model is loaded here."""
    wanted = [t.wanted["projection"] for t in TARGETS if t.op == choices.OP]
    assert wanted == [f"{choices.ITEMS} items {kind}" for kind in choices.KINDS]
    assert tiny(choices.KINDS[0]).projection == "9 items as ARC-Easy"
