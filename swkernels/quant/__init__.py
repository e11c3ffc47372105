"""Quantize whole models without losing their super weights."""

from .config import QuantConfig
from .model import quantize
from .report import LayerReport, QuantReport
from .simulate import simulated_activations, simulated_weights, super_channels_of

__all__ = [
    "LayerReport",
    "QuantConfig",
    "QuantReport",
    "quantize",
    "simulated_activations",
    "simulated_weights",
    "super_channels_of",
]
