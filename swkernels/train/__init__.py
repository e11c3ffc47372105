"""Train exactly the weights that you name, and measure what training changed.

Coordinates say which weights: ``Coordinates`` and its ways to choose them, ``catalogue`` for those
that were published. ``sparse`` makes them, and nothing else of a model, trainable; ``freeze`` holds
them still while the rest trains; ``lora_mask_report`` counts what a masked LoRA touches and
``delta_top`` finds where a trained one changes most; ``to_lora`` and ``to_checkpoint`` take the
result elsewhere; ``weight_change`` compares a model before and after training.
"""

from .coordinates import Coordinates, Site, down_projection_shapes
from .delta_top import DeltaTop, delta_top
from .export import to_checkpoint, to_lora
from .freeze import FreezeHandle, freeze
from .lora_masks import LoraMaskReport, lora_mask_report
from .published import CatalogueEntry, catalogue
from .sparse import SparseHandle, sparse
from .weight_change import WeightChange, weight_change

__all__ = [
    "CatalogueEntry",
    "Coordinates",
    "DeltaTop",
    "FreezeHandle",
    "LoraMaskReport",
    "Site",
    "SparseHandle",
    "WeightChange",
    "catalogue",
    "delta_top",
    "down_projection_shapes",
    "freeze",
    "lora_mask_report",
    "sparse",
    "to_checkpoint",
    "to_lora",
    "weight_change",
]
