"""The data of the studies: from a folder, or from Hugging Face data sets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from swkernels.detect.text import dataset_rows, read_text
from swkernels.errors import InvalidInput
from swkernels.evidence.tasks import Task, read_task

# Of each part: its names in a folder, the first that is there, and the Hugging Face data set.
TEXT = "text"
PARTS = {
    TEXT: (
        ("wikitext2/wiki.test.raw", "wiki.test.raw", "text.txt"),
        "Salesforce/wikitext:wikitext-2-raw-v1@test",
    ),
    "arc/train": (
        ("arc/ARC-Easy-Train.jsonl", "ARC-Easy-Train.jsonl", "arc/train.jsonl"),
        "allenai/ai2_arc:ARC-Easy@train",
    ),
    "arc/dev": (
        ("arc/ARC-Easy-Dev.jsonl", "ARC-Easy-Dev.jsonl", "arc/dev.jsonl"),
        "allenai/ai2_arc:ARC-Easy@validation",
    ),
    "arc/test": (
        ("arc/ARC-Easy-Test.jsonl", "ARC-Easy-Test.jsonl", "arc/test.jsonl"),
        "allenai/ai2_arc:ARC-Easy@test",
    ),
    "winogrande/train": (
        (
            "winogrande/train_s.jsonl",
            "winogrande/train_m.jsonl",
            "winogrande/train_xs.jsonl",
            "winogrande/train.jsonl",
        ),
        "allenai/winogrande:winogrande_s@train",
    ),
    "winogrande/dev": (
        ("winogrande/held_out.jsonl", "winogrande/train_m.jsonl", "winogrande/train_l.jsonl"),
        "allenai/winogrande:winogrande_m@train",
    ),
    "winogrande/test": (
        ("winogrande/dev.jsonl", "winogrande.jsonl", "winogrande/test.jsonl"),
        "allenai/winogrande:winogrande_xl@validation",
    ),
}
# Winogrande publishes no third set with answers, but training sets that hold each other: what a
# larger one has beside the one that is trained on is held out.
LESS = {"winogrande/dev": "winogrande/train"}
NAMES = {"arc/test": "ARC-Easy", "winogrande/test": "Winogrande"}


@dataclass
class Data:
    """The parts that studies need, each read once.

    Attributes:
        folder: where they are; None takes the Hugging Face data sets.
    """

    folder: Path | None = None
    _read: dict[str, object] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        if self.folder is not None and not self.folder.is_dir():
            raise InvalidInput(f"expected a folder with the data of the studies: {self.folder}")

    def check(self, parts: Iterable[str]) -> None:
        """Read what a study needs, before anything long begins.

        Raises:
            InvalidInput: a file that is not there or holds something else, with its line.
        """
        for part in parts:
            if part == TEXT:
                _ = self.text
            else:
                self.task(part)

    @cached_property
    def text(self) -> str:
        """The text whose perplexity is measured."""
        source = self._source(TEXT)
        if isinstance(source, Path):
            return read_text(source)
        name, _, split = source.partition("@")
        rows = dataset_rows(name, split, "a folder with it (--data)")
        if not all(isinstance(row.get("text"), str) for row in rows):
            raise InvalidInput(f"the data set {source} has no column of strings named text")
        if not any(row["text"].strip() for row in rows):
            raise InvalidInput(f"the data set {source} holds no text")
        return "".join(row["text"] or " \n" for row in rows)  # blank lines are empty there

    def task(self, part: str, limit: int | None = None) -> Task:
        """The questions of "arc/test" and its like, the first ``limit``."""
        if part not in self._read:
            found = read_task(self._source(part), name=NAMES.get(part, part))
            self._read[part] = self._less(found, LESS[part]) if part in LESS else found
        task = self._read[part]
        return Task(task.name, task.items[:limit], task.source)

    def digest(self, part: str) -> str:
        """16 hexadecimal digits of what a part holds."""
        content = self.text if part == TEXT else repr(self.task(part).items)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def _less(self, task: Task, part: str) -> Task:
        """``task`` without the questions of another part."""
        asked = lambda item: (item.contexts, item.continuations)  # noqa: E731
        taken = {asked(item) for item in self.task(part).items}
        items = tuple(item for item in task.items if asked(item) not in taken)
        if not items:
            raise InvalidInput(
                f"every question of {task.source} is in {self.task(part).source}, which is trained "
                "on: put a larger set, or one of other questions, beside it"
            )
        return Task(task.name, items, task.source)

    def _source(self, part: str) -> Path | str:
        names, dataset = PARTS[part]
        if self.folder is None:
            return dataset
        found = [self.folder / name for name in names if (self.folder / name).is_file()]
        if found:
            trained_on = self._source(LESS[part]) if part in LESS else None
            return next((path for path in found if path != trained_on), found[0])
        raise InvalidInput(
            f"{self.folder} has no {names[0]} (nor {', '.join(names[1:])}): put it there, or "
            f"leave out --data to take {dataset} of Hugging Face"
        )
