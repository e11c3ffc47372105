"""Runs and weights in words, and how long the runs that are missing will take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from statistics import median

from .book import Book
from .run import Run

_NAMED = 6  # weights of a list, at most


def describe(run: Run, among: Iterable[Run]) -> str:
    """What tells a run from the others of its kind: "train rows, scale = 0.2, seed = 42".

    Args:
        run: one of ``among``.
        among: the runs of a study. What is the same in all of a kind is left out.
    """
    others = [dict(_entries(other.config)) for other in among if other.kind == run.kind]
    own = _entries(run.config)
    keys = {needed.key for needed in run.needs}
    telling = [
        _value(path[-1].replace("_", " "), value)
        for path, value in own
        if any(other.get(path, value) != value for other in others) and value not in keys
    ]
    return f"{run.kind} {', '.join(telling)}".rstrip()


def seconds_left(missing: Sequence[Run], book: Book) -> float | None:
    """An estimate from runs of the same kinds that are done; None where there are none."""
    spent: dict[str, list[float]] = {}
    for record in book:
        spent.setdefault(record["kind"], []).append(record["seconds"])
    if not all(run.kind in spent for run in missing):
        return None
    return sum(median(spent[run.kind]) for run in missing)


def duration(seconds: float) -> str:
    """Such as "40 s", "12 min" or "3.2 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _entries(config, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """Every single value of a configuration with the names that lead to it."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _entries(value, (*path, name))
        elif not isinstance(value, (list, tuple)):
            yield (*path, name), value


def _value(name: str, value: str | bool | int | float | None) -> str:
    if isinstance(value, str):  # says by itself what it is
        return value
    if value is None or isinstance(value, bool):
        return name if value else f"no {name}"
    return f"{name} = {value:,}" if isinstance(value, int) else f"{name} = {value:g}"


def place(entry: dict) -> tuple:
    """What tells the weight of a record from any other of the model."""
    return entry["module"], entry["expert"], entry["row"], entry["column"]


def label(entry: dict) -> str:
    """``layer 11 [507, 1229]``."""
    expert = "" if entry["expert"] is None else f" expert {entry['expert']}"
    return f"layer {entry['layer']}{expert} [{entry['row']}, {entry['column']}]"


def labels(entries: Sequence[dict]) -> str:
    """The first weights of a list, and how many more there are."""
    more = len(entries) - _NAMED
    return "; ".join(map(label, entries[:_NAMED])) + (f" and {more:,} more" if more > 0 else "")
