"""Time variants against each other: interleaved, medians, one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def interleaved(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Run every variant once a round, ``rounds`` times, and return its median seconds.

    The order turns by one each round, so that none always runs after the same neighbour. One
    round of warm-up is not counted.
    """
    names = list(variants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(-1, rounds):
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            variants[name]()
            if round_ >= 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}
