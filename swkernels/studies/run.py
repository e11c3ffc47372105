"""One run of a study: what was done, by a configuration that says all of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Run:
    """Something to measure once; studies that need the same run share it.

    Attributes:
        kind: a key of ``kinds.KINDS``: which function performs it.
        config: everything that its figures depend on beside the model and the data, as JSON has
            it; the seed under ``"seed"`` where there is one.
        needs: runs whose figures it reads.
    """

    kind: str
    config: Mapping
    needs: tuple[Run, ...] = ()

    @cached_property
    def key(self) -> str:
        """16 hexadecimal digits that tell it from every other run."""
        what = [self.kind, self.config, [run.key for run in self.needs]]
        text = json.dumps(what, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Run) and other.key == self.key


def in_order(runs: Iterable[Run]) -> list[Run]:
    """Each run once, what it needs before it."""
    found: dict[Run, None] = {}

    def add(run: Run) -> None:
        for needed in run.needs:
            add(needed)
        found.setdefault(run)

    for run in runs:
        add(run)
    return list(found)
