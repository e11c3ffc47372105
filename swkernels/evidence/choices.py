"""Accuracy on multiple choice: every choice is scored, and the likeliest is the prediction."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from swkernels.detect.samples import check_vocabulary, evaluating
from swkernels.errors import InvalidInput
from swkernels.train.figure import INK, LINE, MARK

from . import bootstrap
from .pairs import encode
from .prefixes import PrefixRun
from .results import Result
from .tasks import Task

RULES = ("perplexity", "sum", "characters")
BATCH = 16
_SAME = ("ids", "answers", "characters")  # what scores that can be compared have in common
_NONE = -1  # the prediction of an item with a score that is not finite


@dataclass(frozen=True)
class ChoiceComparison:
    """Two models on the same items; all figures are of the first over the second.

    Attributes:
        difference: of accuracy.
        interval: its 95 % score interval, over pairs of answers; (0, 0) where all scores are equal
            to the last digit, as those of a model and itself.
        identical: share of items with the same prediction.
        gained, lost: items that the first alone, and that the second alone, has right.
        p_value: of the exact two-sided sign test on those (McNemar).
    """

    difference: float
    interval: tuple[float, float]
    identical: float
    gained: int
    lost: int
    p_value: float

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class ChoiceScores(Result):
    """The scores of every choice of a task, and what follows from them.

    Attributes:
        name, source: of the task.
        ids: of the items, in the task's order.
        answers: which choice is right, from 0, of each item.
        log_likelihoods: of each item, of each choice: summed over its tokens, in nats.
        tokens, characters: the continuations' lengths, of the same shape; characters are those
            of the choice, without the space before it, and 1 at least.
        rule: how choices are compared: "perplexity", by the mean over tokens (the training
            paper's: the lowest perplexity); "sum" (lm-eval's acc); or "characters", by the mean
            over characters (lm-eval's acc_norm).
        shared: whether what the choices of an item begin with was run once.
        seed: of the bootstrap.
    """

    name: str
    source: str
    ids: tuple[str, ...]
    answers: tuple[int, ...]
    log_likelihoods: tuple[tuple[float, ...], ...]
    tokens: tuple[tuple[int, ...], ...]
    characters: tuple[tuple[int, ...], ...]
    rule: str = RULES[0]
    shared: bool = True
    seed: int = 0

    schema = "swkernels.choices/1"

    @property
    def predictions(self) -> tuple[int, ...]:
        """The likeliest choice of each item by ``rule``, the first of equals.

        It is -1 for an item with a score that is not finite: there is no likeliest.
        """
        return tuple(
            scores.index(max(scores)) if all(map(math.isfinite, scores)) else _NONE
            for scores in self._scores()
        )

    @property
    def correct(self) -> tuple[bool, ...]:
        """Whether each item's prediction is its answer."""
        return tuple(p == answer for p, answer in zip(self.predictions, self.answers))

    @property
    def accuracy(self) -> float:
        """Share of items whose prediction is right; one without a prediction is wrong."""
        return sum(self.correct) / len(self.answers)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % bootstrap interval of ``accuracy``, over items."""
        return bootstrap.interval(sum(self.correct), len(self.answers), self.seed)

    @property
    def not_finite(self) -> int:
        """Items with a score that is NaN or infinite; they count as wrong."""
        return sum(not all(map(math.isfinite, sums)) for sums in self.log_likelihoods)

    def accuracy_by(self, rule: str) -> float:
        """``accuracy`` by another rule.

        Raises:
            InvalidInput: an unknown rule.
        """
        return replace(self, rule=_known(rule)).accuracy

    def compare(self, other: ChoiceScores) -> ChoiceComparison:
        """This model against another on the same items, by this one's rule.

        Raises:
            InvalidInput: the items, or the lengths of their choices, are not the same.
        """
        if any(getattr(self, name) != getattr(other, name) for name in _SAME):
            raise InvalidInput(
                f"{self.name} and {other.name} do not hold the same items: score both models on "
                "one task"
            )
        other = replace(other, rule=self.rule)
        pairs = list(zip(self.correct, other.correct))
        gained, lost, items = pairs.count((True, False)), pairs.count((False, True)), len(pairs)
        same = sum(a == b != _NONE for a, b in zip(self.predictions, other.predictions))
        # Scores that are equal to the last digit are of one model: nothing is estimated.
        alike = self.log_likelihoods == other.log_likelihoods
        return ChoiceComparison(
            (gained - lost) / items,
            (0.0, 0.0) if alike else bootstrap.paired_interval(gained, lost, items),
            same / items,
            gained,
            lost,
            bootstrap.sign_test(gained, lost),
        )

    def to_dict(self) -> dict:
        """What it holds and what follows from it, for JSON; the items' scores included."""
        return {
            "schema": self.schema,
            "accuracy": self.accuracy,
            "interval": self.interval,
            "accuracies": {rule: self.accuracy_by(rule) for rule in RULES},
            "not_finite": self.not_finite,
            "predictions": self.predictions,
            **asdict(self),
        }

    def rows(self) -> list[dict]:
        """One row for each item."""
        return [
            {
                "task": self.name,
                "item": name,
                "answer": answer,
                "prediction": prediction,
                "correct": prediction == answer,
                "margin": margin,
            }
            for name, answer, prediction, margin in zip(
                self.ids, self.answers, self.predictions, self._margins()
            )
        ]

    def _scores(self) -> list[list[float]]:
        """What ``rule`` compares: of each item, of each choice."""
        lengths = {"perplexity": self.tokens, "characters": self.characters}.get(self.rule)
        if lengths is None:
            return [list(sums) for sums in self.log_likelihoods]
        return [
            [total / length for total, length in zip(*of_item)]
            for of_item in zip(self.log_likelihoods, lengths)
        ]

    def _margins(self) -> list[float]:
        """The answer's score less that of the best other choice."""
        return [
            scores.pop(answer) - max(scores) for scores, answer in zip(self._scores(), self.answers)
        ]

    def _draw(self, figure) -> None:
        margins = [margin for margin in self._margins() if math.isfinite(margin)]
        axes = figure.subplots()
        if margins:
            edge = max(map(abs, margins)) or 1.0
            bins = [edge * step / 20 for step in range(-20, 21)]
            for right, color, label in ((True, LINE, "right"), (False, MARK, "wrong")):
                part = [margin for margin in margins if (margin >= 0) is right]
                axes.hist(part, bins, color=color, label=f"{label}: {len(part)}")
            axes.legend(frameon=False, fontsize=8.5)
        per = {"perplexity": " a token", "characters": " a character"}.get(self.rule, "")
        axes.axvline(0, color=INK, lw=1)
        axes.set_xlabel(f"log-likelihood{per} of the answer less that of the best other, nats")
        axes.set_ylabel("items")
        low, high = self.interval
        note = f"; {self.not_finite} not finite" if self.not_finite else ""
        title = f"{self.name}: accuracy {self.accuracy:.3f} [{low:.3f}, {high:.3f}]{note}"
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(axis="y", color="#dde2e7")


def score_choices(
    model: nn.Module,
    tokenizer,
    task: Task,
    *,
    batch_size: int = BATCH,
    share_prefixes: bool = True,
    rule: str = RULES[0],
    seed: int = 0,
    strict: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> ChoiceScores:
    """Score every choice of a task: the log-likelihood of its continuation given its context.

    Summed over the continuation's tokens, with the log-softmax in float32; split into tokens as
    lm-eval does it, see ``pairs.encode``.

    Args:
        model: a decoder, of Hugging Face's kind or one that maps ids [B, S] to logits [B, S, V];
            run in eval mode, and given back as it was.
        tokenizer: the model's, of Hugging Face's kind.
        batch_size: sequences that run together. It changes a score by rounding at most.
        share_prefixes: run the tokens that all choices of an item begin with once. Some choices of
            the first batch are run in full too: a model for which the scores differ is run in
            full, and ``shared`` says so.
        rule: see ``ChoiceScores``; it can be changed afterwards.
        seed: of the bootstrap.
        strict: a score that is not finite is an error; else it is in the result as it is.
        progress: called with (items done, items).

    Raises:
        InvalidInput: an argument that is not as above, an encoder-decoder, a token outside the
            vocabulary, an item that cannot be scored, or a score that is not finite.
    """
    _known(rule)
    if batch_size < 1:
        raise InvalidInput(f"batch_size must be at least 1, got {batch_size}")
    if not task.items:
        raise InvalidInput(f"the task {task.name} holds no item")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise InvalidInput(
            f"{type(model).__name__} is an encoder and a decoder, which predict no text that goes "
            "on: multiple choice needs a decoder"
        )
    pairs = encode(model, tokenizer, task)
    check_vocabulary(
        model, [torch.tensor(p.inputs + p.targets[-1:]) for of_item in pairs for p in of_item]
    )
    found: dict[int, list[float]] = {}
    with evaluating(model):
        run = PrefixRun(model, batch_size, share_prefixes)
        for numbers in run.batches(pairs):
            found |= zip(numbers, run.scores([pairs[number] for number in numbers]))
            for number in numbers if strict else ():
                if not all(map(math.isfinite, found[number])):
                    raise InvalidInput(
                        f"item {task.items[number].id} of {task.name} has the scores "
                        f"{found[number]}: the model gives logits that are not finite; a wider "
                        "dtype may help"
                    )
            if progress is not None:
                progress(len(found), len(pairs))
    return ChoiceScores(
        task.name,
        task.source,
        tuple(item.id for item in task.items),
        tuple(item.answer for item in task.items),
        tuple(tuple(found[number]) for number in range(len(pairs))),
        tuple(tuple(len(pair.targets) for pair in of_item) for of_item in pairs),
        tuple(
            tuple(len(text.removeprefix(" ")) or 1 for text in item.continuations)
            for item in task.items
        ),
        rule,
        run.shares,
        seed,
    )


def _known(rule: str) -> str:
    if rule not in RULES:
        raise InvalidInput(f"unknown rule {rule!r}: expected one of {', '.join(RULES)}")
    return rule


__all__ = ["BATCH", "RULES", "ChoiceComparison", "ChoiceScores", "score_choices"]
