"""Where the largest weights of the model are, and where its super weights stand among them."""

from __future__ import annotations

from pathlib import Path

import torch

from swkernels.evidence import rank as ranking
from swkernels.evidence.edits import Edits

from ..lab import Lab

SHOWN = 10  # of the largest


def rank(lab: Lab, config: dict, path: Path) -> dict:
    """Rank all projections of the model by magnitude, and its down projections alone.

    Args:
        config: ``k``, how many of the largest are looked at.

    Returns:
        ``shares`` of each kind of projection among the n largest, ``sizes`` (how many entries each
        kind has), ``largest`` (the first ten), and ``super_weights``: the ``value`` of each, its
        ``rank`` among all projections and its ``rank_down`` among down projections, from 1; None
        beyond the k largest.
    """
    every = ranking.rank(lab.model, config["k"], cache=False, progress=lab.progress)
    down = ranking.rank(lab.model, config["k"], modules="down", cache=False, progress=lab.progress)
    entries = Edits(lab.model, lab.super_weights).entries
    return {
        "shares": every.shares(),
        "sizes": {kind: entries for kind, (_, entries) in every.sizes.items()},
        "largest": every.rows(SHOWN),
        "super_weights": [
            entry.to_dict()
            | {
                "rank": _place(every.value, entry.value),
                "rank_down": _place(down.value, entry.value),
            }
            for entry in entries
        ],
    }


def _place(largest: torch.Tensor, value: float) -> int | None:
    """The rank of a value among the largest by magnitude; equal ones share the first's."""
    larger = int((largest.abs() > abs(value)).sum())
    return larger + 1 if larger < len(largest) else None
