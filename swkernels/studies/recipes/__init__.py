"""The table of recipes, in the order of the page."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ..recipe import Recipe
from .amplification import AMPLIFICATION
from .consistency import CONSISTENCY
from .curvature import CURVATURE
from .direct import DIRECT
from .lora import LORA
from .lora_delta_freeze import LORA_DELTA_FREEZE
from .lora_down import LORA_DOWN
from .lora_mask import LORA_MASK
from .neighborhood import NEIGHBORHOOD
from .perturbation import PERTURBATION
from .pruning import PRUNING
from .quantization import QUANTIZATION
from .random_control import RANDOM_CONTROL
from .restore import RESTORE
from .scaling import SCALING
from .seeds import SEEDS
from .stop_words import STOP_WORDS
from .subspace import SUBSPACE
from .summary import SUMMARY
from .weight_change import WEIGHT_CHANGE

_ALL = (
    SUMMARY,  # first on the page; its runs are those of other studies
    CONSISTENCY, PRUNING, DIRECT, NEIGHBORHOOD, RANDOM_CONTROL, LORA, LORA_DOWN, LORA_MASK,
    LORA_DELTA_FREEZE, SEEDS, WEIGHT_CHANGE, AMPLIFICATION, CURVATURE, PERTURBATION, SUBSPACE,
    QUANTIZATION, SCALING, RESTORE, STOP_WORDS,
)  # fmt: skip
RECIPES: Mapping[str, Recipe] = MappingProxyType({recipe.name: recipe for recipe in _ALL})
