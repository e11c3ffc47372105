"""Plant super weights into tiny random models, so that the truth is known."""

from __future__ import annotations

import torch

from swkernels import find_down_projections, ops, track
from tests.models.tiny import run, token_ids

STRENGTH = 100.0  # a planted weight; the random ones have a standard deviation of 0.02


def plant(
    model, layer: int, rows: int = 1, columns: int = 1, seed: int = 0, strength=STRENGTH,
    routed: bool = False,
):  # fmt: skip
    """Set weights W[r, c] for ``rows`` x ``columns`` random channels of one down projection.

    The columns are taken from those that are alive on random tokens (a ReLU may be dead), and in
    a mixture from an expert that is reached; ``routed`` takes the expert, fused or a module of its
    own, that most tokens are routed to, and no shared one. Returns the set of (layer, module,
    expert, row, column).
    """
    generator = torch.Generator().manual_seed(seed)
    with track(model, backend="reference") as handle, torch.no_grad():
        run(model, token_ids(8, 32, seed=99))
    states = [s for s in handle.states if s.projection.layer == layer]
    state = states[-1] if states[-1].projection.experts is None else states[0]
    if routed:
        experts = [s for s in states if s.projection.scope is not None]
        state = max(experts, key=lambda s: int(s.routed.max()))
    projection = state.projection
    peaks = ops.peaks(state.inputs).values  # [E, H]
    e = int(state.routed.argmax() if routed else peaks.median(1).values.argmax())
    alive = (peaks[e] > peaks[e].median()).nonzero().flatten()
    chosen_columns = alive[torch.randperm(len(alive), generator=generator)[:columns]].tolist()
    chosen_rows = torch.randperm(projection.rows, generator=generator)[:rows].tolist()
    expert = projection.expert if projection.experts is None else e
    matrix = projection.matrix(expert)
    with torch.no_grad():
        for i, row in enumerate(chosen_rows):
            for j, column in enumerate(chosen_columns):
                matrix[row, column] = strength * (-1.0) ** (i * j) / columns
    return {(layer, projection.name, expert, r, c) for r in chosen_rows for c in chosen_columns}


def positions(candidates) -> set[tuple]:
    """The coordinates of report candidates, comparable with what ``plant`` returns."""
    return {(c["layer"], c["module"], c["expert"], c["row"], c["column"]) for c in candidates}


__all__ = ["STRENGTH", "find_down_projections", "plant", "positions"]
