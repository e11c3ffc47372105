"""The super weights of the model, as ``swkernels scan`` finds and verifies them."""

from __future__ import annotations

from pathlib import Path

from swkernels.detect.scan import scan

from ..lab import Lab


def detect(lab: Lab, config: dict, path: Path) -> dict:
    """Scan the model on the text.

    Args:
        config: ``samples`` and ``length`` of the texts.

    Returns:
        ``super_weights``: ``module``, ``expert``, ``layer``, ``row``, ``column``, ``weight`` and
        ``verdict`` of each; None where they were given, and nothing is scanned.
    """
    if lab.given is not None:
        return {"super_weights": None}
    report = scan(
        lab.model, lab.data.text, tokenizer=lab.tokenizer, samples=config["samples"],
        length=config["length"], progress=lab.progress,
    )  # fmt: skip
    keys = ("module", "expert", "layer", "row", "column", "weight", "verdict")
    return {"super_weights": [{key: c[key] for key in keys} for c in report.super_weights]}
