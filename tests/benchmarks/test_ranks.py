"""The case of a shared scan runs at tiny size, and its judge sees another report."""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks.expected import Ceilings
from benchmarks.measure import measure
from benchmarks.models import ranks
from tests.cli.checkpoints import make_model, plant, save

CPU = torch.device("cpu")
CEILINGS = Ceilings(1e10, 1e10, {"float32": 1e11})


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be pinned here")
def test_every_provider_is_right_and_the_judge_sees_what_is_not(tmp_path):
    model = make_model()
    plant(model)
    case = ranks.case(save(model, tmp_path / "tiny"), samples=3, length=16)
    results = measure(case, CPU, CEILINGS, 1 << 10, seconds=0.005)
    two = ("ours", "ok") if len(os.sched_getaffinity(0)) > 1 else ("ours", "unavailable")
    assert [(r["role"], r["status"]) for r in results] == [("bare", "ok"), two], results

    inputs = case.make(1)
    error, report = case.judge(inputs), case.providers()[0].call(inputs)["report"]
    assert error({"report": report}).passed and report["candidates"]
    assert not error({"report": report | {"candidates": []}}).passed
    assert not error({"report": report | {"more": 1}}).passed
    assert not error({"report": {}}).passed
