"""Quantize whole models without losing their super weights."""

from .config import QuantConfig
from .model import quantize
from .report import LayerReport, QuantReport

__all__ = ["LayerReport", "QuantConfig", "QuantReport", "quantize"]
