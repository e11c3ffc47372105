"""The case of the guard runs at tiny size, and its judge sees what is wrong."""

from __future__ import annotations

import pytest
import torch

from benchmarks.expected import Ceilings
from benchmarks.measure import measure
from benchmarks.models import guard

CPU = torch.device("cpu")
CEILINGS = Ceilings(1e10, 1e10, {"float32": 1e11, "bfloat16": 1e11})


@pytest.mark.parametrize("cold", [False, True])
def test_every_provider_is_right(cold):
    case = guard.case(cold=cold, size=1 << 16, columns=64)
    results = measure(case, CPU, CEILINGS, 1 << 10, seconds=0.005)
    assert {r["provider"]: r["status"] for r in results} == {
        "swkernels": "ok",
        "read": "ok",
        "SHA-256 of the file, one thread": "ok",
    }


def test_the_judge_sees_damage_that_is_said_and_bytes_that_are_left_out():
    case = guard.case(cold=False, size=1 << 16, columns=64)
    error = case.judge(case.make(0))
    size = torch.tensor(1 << 16)
    assert error({"bytes": size, "intact": torch.tensor(True)}).passed
    assert not error({"bytes": size, "intact": torch.tensor(False)}).passed
    assert not error({"bytes": size - 1}).passed
