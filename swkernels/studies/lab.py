"""What the runs of a folder share: the model, the data, the super weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from swkernels.detect.perplexity import tokens_of, window_of
from swkernels.errors import InvalidInput
from swkernels.evidence.results import Progress, silent
from swkernels.evidence.yardstick import Yardstick
from swkernels.train import Coordinates

from .book import Book
from .data import TEXT, Data
from .run import Run

DETECT = Run("detect", {"samples": 4, "length": 512})


class NotInModel(InvalidInput):
    """The model has not what a run is about; other runs can be made."""


@dataclass
class Lab:
    """Where runs are performed.

    Attributes:
        load: returns a new copy of the model in eval mode, for a run that trains it.
        data: what is measured and trained on.
        book: the runs that are done.
        work: a folder for what an interrupted run goes on from.
        model: as it was published: whoever changes it puts it back.
        tokenizer: of the model.
        given: super weights; None lets a scan find them.
        progress: called with (stage, done, total).
        name: of the model, as it was loaded: what the catalogue may know it by.
    """

    load: Callable[[], nn.Module]
    data: Data
    book: Book
    work: Path
    model: nn.Module
    tokenizer: object
    given: Coordinates | None = None
    progress: Progress = silent
    name: str = ""
    _tokens: dict[int | None, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    def figures(self, run: Run | str) -> dict:
        """What a run, or that of a key, found that the one at work needs."""
        return self.book.figures(run)

    @property
    def super_weights(self) -> Coordinates:
        """Those that were given, or detected in this model.

        Raises:
            NotInModel: there are none.
        """
        if self.given is not None:
            return self.given
        listed = self.figures(DETECT)["super_weights"]
        if not listed:
            raise NotInModel(
                "no super weight was found in this model: name some with --super-weights"
            )
        weights: dict = {}
        for entry in listed:
            place = (entry["module"], entry["expert"])
            weights.setdefault(place, []).append((entry["row"], entry["column"]))
        return Coordinates.of(weights, self.model)

    def top(self, k: int) -> Coordinates:
        """The super weights and, up to k in all, the largest magnitudes of the down projections.

        The published studies take the k largest magnitudes; a super weight need not be among them.
        """
        chosen = self.super_weights
        if len(chosen) >= k:
            raise NotInModel(f"there are {len(chosen)} super weights, expected fewer than {k}")
        count = k
        while True:
            found = chosen | Coordinates.from_magnitude(self.model, count)
            if len(found) == k:
                return found
            count -= len(found) - k  # one less adds one less at most: k is not passed

    def tokens(self, most: int | None) -> torch.Tensor:
        """The first ``most`` tokens of the text, int64 [N]; None takes all."""
        if most not in self._tokens:  # a long text takes seconds, and every run asks
            self._tokens[most] = tokens_of(self.data.text, self.tokenizer, most)
        return self._tokens[most]

    def yardstick(
        self,
        *,
        tokens: int | None = None,
        window: int | None = None,
        tasks: dict[str, int | None] | None = None,
        stop_words=(),
    ) -> Yardstick:
        """By the text, where there is a window (no more than the model takes), and by tasks."""
        return Yardstick(
            None if window is None else self.tokens(tokens),
            None if window is None else min(window, window_of(self.model)),
            tasks=[
                replace(self.data.task(part, limit), source=part)  # a record holds no local path
                for part, limit in (tasks or {}).items()
            ],
            tokenizer=self.tokenizer,
            stop_words=stop_words,
            source=TEXT,
        )
