"""The case of perplexity runs at tiny size, and its judge sees a loss that is wrong."""

from __future__ import annotations

import pytest
import torch

from benchmarks.expected import Ceilings
from benchmarks.measure import measure
from benchmarks.models import perplexity
from benchmarks.targets import TARGETS
from swkernels.detect.perplexity import perplexity as ours
from tests.cli.checkpoints import make_model

CPU = torch.device("cpu")
CEILINGS = Ceilings(1e10, 1e10, {"float32": 1e11})


def load(dtype, device):
    return make_model(initializer_range=0.3).to(device, getattr(torch, dtype))


@pytest.mark.parametrize("stride", [None, 8])
def test_every_provider_is_right(stride):
    case = perplexity.case("float32", CPU, load=load, tokens=64, window=16, stride=stride)
    results = measure(case, CPU, CEILINGS, 1 << 10, seconds=0.005)
    assert [(r["provider"], r["status"], r["reason"]) for r in results] == [
        ("forward", "ok", None), ("swkernels", "ok", None),
        ("forward, cross_entropy of a batch", "ok", None),
    ]  # fmt: skip
    assert all(r["median"] > 0 for r in results)


@torch.no_grad()
@pytest.mark.parametrize("stride", [None, 8])
def test_the_judge_sees_a_wrong_loss(stride):
    case = perplexity.case("float32", CPU, load=load, tokens=64, window=16, stride=stride)
    inputs = case.make(1)
    error, right = case.judge(inputs), case.providers()[1].call(inputs)
    exact = ours(load("float64", CPU), inputs["ids"], window=16, stride=stride)
    assert right["losses"].tolist() == pytest.approx(exact.losses, rel=1e-6)
    assert error(right).passed and error({}).passed
    for place in (0, 1):
        wrong = right["losses"].clone()
        wrong[place] *= 1 + 1e-4
        assert not error({"losses": wrong}).passed


def test_the_target_names_cases_that_there_are():
    """Those that SmolLM2 is measured by, for which no model is loaded here."""
    wanted = [t.wanted for t in TARGETS if t.op == perplexity.OP]
    projection = f"windows of {perplexity.WINDOW}, {perplexity.BATCH} together"
    assert wanted == [
        {"dtype": dtype, "projection": projection} for dtype in ("float32", "bfloat16")
    ]
    sizes = {"load": load, "tokens": 64, "window": 16}
    tiny = perplexity.case("float32", CPU, **sizes)
    assert tiny.projection == projection.replace(str(perplexity.WINDOW), "16")
