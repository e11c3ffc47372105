"""What transformers gets: models that are quantized while they are loaded, and peaks in its logs.

Importing this package registers the quantization method, so that ``from_pretrained`` knows the
files of quantized models.
"""

from __future__ import annotations

import importlib

from .config import SuperWeightQuantConfig
from .quantizer import SuperWeightQuantizer, register

register()

__all__ = ["SuperWeightQuantConfig", "SuperWeightQuantizer", "log_peaks"]


def __getattr__(name: str):
    if name != "log_peaks":  # which takes the Trainer, and all that it imports
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.peaks").log_peaks
