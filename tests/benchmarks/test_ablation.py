"""The case of an ablation runs at tiny size, and its judge sees a weight that was not zeroed."""

from __future__ import annotations

import torch

from benchmarks.expected import Ceilings
from benchmarks.measure import measure
from benchmarks.models import ablation
from tests.cli.checkpoints import make_model, plant

CPU = torch.device("cpu")
CEILINGS = Ceilings(1e10, 1e10, {"float32": 1e11})
TINY = {
    "module": "model.layers.1.mlp.down_proj", "pair": [[5, 7], [5, 8]], "tokens": 64, "window": 32,
}  # fmt: skip


def load(dtype, device):
    model = make_model(initializer_range=0.3).to(device, getattr(torch, dtype))
    plant(model)
    return model


def test_every_provider_is_right():
    results = measure(ablation.case(CPU, load=load, **TINY), CPU, CEILINGS, 1 << 10, seconds=0.005)
    assert [(r["role"], r["status"], r["reason"]) for r in results] == [
        ("bare", "ok", None), ("ours", "ok", None), ("eager", "ok", None),
    ]  # fmt: skip


def test_the_judge_sees_a_weight_that_stayed():
    case = ablation.case(CPU, load=load, **TINY)
    inputs = case.make(1)
    error, right = case.judge(inputs), case.providers()[1].call(inputs)["losses"]
    assert error({"losses": right}).passed and len(right) == 4
    assert len({tuple(row) for row in right.tolist()}) == 4
    right[2] = right[0]
    assert not error({"losses": right}).passed
