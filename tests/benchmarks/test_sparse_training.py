"""The case of a training step runs at tiny size; its judge and its measure of memory see amiss."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.book import Entry
from benchmarks.expected import Ceilings
from benchmarks.measure import measure
from benchmarks.models import sparse_training
from benchmarks.targets import TARGETS
from tests.cli.checkpoints import make_model

CPU = torch.device("cpu")
CEILINGS = Ceilings(1e10, 1e10, {"float32": 1e11})
VOCABULARY, BATCH, LENGTH, COUNT = 4096, 2, 128, 24
SIZES = {"batch": BATCH, "length": LENGTH, "count": COUNT}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    make_model(vocab_size=VOCABULARY).save_pretrained(folder)
    return folder


def test_every_provider_is_right_and_tells_the_memory_of_its_step(checkpoint):
    memory = {name: 100 + n for n, name in enumerate(sparse_training.WAYS)}
    case = sparse_training.case(CPU, folder=checkpoint, alone=memory.get, **SIZES)
    results = measure(case, CPU, CEILINGS, 1 << 10, seconds=0.005)
    assert [(r["role"], r["status"], r["reason"]) for r in results] == [
        ("bare", "ok", None), ("ours", "ok", None), ("eager", "ok", None), ("peer", "ok", None),
        ("peer", "ok", None), ("peer", "ok", None), ("ours", "ok", None),
    ]  # fmt: skip
    assert {r["provider"]: r["step_memory"] for r in results} == memory
    (target,) = [t for t in TARGETS if "peak memory of a step" in t.work]
    assert target.measure(Entry({}, results)) == 101 / 105  # swkernels over PEFT's LoRA
    assert target.op == sparse_training.OP and target.bar == 1.0 and not target.at_least
    assert target.wanted.items() <= Entry({}, results).described.items()


def test_the_judge_sees_a_gradient_of_another_coordinate(checkpoint):
    case = sparse_training.case(CPU, folder=checkpoint, alone=lambda name: None, **SIZES)
    inputs = case.make(3)
    error = case.judge(inputs)
    gradient = case.providers()[1].call(inputs)["gradient"]
    assert gradient.shape == (COUNT,) and error({"gradient": gradient}).passed
    assert not error({"gradient": gradient.roll(1)}).passed


@pytest.mark.parametrize(
    ("way", "trained"),
    {"swkernels": COUNT, sparse_training.LORA: 2 * 4 * 8 * (32 + 32)}.items(),
)
def test_what_is_trained(checkpoint, way, trained, monkeypatch):
    """k values, or r = 8 of four projections 32 x 32 in two layers."""
    seen = []
    monkeypatch.setattr(sparse_training, "_step", lambda model, parameters: seen.extend(parameters))
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    sparse_training.WAYS[way][1](model, sparse_training._coordinates(model, COUNT))
    assert sum(p.numel() for p in seen) == trained
    assert {id(p) for p in seen} == {id(p) for p in model.parameters() if p.requires_grad}


def test_the_memory_of_a_step_is_that_of_a_process_of_its_own(checkpoint, monkeypatch):
    monkeypatch.setattr(sparse_training, "_PROCESSES", 1)
    sizes = BATCH, LENGTH, COUNT
    found = sparse_training.median_alone(checkpoint, CPU, "float32", *sizes, "swkernels")
    logits = 4 * BATCH * LENGTH * VOCABULARY
    # Logits and their gradient lie beside each other; the model and what is imported do not count.
    assert 2 * logits < found < 10 * logits
    here = sparse_training.memory_here(checkpoint, CPU, "float32", *sizes, "swkernels")
    assert here == pytest.approx(found, rel=0.5)
