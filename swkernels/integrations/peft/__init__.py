"""What PEFT gets: sparse coordinates and masked LoRA as methods, and a faster LoRA.

``SparseCoordinateConfig`` and ``MaskedLoraConfig`` go into ``get_peft_model``; ``accelerate_lora``
speeds up a LoRA model that PEFT made. Importing this package registers the methods. It must be
imported before an adapter of sparse coordinates is loaded, for PEFT looks methods up by the name in
``adapter_config.json``.
"""

from __future__ import annotations

try:
    import peft  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "swkernels.integrations.peft needs PEFT: pip install 'swkernels[peft]'", name="peft"
    ) from error

from . import config, lora
from .config import SparseCoordinateConfig
from .layer import SparseCoordinateLayer
from .lora import AcceleratedLora, MaskedLoraConfig, MaskedLoraModel, accelerate_lora
from .model import SparseCoordinateModel
from .registry import register

register(config.NAME, SparseCoordinateConfig, SparseCoordinateModel, config.PREFIX)
register(lora.NAME, MaskedLoraConfig, MaskedLoraModel, MaskedLoraModel.prefix)

__all__ = [
    "AcceleratedLora",
    "MaskedLoraConfig",
    "MaskedLoraModel",
    "SparseCoordinateConfig",
    "SparseCoordinateLayer",
    "SparseCoordinateModel",
    "accelerate_lora",
]
