"""The cases of topk_abs run at tiny size, and their judge sees what is wrong."""

from __future__ import annotations

import pytest
import torch

from benchmarks.expected import Ceilings
from benchmarks.measure import measure
from benchmarks.ops import topk_abs

CPU = torch.device("cpu")
CEILINGS = Ceilings(1e10, 1e10, {"float32": 1e11, "bfloat16": 1e11})
TINY = ("tiny",), "down_proj", 3, 24, 48


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_provider_is_right(dtype):
    case = topk_abs.case(*TINY, dtype, CPU, dry=True)
    status = {
        r["provider"]: r["status"] for r in measure(case, CPU, CEILINGS, 1 << 10, seconds=0.005)
    }
    assert status == {
        "read": "ok",
        "swkernels": "ok",
        "abs().topk(k)": "ok",
        "torch.compile": "unavailable",
        "NumPy argpartition": "ok" if dtype == "float32" else "unavailable",
    }
    assert case.work[0].read == 3 * 24 * 48 * (4 if dtype == "float32" else 2)


def test_the_judge_sees_a_wrong_entry_one_listed_twice_and_a_wrong_order():
    case = topk_abs.case(*TINY, "float32", CPU, dry=True)
    inputs = case.make(0)
    error = case.judge(inputs)
    places = inputs["w"].abs().flatten().sort(descending=True).indices[:21]
    assert error({"places": places[:20]}).passed
    swapped = places[:20].clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    twice = torch.cat([places[:19], places[18:19]])
    for wrong in (places[1:], torch.cat([places[:19], places[20:]]), swapped, twice):
        assert not error({"places": wrong}).passed
