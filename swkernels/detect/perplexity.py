"""Perplexity of a language model on a text, as WikiText-2 is usually measured.

The text is one stream of tokens, with the special tokens that the tokenizer adds to it, once. It is
cut into windows of 2,048 tokens (or what the model takes), and each window is run by itself. The
first token of a window is not predicted: nothing stands before it. With a ``stride`` shorter than
the window, windows overlap, and each predicts only the tokens that no window before it has: every
token but the first, with more context for the same text.

With a ``prefix`` the windows are those of lm-eval's rolling log-likelihood: every token of the text
is predicted, the first one from the prefix. The first window predicts as many tokens as it holds,
each one after it the next ``stride``, and all of them read a whole window, so that the last one
reaches back (``get_rolling_token_windows`` in lm_eval/utils.py, with ``context_len`` = window -
stride + 1).
"""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from swkernels.errors import InvalidInput

from .evaluate import exp
from .samples import Runner, check_vocabulary, evaluating, most_positions
from .text import make_samples

WINDOW = 2048
# Logits that are looked at together: what is made of them should stay in a CPU's cache, and on a
# GPU be more than a launch costs.
_LOGITS = {"cpu": 1 << 20}
_MOST_LOGITS = 1 << 24


@dataclass(frozen=True)
class Perplexity:
    """A model's loss on a text.

    Attributes:
        losses: summed next-token loss of each window, in nats.
        tokens: predicted tokens of each window.
        window, stride, prefix: how the text was cut.
    """

    losses: tuple[float, ...]
    tokens: tuple[int, ...]
    window: int
    stride: int
    prefix: int | None = None

    @property
    def loss(self) -> float:
        """Mean over all predicted tokens, in nats."""
        return sum(self.losses) / sum(self.tokens)

    @property
    def value(self) -> float:
        """The perplexity, exp(loss)."""
        return exp(self.loss)

    @property
    def not_finite(self) -> int:
        """Windows whose loss is NaN or infinite; ``value`` is NaN or infinite then, too."""
        return sum(not math.isfinite(loss) for loss in self.losses)

    @property
    def error(self) -> float | None:
        """Standard error of ``value`` over windows; None where there is only one."""
        return _standard_error(self.value, self.losses, self.tokens)

    def ratio(self, other: Perplexity) -> tuple[float, float | None]:
        """``value`` over that of ``other`` on the same windows, and its standard error or None.

        Both models find the same windows easy or hard, so the error of the ratio is taken from
        the differences within windows and is far smaller than those of the two values.

        Raises:
            InvalidInput: they were not measured on the same windows.
        """
        cuts = [(p.tokens, p.window, p.stride, p.prefix) for p in (self, other)]
        if cuts[0] != cuts[1]:
            raise InvalidInput(
                "perplexities of different windows cannot be compared: measure both on one text "
                "with one window, stride and prefix"
            )
        differences = [a - b for a, b in zip(self.losses, other.losses)]
        value = exp(sum(differences) / sum(self.tokens))
        return value, _standard_error(value, differences, self.tokens)

    def of_text(self, text: str) -> dict[str, float]:
        """The loss by words and bytes, which tokenizers share, as lm-eval's wikitext counts them.

        Args:
            text: that of the tokens, all of it.

        Returns:
            ``word_perplexity`` and ``byte_perplexity``, exp(summed loss / words or bytes), and
            ``bits_per_byte``. Words are what white space parts, bytes those of UTF-8.

        Raises:
            InvalidInput: it was measured without a prefix, which leaves a token out.
        """
        if self.prefix is None:
            raise InvalidInput(
                "words and bytes need a loss of every token of the text: measure with a prefix"
            )
        loss, size = sum(self.losses), len(text.encode())
        return {
            "word_perplexity": exp(loss / len(re.split(r"\s+", text))),
            "byte_perplexity": exp(loss / size),
            "bits_per_byte": loss / size / math.log(2),
        }

    def to_dict(self) -> dict:
        """What it holds and what follows from it, for JSON."""
        return {"perplexity": self.value, "error": self.error, "loss": self.loss, **asdict(self)}


def perplexity(
    model: nn.Module,
    tokens: torch.Tensor,
    *,
    window: int | None = None,
    stride: int | None = None,
    prefix: int | None = None,
    batch_size: int = 1,
    observe: Callable[[torch.Tensor], None] | None = None,
    strict: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Measure the perplexity of ``model`` on a stream of tokens.

    Args:
        model: a decoder, of Hugging Face's kind or one that maps ids [B, S] to logits [B, S, V];
            run in eval mode, and given back as it was.
        tokens: integers [N], N >= 2 (with a prefix, 1); see ``tokens_of``.
        window: tokens of a window, at least 2; None: 2,048, or the model's positions if fewer.
        stride: tokens from one window's start to the next's, at most ``window``; None: ``window``.
        prefix: a token to put before the text and predict its first token from, as lm-eval does;
            see ``prefix_of``. None: the first token is not predicted.
        batch_size: windows that run together. It changes the result by rounding at most.
        observe: called with the logits [count, V] of each window's predicted tokens, in order.
        strict: a loss that is not finite is an error; else it is in the result as it is.
        progress: called with (windows done, windows).

    Raises:
        InvalidInput: an argument that is not as above, a token outside the vocabulary, a window
            beyond the model's positions, an encoder-decoder, or a loss that is not finite.
    """
    tokens = _checked(tokens, 2 if prefix is None else 1)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise InvalidInput(
            f"{type(model).__name__} is an encoder and a decoder, which predict no text that goes "
            "on: perplexity needs a decoder"
        )
    window = window_of(model, window)
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise InvalidInput(f"stride must be from 1 to the window of {window}, got {stride}")
    if batch_size < 1:
        raise InvalidInput(f"batch_size must be at least 1, got {batch_size}")
    if prefix is None:
        windows = _windows(len(tokens), window, stride)
    elif not isinstance(prefix, int):
        raise InvalidInput(f"prefix must be a token's id, got {type(prefix).__name__}")
    else:
        windows = _rolling(len(tokens), window, stride)
        tokens = torch.cat([torch.tensor([prefix]), tokens])
    check_vocabulary(model, [tokens])
    runner = Runner(model)
    losses: list[float] = []
    with evaluating(model):
        for part in _batches(windows, batch_size):
            ids = torch.stack([tokens[w.start : w.end] for w in part])  # [B, S]
            logits = runner.logits(ids, last=max(w.last for w in part))  # [B, at most S, V]
            for row, w in zip(logits, part):
                predicted = row[len(row) - w.last :][: w.count]  # [count, V]
                losses.append(_summed_loss(predicted, tokens[w.first : w.first + w.count]))
                if observe is not None:
                    observe(predicted)
                if strict and not math.isfinite(losses[-1]):
                    raise InvalidInput(
                        f"the loss of window {len(losses) - 1} is {losses[-1]}: the model gives "
                        "logits that are not finite; a wider dtype may help"
                    )
            if progress is not None:
                progress(len(losses), len(windows))
    counts = tuple(w.count for w in windows)
    return Perplexity(tuple(losses), counts, window, stride, prefix)


def tokens_of(text: str, tokenizer, most: int | None = None) -> torch.Tensor:
    """Return the tokens of a text, int64 [N], at most ``most`` of them.

    Raises:
        InvalidInput: fewer than 2.
    """
    if most is not None and most < 2:
        raise InvalidInput(f"the number of tokens must be at least 2, got {most}")
    length = sys.maxsize if most is None else most
    [tokens] = make_samples(text, tokenizer, samples=1, length=length, special_tokens="tokenizer")
    if len(tokens) < 2:
        raise InvalidInput("the text is shorter than 2 tokens: give a longer text")
    return tokens


def prefix_of(tokenizer) -> int:
    """Return the token that lm-eval puts before a text: BOS, or EOS where there is no BOS.

    Raises:
        InvalidInput: the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise InvalidInput(
        "the tokenizer has neither a BOS nor an EOS token, from which to predict the first token "
        "of the text: measure without a prefix"
    )


def window_of(model: nn.Module, window: int | None = None) -> int:
    """Return the window to use; see ``perplexity``.

    Raises:
        InvalidInput: shorter than 2, or beyond the model's positions.
    """
    positions = most_positions(model)
    if window is None:
        return min(WINDOW, positions or WINDOW)
    if window < 2:
        raise InvalidInput(f"the window must be at least 2 tokens, got {window}")
    if positions is not None and window > positions:
        raise InvalidInput(
            f"a window of {window} tokens does not fit the {positions} positions of "
            f"{type(model).__name__}: give a window of {positions} or less"
        )
    return window


def _checked(tokens: torch.Tensor, least: int) -> torch.Tensor:
    if (
        not isinstance(tokens, torch.Tensor)
        or tokens.dim() != 1
        or tokens.is_floating_point()
        or tokens.dtype == torch.bool
        or len(tokens) < least
    ):
        given = isinstance(tokens, torch.Tensor)
        what = f"{tokens.dtype} {list(tokens.shape)}" if given else type(tokens).__name__
        raise InvalidInput(f"tokens must be integers [N], N >= {least}, got {what}")
    return tokens.long().cpu()


class _Window(NamedTuple):
    """Tokens [start, end) are read, the ``count`` from ``first`` on are predicted."""

    start: int
    end: int
    first: int
    count: int

    @property
    def last(self) -> int:
        """The logits from the one that predicts ``first`` to the end of the window."""
        return self.end - self.first + 1


def _windows(size: int, window: int, stride: int) -> list[_Window]:
    """Windows of ``size`` tokens."""
    windows, seen = [], 0
    for start in range(0, size, stride):
        end = min(start + window, size)
        if count := end - max(seen, start + 1):
            windows.append(_Window(start, end, end - count, count))
        seen = end
        if end == size:
            break
    return windows


def _rolling(size: int, window: int, stride: int) -> list[_Window]:
    """Windows of a prefix and ``size`` tokens: all of them are predicted, and the prefix is not."""
    end = min(window, size)
    windows = [_Window(0, end, 1, end)]
    while end < size:
        count = min(stride, size - end)
        end += count
        windows.append(_Window(end - window, end, end - count + 1, count))
    return windows


def _batches(windows: list[_Window], size: int) -> list[list[_Window]]:
    """At most ``size`` windows each, all of one length: the last window may be shorter."""
    batches: list[list[_Window]] = []
    for _, alike in itertools.groupby(windows, key=lambda w: w.end - w.start):
        alike = list(alike)
        batches += [alike[first : first + size] for first in range(0, len(alike), size)]
    return batches


def rows_together(logits: torch.Tensor) -> int:
    """How many rows of logits [S, V] are best looked at together."""
    return max(1, _LOGITS.get(logits.device.type, _MOST_LOGITS) // logits.shape[1])


def _summed_loss(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Summed loss in nats of targets [S] under logits [S, V]."""
    rows = rows_together(logits)
    parts = zip(logits.split(rows), targets.to(logits.device).split(rows))
    losses = [F.cross_entropy(row.float(), target, reduction="none") for row, target in parts]
    return float(torch.cat(losses).double().sum())


def _standard_error(value: float, sums: Sequence[float], counts: Sequence[int]) -> float | None:
    """Of ``value`` = exp(sum(sums) / sum(counts)), over windows of unequal size (delta method)."""
    n = len(sums)
    if n < 2:
        return None
    mean = sum(sums) / sum(counts)
    squares = sum((total - mean * count) ** 2 for total, count in zip(sums, counts))
    return value * math.sqrt(n / (n - 1) * squares) / sum(counts)
