"""Which function performs a run, by its kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .lab import Lab
from .runs.detect import detect
from .runs.evaluate import evaluate
from .runs.quantize import quantize
from .runs.training import train

Perform = Callable[[Lab, dict, Path], dict]

KINDS: dict[str, Perform] = {
    "detect": detect,
    "evaluate": evaluate,
    "quantize": quantize,
    "train": train,
}
