"""What a model is measured by: the same texts and questions, again and again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from swkernels.detect.perplexity import Perplexity, perplexity
from swkernels.errors import InvalidInput

from .choices import ChoiceScores, score_choices
from .results import Progress, silent
from .stop_words import StopWordMeter, StopWords
from .tasks import Task


@dataclass(frozen=True)
class Scores:
    """What a yardstick read on one model; a part that it does not measure is None or empty.

    Attributes:
        perplexity: on the text.
        choices: of each task, by its name.
        stop_words: how likely they are, over the same predictions as the perplexity.
    """

    perplexity: Perplexity | None = None
    choices: dict[str, ChoiceScores] = field(default_factory=dict)
    stop_words: StopWords | None = None

    @property
    def not_finite(self) -> int:
        """Windows and questions whose score is NaN or infinite."""
        parts = [*self.choices.values(), self.perplexity]
        return sum(part.not_finite for part in parts if part is not None)

    def ratio(self, intact: Scores) -> tuple[float | None, float | None]:
        """The perplexity over that of ``intact``, and its standard error over windows.

        None without a text; the error also with one window, and where the ratio is not finite.
        """
        if self.perplexity is None:
            return None, None
        ratio, error = self.perplexity.ratio(intact.perplexity)
        return ratio, error if math.isfinite(ratio) else None

    def to_dict(self) -> dict:
        """The parts that were measured."""
        return {
            "perplexity": None if self.perplexity is None else self.perplexity.to_dict(),
            "choices": {name: scores.to_dict() for name, scores in self.choices.items()},
            "stop_words": None if self.stop_words is None else self.stop_words.to_dict(),
        }

    def row(self) -> dict:
        """The figures that fit into one row of a table."""
        row: dict = {}
        if self.perplexity is not None:
            row["perplexity"] = self.perplexity.value
        for name, scores in self.choices.items():
            row[name] = scores.accuracy
        if self.stop_words is not None:
            row["stop words"] = self.stop_words.mean
        return row


@dataclass(frozen=True)
class Yardstick:
    """A text, tasks and stop words, prepared once and read on any number of conditions.

    Attributes:
        tokens: integers [N] of the text, or None; see ``swkernels.detect.perplexity``.
        window, stride, batch_size: of the perplexity, as there.
        tasks: multiple choice.
        tokenizer: needed for tasks and stop words.
        stop_words: whose probability is measured along with the perplexity; empty for none.
        source: what the text is, for reports.
        prefix: of the perplexity, as there: lm-eval's rolling windows.
        share_prefixes: of multiple choice; see ``score_choices``.
    """

    tokens: torch.Tensor | None = None
    window: int | None = None
    stride: int | None = None
    batch_size: int = 1
    tasks: Sequence[Task] = ()
    tokenizer: object = None
    stop_words: Sequence[str] = ()
    source: str = "tokens given by the caller"
    prefix: int | None = None
    share_prefixes: bool = True

    def __post_init__(self):
        if self.tokens is None and not self.tasks:
            raise InvalidInput("there is nothing to measure by: give a text or a task")
        if self.tokenizer is None and (self.tasks or self.stop_words):
            raise InvalidInput("tasks and stop words need the model's tokenizer: give tokenizer=")
        if self.tokens is None and self.stop_words:
            raise InvalidInput("stop words are measured on a text: give one, or leave them out")
        names = [task.name for task in self.tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InvalidInput(f"two tasks are called {twice[0]}: give each a name of its own")

    def read(
        self, model: nn.Module, *, strict: bool = True, progress: Progress = silent
    ) -> Scores:
        """Measure ``model`` as it is now.

        Args:
            model: a decoder; run in eval mode, and given back as it was.
            strict: a loss that is not finite is an error; else it is in the scores as it is.
            progress: called with (stage, done, total).

        Raises:
            InvalidInput: as ``perplexity`` and ``score_choices`` do.
        """
        found, meter = None, None
        if self.tokens is not None:
            if self.stop_words:
                meter = StopWordMeter(self.tokenizer, self.stop_words)
            found = perplexity(
                model,
                self.tokens,
                window=self.window,
                stride=self.stride,
                prefix=self.prefix,
                batch_size=self.batch_size,
                observe=meter,
                strict=strict,
                progress=lambda done, total: progress("perplexity", done, total),
            )
        choices = {}
        for task in self.tasks:
            choices[task.name] = score_choices(
                model,
                self.tokenizer,
                task,
                share_prefixes=self.share_prefixes,
                strict=strict,
                progress=lambda done, total, name=task.name: progress(name, done, total),
            )
        return Scores(found, choices, None if meter is None else meter.result())

    def to_dict(self) -> dict:
        """What it measures by, for reports."""
        return {
            "text": None if self.tokens is None else self.source,
            "tokens": None if self.tokens is None else len(self.tokens),
            "window": self.window,
            "stride": self.stride,
            "prefix": self.prefix,
            "tasks": [
                {"name": task.name, "source": task.source, "items": len(task.items)}
                for task in self.tasks
            ],
            "stop_words": list(self.stop_words),
        }
