"""The positions that spike in every text and are no super weights, zeroed."""

from __future__ import annotations

from pathlib import Path

from swkernels.evidence.ablate import ablate

from ..lab import Lab, NotInModel
from ..words import place


def spikes(lab: Lab, config: dict, path: Path) -> dict:
    """Measure the perplexity without each of these positions, and without all of them.

    Args:
        config: ``of``, the key of the ``consistency`` run; ``most``, how many of the positions are
            looked at, the first ones by layer; ``tokens`` and ``window`` of the text.

    Returns:
        ``positions``, how many there are; ``intact``, a ``Perplexity.to_dict``; ``each``, of every
        position that is looked at its ``weight``, as in ``edit``, and the ``perplexity`` without
        it; and ``together``, that without all of these, or None where there is no such position.
    """
    found, known = lab.figures(config["of"]), _super_weights(lab)
    listed = sorted(
        (entry["layer"], entry["module"], entry["expert"], entry["row"], entry["column"])
        for entry in found["positions"]
        if entry["count"] == found["samples"] and place(entry) not in known
    )
    yardstick = lab.yardstick(tokens=config["tokens"], window=config["window"])
    if not listed:
        intact = yardstick.read(lab.model, progress=lab.progress)
        return {"positions": 0, "intact": _perplexity(intact), "each": [], "together": None}
    chosen: dict = {}
    for _, module, expert, row, column in listed[: config["most"]]:
        chosen.setdefault((module, expert), []).append((row, column))
    ablated = ablate(
        lab.model, chosen, yardstick, conditions=("set", "each"), progress=lab.progress
    )
    (together,) = ablated.of_kind("set")
    each = ablated.of_kind("each") or [together]  # of one weight it is the same
    return {
        "positions": len(listed),
        "intact": _perplexity(ablated.intact.scores),
        "each": [
            {"weight": one.entries[0].to_dict(), "perplexity": _perplexity(one.scores)}
            for one in each
        ],
        "together": _perplexity(together.scores),
    }


def _super_weights(lab: Lab) -> set[tuple]:
    try:
        known = lab.super_weights
    except NotInModel:
        return set()
    return {
        (site.name, site.expert, row, column)
        for site, pairs in known.weights.items()
        for row, column in pairs.tolist()
    }


def _perplexity(scores) -> dict:
    return scores.to_dict()["perplexity"]
