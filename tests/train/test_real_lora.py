"""A real model trains with every kind of LoRA mask through PEFT and the Trainer."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer, Trainer, TrainingArguments

from swkernels.train import delta_top
from swkernels.train.data import collate, read_examples

from .test_real_model import TEXT, load, logits

peft = pytest.importorskip("peft", reason="needs peft")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
# The super weights of SmolLM2 (layer 11), and a mild pair of layer 2; both inside q and o only.
LISTED = {11: [[507, 90], [507, 430]], 2: [[507, 90], [107, 430]]}


@pytest.fixture(scope="module")
def examples(smollm2_path, tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return read_examples(file, AutoTokenizer.from_pretrained(smollm2_path), 24)[:2]


def adapted(path, coordinates=None, **options):
    from swkernels.integrations.peft import MaskedLoraConfig

    torch.manual_seed(0)
    config = MaskedLoraConfig(
        r=8, lora_alpha=16, target_modules=TARGETS, coordinates=coordinates,
        task_type="CAUSAL_LM", **options,
    )  # fmt: skip
    return peft.get_peft_model(load(path), config)


def train(model, examples, folder, resume=None):
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-3,
        logging_steps=1, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False, weight_decay=0.1,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=arguments, train_dataset=examples,
        data_collator=lambda items: collate(items, torch.device("cpu")),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore:.*coordinates lie outside")
def test_vanilla_masked_and_held(smollm2_path, examples, tmp_path):
    vanilla = adapted(smollm2_path)
    losses = train(vanilla, examples, tmp_path / "vanilla")
    assert losses[-1] < losses[0]
    top = delta_top(vanilla, 1000)
    assert len(top.entries) == 1000
    kinds = {
        "rows": {"coordinates": LISTED, "mask": "rows", "mask_scale": 0.2},
        "positions": {"coordinates": LISTED, "mask": "positions"},
        "held": {"coordinates": top.coordinates, "mask": "rows and columns", "hold": True},
    }
    for name, options in kinds.items():
        model = adapted(smollm2_path, **options)
        losses = train(model, examples, tmp_path / name)
        assert losses[-1] < losses[0]
        want = logits(model, examples)
        assert not torch.equal(want, logits(vanilla, examples))
        model.save_pretrained(tmp_path / f"{name}-saved")
        stock = peft.PeftModel.from_pretrained(load(smollm2_path), tmp_path / f"{name}-saved")
        assert type(stock.base_model) is peft.LoraModel
        torch.testing.assert_close(logits(stock, examples), want, rtol=1e-4, atol=1e-3)
        again = adapted(smollm2_path, **options)
        train(again, examples, tmp_path / f"{name}-on", str(tmp_path / name / "checkpoint-2"))
        assert torch.equal(logits(again, examples), want)
