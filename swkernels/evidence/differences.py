"""The loss of one input with single weights moved where they lie, and what rounding does to it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from swkernels.detect.samples import Runner
from swkernels.errors import InvalidInput

from .derivatives import loss_of
from .edits import Edits, Entry

# Shifts that show the rounding of the loss. In a float64 model too: many norms are in float32.
_TINY, _UNIT = (1, -1, 2, -2), 16 * torch.finfo(torch.float32).eps


def true_steps(entries: Sequence[Entry], step: float) -> torch.Tensor:
    """By how much each entry really moves, float64 [Q]."""
    moved = [_moved(entry, step).double().item() - entry.value for entry in entries]
    for entry, by in zip(entries, moved):
        if by * step <= 0:
            raise InvalidInput(
                f"{entry.label} is {entry.value:.6g}, which a step of {abs(step):g} does not "
                "change in its dtype: give a larger eps"
            )
    return torch.tensor(moved, dtype=torch.float64)


def _moved(entry: Entry, step: float) -> torch.Tensor:
    """The value beside an entry's, rounded to its dtype."""
    return torch.tensor(entry.value + step, dtype=entry.weight.matrix().dtype)


@contextmanager
def _shifted(edits: Edits, entry: Entry, step: float) -> Iterator[None]:
    """A context in which an entry is moved by a step; put back bit for bit."""
    with edits.scaled(1.0, [entry]):  # which leaves it as it is
        with torch.no_grad():
            matrix = entry.weight.matrix()
            matrix[entry.row, entry.column] = _moved(entry, step).to(matrix.device)
        yield


def differences(runner: Runner, ids, edits: Edits, entries, eps: float):
    """The losses of one input with each entry moved up, and down."""
    both = []
    for step in (eps, -eps):
        both.append([])
        for entry in entries:
            with _shifted(edits, entry, step):
                both[-1].append(loss_of(runner, ids, None).item())
    return both


def rounding(runner: Runner, ids, edits: Edits, entries, loss: float, first, second, number: int):
    """Standard deviation of the rounding of L(w), in nats.

    Some entries, one after the other, are moved by so little that L changes by its derivatives
    (``first`` and ``second``, of each entry) alone, and beyond that by how the forward happens to
    round. At least the rounding of L itself, whose error is even: last place / sqrt(12).
    """
    left = [0.0]  # the loss without what the derivatives explain, from L(w) on
    for turn, times in enumerate(_TINY):
        which = turn * len(entries) // len(_TINY)
        entry = entries[which]
        step = times * _UNIT * max(abs(entry.value), 1)
        with _shifted(edits, entry, step):
            shifted = loss_of(runner, ids, number).item()
        by = _moved(entry, step).double().item() - entry.value
        left.append(shifted - loss - first[which] * by - second[which] * by**2 / 2)
    seen = statistics.stdev(left)
    kept = torch.tensor(loss, dtype=entries[0].weight.matrix().dtype)
    last_place = (torch.nextafter(kept, torch.full_like(kept, math.inf)) - kept).item()
    return max(seen, last_place / math.sqrt(12))
