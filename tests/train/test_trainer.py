"""``fit`` against the Trainer of Hugging Face: the same losses, the same values."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainingArguments

from swkernels.train import Coordinates, loop, sparse
from swkernels.train.data import Example, collate
from tests.models.tiny import VOCABULARY, tiny_model

# The published settings: AdamW at 1e-4 falling to 0, 4 sequences a forward, 4 forwards a step.
SETTINGS = loop.Settings(
    epochs=3, batch_size=4, accumulate=4, learning_rate=1e-4, warmup=0.0, weight_decay=0.0,
    clip=1.0, seed=42,
)  # fmt: skip
COUNT = 32


def questions() -> list[Example]:
    """Sequences of many lengths, whose first tokens do not count."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(COUNT):
        ids = torch.randint(3, VOCABULARY, (5 + number % 9,), generator=generator)
        made.append(Example(ids, torch.where(torch.arange(len(ids)) < 3, -100, ids)))
    return made


def prepared(dtype=torch.float32):
    """A model whose gradients are clipped, with 40 weights to train."""
    model = tiny_model("llama").to(dtype)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.mul_(100)  # gradients with a norm above 1
    return model, Coordinates.random(model, 40, seed=1)


def by_fit(data):
    model, coordinates = prepared()
    handle = sparse(model, coordinates)
    losses = loop.fit(handle, data, SETTINGS)
    return losses, torch.cat([value.detach() for value in handle.parameters()])


class InOrder(Trainer):
    """Takes the data as it comes."""

    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def by_trainer(data, folder):
    """The Trainer on dense weights, of which only 40 have a gradient."""
    model, coordinates = prepared()
    model.requires_grad_(False)
    first = train_only(model, coordinates)
    size, steps = SETTINGS.batch_size * SETTINGS.accumulate, SETTINGS.count(COUNT)
    order = loop._order(COUNT, 0, steps * size, SETTINGS.seed)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, learning_rate=SETTINGS.learning_rate,
        per_device_train_batch_size=SETTINGS.batch_size,
        gradient_accumulation_steps=SETTINGS.accumulate, lr_scheduler_type="linear",
        warmup_steps=0, max_grad_norm=SETTINGS.clip, weight_decay=0.0, optim="adamw_torch",
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False, seed=SETTINGS.seed,
    )  # fmt: skip
    trainer = InOrder(
        model, arguments, train_dataset=[data[n] for n in order],
        data_collator=lambda examples: collate(examples, torch.device("cpu")),
    )  # fmt: skip
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return logged, change(model, coordinates, first)


def train_only(model, coordinates) -> dict:
    """Let only these of the dense weights be trained; returns the weights as they are."""
    first = {}
    for site, pairs in coordinates.weights.items():
        weight = model.get_parameter(f"{site.name}.weight")
        mask = torch.zeros_like(weight)
        mask[pairs[:, 0], pairs[:, 1]] = 1
        weight.requires_grad_(True).register_hook(lambda gradient, mask=mask: gradient * mask)
        first[site] = weight.detach().clone()
    return first


def change(model, coordinates, first) -> torch.Tensor:
    """What each of the weights has gained."""
    moved = []
    for site, pairs in coordinates.weights.items():
        weight = model.get_parameter(f"{site.name}.weight").detach()
        moved.append((weight - first[site])[pairs[:, 0], pairs[:, 1]])
    return torch.cat(moved)


def exactly(data):
    """The same in float64, every sequence by itself."""
    model, coordinates = prepared(torch.float64)
    model.requires_grad_(False)
    first = train_only(model, coordinates)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=SETTINGS.learning_rate, weight_decay=0)
    size, steps = SETTINGS.batch_size * SETTINGS.accumulate, SETTINGS.count(COUNT)
    order = loop._order(COUNT, 0, steps * size, SETTINGS.seed)
    losses, norms = [], []
    for step in range(steps):
        chosen = [data[n] for n in order[step * size : (step + 1) * size]]
        count = sum(len(example.ids) - 3 for example in chosen)
        optimizer.zero_grad()
        total = 0.0
        for ids, labels in chosen:
            scores = model(ids[None]).logits[0, 2:-1].log_softmax(-1)
            loss = -scores.gather(-1, labels[3:, None]).sum() / count
            loss.backward()
            total += loss.item()
        norms.append(float(torch.nn.utils.clip_grad_norm_(weights, 1.0)))
        optimizer.param_groups[0]["lr"] = 1e-4 * (1 - step / steps)
        optimizer.step()
        losses.append(total)
    return losses, norms, change(model, coordinates, first)


def test_it_trains_as_the_trainer_does(tmp_path):
    data = questions()
    losses, values = by_fit(data)
    logged, theirs = by_trainer(data, tmp_path)
    wanted, norms, exact = exactly(data)
    assert len(losses) == len(logged) == SETTINGS.count(COUNT) == 6
    assert [entry["learning_rate"] for entry in logged] == pytest.approx(
        [SETTINGS.rate(step, 6) for step in range(6)], rel=1e-12
    )
    assert [entry["grad_norm"] for entry in logged] == pytest.approx(norms, rel=1e-4)
    assert min(norms) > 1.2  # every step is clipped
    assert close(losses, [entry["loss"] for entry in logged], wanted)
    assert close(values, theirs, exact)


def close(ours, theirs, exact) -> bool:
    """Whether our largest error is at most twice that of the Trainer, and both are rounding."""
    ours, theirs, exact = (torch.as_tensor(x, dtype=torch.float64) for x in (ours, theirs, exact))
    error = (theirs - exact).abs().max()
    assert 0 < error < 1e-4 * exact.abs().max()
    return bool((ours - exact).abs().max() <= 2 * error)
