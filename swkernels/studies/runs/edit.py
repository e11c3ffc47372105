"""The model with chosen weights times a factor, 0 for instance; they are put back."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from swkernels.evidence.edits import Edits

from ..lab import Lab
from ..sets import weights_named


def edit(lab: Lab, config: dict, path: Path) -> dict:
    """Measure the model while some weights are other than they were.

    Args:
        config: ``set``, see ``sets.weights_named``, with ``seed`` where it is random and the
            ``factor`` of its weights; None measures the model as it is. ``tasks`` {part: how many
            questions or None}, ``tokens`` and ``window`` of the text, ``stop_words``.

    Returns:
        ``weights`` (``layer``, ``module``, ``expert``, ``row``, ``column``, ``value``), or None
        and nothing else where the model has no such set; ``perplexity`` (a ``Perplexity.to_dict``),
        ``choices`` by task, and ``stop_words`` (a ``StopWords.to_dict``) or None. Losses of an
        edited model may be infinite or NaN.
    """
    entries, edited, strict = [], nullcontext(), True
    if config["set"] is not None:
        weights = weights_named(lab, config["set"], config.get("seed"))
        if weights is None:
            return {"weights": None}
        edits = Edits(lab.model, weights)
        entries, edited, strict = edits.entries, edits.scaled(config["factor"]), False
    yardstick = lab.yardstick(
        tokens=config["tokens"], window=config["window"], tasks=config["tasks"],
        stop_words=config["stop_words"],
    )  # fmt: skip
    with edited:
        scores = yardstick.read(lab.model, strict=strict, progress=lab.progress)
    return {"weights": [entry.to_dict() for entry in entries]} | scores.to_dict()
