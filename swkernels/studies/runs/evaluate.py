"""The model as it is: perplexity of the text, accuracy on the tasks, loss of right answers."""

from __future__ import annotations

from pathlib import Path

from swkernels.evidence.tasks import Task
from swkernels.evidence.yardstick import Scores
from swkernels.train.data import Example, Source, read_examples
from swkernels.train.loop import mean_loss

from ..lab import Lab

BATCH = 4  # sequences of one forward


def evaluate(lab: Lab, config: dict, path: Path) -> dict:
    """Measure the model.

    Args:
        config: ``tasks`` {part: how many questions or None}, and ``tokens`` and ``window`` of the
            text; window None leaves it out; ``held_out`` {part: how many questions}.

    Returns:
        ``perplexity`` (a ``Perplexity.to_dict``) or None, ``choices`` by task, and ``held_out``,
        the loss of the right answers of each part in nats.
    """
    yardstick = lab.yardstick(
        tokens=config["tokens"], window=config["window"], tasks=config["tasks"]
    )
    scores = yardstick.read(lab.model, progress=lab.progress)
    found = scores.to_dict()
    held_out = {
        part: mean_loss(lab.model, answers(lab.data.task(part, count), lab.tokenizer), BATCH)
        for part, count in config["held_out"].items()
    }
    return {
        "perplexity": found["perplexity"],
        "choices": found["choices"],
        "held_out": held_out,
    }


def choices_of(scores: Scores) -> dict:
    """The scores of the only task."""
    (choices,) = scores.choices.values()
    return choices.to_dict()


def answers(task: Task, tokenizer, length: int = 512) -> list[Example]:
    """The right answer of each question as it is asked in the evaluation; it alone counts."""
    pairs = [(number, *item.pairs[item.answer]) for number, item in enumerate(task.items, 1)]
    return read_examples(Source(task.source, None, pairs), tokenizer, length)
