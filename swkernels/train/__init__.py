"""Train exactly the weights that you name, and measure what training changed.

Coordinates say which weights: ``Coordinates`` and its ways to choose them, ``catalogue`` for those
that were published. ``weight_change`` compares a model before and after training.
"""

from .coordinates import Coordinates, Site, down_projection_shapes
from .published import CatalogueEntry, catalogue
from .weight_change import WeightChange, weight_change

__all__ = [
    "CatalogueEntry",
    "Coordinates",
    "Site",
    "WeightChange",
    "catalogue",
    "down_projection_shapes",
    "weight_change",
]
