"""Which function performs a run, by its kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .lab import Lab
from .runs.analyze import amplify, bend
from .runs.consistency import consistency
from .runs.detect import detect
from .runs.edit import edit
from .runs.evaluate import evaluate
from .runs.quantize import quantize
from .runs.rank import rank
from .runs.restore import restore
from .runs.spikes import spikes
from .runs.subspace import subspace
from .runs.training import train

Perform = Callable[[Lab, dict, Path], dict]

KINDS: dict[str, Perform] = {
    "amplify": amplify,
    "bend": bend,
    "consistency": consistency,
    "detect": detect,
    "edit": edit,
    "evaluate": evaluate,
    "quantize": quantize,
    "rank": rank,
    "restore": restore,
    "spikes": spikes,
    "subspace": subspace,
    "train": train,
}
