"""A training run: an adapter trained on questions, with what it costs and what comes of it."""

from __future__ import annotations

import json
from pathlib import Path

from swkernels.errors import TrainingDiverged
from swkernels.files import read_json, write_atomically
from swkernels.train.loop import Settings, fit, mean_loss

from ..adapters import adapt
from ..lab import Lab
from .evaluate import answers, choices_of


def train(lab: Lab, config: dict, path: Path) -> dict:
    """Train as ``config`` says; it is interrupted and gone on with at any moment.

    Args:
        config: ``task``, ``adapter`` (see ``adapters``), ``seed``, ``train_questions``, ``epochs``,
            ``learning_rate``, ``batch_size``, ``accumulate``, ``questions``, ``held_out``,
            ``points``, ``point_tokens``, ``window``.
        path: where its state is kept, without a suffix.

    Returns:
        ``parameters``, ``losses`` of the steps in nats, ``curve`` (of each point: ``step``,
        ``held_out`` loss of answers in nats, ``perplexity`` of the text), ``choices`` (a
        ``ChoiceScores.to_dict``), ``diverged`` (the step whose loss was not finite, or None), and
        what the adapter adds.
    """
    model, tokenizer = lab.load(), lab.tokenizer
    adapted = adapt(lab, model, config["adapter"], config["seed"])
    task, batch = config["task"], config["batch_size"]
    examples = answers(lab.data.task(f"{task}/train", config["train_questions"]), tokenizer)
    held_out = answers(lab.data.task(f"{task}/dev", config["held_out"]), tokenizer)
    settings = Settings(
        epochs=config["epochs"], batch_size=batch, accumulate=config["accumulate"],
        learning_rate=config["learning_rate"], warmup=0.0, weight_decay=0.0, clip=1.0,
        seed=config["seed"], save_every=10,
    )  # fmt: skip
    steps = settings.count(len(examples))
    along = lab.yardstick(tokens=config["point_tokens"], window=config["window"])
    curve = _Curve(path.with_suffix(".json"))
    points = sorted(
        {max(1, round(steps * (n + 1) / config["points"])) for n in range(config["points"])}
    )
    losses: list[float] = []
    diverged = None
    for point in points:
        try:
            losses = fit(
                adapted.trainable, examples, settings, state=path.with_suffix(".safetensors"),
                until=point, on_step=lambda done, total, _: lab.progress("steps", done, total),
            )  # fmt: skip
        except TrainingDiverged as error:
            losses, diverged = error.losses, len(error.losses) + 1
        reached = min(point, len(losses))  # fewer where it diverged, more where it goes on
        if not curve.has(reached):
            curve.add(
                step=reached,
                held_out=mean_loss(model, held_out, batch),
                perplexity=along.read(model, strict=False).perplexity.value,
            )
        if diverged is not None:
            break
    asked = lab.yardstick(tasks={f"{task}/test": config["questions"]})
    scores = asked.read(model, strict=False, progress=lab.progress)
    return {
        "parameters": adapted.parameters,
        "steps": steps,
        "losses": losses,
        "curve": curve.points,
        "choices": choices_of(scores),
        "diverged": diverged,
    } | adapted.describe()


class _Curve:
    """What is measured along the way; it outlives the process, as the state of the loop does."""

    def __init__(self, path: Path):
        self._path = path
        self.points: list[dict] = read_json(path, special=True) if path.exists() else []

    def has(self, step: int) -> bool:
        return any(point["step"] == step for point in self.points)

    def add(self, **point) -> None:
        self.points.append(point)
        write_atomically(self._path, json.dumps(self.points))
