"""In how many texts each position of a down projection spikes."""

from __future__ import annotations

from pathlib import Path

from swkernels.detect.scan import scan
from swkernels.detect.state import ScanState

from ..lab import Lab


def consistency(lab: Lab, config: dict, path: Path) -> dict:
    """Scan the model on pieces of the text, without verifying what is found.

    Args:
        config: ``samples`` and ``length`` of the pieces.
        path: where its state is kept, without a suffix.

    Returns:
        ``samples``; ``positions``, each with the ``count`` and the ``share`` of the samples in
        which it spikes; ``tiers``, how many spike in at least a share of them; and ``settling``,
        the tiers after 1, 2, 5, 10, ... samples. See ``swkernels.detect.consistency``.
    """
    report = scan(
        lab.model, lab.data.text, tokenizer=lab.tokenizer, samples=config["samples"],
        length=config["length"], verify=False, progress=lab.progress,
        state=ScanState(path.with_suffix(".scan")),
    )  # fmt: skip
    return report.data["consistency"]
