"""The case that reads a checkpoint's file runs at tiny size, and its judge sees what is wrong."""

from __future__ import annotations

import torch

from benchmarks.expected import Ceilings
from benchmarks.measure import measure
from benchmarks.models import topk_checkpoint
from tests.cli.checkpoints import make_model

CEILINGS = Ceilings(1e10, 1e10, {"float32": 1e11})


def test_every_provider_is_right(tmp_path):
    make_model().save_pretrained(tmp_path)
    case = topk_checkpoint.case(tmp_path, 50)
    results = measure(case, torch.device("cpu"), CEILINGS, 1 << 10, seconds=0.005)
    assert [(r["provider"], r["status"]) for r in results] == [
        ("swkernels", "ok"), ("swkernels, the file mapped before", "ok"), ("read", "ok"),
        ("read, the file mapped before", "ok"),
        ("abs().topk(k) of each, then of all", "ok"),
    ]  # fmt: skip
    assert all(r["median"] > 0 for r in results)
    entries = sum(p.numel() for p in make_model().parameters())
    assert case.shape == {"rows": 1, "columns": entries, "k": 50}
    assert case.work[0].read == 4 * entries


def test_the_judge_sees_a_wrong_value_a_wrong_place_and_one_that_is_listed_twice(tmp_path):
    make_model(initializer_range=1.0).save_pretrained(tmp_path)
    case = topk_checkpoint.case(tmp_path, 50)
    error = case.judge({})
    right = case.providers()[0].call({})
    assert error(right).passed
    for name, place, value in (("values", 3, 9.0), ("row", 4, 0), ("column", 4, 0)):
        wrong = right | {name: right[name].clone()}
        wrong[name][place] = value if wrong[name][place] != value else value + 1
        assert not error(wrong).passed
    twice = {name: part.clone() for name, part in right.items()}
    for part in twice.values():
        part[1] = part[0]
    assert not error(twice).passed
