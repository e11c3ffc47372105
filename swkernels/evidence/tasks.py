"""Multiple choice: from files and data sets to items, with the prompts of EleutherAI's lm-eval."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from swkernels.detect.text import dataset_rows, reading
from swkernels.errors import InvalidInput

_SPLIT = "validation"
_FORMS = (
    'ARC {"question": ..., "choices": ..., "answerKey": ...}, Winogrande {"sentence": ..., '
    '"option1": ..., "option2": ..., "answer": "1"} or {"context": ..., "choices": [...], '
    '"answer": 0}'
)


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: its name in the source, or "line N".
        contexts: what the model reads: one for all choices, or one for each.
        continuations: what is scored after it, one for each choice, with the space before it.
        answer: which choice is right, from 0.
    """

    id: str
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    answer: int

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Context and continuation of each choice."""
        shared = len(self.contexts) == 1
        contexts = self.contexts * len(self.continuations) if shared else self.contexts
        return list(zip(contexts, self.continuations))


@dataclass(frozen=True)
class Task:
    """Items under one name.

    Attributes:
        name: for reports; unique among the tasks of a run.
        items: in the order of the source.
        source: the file or the data set.
    """

    name: str
    items: tuple[Item, ...]
    source: str


def read_task(source: str | Path, *, limit: int | None = None, name: str | None = None) -> Task:
    """Read multiple choice from a file of JSON lines or a Hugging Face data set.

    The form of each line is told from its fields: ARC as AI2 publishes it or as it is on the Hub,
    Winogrande, or {"context": str, "choices": [str, ...], "answer": index from 0} with an optional
    "id". The prompts are those of lm-eval's arc_easy and winogrande: "Question: ...\\nAnswer:"
    before each choice; and, for Winogrande, the sentence up to the gap with each option, before
    the rest of the sentence. A space stands between a context and a continuation.

    Args:
        source: a .jsonl file (blank lines are skipped), or NAME, NAME:CONFIGURATION or either with
            @SPLIT behind it (by default @validation; needs the library datasets).
        limit: read the first ``limit`` items only.
        name: of the task; None: the file's name without its suffix, or the data set as given.

    Raises:
        InvalidInput: a source that is not there or holds no item, or, with file and line, JSON
            that is none, a field that is missing or of another kind, an answer that is no choice,
            fewer than two choices, or a sentence without a gap.
    """
    if limit is not None and limit < 1:
        raise InvalidInput(f"limit must be at least 1 item, got {limit}")
    path = Path(source).expanduser()
    if path.suffix.lower() == ".jsonl":
        rows, called = _lines(path), path.stem
    elif path.exists():
        raise InvalidInput(f"{source}: expected a .jsonl file or a Hugging Face data set")
    else:
        rows, called = _hugging_face(str(source)), str(source)
    items = tuple(_item(where, row, number) for where, number, row in itertools.islice(rows, limit))
    if not items:
        raise InvalidInput(f"{source} holds no item: expected one JSON object a line")
    return Task(called if name is None else name, items, str(source))


def _lines(path: Path) -> Iterator[tuple[str, int, object]]:
    """Where it is (for errors), line number and object of each line that is not blank."""
    with reading(path, "task", "a .jsonl file"), path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InvalidInput(f"{where}: not JSON ({error}): mend the line") from error
            yield where, number, row


def _hugging_face(source: str) -> Iterator[tuple[str, int, object]]:
    name, _, split = source.partition("@")
    for number, row in enumerate(dataset_rows(name, split or _SPLIT, "a .jsonl file"), 1):
        yield f"{source}, row {number}", number, row


def _item(where: str, row: object, number: int) -> Item:
    fields = row if isinstance(row, dict) else {}
    if "answerKey" in fields or "question" in fields:
        name, read = "id", _arc
    elif "sentence" in fields:
        name, read = "qID", _winogrande
    elif "context" in fields:
        name, read = "id", _plain
    else:
        raise InvalidInput(f"{where}: expected {_FORMS}, got {str(row)!r:.80}")
    contexts, choices, answer = read(where, fields)
    if len(choices) < 2:
        raise InvalidInput(f"{where}: expected 2 choices at least, got {len(choices)}")
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise InvalidInput(f"{where}: expected choices that are strings and not empty")
    continuations = tuple(f" {choice}" for choice in choices)
    return Item(str(fields.get(name, f"line {number}")), contexts, continuations, answer)


def _arc(where: str, row: dict) -> tuple[tuple[str, ...], list, int]:
    question = row.get("question")
    if isinstance(question, dict):  # as AI2 publishes it
        stem, listed = question.get("stem"), question.get("choices")
        rows = listed if isinstance(listed, list) else [None]
        held = all(isinstance(choice, dict) for choice in rows)
        texts = [choice.get("text") for choice in rows] if held else None
        labels = [choice.get("label") for choice in rows] if held else None
    else:  # as on the Hub
        stem, listed = question, row.get("choices")
        held = isinstance(listed, dict)
        texts, labels = (listed.get("text"), listed.get("label")) if held else (None, None)
    for field, value, kind in (
        ("question", stem, str),
        ("choices with text", texts, list),
        ("choices with label", labels, list),
        ("answerKey", row.get("answerKey"), str),
    ):
        if not isinstance(value, kind):
            raise InvalidInput(f"{where}: {field} is missing or no {kind.__name__}")
    if len(texts) != len(labels):
        raise InvalidInput(f"{where}: {len(texts)} choices have {len(labels)} labels")
    if row["answerKey"] not in labels:
        raise InvalidInput(
            f"{where}: answerKey {row['answerKey']!r} is none of the labels {labels}"
        )
    return (f"Question: {stem}\nAnswer:",), texts, labels.index(row["answerKey"])


def _winogrande(where: str, row: dict) -> tuple[tuple[str, ...], list, int]:
    for field in ("sentence", "option1", "option2", "answer"):
        if not isinstance(row.get(field), str) or not row[field]:
            raise InvalidInput(f"{where}: {field} is missing or no string")
    before, gap, rest = row["sentence"].partition("_")
    if not gap or not rest.strip():
        raise InvalidInput(f'{where}: expected a sentence with a "_" and words behind it')
    if row["answer"] not in ("1", "2"):
        raise InvalidInput(f'{where}: expected the answer "1" or "2", got {row["answer"]!r}')
    contexts = before + row["option1"], before + row["option2"]
    return contexts, [rest.strip()] * 2, int(row["answer"]) - 1


def _plain(where: str, row: dict) -> tuple[tuple[str, ...], list, int]:
    context, choices, answer = row["context"], row.get("choices"), row.get("answer")
    for field, value, kind in (
        ("context", context, str),
        ("choices", choices, list),
        ("answer", answer, int),
    ):
        if not isinstance(value, kind) or isinstance(value, bool):
            raise InvalidInput(f"{where}: {field} is missing or no {kind.__name__}")
    if not 0 <= answer < len(choices):
        raise InvalidInput(
            f"{where}: answer {answer} is none of the choices 0 to {len(choices) - 1}"
        )
    return (context,), choices, answer


__all__ = ["Item", "Task", "read_task"]
