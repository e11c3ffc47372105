"""How likely a model holds stop words to be: the next-token probability of each, averaged.

Yu et al., "The Super Weight in Large Language Models", figure 5: once the super weight is gone,
"the" is about 2 times, "." 5 times and "," 10 times as likely, averaged over 500 prompts. Here the
average is over all predictions of a text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from swkernels.detect.perplexity import rows_together
from swkernels.errors import InvalidInput

STOP_WORDS = (
    "the", ".", ",", "and", "a", "to", "of", "in", "is", "was", "for", "on", "that", "it", "as",
    "with", "by", "at", "from", "but",
)  # fmt: skip

_BEFORE = ("it", "him", "1")  # what may stand before a word, so that it is written as inside a text


@dataclass(frozen=True)
class StopWords:
    """Mean next-token probability of some words.

    Attributes:
        words: those that are one token.
        probabilities: of each word, the mean over all predictions; NaN once one of them is NaN.
        predictions: how many were averaged.
        left_out: words that were asked for and are not one token.
        windows: of each window of the text, of each word, the probabilities summed over its
            predictions: how much they vary says how sure a ratio is.
    """

    words: tuple[str, ...]
    probabilities: tuple[float, ...]
    predictions: int
    left_out: tuple[str, ...] = ()
    windows: tuple[tuple[float, ...], ...] = ()

    @property
    def mean(self) -> float:
        """Mean over the words."""
        return sum(self.probabilities) / len(self.words)

    def ratios(self, other: StopWords) -> dict[str, float]:
        """Of each word the probability here over that in ``other``; NaN where that is zero.

        Raises:
            InvalidInput: they are of different words.
        """
        if self.words != other.words:
            raise InvalidInput("stop words of different tokenizers cannot be compared")
        pairs = zip(self.probabilities, other.probabilities)
        return {
            word: ours / theirs if theirs else float("nan")
            for word, (ours, theirs) in zip(self.words, pairs)
        }

    def to_dict(self) -> dict:
        """What it holds, for JSON."""
        return {
            "mean": self.mean,
            "predictions": self.predictions,
            "probabilities": dict(zip(self.words, self.probabilities)),
            "left_out": list(self.left_out),
            "windows": [list(sums) for sums in self.windows],
        }


class StopWordMeter:
    """Averages the probability of stop words over logits that pass by; see ``StopWords``.

    Args:
        tokenizer: of the model, of Hugging Face's kind.
        words: a word is looked up as the tokenizer writes it inside a text, with a space before
            it if it begins with a letter or a digit. Words that are not one token are left out.

    Attributes:
        tokens: of each word that is one token, its id.
        left_out: the other words.

    Raises:
        InvalidInput: no word is one token.
    """

    def __init__(self, tokenizer, words: Iterable[str] = STOP_WORDS):
        found = {word: _token(tokenizer, word) for word in words}
        self.tokens = {word: token for word, token in found.items() if token is not None}
        self.left_out = tuple(word for word, token in found.items() if token is None)
        if not self.tokens:
            raise InvalidInput(
                f"no stop word is one token of {type(tokenizer).__name__}, of "
                f"{' '.join(found)!r:.100}: name words that are, or measure none"
            )
        self._windows: list[torch.Tensor] = []  # of each call, float64 [words]
        self._predictions = 0

    def __call__(self, logits: torch.Tensor) -> None:
        """Add the predictions of a window, logits [count, V].

        Raises:
            InvalidInput: a word's token is outside the vocabulary.
        """
        ids = torch.tensor(list(self.tokens.values()), device=logits.device)
        if int(ids.max()) >= logits.shape[-1]:
            raise InvalidInput(
                f"token id {int(ids.max())} is outside the model's vocabulary of "
                f"{logits.shape[-1]}: use the tokenizer that belongs to the model"
            )
        sums = torch.zeros(len(ids), dtype=torch.float64)
        for rows in logits.split(rows_together(logits)):
            rows = rows.float()
            chosen = rows[:, ids].double() - rows.logsumexp(-1, keepdim=True).double()
            sums += chosen.exp().sum(0).cpu()
        self._windows.append(sums)
        self._predictions += len(logits)

    def result(self) -> StopWords:
        """What was measured so far.

        Raises:
            InvalidInput: nothing was.
        """
        if not self._predictions:
            raise InvalidInput("no prediction was measured: call the meter with logits first")
        sums = torch.stack(self._windows)  # [windows, words]
        means = sums.sum(0) / self._predictions
        windows = tuple(map(tuple, sums.tolist()))
        return StopWords(
            tuple(self.tokens), tuple(means.tolist()), self._predictions, self.left_out, windows
        )


def _token(tokenizer, word: str) -> int | None:
    """The id of ``word`` behind another word, or None if it is not one token there."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    inside = f" {word}" if word[:1].isalnum() else word
    for before in _BEFORE:
        alone, both = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (before, before + inside)
        )
        if both[:-1] == list(alone) and both[-1] != unknown:
            return both[-1]
    return None


__all__ = ["STOP_WORDS", "StopWordMeter", "StopWords"]
