"""A real model trains alike through plain PyTorch, the Trainer and PEFT."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from swkernels.train import Coordinates, loop, sparse
from swkernels.train.data import collate, read_examples

TEXT = """A student plants two seeds in the same soil and gives one of them more water each day.
Which of them grows taller, and how could she be sure that the water was the reason? She would
repeat it with many seeds, change only one thing at a time, and write down what she sees. """
STEPS, COUNT = 3, 512


@pytest.fixture(scope="module")
def examples(smollm2_path, tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return read_examples(file, AutoTokenizer.from_pretrained(smollm2_path), 24)[:2]


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def with_trainer(model, examples, folder):
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-3,
        lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True, remove_unused_columns=False, weight_decay=0.0,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=arguments, train_dataset=examples,
        data_collator=lambda items: collate(items, torch.device("cpu")),
    )  # fmt: skip
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logits(model, examples):
    with torch.no_grad():
        return model.eval()(**collate(examples, torch.device("cpu"))).logits


def test_three_ways_give_the_same_losses(smollm2_path, examples, tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft")
    from swkernels.integrations.peft import SparseCoordinateConfig

    model = load(smollm2_path)
    coordinates = Coordinates.random(model, COUNT, seed=0)
    handle = sparse(model, coordinates)
    optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-3, weight_decay=0.0)
    model.train()
    plain = []
    for _ in range(STEPS):
        loss = model(**collate(examples, torch.device("cpu"))).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(handle.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        plain.append(loss.item())
    assert plain[-1] < plain[0]

    with_sparse = load(smollm2_path)
    sparse(with_sparse, coordinates)
    assert with_trainer(with_sparse, examples, tmp_path) == pytest.approx(plain, rel=1e-5)
    config = SparseCoordinateConfig(coordinates=coordinates, task_type="CAUSAL_LM")
    with_peft = peft.get_peft_model(load(smollm2_path), config)
    assert with_trainer(with_peft, examples, tmp_path) == pytest.approx(plain, rel=1e-5)
    want = logits(model, examples)
    assert torch.allclose(logits(with_peft, examples), want, atol=1e-3)

    handle.save(tmp_path / "adapter.safetensors")
    loaded = load(smollm2_path)
    sparse(loaded, coordinates).load(tmp_path / "adapter.safetensors")
    assert torch.equal(logits(loaded, examples), want)
    with_peft.save_pretrained(tmp_path / "peft")
    again = peft.PeftModel.from_pretrained(load(smollm2_path), tmp_path / "peft")
    assert torch.equal(logits(again, examples), logits(with_peft, examples))


def test_the_loop_learns_and_resumes(smollm2_path, examples, tmp_path):
    settings = loop.Settings(steps=4, batch_size=2, learning_rate=2e-3, warmup=0)

    def go(state=None, stop=None):
        model = load(smollm2_path)
        handle = sparse(model, Coordinates.random(model, COUNT, seed=0))

        def on_step(done, steps, loss):
            if done == stop:
                raise KeyboardInterrupt

        losses = loop.fit(handle, examples, settings, state=state, on_step=on_step)
        return losses, handle.parameters()

    whole, values = go()
    assert whole[-1] < whole[0]
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "state.safetensors", stop=2)
    resumed, again = go(tmp_path / "state.safetensors")
    assert resumed == whole and all(torch.equal(a, b) for a, b in zip(values, again))
