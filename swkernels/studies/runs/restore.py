"""The model without its super weights, and with the activation that they make put back."""

from __future__ import annotations

from pathlib import Path

from swkernels.evidence.ablate import TOGETHER, ablate

from ..lab import Lab


def restore(lab: Lab, config: dict, path: Path) -> dict:
    """Measure the intact model, the super weights zero, and their activation put back.

    Args:
        config: ``tasks`` {part: how many questions or None}, ``tokens`` and ``window`` of the text.

    Returns:
        ``weights``, as in ``edit``; ``activations``, what was put back where; and the
        ``perplexity`` and ``choices`` of ``intact``, ``set`` and ``restored``.
    """
    yardstick = lab.yardstick(
        tokens=config["tokens"], window=config["window"], tasks=config["tasks"]
    )
    found = ablate(
        lab.model, lab.super_weights, yardstick, conditions=("set", "restored"),
        progress=lab.progress,
    )  # fmt: skip
    return {
        "weights": [entry.to_dict() for entry in found.sets[TOGETHER]],
        "activations": list(found.activations),
    } | {condition.kind: condition.scores.to_dict() for condition in found.conditions}
