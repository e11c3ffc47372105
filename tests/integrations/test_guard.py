"""The callback that watches recorded super weights in a real Trainer."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from swkernels.errors import InvalidInput, SuperWeightChanged
from swkernels.guard import create
from swkernels.integrations.transformers import SuperWeightGuard
from swkernels.train import Coordinates, freeze
from tests.models.tiny import tiny_model, token_ids

SITE = "model.layers.1.mlp.down_proj"
KEPT = Coordinates({SITE: [(3, 5), (7, 11)]}, {SITE: (32, 80)})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model("llama").save_pretrained(folder)
    return folder


def train(checkpoint, guard, tmp_path, frozen: bool, **options):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    rows = [{"input_ids": row, "labels": row} for row in token_ids(8, 12)]
    arguments = TrainingArguments(
        tmp_path, max_steps=5, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        logging_strategy="no", disable_tqdm=True, weight_decay=0.1,
        **{"save_strategy": "no"} | options,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[guard])
    if frozen:
        freeze(model, KEPT).protect(trainer.create_optimizer())
    trainer.train()
    return trainer


def test_frozen_super_weights_pass(checkpoint, tmp_path):
    guard = SuperWeightGuard(create(checkpoint, KEPT), every=1)
    trainer = train(checkpoint, guard, tmp_path, frozen=True)
    assert trainer.state.global_step == 5 and guard.changes == []


def test_raises_and_names_the_weights(checkpoint, tmp_path):
    guard = SuperWeightGuard(create(checkpoint, KEPT), every=2)
    with pytest.raises(SuperWeightChanged, match=r"2 super weights have changed by step 2: .*3, 5"):
        train(checkpoint, guard, tmp_path, frozen=False)
    assert [(step, hit.weight.row) for step, hit in guard.changes] == [(2, 3), (2, 7)]


def test_logs_each_once(checkpoint, tmp_path, caplog):
    guard = SuperWeightGuard(create(checkpoint, KEPT), every=1, on_change="log")
    with caplog.at_level(logging.WARNING):
        train(checkpoint, guard, tmp_path, frozen=False)
    said = [r.message for r in caplog.records if "have changed by step" in r.message]
    assert len(said) == 1 and "by step 1" in said[0] and len(guard.changes) == 2


def test_checks_at_a_save(checkpoint, tmp_path):
    guard = SuperWeightGuard(create(checkpoint, KEPT), every=1000)
    with pytest.raises(SuperWeightChanged, match="by step 3"):
        train(checkpoint, guard, tmp_path, frozen=False, save_strategy="steps", save_steps=3)


def test_refuses_what_cannot_be_compared(checkpoint, tmp_path):
    guard = SuperWeightGuard(create(checkpoint, KEPT))
    other = Trainer(
        tiny_model("gpt2"),
        TrainingArguments(tmp_path, max_steps=1, report_to=[], use_cpu=True),
        train_dataset=[{"input_ids": row, "labels": row} for row in token_ids(8, 12)],
        callbacks=[guard],
    )
    with pytest.raises(InvalidInput, match="cannot be compared"):
        other.train()
    with pytest.raises(InvalidInput, match="at least 1"):
        SuperWeightGuard(create(checkpoint, KEPT), every=0)
    with pytest.raises(InvalidInput, match="on_change"):
        SuperWeightGuard(create(checkpoint, KEPT), on_change="ignore")
    with pytest.raises(InvalidInput, match="no super weights"):
        SuperWeightGuard(create(checkpoint))


def test_float32_training_of_a_bfloat16_checkpoint(tmp_path):
    tiny_model("llama").bfloat16().save_pretrained(tmp_path / "half")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    guard = SuperWeightGuard(create(tmp_path / "half", KEPT))
    guard.on_train_begin(None, type("State", (), {"global_step": 0}), None, model=model)
    assert guard.changes == []
