"""What transformers gets: models quantized while they are loaded, peaks in its logs, a guard.

Importing this package registers the quantization method, so that ``from_pretrained`` knows the
files of quantized models.
"""

from __future__ import annotations

import importlib

from .config import SuperWeightQuantConfig
from .quantizer import SuperWeightQuantizer, register

register()

__all__ = ["SuperWeightGuard", "SuperWeightQuantConfig", "SuperWeightQuantizer", "log_peaks"]

_NEEDS_TRAINER = {"log_peaks": "peaks", "SuperWeightGuard": "guard"}


def __getattr__(name: str):
    if name not in _NEEDS_TRAINER:  # those take the Trainer, and all that it imports
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_NEEDS_TRAINER[name]}"), name)
