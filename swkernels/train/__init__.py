"""Train exactly the weights that you name, and measure what training changed.

Coordinates say which weights: ``Coordinates`` and its ways to choose them, ``catalogue`` for those
that were published. ``sparse`` makes them, and nothing else of a model, trainable; ``freeze`` holds
them still while the rest trains; ``to_lora`` and ``to_checkpoint`` take the result elsewhere;
``weight_change`` compares a model before and after training.
"""

from .coordinates import Coordinates, Site, down_projection_shapes
from .export import to_checkpoint, to_lora
from .freeze import FreezeHandle, freeze
from .published import CatalogueEntry, catalogue
from .sparse import SparseHandle, sparse
from .weight_change import WeightChange, weight_change

__all__ = [
    "CatalogueEntry",
    "Coordinates",
    "FreezeHandle",
    "Site",
    "SparseHandle",
    "WeightChange",
    "catalogue",
    "down_projection_shapes",
    "freeze",
    "sparse",
    "to_checkpoint",
    "to_lora",
    "weight_change",
]
