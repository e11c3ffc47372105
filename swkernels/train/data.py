"""Text for training: token sequences with the labels that count."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from swkernels.detect.text import read_dataset, read_text
from swkernels.errors import InvalidInput

_IGNORED = -100  # a label that no loss counts


class Example(NamedTuple):
    """One sequence.

    Attributes:
        ids: int64 [S], tokens.
        labels: int64 [S], the tokens whose prediction counts, -100 elsewhere.
    """

    ids: torch.Tensor
    labels: torch.Tensor


class Source(NamedTuple):
    """A data set that was read; one of the two lists is None.

    Attributes:
        name: where it came from.
        texts: to be joined and cut into blocks.
        pairs: line in the file, prompt and completion.
    """

    name: str
    texts: list[str] | None
    pairs: list[tuple[int, str, str]] | None


def read_examples(source: str | Path | Source, tokenizer, length: int) -> list[Example]:
    """Read a data set and cut it into sequences of at most ``length`` tokens.

    Args:
        source: a .txt file, or a .jsonl file of objects with a "text", or a Hugging Face data set:
            texts are joined, each ended by EOS, and cut into blocks. Or a .jsonl file of objects
            with a "prompt" and a "completion": one sequence each, in which the completion counts.
            Or what ``read_source`` returned.
        tokenizer: of Hugging Face's kind.
        length: tokens of a sequence, at least 2.

    Raises:
        InvalidInput: not there, unreadable, or too short to hold one prediction.
    """
    if length < 2:
        raise InvalidInput(f"the length must be at least 2 tokens, got {length}")
    name, texts, pairs = source if isinstance(source, Source) else read_source(source)
    if pairs is not None:
        return [_of_pair(name, *pair, tokenizer, length) for pair in pairs]
    stream: list[int] = []
    for text in texts:
        if text.strip():
            stream += _ended(list(tokenizer(text, verbose=False)["input_ids"]), tokenizer)
    blocks = [torch.tensor(stream[i : i + length]) for i in range(0, len(stream), length)]
    examples = [Example(block, block) for block in blocks if len(block) > 1]
    if not examples:
        raise InvalidInput(f"{name} is shorter than 2 tokens: give a longer text")
    return examples


def read_source(source: str | Path) -> Source:
    """Read a data set without its tokens: what is wrong with it is known before a model is loaded.

    Raises:
        InvalidInput: not there, unreadable, or without text.
    """
    pairs = _pairs(source)
    texts = read_dataset(str(source)) if pairs is None else None
    return Source(str(source), texts, pairs)


def collate(examples: Sequence[Example], device: torch.device) -> dict[str, torch.Tensor]:
    """Pad sequences at the right to a batch: input_ids, attention_mask and labels, [B, S]."""
    width = max(len(example.ids) for example in examples)
    batch = {
        "input_ids": torch.zeros(len(examples), width, dtype=torch.int64),
        "attention_mask": torch.zeros(len(examples), width, dtype=torch.int64),
        "labels": torch.full((len(examples), width), _IGNORED),
    }
    for row, (ids, labels) in enumerate(examples):
        batch["input_ids"][row, : len(ids)] = ids
        batch["attention_mask"][row, : len(ids)] = 1
        batch["labels"][row, : len(ids)] = labels
    return {name: tensor.to(device) for name, tensor in batch.items()}


def predictions(examples: Sequence[Example]) -> int:
    """How many predicted tokens count; nothing predicts the first of a sequence."""
    return sum(int((example.labels[1:] != _IGNORED).sum()) for example in examples)


def first_prediction(examples: Sequence[Example]) -> int:
    """The first place of a batch that predicts a token that counts; 0 where none does."""
    found = [(example.labels[1:] != _IGNORED).nonzero() for example in examples]
    return min((int(places[0]) for places in found if len(places)), default=0)


def _pairs(source: str | Path) -> list[tuple[int, str, str]] | None:
    """Line, prompt and completion of each object; None where the file has texts."""
    if Path(source).suffix.lower() != ".jsonl":
        return None
    lines = [(n, line) for n, line in enumerate(read_text(source).split("\n"), 1) if line.strip()]
    pairs = []
    for number, line in lines:
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not pairs and not (isinstance(found, dict) and "completion" in found):
            return None  # texts, or an error that their reader names
        found = found if isinstance(found, dict) else {}
        pair = found.get("prompt"), found.get("completion")
        if not all(isinstance(part, str) for part in pair) or not pair[1]:
            raise InvalidInput(
                f'{source}, line {number}: expected an object with the strings "prompt" and '
                '"completion", which is not empty'
            )
        pairs.append((number, *pair))
    return pairs


def _of_pair(source, line: int, prompt: str, completion: str, tokenizer, length: int) -> Example:
    before = list(tokenizer(prompt, verbose=False)["input_ids"])
    after = tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.tensor((before + _ended(list(after), tokenizer))[:length])
    labels = ids.clone()
    labels[: len(before)] = _IGNORED
    example = Example(ids, labels)
    if not predictions([example]):
        raise InvalidInput(
            f"{source}, line {line}: no token of the completion is left within {length} tokens: "
            "give a larger length or a shorter prompt"
        )
    return example


def _ended(ids: list[int], tokenizer) -> list[int]:
    eos = tokenizer.eos_token_id
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]
