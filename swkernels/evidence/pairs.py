"""Context and continuation as token sequences, split as EleutherAI's lm-eval splits them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from swkernels.detect.samples import most_positions
from swkernels.errors import InvalidInput

from .tasks import Item, Task

_PROBE = "a"


class Pair(NamedTuple):
    """What the model reads for one choice, and what it is scored on.

    Attributes:
        inputs: token ids [S]: context and continuation without the last token.
        targets: token ids [N], N <= S: the continuation, predicted at the last N of the inputs.
    """

    inputs: list[int]
    targets: list[int]

    @property
    def first(self) -> int:
        """The first place of the inputs whose prediction is scored."""
        return len(self.inputs) - len(self.targets)


def encode(model: nn.Module, tokenizer, task: Task) -> list[list[Pair]]:
    """Return the pairs of each item, one a choice.

    As lm-eval's ``HFLM`` makes them for a causal model: spaces at the end of a context move to the
    continuation; the continuation's tokens are those of the whole that come after as many as the
    context alone has; special tokens are those that the tokenizer puts before a text by itself,
    none where the text begins with the BOS token; BOS (or else EOS) stands in for an empty
    context; and what is longer than the model's positions loses its beginning. What a tokenizer
    appends to a text is left out here (lm-eval would score it), and a model that names no number
    of positions gets all of the text (lm-eval cuts at the tokenizer's limit or 2,048).

    Raises:
        InvalidInput: a continuation without a token or longer than the model takes, or an empty
            context and a tokenizer with neither BOS nor EOS; the item is named.
    """
    texts = _Texts(tokenizer)
    most = most_positions(model)
    split = [[_split(pair) for pair in item.pairs] for item in task.items]
    for pairs in split:
        for context, continuation in pairs:
            texts.want(context + continuation, context)
    texts.read()
    return [
        [_pair(task, item, texts, most, *pair) for pair in pairs]
        for item, pairs in zip(task.items, split)
    ]


def shared_prefix(pairs: Sequence[Pair]) -> int:
    """How many of the first inputs all pairs have in common."""
    low, high = min(p.inputs for p in pairs), max(p.inputs for p in pairs)
    same = 0
    while same < min(len(low), len(high)) and low[same] == high[same]:
        same += 1
    return same


def _split(pair: tuple[str, str]) -> tuple[str, str]:
    """Move the spaces at the end of the context to the continuation."""
    context, continuation = pair
    bare = context.rstrip()
    return bare, context[len(bare) :] + continuation


def _pair(
    task: Task, item: Item, texts: _Texts, most: int | None, context: str, continuation: str
) -> Pair:
    where = f"item {item.id} of {task.name}"
    before = texts.ids(context) if context else []
    if before:
        targets = texts.ids(context + continuation)[len(before) :]
    elif texts.prefix is None:
        raise InvalidInput(
            f"{where} has an empty context, and the tokenizer has neither a BOS nor an EOS token "
            "to stand for it: give a context"
        )
    else:
        whole = texts.bare(context + continuation)
        before, targets = [texts.prefix], whole[whole[:1] == [texts.prefix] :]
    if not targets:
        raise InvalidInput(
            f"{where}: the continuation {continuation!r:.60} has no token of its own to score"
        )
    if most is not None and len(targets) > most:
        raise InvalidInput(
            f"{where}: a continuation of {len(targets)} tokens does not fit the {most} positions "
            "of the model: leave the item out"
        )
    whole = before + targets
    return Pair(whole[:-1] if most is None else whole[-most - 1 :][:-1], targets)


class _Texts:
    """Texts that are tokenized together, each once."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._ids: dict[str, list[int]] = {}
        prefix = tokenizer.bos_token_id
        self.prefix = tokenizer.eos_token_id if prefix is None else prefix
        whole, bare = self._encode([_PROBE])[0], self.bare(_PROBE)
        ends = range(len(whole), len(bare) - 1, -1)
        end = next((end for end in ends if whole[end - len(bare) : end] == bare), len(whole))
        self._appended = len(whole) - end

    def want(self, *texts: str) -> None:
        self._ids.update(dict.fromkeys(texts))

    def read(self) -> None:
        begun = "" if self.prefix is None else self._tokenizer.decode(self.prefix)
        plain = [text for text in self._ids if not (begun and text.startswith(begun))]
        for text, ids in zip(plain, self._encode(plain)):
            self._ids[text] = ids[: len(ids) - self._appended]
        for text in self._ids.keys() - set(plain):
            self._ids[text] = self.bare(text)

    def ids(self, text: str) -> list[int]:
        return self._ids[text]

    def bare(self, text: str) -> list[int]:
        return self._encode([text], add_special_tokens=False)[0]

    def _encode(self, texts: list[str], **options) -> list[list[int]]:
        # verbose=False: what is longer than the model's context is cut, so no warning.
        return self._tokenizer(texts, verbose=False, **options)["input_ids"] if texts else []
