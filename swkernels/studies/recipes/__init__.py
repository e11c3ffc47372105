"""The table of recipes, in the order of the page."""

from __future__ import annotations

from ..recipe import Recipe
from .direct import DIRECT
from .neighborhood import NEIGHBORHOOD
from .random_control import RANDOM_CONTROL

_ALL = (DIRECT, NEIGHBORHOOD, RANDOM_CONTROL)
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _ALL}
