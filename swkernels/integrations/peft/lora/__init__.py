"""LoRA with masks, and PEFT's own LoRA through the same operation."""

from __future__ import annotations

from .accelerate import AcceleratedLora, accelerate_lora
from .config import NAME, MaskedLoraConfig
from .model import MaskedLoraModel

__all__ = ["NAME", "AcceleratedLora", "MaskedLoraConfig", "MaskedLoraModel", "accelerate_lora"]
