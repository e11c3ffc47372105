"""The cases of a scan layer by layer, on tiny checkpoints."""

from __future__ import annotations

import pytest
import torch

from benchmarks.models import larger_than_memory, streamed_scan
from tests.cli.checkpoints import make_model, save

SHAPE = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, vocab_size=64, max_position_embeddings=64,
)  # fmt: skip


def test_both_ways_report_the_same(tmp_path):
    case = streamed_scan.case(
        "float32", torch.device("cpu"), save(make_model(), tmp_path), length=8
    )
    inputs = case.make(0)
    inputs["ids"].clamp_(max=10)
    judge = case.judge(inputs)
    for provider in case.providers():
        assert judge(provider.call(inputs)).passed, provider.name
    other = {"ids": inputs["ids"].flip(0)}
    assert not judge(case.providers()[0].call(other)).passed


def test_a_checkpoint_is_made_once_and_both_ways_find_the_same_peaks(tmp_path, monkeypatch):
    folder = larger_than_memory.checkpoint(tmp_path / "model", SHAPE)
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert larger_than_memory.checkpoint(folder, SHAPE) == folder
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    assert len(list(folder.glob("*.safetensors"))) == SHAPE["num_hidden_layers"] + 3
    monkeypatch.setattr(larger_than_memory, "LENGTH", 8)
    found = {way: larger_than_memory.run_here(way, folder, 64) for way in larger_than_memory.WAYS}
    assert found["stream"]["peaks"] == found["accelerate"]["peaks"]
    assert len(found["stream"]["peaks"]) == 2 * SHAPE["num_hidden_layers"]
    assert all(value["memory"] > 1e8 for value in found.values())


def test_the_limit_is_a_control_groups(tmp_path):
    try:
        with larger_than_memory.control_group(1 << 30) as group:
            assert (group / "cgroup.procs").exists()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    assert not group.exists()
